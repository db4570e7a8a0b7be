//! Carries bytes between the guest's connection and the host's.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::pin::pin;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use super::stack::{Phase, Stack};
use super::table::Entry;

/// The timer's resolution.
const LEAST_DELAY: Duration = Duration::from_millis(1);

/// The host's side of a connection.
struct Host {
    stream: TcpStream,
    /// The peer sends no more.
    ended: bool,
    /// The guest's end of data was passed on to the peer.
    end_sent: bool,
}

/// Serves a connection until it ends.
pub(super) async fn relay(mut entry: Entry, mut stack: Stack<'_>, stream: TcpStream) {
    // Small pieces are sent at once; the guest's own stack has delayed them enough.
    let _ = stream.set_nodelay(true);
    let mut host = Host { stream, ended: false, end_sent: false };
    let mut timer = pin!(sleep_until(Instant::now()));
    while let Some(frames) = entry.inbox.take() {
        frames.into_iter().for_each(|frame| stack.input(frame));
        if host.exchange(&mut stack).is_err() {
            stack.abort();
        }
        // After what is passed on, so that the window is as wide as it can be.
        stack.output();
        match stack.phase() {
            Phase::HalfOpen => {}
            Phase::Open => {
                entry.established();
                stack.established();
            }
            Phase::Ended if host.ended && host.end_sent => return,
            Phase::Ended => break,
        }
        let delay = stack.delay();
        if let Some(delay) = delay {
            timer.as_mut().reset(Instant::now() + delay.max(LEAST_DELAY));
        }
        let interest = host.interest(&stack);
        tokio::select! {
            () = entry.inbox.changed() => {}
            _ = host.stream.ready(interest.unwrap_or(Interest::READABLE)), if interest.is_some() => {}
            () = &mut timer, if delay.is_some() => {}
        }
    }
    reset(&host.stream);
}

/// Makes the end of `stream` a failure to its peer.
pub(super) fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}

impl Host {
    /// What has to happen on the host's side before bytes can move.
    fn interest(&self, stack: &Stack<'_>) -> Option<Interest> {
        let reads = (!self.ended && stack.has_room()).then_some(Interest::READABLE);
        let writes = stack.has_bytes().then_some(Interest::WRITABLE);
        match (reads, writes) {
            (Some(reads), Some(writes)) => Some(reads | writes),
            (one, other) => one.or(other),
        }
    }

    /// Moves what can be moved.
    fn exchange(&mut self, stack: &mut Stack<'_>) -> io::Result<()> {
        while stack.has_bytes() {
            let written = stack.take_bytes(|bytes| self.stream.try_write(bytes));
            match written {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if stack.guest_has_ended() && !self.end_sent {
            self.end_sent = true;
            // Fails if the peer is gone already, which reading tells as well.
            let _ = SockRef::from(&self.stream).shutdown(Shutdown::Write);
        }
        while !self.ended && stack.has_room() {
            let read = stack.give_bytes(|room| self.stream.try_read(room));
            match read {
                Ok(0) => {
                    self.ended = true;
                    stack.end();
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
