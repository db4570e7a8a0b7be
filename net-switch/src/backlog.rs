//! Frames that wait for room at a receiver.

use std::collections::VecDeque;

use vm_memory::VolatileSlice;

use crate::port::{Delivery, Frame, Header};

/// A frame with memory of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnedFrame {
    /// Offloads that the sender left to others.
    pub header: Header,
    /// The bytes, from the destination address on.
    pub data: Vec<u8>,
}

impl OwnedFrame {
    /// Lends the frame to what takes frames, such as [`NetPort::send`](crate::NetPort::send).
    pub fn lend<R>(&mut self, to: impl FnOnce(&Frame<'_>) -> R) -> R {
        let data = [VolatileSlice::from(self.data.as_mut_slice())];
        to(&Frame { header: self.header, data: &data })
    }
}

impl From<&Frame<'_>> for OwnedFrame {
    /// Copies the whole frame, however long it is.
    fn from(frame: &Frame<'_>) -> Self {
        Self { header: frame.header, data: frame.to_vec() }
    }
}

/// A bounded queue of frames for a receiver whose ring is empty. What does not fit is dropped
/// and counted; what is inside stays, in order. The receiver guards it with its own lock.
#[derive(Debug)]
pub struct Backlog {
    frames: VecDeque<OwnedFrame>,
    bytes: usize,
    max_frames: usize,
    max_bytes: usize,
    dropped: u64,
}

impl Backlog {
    /// An empty queue for at most `max_frames` frames, together at most `max_bytes` bytes.
    #[must_use]
    pub fn new(max_frames: usize, max_bytes: usize) -> Self {
        Self { frames: VecDeque::new(), bytes: 0, max_frames, max_bytes, dropped: 0 }
    }

    /// Copies a frame to the end. It is copied only if there is room.
    pub fn push(&mut self, frame: &Frame<'_>) -> Delivery {
        if !self.reserve(frame.total_len()) {
            return Delivery::Dropped;
        }
        self.frames.push_back(OwnedFrame::from(frame));
        Delivery::Taken
    }

    /// Puts a frame that is already a copy at the end.
    pub fn push_owned(&mut self, frame: OwnedFrame) -> Delivery {
        if !self.reserve(frame.data.len()) {
            return Delivery::Dropped;
        }
        self.frames.push_back(frame);
        Delivery::Taken
    }

    /// The oldest frame; for who must see its length before taking it.
    #[must_use]
    pub fn front(&self) -> Option<&OwnedFrame> {
        self.frames.front()
    }

    /// Takes the oldest frame.
    pub fn pop(&mut self) -> Option<OwnedFrame> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.data.len();
        Some(frame)
    }

    /// Forgets all frames and gives their memory back. They do not count as dropped.
    pub fn clear(&mut self) {
        self.frames = VecDeque::new();
        self.bytes = 0;
    }

    /// The frames, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &OwnedFrame> {
        self.frames.iter()
    }

    /// How many frames wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether no frame waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// How many bytes wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many frames found no room so far.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Accounts for a frame of `length` bytes that is about to be added, or dropped.
    fn reserve(&mut self, length: usize) -> bool {
        let fits = self.frames.len() < self.max_frames && length <= self.max_bytes - self.bytes;
        if fits {
            self.bytes += length;
        } else {
            self.dropped += 1;
        }
        fits
    }
}

#[cfg(test)]
mod tests;
