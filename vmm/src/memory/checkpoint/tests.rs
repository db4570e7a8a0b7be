use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use vm_memory::GuestAddress;

use super::*;
use crate::memory::{Memory, allocate, allocate_at};

/// Two guests' worth of memory: one that a machine has, and beside it a frame buffer.
fn memories() -> [Memory; 2] {
    [allocate(8).unwrap(), allocate_at(crate::arch::layout::FRAME_BUFFER_START, 5000).unwrap()]
}

fn write(memory: &Memory, at: u64, value: u8) {
    let start = memory.iter().next().unwrap().start_addr().0;
    memory.write_obj(value, GuestAddress(start + at)).unwrap();
}

fn read(memory: &Memory, at: u64) -> u8 {
    let start = memory.iter().next().unwrap().start_addr().0;
    memory.read_obj(GuestAddress(start + at)).unwrap()
}

fn private(memory: &Memory) -> u64 {
    let mut bytes = 0;
    for region in memory.iter() {
        private_pages(region, |range| {
            bytes += range.end - range.start;
            Ok(())
        })
        .unwrap();
    }
    bytes
}

#[test]
fn other_memory_begins_with_a_checkpoint_and_takes_only_what_differs() {
    let [ram, screen] = &memories();
    let mut backing = Backing::default();
    write(ram, 0x1000, 1);
    write(screen, 4999, 3);
    backing.checkpoint(&[ram, screen]).unwrap();
    write(ram, 0x2000, 2);
    let then = backing.checkpoint(&[ram, screen]).unwrap();
    write(ram, 0x1000, 9);

    let [other, beside] = &memories();
    let mut others = Backing::default();
    others.roll_back(&[other, beside], &then).unwrap();
    assert_eq!([read(other, 0x1000), read(other, 0x2000), read(beside, 4999)], [1, 2, 3]);
    assert_eq!(private(other), PAGE as u64, "the rest is shared");
    write(other, 0x3000, 4);
    assert_eq!([read(ram, 0x1000), read(ram, 0x3000)], [9, 0]);
    others.roll_back(&[other, beside], &then).unwrap();
    assert_eq!(read(other, 0x3000), 0);
    let small = allocate(4).unwrap();
    Backing::default().roll_back(&[&small, beside], &then).expect_err("another machine's");
}

#[test]
fn memory_goes_back_to_each_checkpoint_as_often_as_wanted() {
    let [ram, screen] = &memories();
    let both: [&MemoryMap; 2] = [ram, screen];
    let mut backing = Backing::default();
    write(ram, 0x1000, 1);
    write(ram, 0x40_0000, 2);
    write(screen, 4999, 3);
    let first = backing.checkpoint(&both).unwrap();
    assert_eq!([read(ram, 0x1000), read(ram, 0x40_0000), read(screen, 4999)], [1, 2, 3]);
    assert_eq!(private(ram), 0, "nothing is copied twice");

    write(ram, 0x1000, 11);
    write(ram, 0x2000, 12);
    let second = backing.checkpoint(&both).unwrap();
    for _ in 0..3 {
        write(ram, 0x1000, 21);
        write(ram, 0x3000, 22);
        write(screen, 0, 23);
        (0..64).for_each(|page| write(ram, 0x20_0000 + page * PAGE as u64, 24));
        backing.roll_back(&both, &second).unwrap();
        let values = [0x1000, 0x2000, 0x3000, 0x40_0000].map(|at| read(ram, at));
        assert_eq!((values, read(screen, 0)), ([11, 12, 0, 2], 0));
        assert_eq!(private(ram), 3 * PAGE as u64, "the filled pages are given back");
        assert_eq!((0..64).map(|page| read(ram, 0x20_0000 + page * PAGE as u64)).max(), Some(0));
    }
    backing.roll_back(&both, &first).unwrap();
    let values = [0x1000, 0x2000, 0x3000, 0x40_0000].map(|at| read(ram, at));
    assert_eq!((values, read(screen, 4999)), ([1, 0, 0, 2], 3));
    backing.roll_back(&both, &second).unwrap();
    assert_eq!([read(ram, 0x1000), read(ram, 0x2000)], [11, 12]);
}

#[test]
fn cleared_memory_is_zero_and_can_still_go_back() {
    let [ram, screen] = &memories();
    let both: [&MemoryMap; 2] = [ram, screen];
    let mut backing = Backing::default();
    write(ram, 0x1000, 1);
    backing.clear(&both).unwrap();
    assert_eq!(read(ram, 0x1000), 0);
    write(ram, 0x1000, 2);
    let before = backing.checkpoint(&both).unwrap();
    backing.clear(&both).unwrap();
    assert_eq!(read(ram, 0x1000), 0, "not what the checkpoint has");
    write(ram, 0x2000, 3);
    let after = backing.checkpoint(&both).unwrap();
    backing.roll_back(&both, &before).unwrap();
    assert_eq!([read(ram, 0x1000), read(ram, 0x2000)], [2, 0]);
    backing.roll_back(&both, &after).unwrap();
    assert_eq!([read(ram, 0x1000), read(ram, 0x2000)], [0, 3]);
}

#[test]
fn a_thousand_roll_backs_keep_little() {
    let [ram, screen] = &memories();
    let both: [&MemoryMap; 2] = [ram, screen];
    let mut backing = Backing::default();
    write(ram, 0, 1);
    let first = backing.checkpoint(&both).unwrap();
    // Tests beside this one map memory, too: only what belongs to this memory counts.
    let mappings = || {
        let start = ram.iter().next().unwrap().as_ptr().addr();
        let maps = fs::read("/proc/self/maps").unwrap();
        let maps = String::from_utf8_lossy(&maps);
        let inside = maps.lines().filter(|line| {
            let at = usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
            (start..start + (8 << 20)).contains(&at)
        });
        inside.count()
    };
    for round in 0..1000_u64 {
        write(ram, round * PAGE as u64, 7);
        let nested = backing.checkpoint(&both).unwrap();
        write(ram, 0x70_0000, 8);
        backing.roll_back(&both, &nested).unwrap();
        backing.roll_back(&both, &first).unwrap();
    }
    assert_eq!((mappings(), read(ram, 0)), (1, 1));
    assert!(private(ram) <= KEPT, "{}", private(ram));
}

#[test]
fn little_stays_private_after_a_roll_back() {
    let ram = allocate(16).unwrap();
    let mut backing = Backing::default();
    let first = backing.checkpoint(&[&ram]).unwrap();
    let scattered = (0..16 << 20).step_by(2 * PAGE);
    for _ in 0..2 {
        scattered.clone().for_each(|at| write(&ram, at, 1));
        backing.roll_back(&[&ram], &first).unwrap();
        assert!(scattered.clone().all(|at| read(&ram, at) == 0));
        assert_eq!(private(&ram), KEPT);
    }
}

#[test]
fn memory_of_another_size_is_refused() {
    let [ram, _] = &memories();
    let other = allocate(16).unwrap();
    let checkpoint = Backing::default().checkpoint(&[&other]).unwrap();
    write(ram, 0, 1);
    assert!(Backing::default().roll_back(&[ram], &checkpoint).is_err());
    assert_eq!(read(ram, 0), 1);
}

#[test]
fn ranges_without_others() {
    let parts = |range: (u64, u64), holes: &[(u64, u64)]| {
        let holes: Vec<_> = holes.iter().map(|&(start, end)| start..end).collect();
        let mut parts = Vec::new();
        without(&(range.0..range.1), &holes, |part| {
            parts.push((part.start, part.end));
            Ok(())
        })
        .unwrap();
        parts
    };
    assert_eq!(parts((0, 10), &[]), [(0, 10)]);
    assert_eq!(parts((2, 8), &[(0, 2), (3, 4), (6, 9)]), [(2, 3), (4, 6)]);
    assert_eq!(parts((2, 8), &[(0, 10)]), []);
    assert_eq!(parts((2, 8), &[(0, 1), (8, 9)]), [(2, 8)]);
}

#[test]
fn what_was_written_to_a_file_can_be_gone_on_from() {
    let [ram, screen] = &memories();
    let both: [&MemoryMap; 2] = [ram, screen];
    let mut backing = Backing::default();
    write(ram, 0x1000, 1);
    write(ram, 0x40_0000, 2);
    write(screen, 4999, 3);
    backing.checkpoint(&both).unwrap();
    // What has changed since counts, and zeros over what is in the base.
    write(ram, 0x1000, 0);
    write(ram, 0x2000, 4);
    let checkpoint = backing.checkpoint(&both).unwrap();
    for fixed in [false, true] {
        let named = tempfile::NamedTempFile::new().unwrap();
        let extents = checkpoint.write(named.as_file()).unwrap();
        assert_eq!(named.as_file().metadata().unwrap().len(), 3 * PAGE as u64);
        if fixed {
            named.as_file().set_permissions(Permissions::from_mode(0o400)).unwrap();
        }
        let file = || File::open(named.path()).unwrap();
        let read_back = MemoryCheckpoint::read(&extents, file()).unwrap();
        // One that can change is not needed any more, and any may be removed.
        if !fixed {
            named.as_file().set_len(0).unwrap();
            MemoryCheckpoint::read(&extents, file()).err().expect("it was cut short");
        }
        drop(named);
        goes_on(&read_back);
    }
}

/// Another machine begins with what [`what_was_written_to_a_file_can_be_gone_on_from`] has written.
fn goes_on(read_back: &MemoryCheckpoint) {
    let [ram, screen] = &memories();
    let both: [&MemoryMap; 2] = [ram, screen];
    write(ram, 0x3000, 8);
    let mut backing = Backing::default();
    for _ in 0..2 {
        backing.roll_back(&both, read_back).unwrap();
        let values = [0, 0x1000, 0x2000, 0x3000, 0x40_0000].map(|at| read(ram, at));
        assert_eq!((values, read(screen, 4999)), ([0, 0, 4, 0, 2], 3));
        // Over what it has, and over what was zero: a few pages, and many.
        [0x1000, 0x2000, 0x3000].into_iter().for_each(|at| write(ram, at, 9));
        (0..64).for_each(|page| write(ram, 0x3f_0000 + page * PAGE as u64, 9));
    }
    // Its own checkpoints have what it has changed.
    let later = backing.checkpoint(&both).unwrap();
    backing.roll_back(&both, read_back).unwrap();
    let file = tempfile::tempfile().unwrap();
    let extents = later.write(&file).unwrap();
    let again = MemoryCheckpoint::read(&extents, file).unwrap();
    for checkpoint in [&again, &later] {
        backing.roll_back(&both, checkpoint).unwrap();
        let values = [0, 0x1000, 0x3000, 0x3f_0000, 0x40_0000].map(|at| read(ram, at));
        assert_eq!((values, read(screen, 4999)), ([0, 9, 9, 9, 9], 3));
        assert_eq!(read(ram, 0x43_0000), 0);
    }
    backing.clear(&both).unwrap();
    assert_eq!([0x1000, 0x40_0000].map(|at| read(ram, at)), [0, 0]);
    let error = Backing::default().roll_back(&[ram], read_back).unwrap_err().to_string();
    assert!(error.contains("another machine"), "{error}");
}

#[test]
fn parts_that_cannot_be_mapped_are_copied() {
    let page = PAGE as u64;
    let part = |at, len| Part { at, len, from: 0 };
    assert!(can_be_mapped(&[]) && can_be_mapped(&[part(0, page), part(page, 2 * page)]));
    for parts in [
        vec![part(1, page)],
        vec![part(0, page - 1)],
        vec![part(page, page), part(0, page)],
        vec![part(0, 2 * page), part(page, page)],
        (0..=MAX_PARTS as u64).map(|at| part(at * page, page)).collect(),
    ] {
        assert!(!can_be_mapped(&parts), "{parts:?}");
    }
}
