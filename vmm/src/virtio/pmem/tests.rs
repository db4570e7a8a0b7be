use std::fs::{File, write};
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::erofs::Image;
use crate::memory::window::Windows;
use crate::virtio::testing::{
    DriverQueue, Guest, HOSTILE_MEMORY, NEXT, Part, WRITE, hostile_ring, refused_without_queue,
};

fn image(dir: &Path) -> Arc<Image> {
    let root = File::open(dir).unwrap();
    let image = Image::compose(&root, dir, "store", &fs::Filter::default(), &Cancel::default());
    Arc::new(image.unwrap_or_else(|error| panic!("{error}")))
}

/// A device for an image of a directory with this file.
fn pmem(content: &str) -> (TempDir, Box<Pmem>) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path().join("file"), content).unwrap();
    let window = Windows::new(512 << 20, 40).place("store", image(dir.path())).unwrap();
    (dir, Box::new(Pmem { window, queues: () }))
}

fn active(guest: &Guest) -> (DriverQueue, Box<dyn ActiveDevice>) {
    let (mut drivers, activation) = guest.activation(&[QUEUE_SIZE], 0);
    let device = pmem("x").1.activate(activation).ok().unwrap();
    (drivers.remove(0), device)
}

#[test]
fn it_says_where_the_image_is() {
    let (_dir, device) = pmem("x");
    let mut config = [0; 24];
    device.read_config(0, &mut config);
    assert_eq!(config[..8], (4_u64 << 30).to_le_bytes());
    assert_eq!(config[8..16], device.window.image.len().to_le_bytes());
    assert!(device.window.image.len().is_multiple_of(2 << 20));
    assert_eq!(config[16..], [0; 8]);
    assert_eq!((device.device_type(), device.name()), (27, "image store".to_owned()));
}

#[test]
fn it_flushes_and_does_nothing_else() {
    let guest = Guest::new();
    let (mut driver, mut device) = active(&guest);
    let flush = FLUSH.to_le_bytes();
    let requests: [(&[Part<'_>], &[u8]); 7] = [
        (&[Part::Read(&flush), Part::Write(4)], &[0, 0, 0, 0]),
        (&[Part::Read(&flush[..1]), Part::Read(&flush[1..]), Part::Write(9)], &[0, 0, 0, 0]),
        (&[Part::Read(&1_u32.to_le_bytes()), Part::Write(4)], &[1, 0, 0, 0]),
        (&[Part::Read(&flush[..3]), Part::Write(4)], &[1, 0, 0, 0]),
        (&[Part::Write(4)], &[1, 0, 0, 0]),
        (&[Part::Read(&flush), Part::Write(3)], &[]),
        (&[Part::Read(&flush)], &[]),
    ];
    for (request, _) in requests {
        driver.add(request);
    }
    device.notify(REQUESTS).unwrap();
    let used = driver.all_used();
    assert_eq!(used.len(), requests.len());
    for (used, (request, answer)) in used.iter().zip(requests) {
        assert_eq!(used.data, answer, "{request:?}");
    }
    assert_eq!(guest.interrupt.take_queue(REQUESTS), 1);
}

#[test]
fn buffers_in_the_image_are_outside_of_memory() {
    let guest = Guest::new();
    let (mut driver, mut device) = active(&guest);
    let flush = [Part::Read(&FLUSH.to_le_bytes()), Part::Write(4)];
    let (request, answer) = (driver.add(&flush), 0);
    driver.set_descriptor(request, 4 << 30, 4, NEXT, answer);
    device.notify(REQUESTS).unwrap();
    assert_eq!(driver.used().unwrap().data, FAILED.to_le_bytes());
    let (request, answer) = (driver.add(&flush), answer);
    assert_ne!(request, answer);
    driver.set_descriptor(answer, 4 << 30, 4, WRITE, 0);
    device.notify(REQUESTS).unwrap();
    assert_eq!(driver.used().unwrap().len, 0);
}

#[test]
fn it_needs_its_queue() {
    let device = refused_without_queue(pmem("x").1);
    assert_eq!(device.identity(), "store");
}

#[test]
fn it_goes_on_with_the_same_contents_only_and_works_after_a_reset() {
    let guest = Guest::new();
    let (driver, mut device) = active(&guest);
    device.pause();
    let (state, positions) = (device.save(), device.queue_positions());
    drop(device);

    let refused = pmem("y").1.restore(&state);
    assert!(matches!(refused, Err(RestoreError::OtherContents)), "{refused:?}");
    let other = SavedState { version: STATE_VERSION + 1, ..state.clone() };
    let (_dir, mut restored) = pmem("x");
    assert!(matches!(restored.restore(&other), Err(RestoreError::Version { found: 2, .. })));
    restored.restore(&state).unwrap();
    let mut drivers = [driver];
    let activation = guest.reactivation(&drivers, 0, &positions);
    let mut device = restored.activate(activation).ok().unwrap();
    let flush = [Part::Read(&FLUSH.to_le_bytes()), Part::Write(4)];
    drivers[0].add(&flush);
    device.notify(REQUESTS).unwrap();
    assert_eq!(drivers[0].used().unwrap().len, 4);

    let inactive = device.reset();
    let (mut drivers, activation) = guest.activation(&[QUEUE_SIZE], 0);
    let mut device = inactive.activate(activation).ok().unwrap();
    drivers[0].add(&flush);
    device.notify(REQUESTS).unwrap();
    assert_eq!(drivers[0].used().unwrap().len, 4);
}

#[test]
fn images_lie_behind_memory_and_behind_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    for (memory, expected) in [(512_u64, [4, 5]), (3 << 10, [4, 5]), ((7 << 10) + 1, [9, 10])] {
        let mut windows = Windows::new(memory << 20, 40);
        let found = [(); 2].map(|()| windows.place("store", image.clone()).unwrap().start);
        assert_eq!(found, expected.map(|gib: u64| gib << 30));
    }
    // 32 bits end where images begin.
    for (bits, fits) in [(32, false), (33, true), (64, true), (255, true)] {
        let placed = Windows::new(512 << 20, bits).place("store", image.clone());
        assert_eq!(placed.is_ok(), fits, "{bits}");
    }
    // Half of it is the books of these.
    let mut windows = Windows::new(128 << 10, 40);
    let placed = [(); 3].map(|()| windows.place("store", image.clone()).map_err(|e| e.to_string()));
    let books = "with an image of 2 MiB more than half of the guest's memory would be its books";
    assert!(placed[..2].iter().all(Result::is_ok));
    assert_eq!(placed[2].as_ref().err().unwrap(), books);
    let error = Windows::new(512 << 20, 32).place("store", image).err().unwrap();
    let expected =
        "an image of 2 MiB would end above the 32 bits of address that the host's processor has";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn without_room_for_the_image_it_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let share = ShareSpec::new("store".try_into().unwrap(), dir.path().to_owned());
    let refused = |share: &ShareSpec, bits| {
        let device = Pmem::new(share, &mut Windows::new(512 << 20, bits), &Cancel::default());
        device.err().expect("no device")
    };
    // As addresses of the guest, and as what an image can be.
    let mut found = vec![refused(&share, 32)];
    for name in ["1", "2"] {
        File::create(dir.path().join(name)).unwrap().set_len(5 << 40).unwrap();
    }
    found.push(refused(&share, 64));
    for error in found {
        let BuildError::NoRoom { tag, source } = error else { panic!("{error:?}") };
        assert!(tag == "store" && source.to_string().contains("would "), "{source}");
    }
    let missing = ShareSpec { source: dir.path().join("missing"), ..share };
    assert!(matches!(refused(&missing, 64), BuildError::Share(_)));
}

proptest! {
    #[test]
    fn hostile_chains_do_no_harm(ring in hostile_ring()) {
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let mut driver = guest.driver(0, 16);
        let activation = guest.reactivation(
            std::slice::from_ref(&driver), 0, &[Some(Position::default())],
        );
        let mut device = pmem("x").1.activate(activation).ok().unwrap();
        driver.corrupt(&ring);
        let _ = device.notify(REQUESTS);
    }
}
