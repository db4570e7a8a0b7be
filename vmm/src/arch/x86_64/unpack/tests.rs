use std::io::Write;

use linux_loader::bootparam::setup_header;

use super::*;

fn header() -> setup_header {
    setup_header {
        setup_sects: 4,
        boot_flag: bzimage::BOOT_FLAG,
        header: bzimage::MAGIC,
        version: 0x20f,
        payload_offset: 16,
        ..Default::default()
    }
}

/// A bzImage with `payload` at `payload_offset` 16.
fn image(payload: &[u8]) -> Vec<u8> {
    let payload_length = u32::try_from(payload.len()).unwrap();
    let code = [&[0; 16], payload, b"what follows the payload"].concat();
    bzimage::image(&setup_header { payload_length, ..header() }, &code)
}

/// Something that looks like an ELF kernel and takes several LZ4 blocks of 8 MiB.
fn kernel() -> Vec<u8> {
    let mut kernel = ELF_MAGIC.to_vec();
    kernel.extend((0..5_000_000_u32).flat_map(|n| (n / 7).to_le_bytes()));
    kernel
}

fn with_size(mut stream: Vec<u8>, size: usize) -> Vec<u8> {
    stream.extend_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
    stream
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn xz(data: &[u8]) -> Vec<u8> {
    let mut encoder =
        lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// LZ4's old frame format, the one that the kernel's build writes: blocks of 8 MiB, each after its packed size.
fn lz4(data: &[u8]) -> Vec<u8> {
    let mut stream = vec![0x02, 0x21, 0x4c, 0x18];
    for block in data.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        stream.extend_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
        stream.extend_from_slice(&packed);
    }
    stream
}

fn zstd(data: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
}

#[test]
fn unpacks_what_debian_and_others_use() {
    let kernel = kernel();
    for (name, payload) in [
        ("gzip", gzip(&kernel)),
        ("xz", with_size(xz(&kernel), kernel.len())),
        ("lz4", with_size(lz4(&kernel), kernel.len())),
        ("zstd", with_size(zstd(&kernel), kernel.len())),
        ("none", kernel.clone()),
    ] {
        let unpacked =
            vmlinux(&image(&payload)).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert!(unpacked == kernel, "{name}: other bytes came out");
    }
}

#[test]
fn refuses_what_is_no_bzimage() {
    assert!(matches!(vmlinux(b""), Err(UnpackError::NotBzImage)));
    assert!(matches!(vmlinux(&kernel()), Err(UnpackError::NotBzImage)));
    let old = setup_header { version: 0x207, ..header() };
    let error = vmlinux(&bzimage::image(&old, &gzip(&kernel()))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "boot protocol 2.07 does not name the payload (2.08 or later is needed)"
    );
}

#[test]
fn refuses_every_truncation() {
    let whole = image(&with_size(lz4(&kernel()), kernel().len()));
    let payload_end = whole.len() - 24;
    for length in (0..payload_end).step_by(payload_end / 97).chain([payload_end - 1]) {
        match vmlinux(&whole[..length]) {
            Err(UnpackError::NotBzImage | UnpackError::Truncated { .. }) => {}
            other => panic!("{length} bytes: {:?}", other.map(|k| k.len())),
        }
    }
}

#[test]
fn refuses_a_payload_outside_the_file() {
    for (offset, length) in [(u32::MAX, u32::MAX), (0, u32::MAX), (u32::MAX, 8), (16, 0), (16, 7)] {
        let outside = setup_header { payload_offset: offset, payload_length: length, ..header() };
        let unpacked = vmlinux(&bzimage::image(&outside, &gzip(&kernel())));
        assert!(matches!(unpacked, Err(UnpackError::Truncated { .. })), "{offset} {length}");
    }
}

#[test]
fn refuses_a_payload_of_another_size() {
    let kernel = kernel();
    for wrong in [0, 1, kernel.len() - 1, kernel.len() + 1] {
        let result = vmlinux(&image(&with_size(xz(&kernel), wrong)));
        assert!(
            matches!(result, Err(UnpackError::WrongSize { expected, .. }) if expected == wrong)
        );
    }
    let huge = with_size(xz(&kernel), MAX_KERNEL_SIZE + 1);
    assert!(matches!(vmlinux(&image(&huge)), Err(UnpackError::TooLarge(_))));
}

#[test]
fn refuses_what_is_damaged_or_unknown() {
    let text = b"no kernel at all, but long enough\0\0\0\0".to_vec();
    assert!(matches!(vmlinux(&image(&gzip(&text))), Err(UnpackError::NotElf)));
    assert!(
        matches!(vmlinux(&image(&text)), Err(UnpackError::UnknownCompression(start)) if &start == b"no k")
    );
    let kernel = kernel();
    for stream in [xz(&kernel), zstd(&kernel), lz4(&kernel)] {
        let mut cut = stream[..stream.len() / 2].to_vec();
        cut.extend([0; 64]);
        assert!(vmlinux(&image(&with_size(cut, kernel.len()))).is_err());
    }
}
