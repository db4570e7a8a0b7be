//! The kernel image and the initrd.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{self, KernelLoader};
use thiserror::Error;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::archive;
use super::image::ImageFile;
use crate::arch::layout::HIGH_START;
use crate::memory::{MemoryMap, low_end};

/// Where an ELF file says what it is.
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// Offset of the setup header in a bzImage (boot.rst, "The Real-Mode Kernel Header").
const SETUP_HEADER: u64 = 0x1f1;
/// "HdrS", the magic number of the setup header.
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `xloadflags` bit 0: there is a 64-bit entry point, 0x200 after the load address.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
/// The first boot protocol with `xloadflags`.
const MIN_PROTOCOL: u16 = 0x020c;
const SECTOR: u64 = 512;
/// initrds are concatenated; cpio wants each to begin at a multiple of this
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
const INITRD_ALIGN: u64 = 4;
const PAGE: u64 = 4096;

/// A kernel or initrd cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It cannot be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is no kernel: neither a 64-bit bzImage nor an ELF vmlinux ({detail})", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: &'static str,
    },
    /// It ends too early.
    #[error("{what} {} is truncated: {found} bytes of at least {expected}", path.display())]
    Truncated {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size that its header implies.
        expected: u64,
    },
    /// The loader could not place it.
    #[error("cannot load kernel {}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: loader::Error,
    },
    /// It is empty.
    #[error("initrd {} is empty", .0.display())]
    EmptyInitrd(PathBuf),
    /// There is not enough memory for it.
    #[error(
        "{what} of {needed} MiB does not fit into {available} MiB of memory below the device hole"
    )]
    TooLarge {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Its size, rounded up.
        needed: u64,
        /// The room there is.
        available: u64,
    },
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct Kernel {
    /// The 64-bit entry point.
    pub entry: u64,
    /// The first address past everything that the kernel uses before it knows the memory map.
    pub end: u64,
    /// The setup header to hand over.
    pub header: setup_header,
}

/// Reads the kernel at `path` into guest memory.
///
/// # Errors
/// The file is missing, no kernel, truncated or too large.
pub fn load_kernel(memory: &MemoryMap, path: &Path) -> Result<Kernel, ImageError> {
    let read_error = |source| ImageError::Read { what: "kernel", path: path.to_owned(), source };
    let mut file = ImageFile::open(path).map_err(read_error)?;
    let size = file.size();
    let mut magic = [0; 4];
    if size < SETUP_HEADER + size_of::<setup_header>() as u64 {
        let detail = "it is too short";
        return Err(ImageError::NotAKernel { path: path.to_owned(), detail });
    }
    file.read_exact(&mut magic).map_err(read_error)?;
    file.rewind().map_err(read_error)?;
    if magic == ELF_MAGIC {
        load_elf(memory, path, &mut file)
    } else {
        load_bzimage(memory, path, &mut file, size)
    }
}

fn load_elf(memory: &MemoryMap, path: &Path, file: &mut ImageFile) -> Result<Kernel, ImageError> {
    let loaded = Elf::load(memory, None, file, Some(GuestAddress(HIGH_START)))
        .map_err(|source| ImageError::Load { path: path.to_owned(), source })?;
    // What a bzImage would have said of itself; the kernel checks no more than the magic.
    let header = setup_header {
        boot_flag: 0xaa55,
        header: HEADER_MAGIC,
        version: MIN_PROTOCOL,
        kernel_alignment: 0x0100_0000,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 2047,
        ..Default::default()
    };
    Ok(Kernel { entry: loaded.kernel_load.0, end: loaded.kernel_end, header })
}

fn load_bzimage(
    memory: &MemoryMap,
    path: &Path,
    file: &mut ImageFile,
    size: u64,
) -> Result<Kernel, ImageError> {
    let header = read_setup_header(path, file)?;
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    // `syssize` counts the protected-mode code in units of 16 bytes.
    let expected = (setup_sectors + 1) * SECTOR + u64::from(header.syssize) * 16;
    if size < expected {
        let what = "kernel";
        return Err(ImageError::Truncated { what, path: path.to_owned(), found: size, expected });
    }
    // It unpacks itself in place, which takes `init_size` bytes from where it runs.
    let start = HIGH_START.max(header.pref_address);
    let end = start.saturating_add(u64::from(header.init_size));
    if end > low_end(memory) {
        return Err(too_large("kernel", end - start, low_end(memory).saturating_sub(start)));
    }
    let loaded = BzImage::load(memory, Some(GuestAddress(start)), file, None)
        .map_err(|source| ImageError::Load { path: path.to_owned(), source })?;
    Ok(Kernel {
        entry: loaded.kernel_load.0 + ENTRY_64_OFFSET,
        end,
        header: loaded.setup_header.unwrap_or(header),
    })
}

fn read_setup_header(path: &Path, file: &mut ImageFile) -> Result<setup_header, ImageError> {
    let mut header = setup_header::default();
    let not_a_kernel = |detail| ImageError::NotAKernel { path: path.to_owned(), detail };
    file.seek(SeekFrom::Start(SETUP_HEADER))
        .and_then(|_| file.read_exact(header.as_mut_slice()))
        .and_then(|()| file.rewind())
        .map_err(|source| ImageError::Read { what: "kernel", path: path.to_owned(), source })?;
    let (magic, version, flags) = (header.header, header.version, header.xloadflags);
    if magic != HEADER_MAGIC {
        return Err(not_a_kernel("no magic number"));
    }
    if version < MIN_PROTOCOL || flags & XLF_KERNEL_64 == 0 {
        return Err(not_a_kernel("it has no 64-bit entry point"));
    }
    Ok(header)
}

/// Where an initrd lies in guest memory.
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
) -> Result<Initrd, ImageError> {
    let mut files = Vec::new();
    let mut len = 0_u64;
    for path in paths {
        let read_error = |source| ImageError::Read { what: "initrd", path: path.clone(), source };
        let file = ImageFile::open(path).map_err(read_error)?;
        if file.size() == 0 {
            return Err(ImageError::EmptyInitrd(path.clone()));
        }
        len = len.next_multiple_of(INITRD_ALIGN);
        let offset = len;
        len = len.saturating_add(file.size());
        files.push((path, file, offset));
    }
    if len == 0 {
        return Ok(Initrd::default());
    }
    let top = low_end(memory).min(u64::from(kernel.header.initrd_addr_max) + 1);
    let room = top.saturating_sub(kernel.end.next_multiple_of(PAGE));
    if len.next_multiple_of(PAGE) > room {
        return Err(too_large("initrd", len, room));
    }
    let start = top - len.next_multiple_of(PAGE);
    for (path, mut file, offset) in files {
        let read_error = |source| ImageError::Read { what: "initrd", path: path.clone(), source };
        let size = file.size();
        let count = usize::try_from(size).map_err(|_| too_large("initrd", size, room))?;
        memory
            .read_exact_volatile_from(GuestAddress(start + offset), &mut file, count)
            .map_err(|error| read_error(io::Error::other(error)))?;
        if let Some(expected) = archive::missing_end(memory, start + offset, size) {
            let (what, path) = ("initrd", path.clone());
            return Err(ImageError::Truncated { what, path, found: size, expected });
        }
    }
    Ok(Initrd { start, len })
}

fn too_large(what: &'static str, needed: u64, available: u64) -> ImageError {
    ImageError::TooLarge { what, needed: needed.div_ceil(1 << 20), available: available >> 20 }
}

#[cfg(test)]
mod tests;
