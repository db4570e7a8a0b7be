//! The kernel and the initrd of a machine.

use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use super::archive;
use super::image::{ImageFile, LoadError};
use crate::arch::kernel;
pub use crate::arch::kernel::Kernel;
use crate::memory::{MemoryMap, low_end};

/// initrds are concatenated; cpio wants each to begin at a multiple of this
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
const INITRD_ALIGN: u64 = 4;
const PAGE: u64 = 4096;

/// Reads the kernel at `path` into guest memory.
///
/// # Errors
/// The file is missing, no kernel, truncated or too large.
pub fn load_kernel(memory: &MemoryMap, path: &Path) -> Result<Kernel, LoadError> {
    let read_error = |source| LoadError::Read { what: "kernel", path: path.to_owned(), source };
    let mut file = ImageFile::open(path).map_err(read_error)?;
    kernel::load(memory, path, &mut file)
}

/// Where an initrd is in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Initrd {
    /// Its first address.
    pub start: u64,
    /// Its length in bytes; 0 for none.
    pub len: u64,
}

/// Reads the archives at `paths` one after the other to the end of low memory, or as far up as
/// `kernel` can address.
///
/// # Errors
/// A file is missing, empty or visibly truncated, or all of them do not fit above the kernel.
pub fn load_initrd(
    memory: &MemoryMap,
    paths: &[PathBuf],
    kernel: &Kernel,
) -> Result<Initrd, LoadError> {
    let mut files = Vec::new();
    let mut len = 0_u64;
    for path in paths {
        let read_error = |source| LoadError::Read { what: "initrd", path: path.clone(), source };
        let file = ImageFile::open(path).map_err(read_error)?;
        if file.size() == 0 {
            return Err(LoadError::EmptyInitrd(path.clone()));
        }
        len = len.next_multiple_of(INITRD_ALIGN);
        let offset = len;
        len = len.saturating_add(file.size());
        files.push((path, file, offset));
    }
    if len == 0 {
        return Ok(Initrd::default());
    }
    let top = low_end(memory).min(kernel.initrd_end());
    let room = top.saturating_sub(kernel.end.next_multiple_of(PAGE));
    if len.next_multiple_of(PAGE) > room {
        return Err(LoadError::too_large("initrd", len, room));
    }
    let start = top - len.next_multiple_of(PAGE);
    for (path, mut file, offset) in files {
        let read_error = |source| LoadError::Read { what: "initrd", path: path.clone(), source };
        let size = file.size();
        let count =
            usize::try_from(size).map_err(|_| LoadError::too_large("initrd", size, room))?;
        memory
            .read_exact_volatile_from(GuestAddress(start + offset), &mut file, count)
            .map_err(|error| read_error(io::Error::other(error)))?;
        if let Some(expected) = archive::missing_end(memory, start + offset, size) {
            let (what, path) = ("initrd", path.clone());
            return Err(LoadError::Truncated { what, path, found: size, expected });
        }
    }
    Ok(Initrd { start, len })
}

#[cfg(test)]
mod tests;
