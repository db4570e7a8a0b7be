//! The transport as a guest's driver sees it, with the entropy device behind it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use firn_net_switch::Switch;
use proptest::prelude::*;
use virtio_bindings::virtio_mmio::*;

use super::mmio::MmioTransport;
use crate::bus::BusDevice;
use crate::interrupt::Pin;
use crate::spec::{Mac, NetSpec};
use crate::virtio::balloon::Balloon;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{DriverQueue, Guest, Part};
use crate::virtio::{RestoreError, VirtioDevice};

/// Status bits as a driver sets them, one after the other (virtio 1.2, 3.1.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
/// VIRTIO_F_VERSION_1, on the second page of features.
const VERSION_1: u32 = 1;
const QUEUE_SIZE: u16 = 64;

/// A pin that counts.
#[derive(Default)]
struct TestPin(AtomicU32);

impl Pin for TestPin {
    fn pulse(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Fixture {
    pin: Arc<TestPin>,
    guest: Guest,
    transport: MmioTransport,
    failures: Arc<Mutex<Vec<String>>>,
}

impl Fixture {
    fn new() -> Fixture {
        let guest = Guest::new();
        let pin = Arc::new(TestPin::default());
        let failures = Arc::new(Mutex::new(Vec::new()));
        let heard = failures.clone();
        let on_failure = Arc::new(move |name: &str, error: &crate::virtio::DeviceError| {
            heard.lock().unwrap().push(format!("{name}: {error}"));
        });
        let transport =
            MmioTransport::new(Box::new(Rng::new()), guest.memory.clone(), pin.clone(), on_failure)
                .unwrap();
        Fixture { pin, guest, transport, failures }
    }

    /// How often it has interrupted since the last call.
    fn pulses(&self) -> u32 {
        self.pin.0.swap(0, Ordering::SeqCst)
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    fn negotiate(&self, page_0: u32, page_1: u32) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for (page, features) in [(0, page_0), (1, page_1)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn enable(&self, queue: &DriverQueue) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.write(VIRTIO_MMIO_QUEUE_NUM, queue.size.into());
        for (low, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, queue.table),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue.avail),
            (VIRTIO_MMIO_QUEUE_USED_LOW, queue.used),
        ] {
            self.write(low, u32::try_from(address & 0xffff_ffff).unwrap());
            self.write(low + 4, u32::try_from(address >> 32).unwrap());
        }
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn go(&self) {
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// A running device and the driver's side of its queue.
    fn running(&self) -> DriverQueue {
        let queue = self.guest.driver(0, QUEUE_SIZE);
        self.negotiate(0, VERSION_1);
        self.enable(&queue);
        self.go();
        queue
    }
}

#[test]
fn a_driver_finds_negotiates_and_uses_the_device() {
    let fixture = Fixture::new();
    assert_eq!(fixture.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(fixture.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(fixture.read(VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(fixture.read(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(QUEUE_SIZE));
    fixture.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
    assert_eq!(fixture.read(VIRTIO_MMIO_DEVICE_FEATURES), VERSION_1);

    for register in VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH {
        assert_eq!(fixture.read(register), u32::MAX, "no shared memory");
    }

    let mut queue = fixture.running();
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS), 15);
    assert_eq!(fixture.read(VIRTIO_MMIO_QUEUE_READY), 1);
    queue.add(&[Part::Write(16)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(queue.used().unwrap().len, 16);
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    fixture.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_cause_interrupts_once_until_it_is_acknowledged() {
    let fixture = Fixture::new();
    let mut queue = fixture.running();
    assert_eq!(fixture.pulses(), 0);
    for pulses in [1, 0] {
        queue.add(&[Part::Write(8)]);
        fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert_eq!(fixture.pulses(), pulses);
    }
    fixture.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_CONFIG);
    queue.add(&[Part::Write(8)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(fixture.pulses(), 0, "another cause was acknowledged");
    fixture.transport.remind();
    assert_eq!(fixture.pulses(), 1, "the edge may be lost");
    fixture.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
    fixture.transport.remind();
    assert_eq!(fixture.pulses(), 0);
    queue.add(&[Part::Write(8)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(fixture.pulses(), 1);
    fixture.go();
    assert_eq!(fixture.pulses(), 1, "a driver that begins to listen hears what was before");
    fixture.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0, "a reset takes it back");
    fixture.running();
    assert_eq!(fixture.pulses(), 0);
}

#[test]
fn what_kvm_hears_is_acknowledged_too() {
    let fixture = Fixture::new();
    let mut queue = fixture.running();
    let mut interrupt = |pulses| {
        queue.add(&[Part::Write(8)]);
        fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert_eq!(fixture.pulses(), pulses);
    };
    interrupt(1);
    interrupt(0);
    fixture.transport.acknowledged().write(1).unwrap();
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    interrupt(1);
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    // Nobody asks meanwhile.
    fixture.transport.acknowledged().write(1).unwrap();
    interrupt(1);
    interrupt(0);
    // What a driver said before a reset is about what was before.
    fixture.transport.acknowledged().write(1).unwrap();
    fixture.running();
    fixture.transport.acknowledged().write(1).unwrap();
    fixture.write(VIRTIO_MMIO_STATUS, 0);
    let mut queue = fixture.running();
    queue.add(&[Part::Write(8)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let fixture = Fixture::new();
    fixture.negotiate(0, 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER, "without VERSION_1");
    fixture.negotiate(1, VERSION_1);
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER, "a bit of no meaning");
    fixture.go();
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert!(fixture.failures.lock().unwrap().is_empty());
}

#[test]
fn a_queue_outside_memory_costs_the_guest_the_device_until_it_is_reset() {
    let fixture = Fixture::new();
    let mut queue = fixture.guest.driver(0, QUEUE_SIZE);
    queue.ring.used = u64::MAX - 3;
    fixture.negotiate(0, VERSION_1);
    fixture.enable(&queue);
    fixture.go();
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(fixture.failures.lock().unwrap().len(), 1);

    let mut queue = fixture.running();
    queue.add(&[Part::Write(8)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(queue.used().unwrap().len, 8);
}

#[test]
fn a_broken_ring_is_reported_once() {
    let fixture = Fixture::new();
    let mut queue = fixture.running();
    queue.set_available(QUEUE_SIZE + 1);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(*fixture.failures.lock().unwrap(), ["rng: virtqueue 0"]);
}

#[test]
fn ringing_what_is_not_there_does_nothing() {
    let fixture = Fixture::new();
    let queue = fixture.guest.driver(0, QUEUE_SIZE);
    for queue in [0, 1, u32::MAX] {
        fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }
    fixture.negotiate(0, VERSION_1);
    fixture.enable(&queue);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert!(fixture.failures.lock().unwrap().is_empty());
}

#[test]
fn a_running_queue_cannot_be_moved_and_a_reset_forgets_it() {
    let fixture = Fixture::new();
    let mut queue = fixture.running();
    fixture.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 0xdead_0000);
    queue.add(&[Part::Write(8)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert_eq!(queue.used().unwrap().len, 8);
    fixture.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS), 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_QUEUE_READY), 0);
    assert_eq!(fixture.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    queue.add(&[Part::Write(8)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert!(queue.used().is_none());
}

#[test]
fn a_paused_device_goes_on_with_what_came_up_meanwhile() {
    let fixture = Fixture::new();
    let mut queue = fixture.running();
    fixture.transport.pause();
    queue.add(&[Part::Write(8)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert!(queue.used().is_none());
    fixture.transport.resume();
    assert_eq!(queue.used().unwrap().len, 8);
}

#[test]
fn another_transport_goes_on_from_a_saved_state() {
    let fixture = Fixture::new();
    let mut queue = fixture.running();
    queue.add(&[Part::Write(8)]);
    fixture.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    fixture.transport.pause();
    queue.add(&[Part::Write(12)]);
    let state = postcard::to_stdvec(&fixture.transport.save()).unwrap();

    let mut other = Fixture::new();
    other.transport = MmioTransport::new(
        Box::new(Rng::new()),
        fixture.guest.memory,
        other.pin.clone(),
        Arc::new(|_, _| ()),
    )
    .unwrap();
    other.transport.restore(&postcard::from_bytes(&state).unwrap()).unwrap();
    assert_eq!(other.read(VIRTIO_MMIO_STATUS), 15);
    assert_eq!(other.pulses(), 1, "the interrupt is still pending");
    other.transport.resume();
    let lengths: Vec<_> = queue.all_used().iter().map(|used| used.len).collect();
    assert_eq!(lengths, [8, 12], "neither lost nor done twice");
}

#[test]
fn devices_do_not_take_each_others_state() {
    let guest = Guest::new();
    let switch = Switch::new("vlan 1");
    let card = |last| -> Box<dyn VirtioDevice> {
        let spec = NetSpec { mac: Mac([2, 0, 0, 0, 0, last]) };
        Box::new(Net::new(&spec, Arc::new(switch.add_port("m"))).unwrap())
    };
    let behind = |device| {
        let (memory, pin) = (guest.memory.clone(), Arc::new(TestPin::default()));
        MmioTransport::new(device, memory, pin, Arc::new(|_, _| ())).unwrap()
    };
    // Of another type, and of the same type.
    let others: [Box<dyn VirtioDevice>; 2] = [Box::new(Balloon::new().unwrap()), card(2)];
    for other in others {
        let devices = [behind(card(1)), behind(other)];
        let states = devices.each_ref().map(MmioTransport::save);
        for (device, state) in devices.iter().zip(states.iter().rev()) {
            let refused = device.restore(state).unwrap_err();
            assert!(matches!(refused, RestoreError::OtherDevice { .. }), "{refused:?}");
        }
        for (device, state) in devices.iter().zip(&states) {
            device.restore(state).unwrap();
        }
    }
}

#[test]
fn partial_accesses_to_registers_do_nothing() {
    let fixture = Fixture::new();
    let mut data = [7; 2];
    fixture.transport.read(0, &mut data);
    assert_eq!(data, [7; 2]);
    fixture.transport.write(VIRTIO_MMIO_STATUS.into(), &[1]);
    assert_eq!(fixture.read(VIRTIO_MMIO_STATUS), 0);
}

proptest! {
    #[test]
    fn no_sequence_of_writes_breaks_the_host(
        writes in prop::collection::vec((0_u64..0x200, any::<u32>(), 0_usize..9), 0..200)
    ) {
        let fixture = Fixture::new();
        for (offset, value, len) in writes {
            let mut data = u64::from(value).to_le_bytes().repeat(2);
            data.truncate(len);
            // Aligned ones reach registers; most drivers use small values.
            fixture.transport.write(offset & !3, &data);
            fixture.write(u32::try_from(offset & !3).unwrap(), value & 0xff);
            fixture.transport.read(offset, &mut data);
        }
    }
}
