//! Takes the ELF kernel out of a bzImage.
//!
//! A bzImage carries the real kernel as a compressed payload that a stub unpacks in the guest. Unpacking it once on
//! the host and booting the ELF image saves that work at every boot. The places of the payload come from the setup
//! header: Documentation/arch/x86/boot.rst, fields `payload_offset` and `payload_length`.

use std::io::{self, Read};

use thiserror::Error;

use super::bzimage;

/// Largest kernel that is unpacked, in bytes. Debian's is about 64 MiB; one with debug information stays below this.
pub const MAX_KERNEL_SIZE: usize = 1 << 30;

/// Most memory a decoder may ask for its window, in KiB: the kernel's build uses at most 128 MiB (`zstd --ultra -22`).
const MAX_WINDOW_KIB: u32 = 256 << 10;

/// The first boot protocol that names the payload.
const MIN_PROTOCOL: u16 = 0x208;
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// Why no ELF kernel came out of an image.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// The file is no bzImage: a magic number of the setup header is missing.
    #[error("not a bzImage: no setup header")]
    NotBzImage,
    /// The boot protocol is older than 2.08, which brought the payload fields.
    #[error("boot protocol {}.{:02} does not name the payload (2.08 or later is needed)", .0 >> 8, .0 & 0xff)]
    OldProtocol(u16),
    /// The setup header places the payload outside the file.
    #[error(
        "truncated bzImage: the payload should be {length} bytes at {offset}, the file has {file}"
    )]
    Truncated {
        /// Where the payload should start, in bytes from the start of the file.
        offset: usize,
        /// How long it should be, in bytes.
        length: usize,
        /// How long the file is, in bytes.
        file: usize,
    },
    /// The payload's first bytes belong to no compression known here.
    #[error("the kernel's compression is not supported (its payload starts with {0:02x?})")]
    UnknownCompression([u8; 4]),
    /// The payload does not decompress.
    #[error("the kernel's {format} payload is damaged")]
    Damaged {
        /// The compression's name.
        format: &'static str,
        /// What the decoder said.
        #[source]
        source: io::Error,
    },
    /// The payload holds more or fewer bytes than the image says.
    #[error("the kernel's payload unpacks to {actual} bytes or more, the image says {expected}")]
    WrongSize {
        /// Size that the image's build wrote after the payload, in bytes.
        expected: usize,
        /// Size unpacked until it was clear that it is wrong, in bytes.
        actual: usize,
    },
    /// The kernel would be larger than [`MAX_KERNEL_SIZE`].
    #[error("the image says that its kernel is {0} bytes large, more than {MAX_KERNEL_SIZE}")]
    TooLarge(usize),
    /// What was unpacked is not an ELF file.
    #[error("the unpacked kernel is not an ELF file")]
    NotElf,
}

/// How many bytes at the start of a file [`is_packed`] needs.
pub const HEAD: usize = bzimage::HEAD;

/// Whether the file that starts with `head` is a kernel that [`vmlinux`] may unpack.
pub fn is_packed(head: &[u8]) -> bool {
    bzimage::header(head).is_some()
}

/// Unpacks the ELF kernel of `bzimage`, a whole file.
///
/// # Errors
/// When the file is no bzImage, is damaged, uses an unknown compression (bzip2, LZO) or is larger than
/// [`MAX_KERNEL_SIZE`]. Memory use is bounded by that size in every case.
pub fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let payload = payload(bzimage)?;
    if payload.starts_with(ELF_MAGIC) {
        return Ok(payload.to_vec());
    }
    let expected = unpacked_size(payload)?;
    let (format, decoder) = decoder(payload)?;
    let damaged = |source| UnpackError::Damaged { format, source };

    let mut kernel = Vec::new();
    // One byte more than expected, so that a longer stream shows.
    let limit = u64::try_from(expected).unwrap_or(u64::MAX).saturating_add(1);
    decoder.map_err(damaged)?.take(limit).read_to_end(&mut kernel).map_err(damaged)?;
    if kernel.len() != expected {
        return Err(UnpackError::WrongSize { expected, actual: kernel.len() });
    }
    if !kernel.starts_with(ELF_MAGIC) {
        return Err(UnpackError::NotElf);
    }
    Ok(kernel)
}

/// The compressed payload within a bzImage.
fn payload(image: &[u8]) -> Result<&[u8], UnpackError> {
    let header = bzimage::header(image).ok_or(UnpackError::NotBzImage)?;
    if header.version < MIN_PROTOCOL {
        return Err(UnpackError::OldProtocol(header.version));
    }
    let size = |field| usize::try_from(field).unwrap_or(usize::MAX);
    let offset = bzimage::code_offset(&header).saturating_add(size(header.payload_offset));
    let length = size(header.payload_length);
    image
        .get(offset..offset.saturating_add(length))
        .filter(|payload| payload.len() >= 8)
        .ok_or(UnpackError::Truncated { offset, length, file: image.len() })
}

/// Size of the unpacked kernel: the payload's last four bytes. gzip ends with it anyway, for every other format the
/// kernel's build appends it (scripts/Makefile.lib, `size_append`).
fn unpacked_size(payload: &[u8]) -> Result<usize, UnpackError> {
    let size = payload.last_chunk().map_or(0, |&size| u32::from_le_bytes(size));
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if size > MAX_KERNEL_SIZE { Err(UnpackError::TooLarge(size)) } else { Ok(size) }
}

/// The payload's compression by its first bytes: its name and a reader of the unpacked bytes.
#[expect(clippy::type_complexity, reason = "the pair is taken apart at the only call")]
fn decoder(payload: &[u8]) -> Result<(&'static str, io::Result<Box<dyn Read + '_>>), UnpackError> {
    // The appended size is no part of the stream, and LZ4's old format would take it for a block.
    let stream = &payload[..payload.len() - 4];
    let window = u64::from(MAX_WINDOW_KIB) << 10;
    Ok(match payload {
        [0x1f, 0x8b, ..] => ("gzip", Ok(Box::new(flate2::read::GzDecoder::new(payload)))),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            ("xz", Ok(Box::new(lzma_rust2::XzReader::new_mem_limit(stream, false, MAX_WINDOW_KIB))))
        }
        [0x5d, 0, 0, ..] => (
            "lzma",
            lzma_rust2::LzmaReader::new_mem_limit(stream, MAX_WINDOW_KIB, None)
                .map(|r| Box::new(r) as Box<dyn Read>),
        ),
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            ("lz4", Ok(Box::new(lz4_flex::frame::FrameDecoder::new(stream))))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => (
            "zstd",
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(stream, window)
                .map(|r| Box::new(r) as Box<dyn Read>)
                .map_err(io::Error::other),
        ),
        _ => {
            return Err(UnpackError::UnknownCompression(
                payload.first_chunk().copied().unwrap_or_default(),
            ));
        }
    })
}

#[cfg(test)]
mod tests;
