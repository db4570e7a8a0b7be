//! Guest physical memory; [`crate::arch::layout`] says at which addresses.

pub mod checkpoint;
pub mod window;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use thiserror::Error;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

use crate::arch::layout;

/// Guest memory as mapped into this process.
///
/// The bitmap type is the one virtiofsd's FUSE server wants; the whole monitor uses it so that
/// there is one memory type. Without a bitmap installed it costs nothing but a lock read.
pub type MemoryMap = GuestMemoryMmap<BitmapMmapRegion>;

type Region = GuestRegionMmap<BitmapMmapRegion>;

/// A shared handle on guest memory.
pub type Memory = Arc<MemoryMap>;

const PAGE: usize = 4096;
/// How much is copied at once between memory and a file.
const CHUNK: usize = 256 * PAGE;

/// Size of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Why there is no guest memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// mmap failed.
    #[error("cannot map {mib} MiB of guest memory: {problem}")]
    Map {
        /// The amount asked for.
        mib: u64,
        /// Why it failed.
        problem: FromRangesError,
    },
    /// madvise failed.
    #[error("cannot keep guest memory out of child processes")]
    DontFork(#[source] io::Error),
    /// More than this machine can address.
    #[error("{0} MiB of guest memory are more than can be addressed")]
    TooLarge(u64),
}

/// Maps fresh, zeroed memory for a guest of `mib` MiB. Pages are allocated when they are first touched.
///
/// # Errors
/// The host does not have that much address space or memory.
pub fn allocate(mib: u64) -> Result<Memory, MemoryError> {
    let bytes = mib.checked_mul(1 << 20).ok_or(MemoryError::TooLarge(mib))?;
    map(&layout::ranges(bytes), mib)
}

/// Maps memory in the same way for `bytes` bytes, rounded up to whole pages, at the guest's address `start`.
///
/// # Errors
/// As for [`allocate`].
pub fn allocate_at(start: u64, bytes: u64) -> Result<Memory, MemoryError> {
    let bytes = bytes.next_multiple_of(PAGE as u64);
    map(&[(start, bytes)], bytes.div_ceil(1 << 20))
}

/// Maps `ranges` of addresses and lengths, `mib` MiB altogether.
fn map(ranges: &[(u64, u64)], mib: u64) -> Result<Memory, MemoryError> {
    let map = |problem| MemoryError::Map { mib, problem };
    let mut regions = Vec::new();
    for &(start, len) in ranges {
        let len = usize::try_from(len).map_err(|_| MemoryError::TooLarge(mib))?;
        let region = aligned_region(GuestAddress(start), len).map_err(map)?;
        keep_from_children(&region).map_err(MemoryError::DontFork)?;
        regions.push(region);
    }
    let memory = MemoryMap::from_regions(regions).map_err(|problem| map(problem.into()))?;
    Ok(Arc::new(memory))
}

/// Maps `len` bytes for the guest's address `start`, a multiple of [`HUGE_PAGE`], at such a multiple on the host too
/// if possible: otherwise KVM maps no huge pages, and the guest exits for each 4 KiB that it touches for the first
/// time.
fn aligned_region(start: GuestAddress, len: usize) -> Result<Region, FromRangesError> {
    // Another thread may take the gap. It is quick that way, not wrong.
    for _ in 0..4 {
        let gap = Gap::open(len);
        let mapping = MmapRegion::new(len)?;
        drop(gap);
        if mapping.as_ptr().addr().is_multiple_of(HUGE_PAGE) {
            return Region::new(mapping, start).ok_or(FromRangesError::InvalidGuestRegion);
        }
    }
    Region::new(MmapRegion::new(len)?, start).ok_or(FromRangesError::InvalidGuestRegion)
}

/// A gap in this process's address space that begins at a multiple of [`HUGE_PAGE`]. Linux maps at the highest address
/// that has room, so what is mapped next, and is as long as the gap, fills it.
struct Gap {
    /// What is reserved on both sides, until this is dropped.
    reserved: [(*mut libc::c_void, usize); 2],
}

impl Gap {
    fn open(len: usize) -> Option<Self> {
        let whole = len.checked_add(2 * HUGE_PAGE)?;
        let (none, flags) =
            (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping, wherever the kernel likes, touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), whole, none, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let before = base.addr().next_multiple_of(HUGE_PAGE) - base.addr();
        let gap = base.wrapping_byte_add(before);
        let behind = (gap.wrapping_byte_add(len), whole - before - len);
        // SAFETY: the range lies in the mapping made above (`before` is less than HUGE_PAGE), which nobody else knows.
        unsafe { libc::munmap(gap, len) };
        Some(Self { reserved: [(base, before), behind] })
    }
}

impl Drop for Gap {
    fn drop(&mut self) {
        for (start, len) in self.reserved {
            // SAFETY: the range is what is left of the mapping that `open` made, and nobody else knows it. With a
            // length of 0 the call fails, which does no harm.
            unsafe { libc::munmap(start, len) };
        }
    }
}

/// The last address at which a guest of this memory may have its initrd: below the hole.
pub fn low_end(memory: &MemoryMap) -> u64 {
    memory.iter().next().map_or(0, |region| region.last_addr().raw_value() + 1)
}

/// Writes all memory to an empty file, one region after the other; pages of zeros become holes.
///
/// # Errors
/// The file cannot be written.
pub fn save(memories: &[&MemoryMap], file: &File) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut end = 0;
    for region in memories.iter().flat_map(|memory| memory.iter()) {
        let start = end;
        end += region.len();
        for offset in (0..region.len()).step_by(CHUNK) {
            let len = usize::try_from(region.len() - offset).map_or(CHUNK, |rest| rest.min(CHUNK));
            let chunk = &mut buffer[..len];
            region.read_slice(chunk, MemoryRegionAddress(offset)).map_err(io::Error::other)?;
            write_sparse(file, chunk, start + offset)?;
        }
    }
    file.set_len(end)
}

/// Writes `content` at `at` of a file, without its pages of zeros: the file has holes there.
fn write_sparse(file: &File, content: &[u8], at: u64) -> io::Result<()> {
    let mut start = 0;
    for end in (PAGE..content.len()).step_by(PAGE).chain([content.len()]) {
        let page = end.next_multiple_of(PAGE) - PAGE;
        if content[page..end].iter().all(|byte| *byte == 0) {
            if start < page {
                file.write_all_at(&content[start..page], at + start as u64)?;
            }
            start = end;
        }
    }
    if start < content.len() {
        file.write_all_at(&content[start..], at + start as u64)
    } else {
        Ok(())
    }
}

/// Reads into fresh memory what [`save`] has written.
///
/// # Errors
/// The file cannot be read, or is not as large as the memory.
pub fn load(memories: &[&MemoryMap], file: &File) -> io::Result<()> {
    let regions = || memories.iter().flat_map(|memory| memory.iter());
    let size: u64 = regions().map(GuestMemoryRegion::len).sum();
    let found = file.metadata()?.len();
    if found != size {
        return Err(io::Error::other(format!("it has {found} bytes, the machine {size}")));
    }
    let mut buffer = vec![0; CHUNK];
    let mut start = 0;
    for region in regions() {
        let end = start + region.len();
        let mut at = start;
        while let Some(data) = next_data(file, at)?.filter(|data| *data < end) {
            at = data;
            let len = usize::try_from(end - at).map_or(CHUNK, |rest| rest.min(CHUNK));
            file.read_exact_at(&mut buffer[..len], at)?;
            for (offset, content) in (at - start..).step_by(PAGE).zip(buffer[..len].chunks(PAGE)) {
                if content.iter().any(|byte| *byte != 0) {
                    region
                        .write_slice(content, MemoryRegionAddress(offset))
                        .map_err(io::Error::other)?;
                }
            }
            at += len as u64;
        }
        start = end;
    }
    Ok(())
}

/// The first page of `file` from `from` on that is not a hole.
fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    let offset = i64::try_from(from).map_err(io::Error::other)?;
    match lseek(file, offset, Whence::SeekData) {
        Ok(data) => Ok(u64::try_from(data).ok().map(|data| data.max(from) & !(PAGE as u64 - 1))),
        // There is none.
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A script may fork (Python's subprocess does): without this every page that the guest writes
/// until the child's exec would be copied.
fn keep_from_children(region: &Region) -> io::Result<()> {
    // SAFETY: the range is exactly one mapping that `region` owns, and MADV_DONTFORK changes
    // nothing about it in this process.
    let status =
        unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTFORK) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn huge_pages_fit() {
        // Tests beside this one map memory too, and may be quicker.
        let aligned = (0..16).any(|_| {
            let memory = allocate(3 * 1024 + 4).expect("address space");
            memory.iter().all(|region| region.as_ptr().addr().is_multiple_of(HUGE_PAGE))
        });
        assert!(aligned);
    }

    #[test]
    fn memory_that_cannot_be_had_is_refused() {
        for mib in [u64::MAX, 1 << 43, 1 << 40] {
            assert!(allocate(mib).is_err());
        }
    }

    #[test]
    fn memory_goes_to_a_file_and_back() {
        let memory = allocate(8).unwrap();
        let beside = allocate_at(layout::FRAME_BUFFER_START, 5000).unwrap();
        let beside_at = GuestAddress(layout::FRAME_BUFFER_START + 4999);
        beside.write_obj(5_u8, beside_at).unwrap();
        let written = [(0x1000, 1), (0x2fff, 2), (0x40_0000, 3), (0x7f_ffff, 4)];
        for (address, value) in written {
            memory.write_obj::<u8>(value, GuestAddress(address)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        save(&[&memory, &beside], &file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), (8 << 20) + 8192);
        assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20, "zeros take no room");

        let other = allocate(8).unwrap();
        let other_beside = allocate_at(layout::FRAME_BUFFER_START, 5000).unwrap();
        load(&[&other, &other_beside], &file).unwrap();
        assert_eq!(other_beside.read_obj::<u8>(beside_at).unwrap(), 5);
        let mut pages = [vec![0; 8 << 20], vec![0; 8 << 20]];
        memory.read_slice(&mut pages[0], GuestAddress(0)).unwrap();
        other.read_slice(&mut pages[1], GuestAddress(0)).unwrap();
        assert!(pages[0] == pages[1]);
        assert!(written.iter().all(|&(at, value)| pages[1][usize::try_from(at).unwrap()] == value));

        assert!(load(&[&other], &file).is_err(), "another size");
    }
}
