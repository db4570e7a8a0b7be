//! The driver's side of a virtqueue (virtio 1.2, 2.7), which may be as wrong as a test wants it: for the monitor's own
//! tests and for the fuzz targets.

use std::fmt::Debug;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

/// Flag of a descriptor: another one follows (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
/// Flag of a descriptor: the device may write the buffer.
pub const WRITE: u16 = 2;

/// Where a queue is in guest memory, and how far the driver has come.
pub struct Ring {
    /// Number of entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub table: u64,
    /// Address of the available ring.
    pub avail: u64,
    /// Address of the used ring.
    pub used: u64,
    /// The next index of the available ring.
    pub next_avail: u16,
}

impl Ring {
    /// Writes one descriptor.
    pub fn set_descriptor(
        &self,
        memory: &impl Bytes<GuestAddress, E: Debug>,
        at: u16,
        descriptor: [u8; 16],
    ) {
        let place = self.table + 16 * u64::from(at);
        memory.write_slice(&descriptor, GuestAddress(place)).expect("the table is in memory");
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, memory: &impl Bytes<GuestAddress, E: Debug>, head: u16) {
        let entry = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        memory
            .write_slice(&head.to_le_bytes(), GuestAddress(entry))
            .expect("the available ring is in memory");
        self.set_available(memory, self.next_avail.wrapping_add(1));
    }

    /// Sets the available ring's index.
    pub fn set_available(&mut self, memory: &impl Bytes<GuestAddress, E: Debug>, index: u16) {
        self.next_avail = index;
        let place = GuestAddress(self.avail + 2);
        memory
            .store(index.to_le(), place, Ordering::Release)
            .expect("the available ring is in memory");
    }

    /// The used ring's index: how many chains came back.
    pub fn used_index(&self, memory: &impl Bytes<GuestAddress, E: Debug>) -> u16 {
        let place = GuestAddress(self.used + 2);
        memory.load(place, Ordering::Acquire).map(u16::from_le).expect("the used ring is in memory")
    }
}

/// One descriptor as bytes (virtio 1.2, 2.7.5).
pub fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&address.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    raw
}
