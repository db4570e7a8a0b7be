//! A device behind its registers, and a driver that does as it is told.

use std::sync::{Arc, Mutex};

use bolero::TypeGenerator;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use firn_vmm::bus::BusDevice;
use firn_vmm::interrupt::Pin;
use firn_vmm::memory::{self, Memory};
use firn_vmm::virtio::transport::mmio::{MmioEvents, MmioTransport};
use firn_vmm::virtio::{DeviceError, VirtioDevice};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_STATUS,
};
use vm_memory::{Bytes, GuestAddress};

use crate::ring::{NEXT, Ring, WRITE, descriptor};

/// The guest's memory.
const MEMORY_MIB: u64 = 1;
const MEMORY_END: u64 = MEMORY_MIB << 20;
/// Entries of each queue.
const ENTRIES: u16 = 16;
/// Where the queues are, and how much room each has.
const RINGS: u64 = 0x1000;
const RING: u64 = 0x400;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
/// Where buffers are, the next of which is found by its number.
const BUFFERS: u64 = 0x1_0000;
const BUFFER: u64 = 0x400;
/// More queues than this no device here has.
const MAX_QUEUES: u16 = 8;
const QUEUES: usize = 8;

/// Status bits as a driver sets them, one after the other (virtio 1.2, 3.1.1).
const STATUS: [u32; 4] = [0, 1, 3, 11];
const DRIVER_OK: u32 = 15;
const NEEDS_RESET: u32 = 64;
/// What a driver may do.
#[derive(Debug, TypeGenerator)]
pub enum Step {
    /// Any access, of any length.
    Write(u16, u64, u8),
    Read(u16, u8),
    /// One to a register, with a value that may make sense.
    Register(u8, u8),
    /// Negotiates and starts it as it should be done; of the features all but these.
    SetUp(u8),
    /// Makes a chain available, and rings if so.
    Chain(u8, Chain, bool),
    /// Rings.
    Notify(u8),
    /// Writes to where the queues are.
    Scribble(u16, Vec<u8>),
    /// The host's side does something.
    Outside(Vec<u8>),
    /// The device hears of it.
    Events,
    /// The machine is paused and goes on, or is paused, saved, restored and goes on.
    Pause(bool),
    Reset,
}

/// A chain; without a twist it is one that a driver could send.
#[derive(Debug, TypeGenerator)]
pub struct Chain {
    /// What the device is to read first.
    request: Vec<u8>,
    /// Its first descriptor.
    head: u8,
    /// What comes after the request.
    buffers: Vec<Buffer>,
    twist: Twist,
}

impl Chain {
    /// One with a request and room for an answer.
    pub fn right(request: Vec<u8>, room: u16) -> Self {
        let buffers = vec![Buffer { length: room, write: true }];
        Self { request, head: 0, buffers, twist: Twist::None }
    }
}

#[derive(Debug, TypeGenerator)]
struct Buffer {
    length: u16,
    write: bool,
}

/// What is wrong with a chain.
#[derive(Debug, TypeGenerator)]
enum Twist {
    None,
    Nothing,
    /// A descriptor of it has another address, length, flags or successor.
    Address(u8, Place),
    Length(u8, u32),
    Flags(u8, u16),
    Next(u8, u16),
    /// The available ring's index is another than belongs to it.
    Index(u16),
}

#[derive(Debug, TypeGenerator)]
enum Place {
    Rings(u16),
    End(u8),
    Highest(u8),
    Anywhere(u64),
}

impl Place {
    fn address(&self) -> u64 {
        match *self {
            Self::Rings(at) => RINGS + u64::from(at % 0x2000),
            Self::End(before) => MEMORY_END - u64::from(before),
            Self::Highest(before) => u64::MAX - u64::from(before),
            Self::Anywhere(address) => address,
        }
    }
}

/// A pin that nobody looks at.
struct NoPin;

impl Pin for NoPin {
    fn pulse(&self) {}
}

/// A device and its driver.
pub struct Rig {
    memory: Memory,
    transport: Arc<MmioTransport>,
    events: EventManager<Box<dyn MutEventSubscriber>>,
    failures: Arc<Mutex<Vec<String>>>,
    /// Makes a request of bytes.
    request: fn(u16, &[u8]) -> Vec<u8>,
    rings: [Ring; QUEUES],
    buffers: u64,
}

impl Rig {
    pub fn new(device: Box<dyn VirtioDevice>, request: fn(u16, &[u8]) -> Vec<u8>) -> Self {
        let memory = memory::allocate(MEMORY_MIB).expect("a little memory");
        let failures = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&failures);
        let on_failure = Arc::new(move |name: &str, error: &DeviceError| {
            heard.lock().expect("nobody panics with it").push(format!("{name}: {error}"));
        });
        let transport =
            MmioTransport::new(device, Arc::clone(&memory), Arc::new(NoPin), on_failure);
        let transport = Arc::new(transport.expect("descriptors"));
        let mut events = EventManager::new().expect("descriptors");
        let subscriber = MmioEvents(Arc::clone(&transport));
        events.add_subscriber(Box::new(subscriber) as Box<dyn MutEventSubscriber>);
        let rings = rings();
        Self { memory, transport, events, failures, request, rings, buffers: 0 }
    }

    fn write(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn poke(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).expect("an address of the rig's");
    }

    /// Does one step; gives what the host's side is to do.
    pub fn run<'a>(&mut self, step: &'a Step) -> Option<&'a [u8]> {
        match step {
            Step::Write(at, value, length) => {
                let length = usize::from(length % 9);
                self.transport.write(u64::from(at % 0x200), &value.to_le_bytes()[..length]);
            }
            Step::Read(at, length) => {
                let mut data = vec![0; usize::from(length % 9)];
                self.transport.read(u64::from(at % 0x200), &mut data);
            }
            Step::Register(register, value) => {
                self.write(u32::from(*register) & !3, (*value).into())
            }
            Step::SetUp(without) => self.set_up(*without),
            Step::Chain(queue, chain, ring) => {
                let queue = u16::from(*queue) % MAX_QUEUES;
                self.offer(queue, chain);
                if *ring {
                    self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
                }
            }
            Step::Notify(queue) => {
                self.write(
                    VIRTIO_MMIO_QUEUE_NOTIFY,
                    u32::from(*queue) % (u32::from(MAX_QUEUES) + 1),
                );
            }
            Step::Scribble(at, bytes) => {
                self.poke(RINGS + u64::from(*at % 0x2000), &bytes[..bytes.len().min(64)]);
            }
            Step::Outside(bytes) => return Some(bytes),
            Step::Events => self.events(),
            Step::Pause(save) => {
                self.transport.pause();
                if *save {
                    let state = self.transport.save();
                    // It is the device's own, but a hostile driver may have left nothing to go on with.
                    let _ = self.transport.restore(&state);
                }
                self.transport.resume();
            }
            Step::Reset => self.transport.reset(),
        }
        None
    }

    fn events(&mut self) {
        for _ in 0..4 {
            if self.events.run_with_timeout(0).is_ok_and(|count| count == 0) {
                break;
            }
        }
    }

    /// Starts the device as a driver should, with all queues and all features but those in `without`.
    pub fn set_up(&mut self, without: u8) {
        for status in &STATUS[..3] {
            self.write(VIRTIO_MMIO_STATUS, *status);
        }
        for page in 0..2 {
            self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, page);
            let offered = self.read(VIRTIO_MMIO_DEVICE_FEATURES);
            let refused = if page == 0 { u32::from(without) } else { 0 };
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, offered & !refused);
        }
        self.write(VIRTIO_MMIO_STATUS, STATUS[3]);
        self.poke(RINGS, &vec![0; 0x400 * QUEUES]);
        self.rings = rings();
        for queue in 0..MAX_QUEUES {
            self.write(VIRTIO_MMIO_QUEUE_SEL, queue.into());
            if self.read(VIRTIO_MMIO_QUEUE_NUM_MAX) < ENTRIES.into() {
                continue;
            }
            self.write(VIRTIO_MMIO_QUEUE_NUM, ENTRIES.into());
            let Ring { table, avail, used, .. } = self.rings[usize::from(queue)];
            for (register, address) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, table),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail),
                (VIRTIO_MMIO_QUEUE_USED_LOW, used),
            ] {
                self.write(register, u32::try_from(address).expect("a small guest"));
                self.write(register + 4, 0);
            }
            self.write(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.write(VIRTIO_MMIO_STATUS, DRIVER_OK);
    }

    fn buffer(&mut self) -> u64 {
        let count = (MEMORY_END - BUFFERS) / BUFFER;
        self.buffers = (self.buffers + 1) % count;
        BUFFERS + self.buffers * BUFFER
    }

    fn offer(&mut self, queue: u16, chain: &Chain) {
        let mut request = (self.request)(queue, &chain.request);
        request.truncate(0x400);
        let at = self.buffer();
        self.poke(at, &request);
        let length = u32::try_from(request.len()).expect("it is short");
        let mut descriptors = vec![(at, length, 0)];
        for Buffer { length, write } in chain.buffers.iter().take(usize::from(ENTRIES) - 1) {
            let flags = if *write { WRITE } else { 0 };
            descriptors.push((self.buffer(), u32::from(length % 0x800), flags));
        }
        if request.is_empty() && descriptors.len() > 1 {
            descriptors.remove(0);
        }
        let head = u16::from(chain.head) % ENTRIES;
        let last = descriptors.len() - 1;
        let ring = &mut self.rings[usize::from(queue)];
        let index = |place: usize| (head + u16::try_from(place).expect("there are few")) % ENTRIES;
        for (place, (mut address, mut length, mut flags)) in descriptors.into_iter().enumerate() {
            let mut next = index(place + 1);
            if place != last {
                flags |= NEXT;
            }
            let is = |twisted: u8| usize::from(twisted) % (last + 1) == place;
            match &chain.twist {
                Twist::Address(at, place) if is(*at) => address = place.address(),
                Twist::Length(at, wrong) if is(*at) => length = *wrong,
                Twist::Flags(at, wrong) if is(*at) => flags = *wrong,
                Twist::Next(at, wrong) if is(*at) => next = *wrong,
                _ => {}
            }
            let descriptor = descriptor(address, length, flags, next);
            ring.set_descriptor(&*self.memory, index(place), descriptor);
        }
        ring.offer(&*self.memory, head);
        if let Twist::Index(wrong) = chain.twist {
            ring.set_available(&*self.memory, wrong);
        }
    }

    /// How many chains of queue 0 came back since it was set up.
    pub fn used(&self) -> u16 {
        self.rings[0].used_index(&*self.memory)
    }

    /// Starts the device once more, and looks whether it runs.
    pub fn still_serves(&mut self) {
        self.events();
        self.set_up(0);
        let status = self.read(VIRTIO_MMIO_STATUS);
        let failures = self.failures.lock().expect("nobody panics with it");
        assert_eq!(status & !NEEDS_RESET, DRIVER_OK, "{failures:?}");
    }
}

/// The queues of a driver that has just begun.
fn rings() -> [Ring; QUEUES] {
    std::array::from_fn(|queue| {
        let table = RINGS + u64::try_from(queue).expect("there are few") * RING;
        let (avail, used) = (table + AVAILABLE, table + USED);
        Ring { size: ENTRIES, table, avail, used, next_avail: 0 }
    })
}
