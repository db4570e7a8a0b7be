//! Moving bytes between guest memory and files of the host, past the libraries that read formats: what can be done at
//! once is worth no other thread.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use vm_memory::bitmap::Bitmap;

use super::queue::GuestSlice;

/// Whether a file is in memory: reading and writing it waits for no disk, but for what was swapped out.
pub fn in_memory(file: &File) -> bool {
    // The device node of a disk lies in such a file system, too.
    fstatfs(file).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC)
        && file.metadata().is_ok_and(|meta| meta.is_file())
}

/// Reads from `at` on and says how much; without waiting for a disk unless `waits`.
///
/// # Errors
/// What the host says: that it would have to wait, or cannot tell, is `EAGAIN` or `EOPNOTSUPP`.
pub fn read_at(file: &File, buffers: &[GuestSlice<'_>], at: u64, waits: bool) -> io::Result<usize> {
    let guards: Vec<_> = buffers.iter().map(GuestSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let (count, at) = arguments(&vectors, at)?;
    let flags = if waits { 0 } else { libc::RWF_NOWAIT };
    // SAFETY: the vectors lie in guest memory, which is mapped as long as the slices live, and which anybody may
    // write at any time.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), vectors.as_ptr(), count, at, flags) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    let mut left = read;
    for buffer in buffers {
        let written = left.min(buffer.len());
        buffer.bitmap().mark_dirty(0, written);
        left -= written;
    }
    Ok(read)
}

/// Writes from `at` on and says how much.
///
/// # Errors
/// What the host says.
pub fn write_at(file: &File, buffers: &[GuestSlice<'_>], at: u64) -> io::Result<usize> {
    let guards: Vec<_> = buffers.iter().map(GuestSlice::ptr_guard).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let (count, at) = arguments(&vectors, at)?;
    // SAFETY: the vectors lie in guest memory, which is mapped as long as the slices live; the call only reads it.
    let written = unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count, at) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// The number of vectors and the offset, as system calls take them.
fn arguments(vectors: &[libc::iovec], at: u64) -> io::Result<(libc::c_int, libc::off_t)> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    Ok((vectors.len().try_into().map_err(invalid)?, at.try_into().map_err(invalid)?))
}
