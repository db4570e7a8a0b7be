//! The memory of an image: the only place of this module that knows mmap.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What lengths are rounded up to, and addresses a multiple of: a huge page.
pub(super) const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4096;

/// Most mappings that images of the process have for files, of the 65,530 that Linux allows (`vm.max_map_count`): guest
/// memory that was kept, threads and libraries need some, too.
const MAX_MAPPINGS: usize = 32_768;

static MAPPINGS: AtomicUsize = AtomicUsize::new(0);

/// A range of addresses: some memory at its beginning, behind it files and zeros.
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// So many bytes before it are its own, too, and nothing.
    before: usize,
    /// So many bytes are memory.
    written: usize,
    /// So many mappings are files, or gaps between them.
    mappings: usize,
    /// Where there may be a hole, by now of somebody else's.
    hole: Range<usize>,
}

// SAFETY: it owns its addresses like a Box<[u8]>. Only a `&mut Mapping` changes what is there.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, rounded up to whole huge pages, the first `written` of which are memory.
    pub(super) fn new(len: usize, written: usize) -> io::Result<Self> {
        let len = len.max(1).checked_next_multiple_of(HUGE_PAGE).ok_or_else(no_memory)?;
        let written = written.next_multiple_of(PAGE);
        if written > len {
            return Err(no_memory());
        }
        let whole = len.checked_add(HUGE_PAGE).ok_or_else(no_memory)?;
        // The kernel may say that there is not as much memory, once it is more than addresses.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, wherever the kernel likes, touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // The addresses before it stay: a thread's stack that ended there would be one huge page.
        let before = (start.addr() + PAGE).next_multiple_of(HUGE_PAGE) - start.addr();
        let base = start.wrapping_byte_add(before);
        if before < HUGE_PAGE {
            // SAFETY: the range lies in the mapping made above, which nobody else knows.
            unsafe { libc::munmap(base.wrapping_byte_add(len), HUGE_PAGE - before) };
        }
        let base = NonNull::new(base.cast()).ok_or_else(no_memory)?;
        let mapping = Self { base, len, before, written, mappings: 0, hole: len..len };
        let memory = base.as_ptr().cast();
        // SAFETY: the range is this mapping's beginning, where nothing is yet.
        check(unsafe { libc::mprotect(memory, written, libc::PROT_READ | libc::PROT_WRITE) })?;
        // Without them everything works, only slower.
        // SAFETY: the same range; the advice changes nothing of what it holds.
        unsafe { libc::madvise(memory, written, libc::MADV_HUGEPAGE) };
        Ok(mapping)
    }

    pub(super) fn address(&self) -> NonNull<u8> {
        self.base
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Its memory.
    pub(super) fn memory(&self) -> &[u8] {
        // SAFETY: the range is mapped and readable, zeroed at first, and only `&mut self` changes it.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.written) }
    }

    /// Its memory, until it is [sealed](Self::seal).
    pub(super) fn memory_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `memory`; who has sealed it has given the only `Mapping` that can be changed away.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.written) }
    }

    /// Maps the first `len` bytes of `file` at `at`, behind the memory.
    pub(super) fn map(&mut self, at: usize, len: usize, file: &File) -> io::Result<()> {
        let end = len.checked_next_multiple_of(PAGE).and_then(|len| at.checked_add(len));
        let fits = at >= self.written && at.is_multiple_of(PAGE) && self.hole.is_empty();
        let Some(end) = end.filter(|end| fits && *end <= self.len) else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        // Before one that begins at a huge page there may be a gap, which is a mapping, too.
        let mappings = if len < HUGE_PAGE { 1 } else { 2 };
        if MAPPINGS.fetch_add(mappings, Ordering::Relaxed) + mappings > MAX_MAPPINGS {
            MAPPINGS.fetch_sub(mappings, Ordering::Relaxed);
            let most = format!("images have {MAX_MAPPINGS} mappings of files at most");
            return Err(io::Error::new(ErrorKind::OutOfMemory, most));
        }
        self.mappings += mappings;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let to = self.base.as_ptr().wrapping_add(at).cast();
        // SAFETY: the range was found to lie in this mapping, behind the memory that slices are made of; nothing
        // refers to what is there.
        let mapped = unsafe { libc::mmap(to, len, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            self.hole = at..end;
            return Err(error);
        }
        Ok(())
    }

    /// Lets nobody write from now on, nor child processes have it.
    pub(super) fn seal(self) -> io::Result<Sealed> {
        let start = self.base.as_ptr().cast();
        // SAFETY: the range is this mapping's; nobody has a slice of its memory, as `self` is moved here.
        check(unsafe { libc::mprotect(start, self.len, libc::PROT_READ) })?;
        // SAFETY: the same range; the advice changes nothing about it in this process.
        check(unsafe { libc::madvise(start, self.len, libc::MADV_DONTFORK) })?;
        Ok(Sealed(self))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        MAPPINGS.fetch_sub(self.mappings, Ordering::Relaxed);
        let start = self.base.as_ptr().wrapping_sub(self.before);
        for part in
            [0..self.before + self.hole.start, self.before + self.hole.end..self.before + self.len]
        {
            if !part.is_empty() {
                let start = start.wrapping_add(part.start).cast();
                // SAFETY: all but the hole is this mapping's, and nothing refers to it any more.
                unsafe { libc::munmap(start, part.len()) };
            }
        }
    }
}

/// A mapping that nobody can write to.
pub(super) struct Sealed(Mapping);

impl Sealed {
    pub(super) fn address(&self) -> NonNull<u8> {
        self.0.address()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the page at `at` can be read: one behind its file's end cannot.
    pub(super) fn readable(&self, at: usize) -> bool {
        /// linux/mman.h; 5.14 or newer.
        const MADV_POPULATE_READ: libc::c_int = 22;
        let page = self.0.base.as_ptr().wrapping_add(at & !(PAGE - 1)).cast();
        if at >= self.0.len {
            return false;
        }
        // SAFETY: the page lies in this mapping; reading it ahead changes nothing.
        let status = unsafe { libc::madvise(page, PAGE, MADV_POPULATE_READ) };
        status == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
    }

    /// Its memory.
    #[cfg(test)]
    pub(super) fn memory(&self) -> &[u8] {
        self.0.memory()
    }

    /// Writes all of it to an empty file, by the kernel: where a file is mapped, this process makes no slices of it.
    #[cfg(test)]
    pub(super) fn write_to(&self, file: &File) -> io::Result<()> {
        let mut at = 0;
        while at < self.len() {
            let from = self.0.base.as_ptr().wrapping_add(at).cast();
            // SAFETY: the range is mapped; what the kernel cannot read of it is an error.
            let count = unsafe { libc::write(file.as_raw_fd(), from, self.len() - at) };
            at += usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        }
        Ok(())
    }
}

fn check(status: libc::c_int) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn no_memory() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOMEM)
}
