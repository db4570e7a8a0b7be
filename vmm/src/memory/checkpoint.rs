//! Guest memory that can be put back to earlier contents.
//!
//! At the first checkpoint all pages are copied once, to a file in memory that nobody changes any more (the *base*),
//! and the base is mapped privately in the place of the guest's memory. From then on the kernel copies a page when it
//! is first written to, and `/proc/self/pagemap` says which ones: a later checkpoint keeps copies of those, and a roll
//! back drops them or, if they are few in a place, writes over them. KVM follows by itself, so its memory slots stay as they are.
//!
//! The base of a machine that goes on from a file is that file, if nobody may write to it: nothing is copied then. It
//! lacks what is zero, where there is fresh memory instead.

use std::fs::File;
use std::io::{self, BufWriter};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemory, GuestMemoryRegion, MemoryRegionAddress};

use super::{MemoryMap, PAGE, Region, keep_from_children};
use crate::extents::{Extents, Part, Writer};
use crate::file;

/// Bits of an entry in `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst): the page is the file's, it is
/// swapped out, it is in memory.
const FILE_PAGE: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;
/// How many entries of it are read at once.
const ENTRIES: usize = 8192;

/// The longest run of changed pages, in bytes, that a roll back writes over. Such are the pages of the guest's kernel and
/// of its agent, which change each time: one that was given back costs two faults and a copy as soon as the guest goes
/// on. Longer runs are what a test has filled, and are given back.
const SHORT: u64 = 16 * PAGE as u64;
/// Most bytes that stay private for that.
const KEPT: u64 = 1024 * PAGE as u64;
static ZEROS: [u8; super::CHUNK] = [0; super::CHUNK];

/// How long a run of zeros is, in bytes, that is not written to files: each is a mapping of its own when they are mapped.
const GAP: u64 = 16 * PAGE as u64;
/// The most parts of a file that are mapped: by default a process may have 65,530 mappings.
const MAX_PARTS: usize = 4096;

/// All memory of a guest at its first checkpoint: regions one after the other.
struct Base {
    /// Nobody writes to it.
    file: File,
    size: u64,
    /// What of the whole the file has, in order; all else is zero. A part may have holes.
    parts: Vec<Part>,
}

impl Base {
    /// What `fill` writes to a file in memory.
    fn copied(size: u64, fill: impl FnOnce(&File) -> io::Result<()>) -> io::Result<Self> {
        let file = anonymous_file(c"firn-memory")?;
        file.set_len(size)?;
        fill(&file)?;
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(Self { file, size, parts: vec![Part { at: 0, len: size, from: 0 }] })
    }

    /// Calls `each` with the parts of `range`, in order, and where in the file they are; None for zeros.
    fn parts_in(
        &self,
        range: &Range<u64>,
        mut each: impl FnMut(Range<u64>, Option<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut at = range.start;
        let first = self.parts.partition_point(|part| part.end() <= at);
        for part in self.parts[first..].iter().take_while(|part| part.at < range.end) {
            if at < part.at {
                each(at..part.at, None)?;
                at = part.at;
            }
            let end = part.end().min(range.end);
            each(at..end, Some(part.from + (at - part.at)))?;
            at = end;
        }
        if at < range.end { each(at..range.end, None) } else { Ok(()) }
    }

    /// Fills `range` of a region, which begins at `start` of the whole, with what it has there.
    fn read_over(&self, region: &Region, start: u64, range: &Range<u64>) -> io::Result<()> {
        self.parts_in(range, |part, from| {
            let inside = part.start - start..part.end - start;
            match from {
                Some(from) => read_over(region, &inside, &self.file, from),
                None => chunks(&inside, |at, len| {
                    region.write_slice(&ZEROS[..len], at).map_err(io::Error::other)
                }),
            }
        })
    }

    /// Maps it in the place of a region, which begins at `start` of the whole.
    fn map_over(&self, region: &Region, start: u64) -> io::Result<()> {
        let whole = start..start + region.len();
        let filled = |part: &Part| part.at <= whole.start && whole.end <= part.end();
        if !self.parts.iter().any(filled) {
            // All at once: there may be many parts.
            map_over(region, &(0..region.len()), None)?;
            // One byte written there would fill a huge page, which later is 512 changed ones.
            keep_small(region)?;
        }
        self.parts_in(&whole, |part, from| match from {
            Some(from) => {
                map_over(region, &(part.start - start..part.end - start), Some((&self.file, from)))
            }
            None => Ok(()),
        })?;
        keep_from_children(region)
    }
}

/// What a guest's memory held at some time.
pub struct MemoryCheckpoint {
    base: Arc<Base>,
    /// Where pages differed from the base, as byte ranges of it, in order. Each is copied at once, and in one region.
    changed: Vec<Range<u64>>,
    /// Their contents, one after the other.
    pages: File,
}

impl MemoryCheckpoint {
    /// Writes what the memory held to an empty file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn write(&self, to: &File) -> io::Result<Extents> {
        let size = self.base.size;
        let mut writer =
            Writer::with_gaps(BufWriter::with_capacity(super::CHUNK, to), size, GAP - PAGE as u64);
        let mut buffer = vec![0; super::CHUNK];
        let mut changed = Changed { checkpoint: self, next: 0, from: 0 };
        for part in &self.base.parts {
            let (mut at, end) = (part.from, part.from + part.len);
            while let Some(data) = super::next_data(&self.base.file, at)?.filter(|at| *at < end) {
                at = end.min(data + super::CHUNK as u64);
                let [start, end] = [data, at].map(|at| part.at + (at - part.from));
                without(&(start..end), &self.changed, |range| {
                    changed.put_until(range.start, &mut writer)?;
                    let chunk = &mut buffer[..to_usize(range.end - range.start)?];
                    self.base.file.read_exact_at(chunk, data + (range.start - start))?;
                    writer.put(range.start, chunk)
                })?;
            }
        }
        changed.put_until(size, &mut writer)?;
        writer.finish()
    }

    /// Reads what [`Self::write`] has written. A file that nobody may write is mapped, and may be removed then; others
    /// are copied, and may change.
    ///
    /// # Errors
    /// It is damaged; the host has no memory left.
    pub(crate) fn read(extents: &Extents, from: File) -> io::Result<Self> {
        let parts = extents.parts_of(&from)?;
        let pages = anonymous_file(c"firn-checkpoint")?;
        // Some file systems cannot map at all.
        let mapped = file::map(&from, &from.metadata()?).is_some();
        let base = if mapped && can_be_mapped(&parts) {
            Base { file: from, size: extents.size(), parts }
        } else {
            Base::copied(extents.size(), |base| {
                extents.read(&from, |at, chunk| base.write_all_at(chunk, at))
            })?
        };
        Ok(Self { base: Arc::new(base), changed: Vec::new(), pages })
    }
}

/// What differs from the base, as it is written to a file in its order.
struct Changed<'a> {
    checkpoint: &'a MemoryCheckpoint,
    /// Of the ranges.
    next: usize,
    /// In the pages.
    from: u64,
}

impl Changed<'_> {
    /// Writes what comes before `end` and is not written yet.
    fn put_until(&mut self, end: u64, writer: &mut Writer<impl io::Write>) -> io::Result<()> {
        let MemoryCheckpoint { changed, pages, .. } = self.checkpoint;
        while let Some(range) = changed.get(self.next).filter(|range| range.start < end) {
            let mut chunk = vec![0; to_usize(range.end - range.start)?];
            pages.read_exact_at(&mut chunk, self.from)?;
            writer.put(range.start, &chunk)?;
            (self.next, self.from) = (self.next + 1, self.from + chunk.len() as u64);
        }
        Ok(())
    }
}

/// Whether the parts are few, whole pages and in order.
fn can_be_mapped(parts: &[Part]) -> bool {
    let page = PAGE as u64;
    let whole = |part: &Part| part.at.is_multiple_of(page) && part.len.is_multiple_of(page);
    parts.len() <= MAX_PARTS
        && parts.iter().all(whole)
        && parts.is_sorted_by(|a, b| a.end() <= b.at)
}

/// What lies under a guest's memory.
#[derive(Default)]
pub struct Backing {
    /// Mapped in the place of all memory; whatever differs from it is in private pages.
    base: Option<Arc<Base>>,
    /// Some of the memory may be mapped from a file: pages that are given back to the host read as that then, not as
    /// zeros.
    mapped: bool,
}

impl Backing {
    /// Keeps the contents of `memories`, which nobody writes to meanwhile. Memory is as before if this fails.
    ///
    /// # Errors
    /// The host has no memory left for the copies, or no `/proc`.
    pub fn checkpoint(&mut self, memories: &[&MemoryMap]) -> io::Result<MemoryCheckpoint> {
        let pages = anonymous_file(c"firn-checkpoint")?;
        let Some(base) = &self.base else {
            let size = regions(memories).map(|(region, _)| region.len()).sum();
            let base = Base::copied(size, |base| {
                read_private(memories, |at, chunk| super::write_sparse(base, chunk, at))
            })?;
            let base = Arc::new(base);
            self.map(memories, &base)?;
            return Ok(MemoryCheckpoint { base, changed: Vec::new(), pages });
        };
        let mut changed = Vec::new();
        let mut end = 0;
        read_private(memories, |at, chunk| {
            pages.write_all_at(chunk, end)?;
            let len = chunk.len() as u64;
            end += len;
            changed.push(at..at + len);
            Ok(())
        })?;
        Ok(MemoryCheckpoint { base: Arc::clone(base), changed, pages })
    }

    /// Puts the contents of `memories`, which nobody uses meanwhile, back to those of a checkpoint of theirs.
    ///
    /// # Errors
    /// The host refuses; what the memory holds then is undefined.
    pub fn roll_back(&mut self, memories: &[&MemoryMap], to: &MemoryCheckpoint) -> io::Result<()> {
        if self.base.as_ref().is_some_and(|base| Arc::ptr_eq(base, &to.base)) {
            let mut kept = 0;
            for (region, start) in regions(memories) {
                private_pages(region, |run| {
                    let short = run.end - run.start <= SHORT;
                    without(&(start + run.start..start + run.end), &to.changed, |rest| {
                        let len = rest.end - rest.start;
                        if short && kept + len <= KEPT {
                            kept += len;
                            to.base.read_over(region, start, &rest)
                        } else {
                            drop_pages(region, &(rest.start - start..rest.end - start))
                        }
                    })
                })?;
            }
        } else {
            self.map(memories, &to.base)?;
        }
        let mut from = 0;
        for range in &to.changed {
            let Some((region, start)) =
                regions(memories).find(|(region, start)| range.start < start + region.len())
            else {
                return Err(io::Error::other("it is the memory of another machine"));
            };
            let inside = range.start - start..range.end - start;
            read_over(region, &inside, &to.pages, from)?;
            from += range.end - range.start;
        }
        Ok(())
    }

    /// Makes all memory zero again.
    ///
    /// # Errors
    /// The host refuses.
    pub fn clear(&mut self, memories: &[&MemoryMap]) -> io::Result<()> {
        for (region, _) in regions(memories) {
            if self.mapped {
                map_over(region, &(0..region.len()), None)?;
                keep_from_children(region)?;
            } else {
                drop_pages(region, &(0..region.len()))?;
            }
        }
        *self = Self::default();
        Ok(())
    }

    fn map(&mut self, memories: &[&MemoryMap], base: &Arc<Base>) -> io::Result<()> {
        let size: u64 = regions(memories).map(|(region, _)| region.len()).sum();
        if base.size != size {
            return Err(io::Error::other("it is the memory of another machine"));
        }
        (self.base, self.mapped) = (None, true);
        for (region, start) in regions(memories) {
            base.map_over(region, start)?;
        }
        self.base = Some(Arc::clone(base));
        Ok(())
    }
}

/// The regions, each with where it starts in a base.
fn regions<'a>(memories: &'a [&MemoryMap]) -> impl Iterator<Item = (&'a Region, u64)> {
    let regions = memories.iter().flat_map(|memory| memory.iter());
    regions.scan(0, |end, region| {
        let start = *end;
        *end += region.len();
        Some((region, start))
    })
}

/// Calls `each` with the contents of the private pages of all regions, in parts, each with where it starts in a base.
fn read_private(
    memories: &[&MemoryMap],
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; super::CHUNK];
    for (region, start) in regions(memories) {
        private_pages(region, |range| {
            chunks(&range, |at, len| {
                let chunk = &mut buffer[..len];
                region.read_slice(chunk, at).map_err(io::Error::other)?;
                each(start + at.0, chunk)
            })
        })?;
    }
    Ok(())
}

/// Calls `each` with address and length of the parts of a range that are copied at once.
fn chunks(
    range: &Range<u64>,
    mut each: impl FnMut(MemoryRegionAddress, usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let len = to_usize(range.end - at)?.min(super::CHUNK);
        each(MemoryRegionAddress(at), len)?;
        at += len as u64;
    }
    Ok(())
}

fn to_usize(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(io::Error::other)
}

fn anonymous_file(name: &std::ffi::CStr) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    Ok(File::from(memfd_create(name, flags)?))
}

/// Calls `each` with the runs of pages of `region`, as byte ranges, that are not those of a file mapped there.
fn private_pages(
    region: &Region,
    mut each: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let page = PAGE as u64;
    let first = region.as_ptr().addr() as u64 / page;
    let count = region.len() / page;
    let mut run: Option<Range<u64>> = None;
    let mut buffer = vec![0; ENTRIES * 8];
    let mut index = 0;
    while index < count {
        let entries = to_usize(count - index)?.min(ENTRIES);
        let bytes = &mut buffer[..entries * 8];
        pagemap.read_exact_at(bytes, (first + index) * 8)?;
        for entry in bytes.chunks_exact(8) {
            let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
            if entry & (PRESENT | SWAPPED) != 0 && entry & FILE_PAGE == 0 {
                run.get_or_insert(index * page..index * page).end = (index + 1) * page;
            } else if let Some(run) = run.take() {
                each(run)?;
            }
            index += 1;
        }
    }
    run.map_or(Ok(()), each)
}

/// Calls `each` with the parts of `range` that are in none of `holes`, which are in order and do not overlap.
fn without(
    range: &Range<u64>,
    holes: &[Range<u64>],
    mut each: impl FnMut(Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = range.start;
    let first = holes.partition_point(|hole| hole.end <= range.start);
    for hole in &holes[first..] {
        if hole.start >= range.end {
            break;
        }
        if at < hole.start {
            each(at..hole.start)?;
        }
        at = hole.end;
    }
    if at < range.end { each(at..range.end) } else { Ok(()) }
}

/// Gives pages back to the host: what is read there then is the file mapped there, or zeros.
fn drop_pages(region: &Region, range: &Range<u64>) -> io::Result<()> {
    let (start, len) = (to_usize(range.start)?, to_usize(range.end - range.start)?);
    assert!(range.end <= region.len(), "inside the region");
    // SAFETY: the range is part of the private mapping that `region` owns, which stays mapped. Nobody holds
    // references into guest memory.
    let status =
        unsafe { libc::madvise(region.as_ptr().add(start).cast(), len, libc::MADV_DONTNEED) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Fills a range of a region with what a file has from an offset on.
fn read_over(region: &Region, range: &Range<u64>, file: &File, mut from: u64) -> io::Result<()> {
    let at = MemoryRegionAddress(range.start);
    let len = to_usize(range.end - range.start)?;
    let mut rest = region.get_slice(at, len).map_err(io::Error::other)?;
    while !rest.is_empty() {
        let guard = rest.ptr_guard_mut();
        let offset = libc::off_t::try_from(from).map_err(io::Error::other)?;
        // SAFETY: the slice lies in guest memory, which stays mapped, and which anybody may write at any time.
        let read =
            unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), guard.len(), offset) };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        rest.bitmap().mark_dirty(0, read);
        rest = rest.offset(read).map_err(io::Error::other)?;
        from += read as u64;
    }
    Ok(())
}

/// Keeps the kernel from mapping huge pages in a region.
fn keep_small(region: &Region) -> io::Result<()> {
    // SAFETY: the range is mapped, and `region` owns it; MADV_NOHUGEPAGE changes nothing of what it holds.
    let status =
        unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_NOHUGEPAGE) };
    match Errno::result(status) {
        // A kernel without huge pages does not know the request.
        Err(Errno::EINVAL) | Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Replaces what is mapped in the place of a range of a region: by a private view of a file from an offset on, or by
/// zeros. Children then have it, too.
fn map_over(region: &Region, range: &Range<u64>, file: Option<(&File, u64)>) -> io::Result<()> {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
    );
    let (flags, fd, offset) = match file {
        Some((file, offset)) => (flags, file.as_raw_fd(), offset),
        None => (flags | libc::MAP_ANONYMOUS, -1, 0),
    };
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let (start, len) = (to_usize(range.start)?, to_usize(range.end - range.start)?);
    assert!(range.end <= region.len(), "inside the region");
    // SAFETY: this replaces a range of the mapping that `region` owns by another of the same size and protection, so
    // what `region` promises of its addresses holds on. Nobody holds references into guest memory.
    let mapped = unsafe {
        libc::mmap(region.as_ptr().add(start).cast(), len, protection, flags, fd, offset)
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
