//! What benchmarks do inside of a guest that no command there does. Says on the console what it begins and what it has
//! done.
//!
//! ```text
//! bench-guest disk DEVICE MIB   reads and writes all of it, and pages at random, past the guest's cache
//! bench-guest memory MIB        uses so much memory for the first time, and again
//! ```

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::fcntl::OFlag;

const PAGE: usize = 4096;
const PAGES_IN_MIB: usize = (1 << 20) / PAGE;
/// How many pages are read, and how many written.
const AT_RANDOM: usize = 1000;

/// What is read and written past a cache has to begin where a page does.
#[repr(align(4096))]
struct Mib([u8; 1 << 20]);

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["disk", device, mib] => disk(device, number(mib)?),
        ["memory", mib] => {
            memory(number(mib)?);
            Ok(())
        }
        _ => Err(io::Error::other("bench-guest disk DEVICE MIB | memory MIB")),
    }
}

fn number(text: &str) -> io::Result<usize> {
    text.parse().map_err(io::Error::other)
}

fn step<T>(name: &str, work: impl FnOnce() -> T) -> T {
    println!("begin {name}");
    let done = work();
    println!("end {name}");
    done
}

fn disk(device: &str, mib: usize) -> io::Result<()> {
    let direct = OFlag::O_DIRECT.bits();
    let disk = OpenOptions::new().read(true).write(true).custom_flags(direct).open(device)?;
    let mut buffer = Mib([0; 1 << 20]);
    let whole = &mut buffer.0;
    let all = |one: &mut dyn FnMut(u64) -> io::Result<()>| {
        (0..mib as u64).map(|at| at << 20).try_for_each(one)
    };
    let pages = || random_pages(mib * PAGES_IN_MIB);
    step("read", || all(&mut |at| disk.read_exact_at(whole, at)))?;
    step("write", || {
        all(&mut |at| disk.write_all_at(whole, at))?;
        disk.sync_data()
    })?;
    let page = &mut whole[..PAGE];
    step(&format!("read {AT_RANDOM} pages"), || {
        pages().try_for_each(|at| disk.read_exact_at(page, at))
    })?;
    step(&format!("write {AT_RANDOM} pages"), || {
        pages().try_for_each(|at| disk.write_all_at(page, at))?;
        File::sync_data(&disk)
    })
}

/// Where pages begin, in an order without a pattern, the same each time.
fn random_pages(count: usize) -> impl Iterator<Item = u64> {
    // The multiplier and the increment are those of Knuth's MMIX.
    let mut state = 1_u64;
    (0..AT_RANDOM).map(move |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % count as u64 * PAGE as u64
    })
}

fn memory(mib: usize) {
    let touch = |memory: &mut [u8]| memory.chunks_mut(PAGE).for_each(|page| page[0] = 1);
    // Such an allocation is a mapping of its own, and gone when it is dropped.
    let fresh = || vec![0_u8; mib << 20];
    let mut memory = fresh();
    step("touch", || touch(black_box(&mut memory)));
    step("touch again", || touch(black_box(&mut memory)));
    drop(memory);
    let mut memory = fresh();
    // The host has given the guest what it needs.
    step("touch what another had", || touch(black_box(&mut memory)));
}
