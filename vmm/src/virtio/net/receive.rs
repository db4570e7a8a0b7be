//! From the network into the guest's receive queue, on the sender's thread.
//!
//! The ring has a lock of its own, the last in any order: who holds it calls neither the transport
//! nor the network, so two guests that send to each other cannot wait for each other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use firn_net_switch::{
    Backlog, Delivery, Frame, MAX_FRAME, Offloads, OwnedFrame, Receiver, without_offloads,
};
use vm_memory::VolatileSlice;

use super::header;
use crate::memory::MemoryMap;
use crate::virtio::Interrupt;
use crate::virtio::queue::{GuestSlice, Position, QueueError, VirtQueue, writable};
use crate::virtio::turn::Again;

/// Frames that wait while the guest has no buffers: [`BACKLOG_BYTES`] of Ethernet's longest.
const BACKLOG_FRAMES: usize = 5_632;
/// The bytes they may have: more than the largest window that Linux gives a TCP connection (6 MiB,
/// `tcp_rmem`), so that a receiver slower than its sender holds it up and loses nothing.
const BACKLOG_BYTES: usize = 8 << 20;
/// Limit on the chains that one frame is spread over: enough for the longest in buffers of 512 bytes, when Linux
/// gives no less than 1,500. It bounds what a hostile receiver costs the sender's thread.
const MAX_CHAINS: u16 = 128;
/// Limit on the descriptors read of a chain, for the same reason. Linux uses 19 at most.
const MAX_DESCRIPTORS: usize = 64;

/// What the network holds of an active card.
pub(super) struct Card {
    ring: Mutex<Ring>,
    interrupt: Option<Arc<dyn Interrupt>>,
    again: Arc<Again>,
}

struct Ring {
    queue: VirtQueue,
    /// What the guest takes upon itself.
    offloads: Offloads,
    /// Frames may be spread over several chains (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    backlog: Backlog,
    paused: bool,
    /// Found on a sender's thread, for the device's own to report.
    error: Option<QueueError>,
}

impl Card {
    /// A card that receives into `queue`, and reports link changes through `interrupt` if the guest supports that. It
    /// rings `again` when the queue turns out to be broken.
    pub fn new(
        queue: VirtQueue,
        offloads: Offloads,
        mergeable: bool,
        interrupt: Option<Arc<dyn Interrupt>>,
        again: Arc<Again>,
    ) -> Card {
        let backlog = Backlog::new(BACKLOG_FRAMES, BACKLOG_BYTES);
        let ring = Ring { queue, offloads, mergeable, backlog, paused: false, error: None };
        Card { ring: Mutex::new(ring), interrupt, again }
    }

    /// Goes on after a pause, and gives the guest what has waited for buffers.
    pub fn resume(&self) -> Result<(), QueueError> {
        let mut ring = self.ring();
        ring.paused = false;
        match ring.error.take() {
            Some(error) => Err(error),
            None => ring.drain(),
        }
    }

    /// Leaves queue and memory alone until [`Card::resume`]. Frames wait meanwhile.
    pub fn pause(&self) {
        self.ring().paused = true;
    }

    /// The frames that wait for buffers, oldest first.
    pub fn waiting(&self) -> Vec<OwnedFrame> {
        self.ring().backlog.iter().cloned().collect()
    }

    /// Makes the card one that is paused and has these frames waiting. What [`Card::receive`] would not take is dropped.
    pub fn put_back(&self, frames: impl Iterator<Item = OwnedFrame>) {
        self.pause();
        for mut frame in frames {
            frame.lend(|frame| self.receive(frame));
        }
    }

    /// How far the queue has come.
    pub fn position(&self) -> Position {
        self.ring().queue.position()
    }

    /// A panic under the lock leaves at worst a frame half delivered.
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Receiver for Card {
    fn receive(&self, frame: &Frame<'_>) -> Delivery {
        let mut ring = self.ring();
        if ring.error.is_some() || frame.total_len() > MAX_FRAME {
            return Delivery::Dropped;
        }
        ring.receive(frame).unwrap_or_else(|error| {
            ring.error = Some(error);
            self.again.ring();
            Delivery::Dropped
        })
    }

    fn link_changed(&self, _up: bool) {
        // The guest reads the new state from the configuration space.
        if let Some(interrupt) = &self.interrupt {
            interrupt.config();
        }
    }
}

/// Why a frame is not placed.
enum Refusal {
    /// Not before the guest gives more buffers.
    NoRoom,
    /// Not in this ring, ever.
    TooLong,
}

impl Ring {
    /// Takes a frame from the network.
    fn receive(&mut self, frame: &Frame<'_>) -> Result<Delivery, QueueError> {
        let delivery = if self.offloads.cover(&frame.header) {
            self.place_or_keep(frame)?
        } else {
            let Ok(segments) = without_offloads(frame, self.offloads) else {
                return Ok(Delivery::Dropped);
            };
            let mut delivery = Delivery::Dropped;
            for mut segment in segments {
                delivery = segment.lend(|segment| self.place_or_keep(segment))?;
            }
            delivery
        };
        if !self.paused {
            self.queue.signal()?;
        }
        Ok(delivery)
    }

    /// Delivers a frame after all earlier ones.
    fn place_or_keep(&mut self, frame: &Frame<'_>) -> Result<Delivery, QueueError> {
        if self.paused || !self.backlog.is_empty() {
            return Ok(self.backlog.push(frame));
        }
        let memory = Arc::clone(self.queue.memory());
        match Room::reserve(&mut self.queue, &memory, self.mergeable, frame.total_len())? {
            Ok(room) => room.fill(&mut self.queue, frame).map(|()| Delivery::Taken),
            Err(Refusal::NoRoom) => Ok(self.backlog.push(frame)),
            Err(Refusal::TooLong) => Ok(Delivery::Dropped),
        }
    }

    /// Delivers waiting frames while there is room.
    fn drain(&mut self) -> Result<(), QueueError> {
        let memory = Arc::clone(self.queue.memory());
        while let Some(length) = self.backlog.front().map(|frame| frame.data.len()) {
            let room = Room::reserve(&mut self.queue, &memory, self.mergeable, length)?;
            if let Err(Refusal::NoRoom) = room {
                break;
            }
            let frame = self.backlog.pop();
            if let (Ok(room), Some(mut frame)) = (room, frame) {
                frame.lend(|frame| room.fill(&mut self.queue, frame))?;
            }
        }
        self.queue.signal()
    }
}

/// Chains taken from the ring for one frame.
#[derive(Default)]
struct Room<'a> {
    /// Head and capacity of each.
    chains: Vec<(u16, usize)>,
    /// Their buffers, in order.
    buffers: Vec<GuestSlice<'a>>,
    /// Their capacity together.
    bytes: usize,
}

impl<'a> Room<'a> {
    /// Takes chains for a frame of `length` bytes and its header. A refusal leaves them all in the
    /// ring.
    fn reserve(
        queue: &mut VirtQueue,
        memory: &'a MemoryMap,
        mergeable: bool,
        length: usize,
    ) -> Result<Result<Room<'a>, Refusal>, QueueError> {
        let need = header::LEN + length;
        let most = if mergeable { queue.size().min(MAX_CHAINS) } else { 1 };
        let mut room = Room::default();
        let refusal = loop {
            if room.bytes >= need {
                return Ok(Ok(room));
            }
            if room.chains.len() >= usize::from(most) {
                break Refusal::TooLong;
            }
            if !room.add_chain(queue, memory)? {
                break Refusal::NoRoom;
            }
        };
        for _ in &room.chains {
            queue.undo_pop();
        }
        Ok(Err(refusal))
    }

    /// Copies header and frame into the chains and gives them back.
    fn fill(self, queue: &mut VirtQueue, frame: &Frame<'_>) -> Result<(), QueueError> {
        // Without MRG_RXBUF this is 1, as it has to be (virtio 1.2, 5.1.6.4).
        let buffers = u16::try_from(self.chains.len()).unwrap_or(MAX_CHAINS);
        let mut head = header::compose(&frame.header, buffers);
        let head = VolatileSlice::from(&mut head[..]);
        copy(std::iter::once(&head).chain(frame.data), &self.buffers);
        let mut left = header::LEN + frame.total_len();
        let written = |&(head, capacity): &(u16, usize)| {
            let here = left.min(capacity);
            left -= here;
            (head, u32::try_from(here).unwrap_or(u32::MAX))
        };
        let used: Vec<_> = self.chains.iter().map(written).collect();
        queue.add_used_together(&used)
    }

    /// Takes one more chain, if there is one. Where it leaves guest memory, it ends.
    fn add_chain(
        &mut self,
        queue: &mut VirtQueue,
        memory: &'a MemoryMap,
    ) -> Result<bool, QueueError> {
        let Some(chain) = queue.pop()? else { return Ok(false) };
        let head = chain.head_index();
        let mut capacity = 0_usize;
        for buffer in writable(chain.take(MAX_DESCRIPTORS), memory).map_while(Result::ok) {
            capacity = capacity.saturating_add(buffer.len());
            self.buffers.push(buffer);
        }
        self.chains.push((head, capacity));
        self.bytes = self.bytes.saturating_add(capacity);
        Ok(true)
    }
}

/// Copies all of `sources` to the start of `targets`, which have room for it.
fn copy<'a>(sources: impl Iterator<Item = &'a VolatileSlice<'a>>, targets: &[GuestSlice<'_>]) {
    let mut targets = targets.iter();
    let mut target: Option<GuestSlice<'_>> = None;
    for source in sources {
        let mut source = *source;
        while !source.is_empty() {
            let Some(room) = target.take().or_else(|| targets.next().cloned()) else { return };
            let count = source.len().min(room.len());
            let (now, later) = (room.split_at(count), source.offset(count));
            let (Ok((now, rest)), Ok(later)) = (now, later) else { return };
            source.copy_to_volatile_slice(now);
            source = later;
            target = (!rest.is_empty()).then_some(rest);
        }
    }
}
