use proptest::prelude::*;
use vm_memory::{Address, Bytes};

use super::*;
use crate::arch::layout;
use crate::memory;
use crate::virtio::testing::{DriverQueue, Guest, HOSTILE_MEMORY, Part, hostile_ring};

const SIZES: [u16; QUEUES] = [QUEUE_SIZE; QUEUES];
const PAGE: usize = 4096;

fn active(guest: &Guest) -> (Vec<DriverQueue>, BalloonHandle, Box<dyn ActiveDevice>) {
    let (drivers, activation) = guest.activation(&SIZES, F_REPORTING);
    let balloon = Balloon::new().unwrap();
    let handle = balloon.handle();
    let device = Box::new(balloon).activate(activation).ok().unwrap();
    (drivers, handle, device)
}

/// Sets `pages` pages aside, full of ones, and gives the number of the first.
fn filled_pages(guest: &Guest, pages: usize) -> u32 {
    let at = guest.alloc((pages + 1) * PAGE).next_multiple_of(PAGE as u64);
    guest.write(at, &vec![1; pages * PAGE]);
    u32::try_from(at / PAGE as u64).unwrap()
}

/// How many of the pages from number `first` the host backs, by mincore(2).
fn resident(guest: &Guest, first: u32, pages: usize) -> usize {
    let address = GuestAddress(u64::from(first) * PAGE as u64);
    let slice = guest.memory.get_slice(address, pages * PAGE).unwrap();
    let mut present = vec![0_u8; pages];
    let start = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the range is mapped guest memory, and `present` has a byte for each of its pages.
    let status = unsafe { libc::mincore(start.cast(), pages * PAGE, present.as_mut_ptr()) };
    assert_eq!(status, 0);
    present.iter().filter(|&&page| page & 1 == 1).count()
}

fn page_numbers(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

#[test]
fn inflated_pages_go_back_to_the_host_and_no_others() {
    let guest = Guest::new();
    let (mut drivers, _, mut device) = active(&guest);
    let first = filled_pages(&guest, 8);
    assert_eq!(resident(&guest, first, 8), 8);
    // Downwards, alone, and outside memory; the last number is cut off.
    let mut numbers = page_numbers(&[first + 2, first + 1, u32::MAX, first + 5]);
    numbers.extend(&first.to_le_bytes()[..3]);
    drivers[INFLATE].add(&[Part::Read(&numbers)]);
    device.notify(INFLATE).unwrap();
    assert_eq!(drivers[INFLATE].used().unwrap().len, 0);
    assert_eq!(resident(&guest, first, 8), 5);
    let start = u64::from(first) * PAGE as u64;
    for page in 0..8 {
        let kept = !matches!(page, 1 | 2 | 5);
        let expected = vec![u8::from(kept); PAGE];
        assert_eq!(guest.read(start + page * PAGE as u64, PAGE), expected, "page {page}");
    }
}

#[test]
fn deflating_gives_the_buffer_back() {
    let guest = Guest::new();
    let (mut drivers, _, mut device) = active(&guest);
    let first = filled_pages(&guest, 1);
    drivers[DEFLATE].add(&[Part::Read(&page_numbers(&[first]))]);
    device.notify(DEFLATE).unwrap();
    assert_eq!(drivers[DEFLATE].used().unwrap().len, 0);
    assert_eq!(resident(&guest, first, 1), 1);
}

#[test]
fn reported_ranges_lose_their_whole_pages_only() {
    let guest = Guest::new();
    let (mut drivers, _, mut device) = active(&guest);
    let first = filled_pages(&guest, 512);
    let start = u64::from(first) * PAGE as u64;
    let queue = &mut drivers[REPORTING];
    // A whole range, and one that begins and ends inside a page.
    queue.set_descriptor(0, start, u32::try_from(256 * PAGE).unwrap(), 2 | 1, 1);
    queue.set_descriptor(1, start + 300 * PAGE as u64 + 8, u32::try_from(2 * PAGE).unwrap(), 2, 0);
    queue.offer(0);
    device.notify(REPORTING).unwrap();
    assert_eq!(guest.interrupt.take_queue(REPORTING), 1);
    assert_eq!(resident(&guest, first, 512), 512 - 256 - 1);
    assert_eq!(guest.read(start + 300 * PAGE as u64, PAGE), [1; PAGE]);
    assert_eq!(guest.read(start + 301 * PAGE as u64, PAGE), [0; PAGE]);
}

#[test]
fn a_range_over_the_hole_takes_memory_on_both_sides_and_nothing_else() {
    let memory = memory::allocate(3072 + 64).unwrap();
    let at = |address| GuestAddress(address);
    let page = u32::try_from(layout::HOLE_START / PAGE as u64).unwrap();
    memory.write_obj(1_u8, at(layout::HOLE_START - 1)).unwrap();
    memory.write_obj(1_u8, at(layout::HOLE_END)).unwrap();
    let mut guest = Guest::new();
    guest.memory = memory;
    let (mut drivers, _, mut device) = active(&guest);
    let hole_end = u32::try_from(layout::HOLE_END / PAGE as u64).unwrap();
    let last = guest.memory.last_addr().raw_value() / PAGE as u64;
    let last = u32::try_from(last).unwrap();
    let numbers = [page - 1, page, page + 1, hole_end - 1, hole_end, last, last + 1];
    drivers[INFLATE].add(&[Part::Read(&page_numbers(&numbers))]);
    device.notify(INFLATE).unwrap();
    assert!(drivers[INFLATE].used().is_some());
    assert_eq!(guest.memory.read_obj::<u8>(at(layout::HOLE_START - 1)).unwrap(), 0);
    assert_eq!(guest.memory.read_obj::<u8>(at(layout::HOLE_END)).unwrap_or(0), 0);
}

#[test]
fn the_host_sets_a_target_and_sees_what_the_guest_does() {
    let guest = Guest::new();
    let (_, handle, mut device) = active(&guest);
    device.host_event().unwrap();
    assert_eq!(guest.interrupt.take_config(), 0);
    handle.set_target(0x1234);
    device.host_event().unwrap();
    device.host_event().unwrap();
    assert_eq!(guest.interrupt.take_config(), 1);
    let mut config = [0xff; 12];
    device.read_config(0, &mut config);
    assert_eq!(config, [0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);

    assert!(!handle.wait_for_size(Duration::ZERO, |pages| pages == 7));
    let waiter = {
        let handle = handle.clone();
        std::thread::spawn(move || handle.wait_for_size(Duration::from_secs(60), |n| n == 7))
    };
    device.write_config(0, &9_u32.to_le_bytes());
    device.write_config(4, &[1]);
    device.write_config(4, &7_u32.to_le_bytes());
    assert!(waiter.join().unwrap());
    assert_eq!(handle.size(), 7);
    device.read_config(0, &mut config);
    assert_eq!(config[..8], [0x34, 0x12, 0, 0, 7, 0, 0, 0], "only the device sets the target");
}

#[test]
fn a_driver_that_does_not_report_needs_no_queue_for_it() {
    let guest = Guest::new();
    let (_, mut activation) = guest.activation(&SIZES, 0);
    activation.queues[REPORTING] = None;
    let mut device = Box::new(Balloon::new().unwrap()).activate(activation).ok().unwrap();
    device.host_event().unwrap();
    assert_eq!(device.queue_positions()[REPORTING], None);

    let (_, mut activation) = guest.activation(&SIZES, F_REPORTING);
    activation.queues[REPORTING] = None;
    let (_, error) = Box::new(Balloon::new().unwrap()).activate(activation).err().unwrap();
    assert!(matches!(error, DeviceError::Queue { index: REPORTING, .. }));
}

#[test]
fn sizes_and_positions_outlive_a_restore() {
    let guest = Guest::new();
    let (mut drivers, handle, mut device) = active(&guest);
    handle.set_target(10);
    device.write_config(4, &10_u32.to_le_bytes());
    let first = filled_pages(&guest, 2);
    drivers[INFLATE].add(&[Part::Read(&page_numbers(&[first]))]);
    device.notify(INFLATE).unwrap();
    device.pause();
    let (state, positions) = (device.save(), device.queue_positions());
    drop(device);

    let mut restored = Box::new(Balloon::new().unwrap());
    restored.restore(&state).unwrap();
    let handle = restored.handle();
    let activation = guest.reactivation(&drivers, F_REPORTING, &positions);
    let mut device = restored.activate(activation).ok().unwrap();
    assert_eq!(handle.size(), 10);
    drivers[INFLATE].add(&[Part::Read(&page_numbers(&[first + 1]))]);
    device.notify(INFLATE).unwrap();
    assert_eq!(drivers[INFLATE].all_used().len(), 2);
    assert_eq!(resident(&guest, first, 2), 0);

    let inactive = device.reset();
    assert_eq!(handle.size(), 0, "a new driver starts with an empty balloon");
    let (_, activation) = guest.activation(&SIZES, F_REPORTING);
    let mut device = inactive.activate(activation).ok().unwrap();
    guest.interrupt.take_config();
    device.host_event().unwrap();
    assert_eq!(guest.interrupt.take_config(), 1, "and hears what the host wants");
}

#[test]
fn a_chain_of_endless_page_numbers_is_cut() {
    let guest = Guest::new();
    let (mut drivers, _, mut device) = active(&guest);
    let first = filled_pages(&guest, 1);
    let mut numbers = vec![0xff; 4 * MAX_PAGES];
    numbers.extend(page_numbers(&[first]));
    drivers[INFLATE].add(&[Part::Read(&numbers)]);
    device.notify(INFLATE).unwrap();
    assert!(drivers[INFLATE].used().is_some());
    assert_eq!(resident(&guest, first, 1), 1);
}

proptest! {
    #[test]
    fn runs_cover_what_they_join(pages in prop::collection::vec(prop_oneof![
        4 => 0..16_u32, 1 => u32::MAX - 3..=u32::MAX,
    ], 0..32)) {
        let joined: std::collections::BTreeSet<u64> = runs(pages.iter().copied())
            .flat_map(|(first, count)| u64::from(first)..u64::from(first) + count)
            .collect();
        let expected = pages.into_iter().map(u64::from).collect();
        prop_assert_eq!(joined, expected);
    }

    #[test]
    fn hostile_chains_do_no_harm(
        rings in prop::collection::vec(hostile_ring(), QUEUES), target in any::<u32>(),
    ) {
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let mut drivers: Vec<_> = (0..3).map(|index| guest.driver(index, 16)).collect();
        let positions = [Some(Position::default()); QUEUES];
        let activation = guest.reactivation(&drivers, F_REPORTING, &positions);
        let balloon = Balloon::new().unwrap();
        balloon.handle().set_target(target);
        let mut device = Box::new(balloon).activate(activation).ok().unwrap();
        for (driver, ring) in drivers.iter_mut().zip(&rings) {
            driver.corrupt(ring);
        }
        for index in 0..=QUEUES {
            let _ = device.notify(index);
        }
        let _ = device.host_event();
        prop_assert_eq!(guest.read(0, 16).len(), 16, "the memory is still mapped");
    }
}
