//! The head of a bzImage (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"): the only place that parses
//! it.

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

/// Offset of the setup header.
const HEADER: usize = 0x1f1;
/// How many bytes at the start of a file it takes to recognize a bzImage.
pub const HEAD: usize = HEADER + size_of::<setup_header>();
/// What the setup header says at `boot_flag`.
pub const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS", at `header`.
pub const MAGIC: u32 = 0x5372_6448;
const SECTOR: usize = 512;

/// The setup header of the file that starts with `head`, if that is a bzImage.
pub fn header(head: &[u8]) -> Option<setup_header> {
    let header = *setup_header::from_slice(head.get(HEADER..HEAD)?)?;
    (header.boot_flag == BOOT_FLAG && header.header == MAGIC).then_some(header)
}

/// Where the protected-mode code starts: after the boot sector and the setup sectors.
pub const fn code_offset(header: &setup_header) -> usize {
    // Zero means four, for images older than the field (boot.rst, `setup_sects`).
    let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects as usize };
    (sectors + 1) * SECTOR
}

/// An image with this header and code.
#[cfg(test)]
pub fn image(header: &setup_header, code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; code_offset(header)];
    image[HEADER..HEAD].copy_from_slice(header.as_slice());
    image.extend(code);
    image
}
