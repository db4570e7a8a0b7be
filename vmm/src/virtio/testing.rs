//! The guest's half of a virtqueue, for tests: memory, a driver and a recorder of interrupts.
//!
//! ```ignore
//! let guest = Guest::new();
//! let (mut drivers, activation) = guest.activation(&[64], 0);
//! let mut device = Box::new(Rng::new()).activate(activation).ok().unwrap();
//! drivers[0].add(&[Part::Write(16)]);
//! device.notify(0).unwrap();
//! assert_eq!(drivers[0].used().unwrap().data.len(), 16);
//! ```

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::queue::{Position, VirtQueue};
use super::{Activation, DeviceError, Interrupt, VirtioDevice};
use crate::memory::{Memory, MemoryMap};

#[path = "../../../tests/src/ring.rs"]
pub mod ring;

use ring::Ring;
pub use ring::{NEXT, WRITE, descriptor as raw_descriptor};

/// Flag of a descriptor: the buffer is a table of descriptors (virtio 1.2, 2.7.5).
pub const INDIRECT: u16 = 4;

/// Counts interrupts.
#[derive(Default)]
pub struct Recorder {
    queues: [AtomicU64; 32],
    config: AtomicU64,
}

impl Interrupt for Recorder {
    fn queue(&self, index: u16) {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }
    fn config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}

impl Recorder {
    /// Interrupts of queue `index` since the last call.
    pub fn take_queue(&self, index: usize) -> u64 {
        self.queues[index].swap(0, Ordering::SeqCst)
    }
    /// Configuration interrupts since the last call.
    pub fn take_config(&self) -> u64 {
        self.config.swap(0, Ordering::SeqCst)
    }
}

/// Guest memory with an allocator that never frees, and the guest's interrupt controller.
#[derive(Clone)]
pub struct Guest {
    /// All of it, from address 0.
    pub memory: Memory,
    /// What the device under test raises.
    pub interrupt: Arc<Recorder>,
    next: Arc<AtomicU64>,
}

impl Guest {
    /// A guest with 256 MiB, of which the host backs only what a test touches.
    pub fn new() -> Guest {
        Guest::with_memory(256 << 20)
    }

    /// A guest with `size` bytes of memory.
    pub fn with_memory(size: usize) -> Guest {
        let memory = MemoryMap::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        // Address 0 stays unused: the queue library takes it for "not set".
        let next = Arc::new(AtomicU64::new(0x1000));
        Guest { memory: Arc::new(memory), interrupt: Arc::default(), next }
    }

    /// Sets `len` bytes aside, aligned to 16, and gives their address.
    pub fn alloc(&self, len: usize) -> u64 {
        let len = u64::try_from(len).unwrap().next_multiple_of(16);
        let at = self.next.fetch_add(len, Ordering::SeqCst);
        assert!(at + len <= self.memory.last_addr().0, "the test's guest is out of memory");
        at
    }

    /// Bytes of guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// Changes guest memory.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    /// Lays out a queue of `size` entries in memory, from the driver's side.
    pub fn driver(&self, index: u16, size: u16) -> DriverQueue {
        let entries = usize::from(size);
        DriverQueue {
            guest: self.clone(),
            index,
            ring: Ring {
                size,
                table: self.alloc(16 * entries),
                avail: self.alloc(6 + 2 * entries),
                used: self.alloc(6 + 8 * entries),
                next_avail: 0,
            },
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            next_used: 0,
        }
    }

    /// A queue seen from both sides.
    pub fn queue(&self, index: u16, size: u16) -> (DriverQueue, VirtQueue) {
        let driver = self.driver(index, size);
        let device = driver.device(0, Position::default());
        (driver, device)
    }

    /// Enables one queue of each size and gives the driver's sides and the activation.
    pub fn activation(&self, sizes: &[u16], features: u64) -> (Vec<DriverQueue>, Activation) {
        let drivers: Vec<DriverQueue> =
            (0..).zip(sizes).map(|(index, &size)| self.driver(index, size)).collect();
        let positions = vec![Some(Position::default()); drivers.len()];
        let activation = self.reactivation(&drivers, features, &positions);
        (drivers, activation)
    }

    /// An activation on queues that have come as far as `positions`: what a restore does.
    pub fn reactivation(
        &self,
        drivers: &[DriverQueue],
        features: u64,
        positions: &[Option<Position>],
    ) -> Activation {
        let queues = drivers
            .iter()
            .zip(positions)
            .map(|(driver, position)| position.map(|position| driver.device(features, position)))
            .collect();
        let interrupt = Arc::clone(&self.interrupt) as Arc<dyn Interrupt>;
        Activation { memory: Arc::clone(&self.memory), queues, features, interrupt }
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// The device reads these bytes.
    Read(&'a [u8]),
    /// The device may write so many bytes.
    Write(usize),
}

/// A chain that came back.
#[derive(Debug, PartialEq, Eq)]
pub struct Used {
    /// The chain's head, as [`DriverQueue::add`] returned it.
    pub head: u16,
    /// How much the device says it wrote.
    pub len: u32,
    /// The first `len` bytes of the chain's writable buffers.
    pub data: Vec<u8>,
}

/// The driver's side of one queue.
pub struct DriverQueue {
    guest: Guest,
    index: u16,
    /// Where its rings are.
    pub ring: Ring,
    free: Vec<u16>,
    chains: HashMap<u16, Pending>,
    next_used: u16,
}

impl Deref for DriverQueue {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        &self.ring
    }
}

/// What the driver remembers of a chain it made available.
#[derive(Default)]
struct Pending {
    descriptors: Vec<u16>,
    writable: Vec<(u64, usize)>,
}

impl DriverQueue {
    /// The device's side of the queue. `features` decides on VIRTIO_F_EVENT_IDX (bit 29).
    pub fn device(&self, features: u64, position: Position) -> VirtQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.table)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used)).unwrap();
        queue.set_next_avail(position.next_avail);
        queue.set_next_used(position.next_used);
        queue.set_event_idx(features & (1 << 29) != 0);
        queue.set_ready(true);
        let interrupt = Arc::clone(&self.guest.interrupt) as Arc<dyn Interrupt>;
        VirtQueue::new(self.index, queue, Arc::clone(&self.guest.memory), interrupt).unwrap()
    }

    /// Makes one chain available and returns its head.
    pub fn add(&mut self, parts: &[Part<'_>]) -> u16 {
        assert!(!parts.is_empty() && parts.len() <= self.free.len(), "no room in the queue");
        let descriptors = self.free.split_off(self.free.len() - parts.len());
        let mut pending = Pending::default();
        for (i, part) in parts.iter().enumerate() {
            let (len, write) = match part {
                Part::Read(data) => (data.len(), 0),
                Part::Write(len) => (*len, WRITE),
            };
            let address = self.guest.alloc(len);
            match part {
                Part::Read(data) => self.guest.write(address, data),
                Part::Write(_) => pending.writable.push((address, len)),
            }
            let (next, more) = descriptors.get(i + 1).map_or((0, 0), |&next| (next, NEXT));
            let len = u32::try_from(len).unwrap();
            self.set_descriptor(descriptors[i], address, len, write | more, next);
        }
        let head = descriptors[0];
        pending.descriptors = descriptors;
        self.chains.insert(head, pending);
        self.offer(head);
        head
    }

    /// The used ring's index: how many chains came back, also those that were not looked at yet.
    pub fn used_index(&self) -> u16 {
        self.ring.used_index(&*self.guest.memory)
    }

    /// The next chain that came back.
    pub fn used(&mut self) -> Option<Used> {
        let memory = &self.guest.memory;
        if self.used_index() == self.next_used {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let entry: [u32; 2] = memory.read_obj(GuestAddress(entry)).unwrap();
        let head = u16::try_from(entry[0]).expect("a head is an index");
        let len = entry[1];
        let pending = self.chains.remove(&head).expect("the chain was made available once");
        self.next_used = self.next_used.wrapping_add(1);
        let mut data: Vec<u8> =
            pending.writable.iter().flat_map(|&(at, len)| self.guest.read(at, len)).collect();
        let written = usize::try_from(len).unwrap();
        assert!(written <= data.len(), "the device claims {len} of {} bytes", data.len());
        data.truncate(written);
        self.free.extend(pending.descriptors);
        Some(Used { head, len, data })
    }

    /// All chains that came back.
    pub fn all_used(&mut self) -> Vec<Used> {
        std::iter::from_fn(|| self.used()).collect()
    }

    /// Writes one descriptor as it is, right or wrong.
    pub fn set_descriptor(&self, at: u16, address: u64, len: u32, flags: u16, next: u16) {
        let descriptor = raw_descriptor(address, len, flags, next);
        self.ring.set_descriptor(&*self.guest.memory, at, descriptor);
    }

    /// Puts a head into the available ring, right or wrong.
    pub fn offer(&mut self, head: u16) {
        self.ring.offer(&*self.guest.memory, head);
    }

    /// Sets the available ring's index, right or wrong.
    pub fn set_available(&mut self, index: u16) {
        self.ring.set_available(&*self.guest.memory, index);
    }

    /// Sets the available ring's flags: 1 asks for no interrupts (virtio 1.2, 2.7.6).
    pub fn set_flags(&self, flags: u16) {
        self.guest.write(self.avail, &flags.to_le_bytes());
    }

    /// With VIRTIO_F_EVENT_IDX: interrupt when the used index has passed `index`.
    pub fn set_used_event(&self, index: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.guest.write(at, &index.to_le_bytes());
    }

    /// With VIRTIO_F_EVENT_IDX: the available index from which the device wants to be rung.
    pub fn avail_event(&self) -> u16 {
        let at = self.used + 4 + 8 * u64::from(self.size);
        self.guest.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Overwrites the queue with `ring`.
    pub fn corrupt(&mut self, ring: &HostileRing) {
        for (at, &(address, len, flags, next)) in (0..self.size).zip(&ring.descriptors) {
            self.set_descriptor(at, address, len, flags, next);
        }
        for &head in &ring.heads {
            self.offer(head);
        }
        if let Some(index) = ring.available {
            self.set_available(index);
        }
    }
}

/// Rings as only a hostile driver writes them.
#[derive(Clone, Debug)]
pub struct HostileRing {
    /// Address, length, flags and next of each descriptor.
    pub descriptors: Vec<(u64, u32, u16, u16)>,
    /// Heads for the available ring, some outside the table.
    pub heads: Vec<u16>,
    /// An index for the available ring that need not fit the heads.
    pub available: Option<u16>,
}

/// Memory of a guest for hostile tests: small, so that chains overlap rings and each other.
pub const HOSTILE_MEMORY: usize = 1 << 20;

/// Random rings of 16 entries for a guest with [`HOSTILE_MEMORY`]: loops, indirect tables anywhere,
/// buffers over the rings, over the end of memory and outside it.
pub fn hostile_ring() -> impl Strategy<Value = HostileRing> {
    let end = u64::try_from(HOSTILE_MEMORY).unwrap();
    let address = prop_oneof![
        6 => 0..end,
        2 => 0x1000..0x3000_u64,
        1 => end - 64..end + 64,
        1 => u64::MAX - 64..=u64::MAX,
    ];
    let len = prop_oneof![
        4 => 0..64_u32,
        2 => 0..0x2000_u32,
        1 => (0..64_u32).prop_map(|n| n * 16),
        1 => 0..0x10_0000_u32,
        1 => u32::MAX - 16..=u32::MAX,
    ];
    let flags = prop_oneof![8 => 0..4_u16, 1 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..16_u16, 1 => any::<u16>()];
    let head = prop_oneof![15 => 0..16_u16, 1 => any::<u16>()];
    (
        prop::collection::vec((address, len, flags, next), 16),
        prop::collection::vec(head, 0..16),
        prop::option::weighted(0.1, any::<u16>()),
    )
        .prop_map(|(descriptors, heads, available)| HostileRing {
            descriptors,
            heads,
            available,
        })
}

/// Gives back a device of one queue, which has to refuse to be without that.
pub fn refused_without_queue(device: Box<dyn VirtioDevice>) -> Box<dyn VirtioDevice> {
    let guest = Guest::new();
    let (_, mut activation) = guest.activation(&[1], 0);
    activation.queues[0] = None;
    let (device, error) = device.activate(activation).err().unwrap();
    assert!(matches!(error, DeviceError::Queue { index: 0, .. }));
    device
}
