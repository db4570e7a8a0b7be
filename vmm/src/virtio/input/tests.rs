use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{DriverQueue, Guest, HOSTILE_MEMORY, Part, Used, hostile_ring};

const SIZES: [u16; 2] = [QUEUE_SIZE; 2];
/// `KEY_A` and `KEY_LEFTSHIFT`.
const A: u16 = 30;
const SHIFT: u16 = 42;
const SYN: (u16, u16, i32) = (0, 0, 0);

struct Bench {
    guest: Guest,
    drivers: Vec<DriverQueue>,
    device: Box<dyn ActiveDevice>,
    handle: InputHandle,
}

fn bench(kind: Kind) -> Bench {
    let guest = Guest::new();
    let (drivers, activation) = guest.activation(&SIZES, 0);
    let input = Input::new(kind).unwrap();
    let handle = input.handle();
    let device = Box::new(input).activate(activation).ok().unwrap();
    Bench { guest, drivers, device, handle }
}

/// What the guest has heard, in buffers of `count` that it gives first.
fn heard(
    driver: &mut DriverQueue,
    device: &mut dyn ActiveDevice,
    count: usize,
) -> Vec<(u16, u16, i32)> {
    for _ in 0..count {
        driver.add(&[Part::Write(8)]);
    }
    device.notify(EVENTS).unwrap();
    let event = |used: Used| {
        let word = |at| u16::from_le_bytes([used.data[at], used.data[at + 1]]);
        let value = i32::from_le_bytes(used.data[4..8].try_into().unwrap());
        (word(0), word(2), value)
    };
    driver.all_used().into_iter().map(event).collect()
}

impl Bench {
    fn heard(&mut self, count: usize) -> Vec<(u16, u16, i32)> {
        heard(&mut self.drivers[EVENTS], self.device.as_mut(), count)
    }

    /// What the guest reads of a selection: as Linux does, byte by byte.
    fn described(&mut self, select: u32, subselect: u16) -> Vec<u8> {
        self.device.write_config(0, &[u8::try_from(select).unwrap()]);
        self.device.write_config(1, &[u8::try_from(subselect).unwrap()]);
        let byte = |device: &dyn ActiveDevice, at| {
            let mut byte = [0xff];
            device.read_config(at, &mut byte);
            byte[0]
        };
        let size = byte(self.device.as_ref(), 2);
        (0..u64::from(size)).map(|at| byte(self.device.as_ref(), 8 + at)).collect()
    }
}

#[test]
fn keys_come_in_order_and_repeat_only_when_told() {
    let mut bench = bench(Kind::Keyboard);
    let keys = &bench.handle;
    keys.key(SHIFT, true);
    keys.key(A, true);
    keys.key(A, true);
    keys.key(A, true);
    keys.key(A, false);
    keys.key(SHIFT, false);
    keys.key(SHIFT, false);
    // No such keys.
    keys.key(0, true);
    keys.key(300, true);
    keys.move_to(1, 1);
    keys.wheel(1);
    bench.device.host_event().unwrap();
    let expected = [
        (EV_KEY, SHIFT, 1),
        SYN,
        (EV_KEY, A, 1),
        SYN,
        (EV_KEY, A, 2),
        SYN,
        (EV_KEY, A, 0),
        SYN,
        (EV_KEY, SHIFT, 0),
        SYN,
    ];
    assert_eq!(bench.heard(20), expected);
    assert_eq!(bench.guest.interrupt.take_queue(EVENTS), 1, "one interrupt for the batch");
    assert_eq!(bench.heard(0), []);
}

#[test]
fn a_report_comes_whole_or_not_yet() {
    let mut bench = bench(Kind::Tablet);
    bench.handle.move_to(10, 20);
    // Only where it is in the end matters.
    bench.handle.move_to(u16::MAX, 30);
    bench.handle.button(BTN_LEFT, true);
    bench.handle.wheel(-2);
    bench.handle.key(A, true);
    assert_eq!(bench.heard(2), []);
    let position = [(EV_ABS, ABS_X, 32767), (EV_ABS, ABS_Y, 30), SYN];
    assert_eq!(bench.heard(2), position);
    assert_eq!(bench.heard(4), [(EV_KEY, BTN_LEFT, 1), SYN, (EV_REL, REL_WHEEL, -2), SYN]);
}

#[test]
fn what_is_typed_before_the_driver_comes_waits_for_it() {
    let guest = Guest::new();
    let input = Input::new(Kind::Keyboard).unwrap();
    let handle = input.handle();
    handle.key(A, true);
    handle.key(A, false);
    let (mut drivers, activation) = guest.activation(&SIZES, 0);
    let mut device = Box::new(input).activate(activation).ok().unwrap();
    device.host_event().unwrap();
    let events = heard(&mut drivers[EVENTS], device.as_mut(), 8);
    assert_eq!(events, [(EV_KEY, A, 1), SYN, (EV_KEY, A, 0), SYN]);
}

#[test]
fn a_guest_that_does_not_look_costs_bounded_memory_and_no_key_hangs() {
    let mut bench = bench(Kind::Keyboard);
    bench.handle.key(SHIFT, true);
    for _ in 0..100_000 {
        bench.handle.key(A, true);
        bench.handle.key(A, false);
    }
    bench.handle.key(SHIFT, false);
    assert!(bench.handle.0.waiting().reports.len() < 5000);
    let mut down = std::collections::BTreeSet::new();
    let mut room = QUEUE_SIZE.into();
    while room > 0 {
        let events = bench.heard(room);
        room = events.len();
        for (kind, code, value) in events {
            match (kind, value) {
                (EV_KEY, 1) => assert!(down.insert(code)),
                (EV_KEY, 0) => assert!(down.remove(&code)),
                _ => {}
            }
        }
    }
    assert!(down.is_empty());
    bench.handle.key(A, true);
    assert_eq!(bench.heard(0), [(EV_KEY, A, 1), SYN], "there is room again");
}

#[test]
fn a_pause_releases_what_is_down_and_a_restore_keeps_what_waits() {
    let mut bench = bench(Kind::Keyboard);
    bench.handle.key(SHIFT, true);
    assert_eq!(bench.heard(2), [(EV_KEY, SHIFT, 1), SYN]);
    bench.handle.key(A, true);
    bench.device.pause();
    bench.device.write_config(0, &[1]);
    let (state, positions) = (bench.device.save(), bench.device.queue_positions());
    let expected = [(EV_KEY, A, 1), SYN, (EV_KEY, A, 0), SYN, (EV_KEY, SHIFT, 0), SYN].as_slice();

    let mut restored = Box::new(Input::new(Kind::Keyboard).unwrap());
    restored.restore(&state).unwrap();
    let activation = bench.guest.reactivation(&bench.drivers, 0, &positions);
    let mut device = restored.activate(activation).ok().unwrap();
    assert_eq!(heard(&mut bench.drivers[EVENTS], device.as_mut(), 10), expected);
    let mut name = [0; 5];
    device.read_config(8, &mut name);
    assert_eq!(&name, b"firn ", "the selection is part of the state");

    // A key that is held for ever in a state that says so is released, too.
    let mut held = Waiting::default();
    held.reports.push_back(handle::Report::Key { code: A, down: true });
    let mut other = Input::new(Kind::Keyboard).unwrap();
    other.handle().key(A, true);
    other.restore(&other.save()).unwrap();
    held.reports.push_back(handle::Report::Key { code: A, down: false });
    assert_eq!(other.shared.waiting().reports, held.reports);
}

#[test]
fn a_reset_forgets_what_was_for_the_driver_before() {
    let mut bench = bench(Kind::Keyboard);
    bench.handle.key(A, true);
    let (handle, guest) = (bench.handle.clone(), bench.guest.clone());
    bench.device.write_config(0, &[1, 0]);
    let inactive = bench.device.reset();
    let (mut drivers, activation) = guest.activation(&SIZES, 0);
    let mut device = inactive.activate(activation).ok().unwrap();
    handle.key(SHIFT, true);
    let events = heard(&mut drivers[EVENTS], device.as_mut(), 8);
    assert_eq!(events, [(EV_KEY, SHIFT, 1), SYN]);
    handle.release_all();
    assert_eq!(heard(&mut drivers[EVENTS], device.as_mut(), 0), [(EV_KEY, SHIFT, 0), SYN]);
}

#[test]
fn lamps_are_taken_note_of_and_small_buffers_cost_the_device() {
    let mut bench = bench(Kind::Keyboard);
    bench.drivers[STATUS].add(&[Part::Read(&[0x11, 0, 1, 0, 1, 0, 0, 0])]);
    bench.device.notify(STATUS).unwrap();
    assert_eq!(bench.drivers[STATUS].used().unwrap().len, 0);
    bench.drivers[EVENTS].add(&[Part::Write(7)]);
    bench.drivers[EVENTS].add(&[Part::Write(8)]);
    bench.device.notify(EVENTS).unwrap();
    bench.handle.key(A, true);
    let error = bench.device.host_event().unwrap_err();
    assert!(matches!(error, DeviceError::Request(_)), "{error}");
}

#[test]
fn the_guest_is_told_what_there_is() {
    let mut keyboard = bench(Kind::Keyboard);
    assert_eq!(keyboard.described(CFG_ID_NAME, 0), b"firn keyboard");
    assert_eq!(keyboard.described(CFG_ID_DEVIDS, 0), [6, 0, 0xf4, 0x1a, 1, 0, 1, 0]);
    let keys = keyboard.described(CFG_EV_BITS, EV_KEY);
    assert_eq!((keys.len(), keys[0], keys[28]), (29, 0xfe, 0xff));
    assert_eq!(keyboard.described(CFG_EV_BITS, EV_LED), [7]);
    // EV_REP
    assert_eq!(keyboard.described(CFG_EV_BITS, 0x14), [], "Linux repeats no key by itself");
    assert_eq!(keyboard.described(CFG_EV_BITS, EV_ABS), []);
    assert_eq!(keyboard.described(0, 0), []);
    assert_eq!(keyboard.described(255, 255), []);
    let mut tablet = bench(Kind::Tablet);
    assert_eq!(tablet.described(CFG_ID_NAME, 0), b"firn tablet");
    let buttons = tablet.described(CFG_EV_BITS, EV_KEY);
    assert_eq!((buttons.len(), buttons[33], buttons[34]), (35, 0, 0x1f));
    assert_eq!(tablet.described(CFG_EV_BITS, EV_REL), [0, 1]);
    assert_eq!(tablet.described(CFG_EV_BITS, EV_ABS), [3]);
    let places = [&[0; 4][..], &32767_u32.to_le_bytes(), &[0; 12]].concat();
    assert_eq!(tablet.described(CFG_ABS_INFO, ABS_X), places);
    assert_eq!(tablet.described(CFG_ABS_INFO, 2), []);
    tablet.device.write_config(u64::MAX, &[1, 1]);
    assert_ne!(tablet.device.identity(), keyboard.device.identity());
}

proptest! {
    #[test]
    fn hostile_chains_do_no_harm(rings in prop::collection::vec(hostile_ring(), 2)) {
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let mut drivers: Vec<_> = (0..2).map(|index| guest.driver(index, 16)).collect();
        let activation = guest.reactivation(&drivers, 0, &[Some(Position::default()); 2]);
        let input = Input::new(Kind::Tablet).unwrap();
        let handle = input.handle();
        let mut device = Box::new(input).activate(activation).ok().unwrap();
        for (driver, ring) in drivers.iter_mut().zip(&rings) {
            driver.corrupt(ring);
        }
        handle.move_to(1, 2);
        handle.button(BTN_LEFT, true);
        for index in 0..3 {
            let _ = device.notify(index);
        }
        let _ = device.host_event();
    }
}
