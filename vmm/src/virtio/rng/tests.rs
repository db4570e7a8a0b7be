use proptest::proptest;

use super::*;
use crate::virtio::testing::{
    DriverQueue, Guest, HOSTILE_MEMORY, Part, hostile_ring, refused_without_queue,
};

fn active(guest: &Guest) -> (DriverQueue, Box<dyn ActiveDevice>) {
    let (mut drivers, activation) = guest.activation(&[QUEUE_SIZE], 0);
    let device = Box::new(Rng::new()).activate(activation).ok().unwrap();
    (drivers.remove(0), device)
}

#[test]
fn buffers_come_back_full_of_different_bytes() {
    let guest = Guest::new();
    let (mut driver, mut device) = active(&guest);
    driver.add(&[Part::Write(64), Part::Write(3)]);
    driver.add(&[Part::Write(64)]);
    device.notify(REQUESTS).unwrap();
    let used = driver.all_used();
    assert_eq!([used[0].len, used[1].len], [67, 64]);
    assert_ne!(used[0].data[..64], used[1].data);
    assert_eq!(guest.interrupt.take_queue(REQUESTS), 1, "one interrupt for the batch");
}

#[test]
fn one_chain_gets_a_bounded_share() {
    let guest = Guest::new();
    let (mut driver, mut device) = active(&guest);
    driver.add(&[Part::Write(MAX_BYTES), Part::Write(1)]);
    device.notify(REQUESTS).unwrap();
    assert_eq!(driver.used().unwrap().data.len(), MAX_BYTES);
}

#[test]
fn a_chain_without_room_comes_back_empty() {
    let guest = Guest::new();
    let (mut driver, mut device) = active(&guest);
    driver.add(&[Part::Read(b"seed")]);
    driver.set_descriptor(63, u64::MAX - 1, 8, 2, 0);
    device.notify(REQUESTS).unwrap();
    assert_eq!(driver.used().unwrap().len, 0);
}

#[test]
fn it_needs_its_queue() {
    let device = refused_without_queue(Box::new(Rng::new()));
    assert_eq!(device.device_type(), 4);
}

#[test]
fn it_goes_on_after_a_restore_and_works_after_a_reset() {
    let guest = Guest::new();
    let (mut driver, mut device) = active(&guest);
    driver.add(&[Part::Write(8)]);
    device.notify(REQUESTS).unwrap();
    device.pause();
    let (state, positions) = (device.save(), device.queue_positions());
    drop(device);

    let mut restored = Box::new(Rng::new());
    restored.restore(&state).unwrap();
    let mut drivers = [driver];
    let activation = guest.reactivation(&drivers, 0, &positions);
    let mut device = restored.activate(activation).ok().unwrap();
    drivers[0].add(&[Part::Write(8)]);
    device.notify(REQUESTS).unwrap();
    assert_eq!(drivers[0].all_used().len(), 2);

    let inactive = device.reset();
    let (mut drivers, activation) = guest.activation(&[QUEUE_SIZE], 0);
    let mut device = inactive.activate(activation).ok().unwrap();
    drivers[0].add(&[Part::Write(8)]);
    device.notify(REQUESTS).unwrap();
    assert_eq!(drivers[0].used().unwrap().len, 8);
}

#[test]
fn states_of_other_versions_are_refused() {
    let state = SavedState { version: STATE_VERSION + 1, data: Vec::new() };
    assert!(matches!(Rng::new().restore(&state), Err(RestoreError::Version { found: 2, .. })));
}

proptest! {
    #[test]
    fn hostile_chains_do_no_harm(ring in hostile_ring()) {
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let mut driver = guest.driver(0, 16);
        let activation = guest.reactivation(
            std::slice::from_ref(&driver), 0, &[Some(Position::default())],
        );
        let mut device = Box::new(Rng::new()).activate(activation).ok().unwrap();
        driver.corrupt(&ring);
        let _ = device.notify(REQUESTS);
    }
}
