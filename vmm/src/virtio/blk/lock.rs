//! Locks on image files, so that no two machines or programs write one image.
//!
//! The locks are those of QEMU (`block/file-posix.c`, its `docs/interop` calls them image locks): bytes of the file
//! stand for permissions, and an open-file-description lock on a byte means that the process has that permission. A
//! program that may write holds "write"; one that must not see changes says so by a lock on "no writer but me". firn
//! takes all of it to write, so that it excludes other instances of itself and QEMU; readers share.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Byte that is locked by those who read.
const READS: i64 = 100;
/// Bytes that are locked by those who write and who resize.
const CHANGES: [i64; 2] = [101, 103];
/// Locked by programs that allow no one else to write or resize.
const EXCLUDES_CHANGES: [i64; 2] = [201, 203];

/// The result of an attempt to lock.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is locked until the last copy of the descriptor is closed.
    Locked,
    /// Another process, or another disk of this one, has it in a way that excludes this.
    Taken,
    /// The file system has no locks.
    Unsupported,
}

/// Locks `file`, which is open for writing too if `exclusive`.
pub(super) fn lock(file: &File, exclusive: bool) -> io::Result<Outcome> {
    let outcome = if exclusive { set(file, libc::F_WRLCK, 0, 0) } else { lock_shared(file) };
    match outcome {
        Ok(true) => Ok(Outcome::Locked),
        Ok(false) => Ok(Outcome::Taken),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                Ok(Outcome::Unsupported)
            }
            _ => Err(error),
        },
    }
}

fn lock_shared(file: &File) -> io::Result<bool> {
    for byte in [READS].into_iter().chain(EXCLUDES_CHANGES) {
        if !set(file, libc::F_RDLCK, byte, 1)? {
            return Ok(false);
        }
    }
    for byte in CHANGES {
        if is_locked(file, byte)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Tries to lock `len` bytes (0: to the end of the file, however it grows); false if another holds them.
pub(super) fn set(file: &File, kind: i32, start: i64, len: i64) -> io::Result<bool> {
    match control(file, libc::F_OFD_SETLK, kind, start, len) {
        Ok(_) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Ok(false),
            _ => Err(error),
        },
    }
}

fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let found = control(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte, 1)?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn control(file: &File, command: i32, kind: i32, start: i64, len: i64) -> io::Result<libc::flock> {
    let mut range = libc::flock {
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: start,
        l_len: len,
        // Must be zero for these locks (fcntl(2)).
        l_pid: 0,
    };
    // SAFETY: the descriptor is open as long as `file` lives, and both commands read and write one
    // `flock`, which `range` is.
    let status = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut range) };
    if status == 0 { Ok(range) } else { Err(io::Error::last_os_error()) }
}
