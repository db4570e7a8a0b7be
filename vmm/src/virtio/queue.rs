//! The one place where virtqueues are walked (virtio 1.2, 2.7).

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, VolatileSlice};

use super::{DeviceError, Interrupt};
use crate::memory::{Memory, MemoryMap};

/// A chain of buffers that the guest made available.
pub type Chain = DescriptorChain<Memory>;
/// One buffer of a chain.
pub type GuestSlice<'a> = VolatileSlice<'a, BitmapMmapRegion>;
/// Reads the device-readable part of a [`Chain`].
pub type ChainReader<'a> = virtio_queue::Reader<'a, BitmapMmapRegion>;
/// Writes the device-writable part of a [`Chain`].
pub type ChainWriter<'a> = virtio_queue::Writer<'a, BitmapMmapRegion>;

/// What the guest did wrong with a queue.
#[derive(Debug, Error)]
pub enum QueueError {
    /// The driver needs the queue but has not enabled it.
    #[error("the queue is not enabled")]
    NotReady,
    /// The rings lie outside memory, are misaligned or have a bad size.
    #[error("the rings lie outside memory or are misaligned")]
    BadRings,
    /// More buffers announced than the ring has places, or a head outside the table.
    #[error("the available ring is inconsistent")]
    BadAvailable,
    /// A ring or buffer could not be accessed.
    #[error("cannot access the rings")]
    Access(#[source] virtio_queue::Error),
}

impl From<virtio_queue::Error> for QueueError {
    fn from(error: virtio_queue::Error) -> QueueError {
        QueueError::Access(error)
    }
}

impl QueueError {
    /// Says in which of a device's queues it happened.
    pub fn in_queue(self, index: usize) -> DeviceError {
        DeviceError::Queue { index, source: self }
    }
}

/// How far a queue has come; with the transport's registers this is all its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The next entry of the available ring to read.
    pub next_avail: u16,
    /// The next entry of the used ring to fill.
    pub next_used: u16,
}

/// Limit on the descriptors read of a chain. A driver may use no more than the queue has places (virtio 1.2,
/// 2.7.5.3.1), and no queue of ours has more.
const MAX_DESCRIPTORS: usize = 1024;

/// The device-readable buffers of a chain; they come first (virtio 1.2, 2.7.4.2). A buffer outside
/// guest memory is an error.
pub fn readable(
    chain: impl Iterator<Item = Descriptor>,
    memory: &MemoryMap,
) -> impl Iterator<Item = Result<GuestSlice<'_>, QueueError>> {
    let descriptors = chain.take(MAX_DESCRIPTORS);
    descriptors.take_while(|descriptor| !descriptor.is_write_only()).map(|at| slice(at, memory))
}

/// The device-writable buffers of a chain; they come last. A buffer outside guest memory is an
/// error.
pub fn writable(
    chain: impl Iterator<Item = Descriptor>,
    memory: &MemoryMap,
) -> impl Iterator<Item = Result<GuestSlice<'_>, QueueError>> {
    let descriptors = chain.take(MAX_DESCRIPTORS);
    descriptors.filter(|descriptor| descriptor.is_write_only()).map(|at| slice(at, memory))
}

fn slice(descriptor: Descriptor, memory: &MemoryMap) -> Result<GuestSlice<'_>, QueueError> {
    let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
    memory
        .get_slice(descriptor.addr(), len)
        .map_err(|error| QueueError::Access(virtio_queue::Error::GuestMemory(error)))
}

/// What became of a chain that was handed out by [`VirtQueue::serve`].
pub enum Served {
    /// Finished, with this many bytes written into it.
    Done(u32),
    /// The device keeps it and calls [`VirtQueue::complete`] later.
    Deferred,
    /// Not now: it goes back to the head of the queue and serving ends.
    Stop,
}

/// A queue that the driver has enabled.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    /// Chains given back since the last [`VirtQueue::signal`].
    unannounced: u16,
}

/// The driver's wish in the available ring's flags not to be interrupted (virtio 1.2, 2.7.6).
const NO_INTERRUPT: u16 = 1;

impl VirtQueue {
    /// Takes a queue that the transport has set up.
    ///
    /// # Errors
    /// The driver placed the rings where they cannot be.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: Memory,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<VirtQueue, QueueError> {
        if !queue.is_valid::<MemoryMap>(&memory) {
            return Err(QueueError::BadRings);
        }
        Ok(VirtQueue { index, queue, memory, interrupt, unannounced: 0 })
    }

    /// Gives back the queue as it is now.
    pub fn into_inner(self) -> Queue {
        self.queue
    }

    /// The guest memory that holds the queue's chains.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The queue's number in its device.
    pub fn index(&self) -> usize {
        usize::from(self.index)
    }

    /// How many chains it has places for, a power of two.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// How far the queue has come.
    pub fn position(&self) -> Position {
        Position { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Hands every available chain to `serve`, in order, then interrupts the guest if it asked
    /// for it.
    ///
    /// # Errors
    /// The rings are broken; chains before the break were served.
    pub fn serve(&mut self, mut serve: impl FnMut(Chain) -> Served) -> Result<(), QueueError> {
        while let Some(chain) = self.pop()? {
            let head = chain.head_index();
            match serve(chain) {
                Served::Done(written) => self.add_used(head, written)?,
                Served::Deferred => {}
                Served::Stop => {
                    self.undo_pop();
                    break;
                }
            }
        }
        self.signal()
    }

    /// Takes the next available chain. When there is none, the guest will ring for the next one.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        loop {
            let available = self.queue.avail_idx::<MemoryMap>(&self.memory, Ordering::Acquire)?;
            let waiting = (available - Wrapping(self.queue.next_avail())).0;
            // The library would log and report an empty queue, for which we would wait for ever.
            if waiting > self.queue.size() {
                return Err(QueueError::BadAvailable);
            }
            if waiting > 0 {
                let chain = self.queue.pop_descriptor_chain(Arc::clone(&self.memory));
                return chain.map(Some).ok_or(QueueError::BadAvailable);
            }
            if !self.queue.enable_notification::<MemoryMap>(&self.memory)? {
                return Ok(None);
            }
        }
    }

    /// Puts the chain that [`VirtQueue::pop`] gave last back to the head of the queue; called
    /// again, the one before it.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `written` bytes in it. The next [`VirtQueue::signal`] notifies the guest.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.unannounced = self.unannounced.saturating_add(1);
        Ok(self.queue.add_used::<MemoryMap>(&self.memory, head, written)?)
    }

    /// Gives chains back, each with the bytes written into it, of which the guest must see all or none: a driver that
    /// reads the ring in between would lose what is spread over them (virtio 1.2, 5.1.6.4).
    ///
    /// # Errors
    /// The rings are broken.
    pub fn add_used_together(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some((&(head, written), others)) = chains.split_last() else { return Ok(()) };
        let mut next = self.queue.next_used();
        for &(head, written) in others {
            let place = u64::from(next % self.queue.size());
            // The ring was checked to lie in memory. It begins with flags and index.
            let at = GuestAddress(self.queue.used_ring() + 4 + 8 * place);
            let element = [u32::from(head).to_le(), written.to_le()];
            self.memory
                .write_obj(element, at)
                .map_err(|error| QueueError::Access(virtio_queue::Error::GuestMemory(error)))?;
            next = next.wrapping_add(1);
            self.unannounced = self.unannounced.saturating_add(1);
        }
        // The last one's index makes them all the guest's.
        self.queue.set_next_used(next);
        self.add_used(head, written)
    }

    /// Interrupts the guest if it wants to hear of the chains given back since the last time.
    ///
    /// # Errors
    /// The rings are broken.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let added = std::mem::take(&mut self.unannounced);
        if added > 0 && self.wants_interrupt(added)? {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Gives back one chain that was [`Served::Deferred`].
    ///
    /// # Errors
    /// The rings are broken.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.add_used(head, written)?;
        self.signal()
    }

    /// Whether the guest wants to hear of the last `added` chains. Of the library's own answer the
    /// flag is no part, and it does not know of chains given back together.
    fn wants_interrupt(&self, added: u16) -> Result<bool, QueueError> {
        // The guest writes its wish, then looks at the used index: here it is the other way round.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        if !self.queue.event_idx_enabled() {
            return Ok(self.load(available)? & NO_INTERRUPT == 0);
        }
        // Behind flags, index and heads: it wants to hear once the index has passed this one.
        let event = self.load(available + 4 + 2 * u64::from(self.queue.size()))?;
        Ok(self.queue.next_used().wrapping_sub(event).wrapping_sub(1) < added)
    }

    /// Reads a number of the rings, which were checked to lie in memory.
    fn load(&self, at: u64) -> Result<u16, QueueError> {
        let value = self.memory.load(GuestAddress(at), Ordering::Relaxed);
        value
            .map(u16::from_le)
            .map_err(|error| QueueError::Access(virtio_queue::Error::GuestMemory(error)))
    }
}

#[cfg(test)]
mod tests;
