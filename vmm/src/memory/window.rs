//! Memory that is not the guest's: an image on the host, which guests see behind their own memory and can only read.
//!
//! It lies in no [`MemoryMap`](super::MemoryMap): devices do not reach it. What they read there could end firn, should a
//! file be cut short, and what they wrote would be written to what all guests have in common. KVM alone knows it, by the
//! same addresses of this process for all machines; what it cannot provide ends one machine.

use std::sync::Arc;

use thiserror::Error;

use crate::arch::layout;
use crate::erofs::Image;

/// An image in a guest.
pub struct Window {
    /// The share that it is.
    pub(crate) tag: String,
    /// Where the guest finds it.
    pub(crate) start: u64,
    pub(crate) image: Arc<Image>,
}

/// The guest's processors have not enough address lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "an image of {mib} MiB would end above the {bits} bits of address that the host's processor has"
)]
pub struct NoRoom {
    mib: u64,
    bits: u8,
}

/// Where in a guest there is still room for windows.
pub struct Windows {
    next: u64,
    bits: u8,
}

impl Windows {
    /// For a guest with so many bytes of memory, whose processors have so many bits of physical address.
    #[must_use]
    pub fn new(memory: u64, bits: u8) -> Self {
        Self { next: layout::windows_start(memory), bits }
    }

    /// Puts an image behind all others.
    pub(crate) fn place(&mut self, tag: &str, image: Arc<Image>) -> Result<Arc<Window>, NoRoom> {
        let start = self.next.next_multiple_of(layout::WINDOW_ALIGNMENT);
        let end = start.saturating_add(image.len());
        if end > 1_u64.checked_shl(self.bits.into()).unwrap_or(u64::MAX) {
            return Err(NoRoom { mib: image.len() >> 20, bits: self.bits });
        }
        self.next = end;
        Ok(Arc::new(Window { tag: tag.to_owned(), start, image }))
    }
}
