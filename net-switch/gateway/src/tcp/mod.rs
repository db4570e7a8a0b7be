//! Connections: one ends at the guest, one at the host, and bytes go between the two.

mod relay;
mod stack;
mod table;

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use super::icmp::Reason;
use super::route::Target;
use super::wire::{ETHERNET, Envelope, Mac, Packet, protocol};
use super::{Inner, Protocol};
use stack::{Buffers, Stack};
pub(super) use table::Connections;
use table::{Entry, Key};

/// How long the host may try to connect: what BSD systems wait. Meanwhile the guest gets no answer and retries for as
/// long as it likes.
const CONNECT_TIMEOUT: Duration =
    if cfg!(test) { Duration::from_secs(8) } else { Duration::from_secs(75) };
/// How long a guest is waited for beyond the time after which it should have repeated its wish to
/// connect.
const LATE: Duration = Duration::from_secs(2);
/// How long a guest waits before it repeats its wish for the first time.
const FIRST_WAIT: Duration = Duration::from_secs(3);

/// What decides about a segment of the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    key: Key,
    control: TcpControl,
    sequence: TcpSeqNumber,
    acknowledges: Option<TcpSeqNumber>,
    /// Bytes of the sequence space that it takes up.
    length: usize,
}

impl Segment {
    /// Takes a segment apart; `None` if it is malformed.
    pub fn parse(packet: &Packet<'_>) -> Option<Self> {
        let segment = TcpPacket::new_checked(packet.payload).ok()?;
        let (from, to) = (segment.src_port(), segment.dst_port());
        if from == 0 || to == 0 || packet.source.is_unspecified() {
            return None;
        }
        let control = match (segment.syn(), segment.fin(), segment.rst()) {
            (false, false, false) => TcpControl::None,
            (true, false, false) => TcpControl::Syn,
            (false, true, false) => TcpControl::Fin,
            (false, _, true) => TcpControl::Rst,
            (true, _, _) => return None,
        };
        Some(Self {
            key: Key {
                guest: SocketAddr::new(packet.source, from),
                remote: SocketAddr::new(packet.destination, to),
            },
            control,
            sequence: segment.seq_number(),
            acknowledges: segment.ack().then(|| segment.ack_number()),
            length: segment.segment_len(),
        })
    }

    /// Whether the guest begins a connection with it.
    fn begins(&self) -> bool {
        self.control == TcpControl::Syn && self.acknowledges.is_none()
    }
}

impl Inner {
    /// Takes a segment, and the frame it came in.
    pub(super) fn tcp(self: &Arc<Self>, from: Mac, segment: Segment, frame: Vec<u8>) {
        if let Some(connection) = self.connections.find(&segment.key) {
            let another = segment.begins() && connection.is_another(segment.sequence);
            let given_up = segment.control == TcpControl::Rst && connection.waits();
            if !another && !given_up {
                connection.inbox.push(frame);
                return;
            }
            // The guest has forgotten the old one, as after a reboot, or wants it no more.
            self.connections.remove(&connection);
            connection.inbox.close();
        }
        if segment.begins() {
            self.begin(from, segment, frame);
        } else if segment.control != TcpControl::Rst {
            self.reset(&segment, from);
        }
    }

    fn begin(self: &Arc<Self>, from: Mac, segment: Segment, frame: Vec<u8>) {
        let addresses = match self.target(Some(Protocol::Tcp), segment.key.remote) {
            Target::Host(address) => vec![address],
            Target::Dns => self.resolvers(),
            Target::Unreachable(Reason::Port) => Vec::new(),
            Target::Unreachable(reason) => {
                return self.unreachable(&frame[ETHERNET..], reason, from);
            }
            Target::Nowhere => return,
        };
        if addresses.is_empty() {
            return self.reset(&segment, from);
        }
        // When there are too many the guest hears nothing, and tries again later.
        let Some(entry) = self.connections.enter(segment.key, Some(segment.sequence)) else {
            return;
        };
        let inner = Arc::clone(self);
        self.runtime.spawn(async move {
            tokio::select! {
                connected = timeout(CONNECT_TIMEOUT, connect(&addresses)) => match connected {
                    Ok(Ok(stream)) => inner.accept(entry, from, &frame, stream).await,
                    Ok(Err(error)) => {
                        drop(entry);
                        inner.decline(&segment, &frame, from, &error);
                    }
                    Err(_) => {}
                },
                () = given_up(&entry) => {}
            }
        });
    }

    /// Accepts the guest's connection, now that there is one on the host's side.
    async fn accept(self: &Arc<Self>, entry: Entry, mac: Mac, syn: &[u8], stream: TcpStream) {
        // What came meanwhile was the same again.
        entry.inbox.clear();
        entry.accept();
        let Some(mut buffers) = buffers(&entry, &stream) else { return };
        let stack = Stack::accept(Arc::clone(self), entry.key, &mut buffers, mac, syn);
        relay::relay(entry, stack, stream).await;
    }

    /// Says why there is no connection on the host's side.
    fn decline(&self, segment: &Segment, frame: &[u8], mac: Mac, error: &io::Error) {
        match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => self.reset(segment, mac),
            ErrorKind::TimedOut => {}
            _ => {
                tracing::debug!(remote = %segment.key.remote, %error, "cannot connect");
                self.unreachable(&frame[ETHERNET..], Reason::Host, mac);
            }
        }
    }

    /// Connects to the guest for who has connected to a forwarded port.
    pub(super) fn connect_guest(
        self: &Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        guest: SocketAddr,
    ) {
        let Some(entry) = self.connections.enter_from_host(peer.port(), guest) else {
            tracing::warn!(%guest, "too many connections, one more is refused");
            relay::reset(&stream);
            return;
        };
        let mac = self.link.neighbour(guest.ip());
        let inner = Arc::clone(self);
        self.runtime.spawn(async move {
            let Some(mut buffers) = buffers(&entry, &stream) else { return };
            let stack = Stack::connect(inner, entry.key, &mut buffers, mac);
            relay::relay(entry, stack, stream).await;
        });
    }

    /// Tells the guest that there is no such connection (RFC 9293, 3.5.2).
    fn reset(&self, segment: &Segment, mac: Mac) {
        let Key { guest, remote } = segment.key;
        let acknowledges = segment.sequence + segment.length;
        let (seq_number, ack_number) = match segment.acknowledges {
            Some(number) => (number, None),
            None => (TcpSeqNumber(0), Some(acknowledges)),
        };
        let reset = TcpRepr {
            src_port: remote.port(),
            dst_port: guest.port(),
            control: TcpControl::Rst,
            seq_number,
            ack_number,
            window_len: 0,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let mut payload = vec![0; reset.buffer_len()];
        reset.emit(
            &mut TcpPacket::new_unchecked(&mut payload[..]),
            &remote.ip().into(),
            &guest.ip().into(),
            &ChecksumCapabilities::default(),
        );
        let envelope = Envelope::new(remote.ip(), guest.ip(), protocol::TCP);
        self.link.send(mac, &envelope, &payload);
    }
}

/// The connection's buffers; without memory for them the host's side is reset.
fn buffers(entry: &Entry, stream: &TcpStream) -> Option<Buffers> {
    let buffers = Buffers::new(entry.buffer);
    if let Err(error) = &buffers {
        tracing::warn!(guest = %entry.key.guest, %error, "no memory for a connection");
        relay::reset(stream);
    }
    buffers.ok()
}

/// Waits until the guest gives up on an unanswered connection: it closed it, or stopped repeating its SYN. A guest
/// that gives up sends nothing.
async fn given_up(entry: &Entry) {
    let began = Instant::now();
    let mut last = began;
    loop {
        match timeout_at(next_attempt(began, last) + LATE, entry.inbox.changed()).await {
            Err(_) => return,
            Ok(()) => match entry.inbox.take() {
                None => return,
                Some(_) => last = Instant::now(),
            },
        }
    }
}

/// When a guest that has said last at `last` that it wants to connect says so again at the latest:
/// each wait is at most twice the one before (RFC 6298, 5.5), so that all together are at most
/// doubled, and the first is at most 3 s (RFC 1122, 4.2.3.1).
fn next_attempt(began: Instant, last: Instant) -> Instant {
    last + last.duration_since(began) + FIRST_WAIT
}

/// Connects to the first address that takes a connection.
async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut last = io::Error::from(ErrorKind::ConnectionRefused);
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}
