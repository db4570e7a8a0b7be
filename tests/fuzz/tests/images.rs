//! Kernel images that are nearly right, and such as are nothing of the kind.

use std::fs;
use std::io::Write;

use bolero::{TypeGenerator, check};
use firn_vmm::boot::{kernel, unpack};
use firn_vmm::memory;

/// Inputs of an ordinary test run.
const ITERATIONS: usize = 2000;

/// What is done to an image: its start is where all fields are.
#[derive(Debug, TypeGenerator)]
struct Damage {
    bytes: Vec<(u16, u8)>,
    words: Vec<(u16, u32)>,
    cut: Option<u16>,
}

impl Damage {
    fn apply(&self, image: &mut Vec<u8>, fields: &[u16]) {
        let at = |place: &u16| {
            // Every other hits a field.
            let field = usize::from(*place) / 2 % fields.len();
            if place.is_multiple_of(2) { fields[field].into() } else { usize::from(*place) }
        };
        for (place, value) in &self.bytes {
            if let Some(byte) = image.get_mut(at(place)) {
                *byte = *value;
            }
        }
        for (place, value) in &self.words {
            if let Some(word) = image.get_mut(at(place)..).and_then(|rest| rest.get_mut(..4)) {
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
        if let Some(length) = self.cut {
            image.truncate(length.into());
        }
    }
}

/// An ELF file with one segment.
fn elf() -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    // Identification, kind, machine, version, entry (ELF-64 object file format, 3).
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &0x10_0000_u64.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 1, 0, 64, 0]);
    // One segment to load, from 0x800 to 1 MiB.
    put(64, &[1, 0, 0, 0, 7, 0, 0, 0]);
    for (at, value) in
        [(72, 0x800_u64), (80, 0x10_0000), (88, 0x10_0000), (96, 0x800), (104, 0x1000)]
    {
        put(at, &value.to_le_bytes());
    }
    file
}

const ELF_FIELDS: [u16; 14] = [0, 4, 16, 18, 24, 32, 52, 54, 56, 64, 72, 88, 96, 104];

/// A bzImage with this payload (linux/Documentation/arch/x86/boot.rst).
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 5 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    // It has a 64-bit entry point.
    put(0x236, &[1, 0]);
    put(0x248, &16_u32.to_le_bytes());
    let length = u32::try_from(payload.len()).expect("it is small");
    put(0x24c, &length.to_le_bytes());
    put(0x258, &0x10_0000_u64.to_le_bytes());
    put(0x260, &0x1_0000_u32.to_le_bytes());
    let code = [&[0; 16], payload, &[0; 16]].concat();
    put(0x1f4, &u32::try_from(code.len() / 16).expect("it is small").to_le_bytes());
    image.extend(code);
    image
}

const HEADER_FIELDS: [u16; 13] =
    [0x1f1, 0x1f4, 0x1fe, 0x202, 0x206, 0x211, 0x236, 0x248, 0x24c, 0x258, 0x260, 0xa10, 0xa14];

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).and_then(|()| encoder.finish()).expect("memory takes it all")
}

fn with_size(mut stream: Vec<u8>, size: usize) -> Vec<u8> {
    stream.extend(u32::try_from(size).expect("it is small").to_le_bytes());
    stream
}

/// One image for each way to pack a kernel.
fn packed() -> [Vec<u8>; 5] {
    let kernel = elf();
    let block = lz4_flex::block::compress(&kernel);
    let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
    lz4.extend(u32::try_from(block.len()).expect("it is small").to_le_bytes());
    lz4.extend(block);
    let options = lzma_rust2::XzOptions::with_preset(0);
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).expect("options that are right");
    xz.write_all(&kernel).expect("memory takes it all");
    let xz = xz.finish().expect("memory takes it all");
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let zstd = ruzstd::encoding::compress_to_vec(kernel.as_slice(), level);
    let size = kernel.len();
    [gzip(&kernel), with_size(lz4, size), with_size(xz, size), with_size(zstd, size), kernel]
        .map(|payload| bzimage(&payload))
}

/// Kernels that are unpacked.
#[test]
fn packed_kernels() {
    let images = packed();
    for image in &images {
        assert!(unpack::vmlinux(image).expect("it is right") == elf());
    }
    check!().with_iterations(ITERATIONS).with_type::<(u8, Damage)>().for_each(|(which, damage)| {
        let mut image = images[usize::from(*which) % images.len()].clone();
        damage.apply(&mut image, &HEADER_FIELDS);
        if let Ok(kernel) = unpack::vmlinux(&image) {
            assert!(kernel.starts_with(b"\x7fELF"));
        }
    });
}

/// Kernels that are loaded, damaged or mere noise.
#[test]
fn kernels() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("kernel");
    let memory = memory::allocate(4).expect("a little memory");
    let [image, ..] = packed();
    for whole in [&image, &elf()] {
        fs::write(&path, whole).expect("there is room");
        kernel::load_kernel(&memory, &path).expect("it is right");
    }
    let input = check!().with_iterations(ITERATIONS).with_type::<(u8, Damage, Vec<u8>)>();
    input.for_each(|(kind, damage, noise)| {
        let mut bytes = match kind % 4 {
            0 => noise.clone(),
            1 => [&b"\x7fELF"[..], noise].concat(),
            2 => elf(),
            _ => image.clone(),
        };
        let fields = if kind % 4 == 3 { &HEADER_FIELDS[..] } else { &ELF_FIELDS };
        damage.apply(&mut bytes, fields);
        fs::write(&path, &bytes).expect("there is room");
        if let Ok(kernel) = kernel::load_kernel(&memory, &path) {
            assert!(kernel.end <= 4 << 20 || kind % 4 != 3, "{kernel:?}");
        }
    });
}
