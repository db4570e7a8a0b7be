//! Frames on their way out to a plug.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, send};

use super::stream::PREFIX;
use super::{MTU, QUEUE};
use crate::backlog::{Backlog, OwnedFrame};
use crate::lock;
use crate::offload::{Offloads, without_offloads};
use crate::port::{Delivery, Frame, Header, MIN_FRAME, Receiver};

/// The longest frame for a plug: with two 802.1Q tags.
const MAX_OUT: usize = MIN_FRAME + 2 * 4 + MTU;

/// How a plug's frames are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// Each is a datagram.
    Datagrams,
    /// Each follows its length.
    Stream,
}

/// Sends frames to a plug: at once, or, if it has no room, when it has. It is never waited for.
#[derive(Debug)]
pub(super) struct Outlet {
    socket: OwnedFd,
    framing: Framing,
    waiting: Mutex<Waiting>,
    dropped: AtomicU64,
    broken: AtomicBool,
    /// Wakes who watches the sockets.
    waker: Arc<EventFd>,
}

#[derive(Debug)]
struct Waiting {
    frames: Backlog,
    /// How much of the first has been sent.
    sent: usize,
}

/// What became of a frame.
enum Sent {
    Whole,
    /// There is no room for what comes from this byte on.
    Until(usize),
    /// The plug cannot be reached.
    No,
}

impl Outlet {
    pub(super) fn new(socket: OwnedFd, framing: Framing, waker: Arc<EventFd>) -> Self {
        let waiting = Waiting { frames: Backlog::new(QUEUE, QUEUE * (PREFIX + MAX_OUT)), sent: 0 };
        Self {
            socket,
            framing,
            waiting: Mutex::new(waiting),
            dropped: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            waker,
        }
    }

    pub(super) fn raw(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Whether frames wait for room.
    pub(super) fn is_waiting(&self) -> bool {
        !lock(&self.waiting).frames.is_empty()
    }

    /// Whether the plug cannot be reached any more.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Frames that the plug did not get.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Sends waiting frames while there is room.
    pub(super) fn drain(&self) {
        let mut waiting = lock(&self.waiting);
        while let Some(frame) = waiting.frames.front() {
            match self.try_send(&frame.data, waiting.sent) {
                Sent::Until(sent) => {
                    waiting.sent = sent;
                    break;
                }
                Sent::Whole => {}
                Sent::No => self.drop_frames(1),
            }
            waiting.sent = 0;
            waiting.frames.pop();
        }
    }

    fn push(&self, waiting: &mut Waiting, mut data: Vec<u8>) -> Delivery {
        if data.len() > MAX_OUT {
            return Delivery::Dropped;
        }
        if self.framing == Framing::Stream {
            let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
            data.splice(..0, length.to_be_bytes());
        }
        if waiting.frames.is_empty() {
            match self.try_send(&data, 0) {
                Sent::Whole => return Delivery::Taken,
                Sent::Until(sent) => waiting.sent = sent,
                Sent::No => return Delivery::Dropped,
            }
            // The thread that watches the sockets must watch for room from now on. If this fails it is awake already.
            let _ = self.waker.write(1);
        }
        waiting.frames.push_owned(OwnedFrame { header: Header::default(), data })
    }

    fn try_send(&self, data: &[u8], mut sent: usize) -> Sent {
        loop {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.raw(), &data[sent..], flags) {
                Ok(more) if self.framing == Framing::Datagrams || sent + more == data.len() => {
                    return Sent::Whole;
                }
                Ok(more) => sent += more,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Sent::Until(sent),
                // This frame only.
                Err(Errno::EMSGSIZE | Errno::ENOBUFS | Errno::ENOMEM)
                    if self.framing == Framing::Datagrams =>
                {
                    return Sent::No;
                }
                Err(_) => {
                    if !self.broken.swap(true, Ordering::AcqRel) {
                        let _ = self.waker.write(1);
                    }
                    return Sent::No;
                }
            }
        }
    }

    fn drop_frames(&self, count: usize) {
        self.dropped.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl AsFd for Outlet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Receiver for Outlet {
    /// `Taken` if the plug got or will get all that the frame was cut into.
    fn receive(&self, frame: &Frame<'_>) -> Delivery {
        let too_long = frame.header.gso_type == Header::GSO_NONE && frame.total_len() > MAX_OUT;
        let segments = match without_offloads(frame, Offloads::default()) {
            Ok(segments) if !too_long && !self.is_broken() => segments,
            _ => {
                self.drop_frames(1);
                return Delivery::Dropped;
            }
        };
        let mut waiting = lock(&self.waiting);
        // A plug that does not read costs no more than this.
        if waiting.frames.len() >= QUEUE {
            self.drop_frames(segments.len());
            return Delivery::Dropped;
        }
        let pushed = segments.map(|segment| self.push(&mut waiting, segment.data));
        let dropped = pushed.filter(|done| *done == Delivery::Dropped).count();
        self.drop_frames(dropped);
        if dropped == 0 { Delivery::Taken } else { Delivery::Dropped }
    }

    /// These protocols have no word for it.
    fn link_changed(&self, _up: bool) {}
}
