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

/// The guest has no room for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NoRoom {
    /// Its processors have not enough address lines.
    #[error(
        "an image of {mib} MiB would end above the {bits} bits of address that the host's processor has"
    )]
    Addresses {
        /// The image's size.
        mib: u64,
        /// What there is.
        bits: u8,
    },
    /// Its kernel has too little memory to keep books of it.
    #[error("with an image of {mib} MiB more than half of the guest's memory would be its books")]
    Books {
        /// The image's size.
        mib: u64,
    },
}

/// Linux has a `struct page` of 64 bytes for each page of 4 KiB.
const BYTES_PER_BOOKED: u64 = 64;

/// Where in a guest there is still room for windows.
pub struct Windows {
    next: u64,
    /// How much more images may have in all.
    left: u64,
    bits: u8,
}

impl Windows {
    /// For a guest with so many bytes of memory, whose processors have so many bits of physical address.
    #[must_use]
    pub fn new(memory: u64, bits: u8) -> Self {
        let left = (memory / 2).saturating_mul(BYTES_PER_BOOKED);
        Self { next: layout::windows_start(memory), left, bits }
    }

    /// Puts an image behind all others.
    pub(crate) fn place(&mut self, tag: &str, image: Arc<Image>) -> Result<Arc<Window>, NoRoom> {
        let mib = image.len() >> 20;
        let left = self.left.checked_sub(image.len()).ok_or(NoRoom::Books { mib })?;
        let start = self.next.next_multiple_of(layout::WINDOW_ALIGNMENT);
        let end = start.saturating_add(image.len());
        if end > 1_u64.checked_shl(self.bits.into()).unwrap_or(u64::MAX) {
            return Err(NoRoom::Addresses { mib, bits: self.bits });
        }
        (self.next, self.left) = (end, left);
        Ok(Arc::new(Window { tag: tag.to_owned(), start, image }))
    }
}
