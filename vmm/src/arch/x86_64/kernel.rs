//! The files that a kernel comes in: bzImage and ELF.

use std::io::{self, Read, Seek};
use std::path::Path;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use vm_memory::GuestAddress;

use super::bzimage;
use super::layout::HIGH_START;
use crate::boot::image::{ImageFile, LoadError};
use crate::memory::{MemoryMap, low_end};

/// The first bytes of an ELF file.
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// `xloadflags` bit 0: there is a 64-bit entry point, 0x200 after the load address.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
/// The first boot protocol with `xloadflags`.
const MIN_PROTOCOL: u16 = 0x020c;

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

impl Kernel {
    /// The first address past the room that its initrd may be in.
    pub fn initrd_end(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// A kernel that was never loaded and would use memory up to `end`.
    #[cfg(test)]
    pub fn unloaded(end: u64) -> Self {
        let header = setup_header { initrd_addr_max: 0x7fff_ffff, ..Default::default() };
        Self { entry: 0, end, header }
    }
}

/// Loads `file`, which was opened at `path`, into guest memory.
///
/// # Errors
/// It is no kernel, truncated or too large.
pub fn load(memory: &MemoryMap, path: &Path, file: &mut ImageFile) -> Result<Kernel, LoadError> {
    let head = read_head(file).map_err(|source| LoadError::Read {
        what: "kernel",
        path: path.to_owned(),
        source,
    })?;
    let not_a_kernel = |detail| LoadError::NotAKernel { path: path.to_owned(), detail };
    if head.len() < bzimage::HEAD {
        return Err(not_a_kernel("it is too short"));
    }
    if head.starts_with(ELF_MAGIC) {
        return load_elf(memory, path, file);
    }
    let header = bzimage::header(&head)
        .ok_or_else(|| not_a_kernel("it is neither a bzImage nor an ELF file"))?;
    if header.version < MIN_PROTOCOL || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(not_a_kernel("it has no 64-bit entry point"));
    }
    load_bzimage(memory, path, file, header)
}

fn read_head(file: &mut ImageFile) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    file.by_ref().take(bzimage::HEAD as u64).read_to_end(&mut head)?;
    file.rewind()?;
    Ok(head)
}

fn load_elf(memory: &MemoryMap, path: &Path, file: &mut ImageFile) -> Result<Kernel, LoadError> {
    let loaded = Elf::load(memory, None, file, Some(GuestAddress(HIGH_START)))
        .map_err(|problem| LoadError::Load { path: path.to_owned(), problem })?;
    // What a bzImage would have said of itself; the kernel checks no more than the magic.
    let header = setup_header {
        boot_flag: bzimage::BOOT_FLAG,
        header: bzimage::MAGIC,
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
    header: setup_header,
) -> Result<Kernel, LoadError> {
    let found = file.size();
    // `syssize` counts the protected-mode code in units of 16 bytes.
    let expected = bzimage::code_offset(&header) as u64 + u64::from(header.syssize) * 16;
    if found < expected {
        let what = "kernel";
        return Err(LoadError::Truncated { what, path: path.to_owned(), found, expected });
    }
    // It unpacks itself in place, which takes `init_size` bytes from where it runs.
    let start = HIGH_START.max(header.pref_address);
    let end = start.saturating_add(u64::from(header.init_size));
    if end > low_end(memory) {
        let room = low_end(memory).saturating_sub(start);
        return Err(LoadError::too_large("kernel", end - start, room));
    }
    let loaded = BzImage::load(memory, Some(GuestAddress(start)), file, None)
        .map_err(|problem| LoadError::Load { path: path.to_owned(), problem })?;
    Ok(Kernel {
        entry: loaded.kernel_load.0 + ENTRY_64_OFFSET,
        end,
        header: loaded.setup_header.unwrap_or(header),
    })
}

#[cfg(test)]
mod tests;
