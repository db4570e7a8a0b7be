use std::io::Write;

use tempfile::NamedTempFile;

use super::*;
use crate::boot::kernel::load_kernel;
use crate::memory;

/// A bzImage of one setup sector and `code` bytes of protected-mode code.
fn bzimage(code: u32, change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        syssize: code / 16,
        boot_flag: bzimage::BOOT_FLAG,
        header: bzimage::MAGIC,
        version: 0x020f,
        loadflags: 1,
        code32_start: 0x10_0000,
        xloadflags: XLF_KERNEL_64,
        pref_address: 0x100_0000,
        init_size: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        ..Default::default()
    };
    change(&mut header);
    bzimage::image(&header, &vec![0x90; code as usize])
}

fn file(content: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file
}

fn load(content: &[u8], mib: u64) -> Result<Kernel, String> {
    let memory = memory::allocate(mib).unwrap();
    let file = file(content);
    load_kernel(&memory, file.path()).map_err(|error| {
        assert!(error.to_string().contains(file.path().to_str().unwrap()) || mib < 64, "{error}");
        error.to_string()
    })
}

#[test]
fn a_bzimage_is_entered_where_it_wants_to_run() {
    let kernel = load(&bzimage(4096, |_| ()), 64).unwrap();
    assert_eq!(kernel.entry, 0x100_0200);
    assert_eq!(kernel.end, 0x110_0000);
}

#[test]
fn files_that_are_no_kernel_are_named_with_the_reason() {
    assert!(load(b"", 64).unwrap_err().contains("too short"));
    assert!(load(&[0; 4096], 64).unwrap_err().contains("neither a bzImage nor an ELF file"));
    assert!(load(b"\x7fELF", 64).unwrap_err().contains("too short"));
    let image = bzimage(4096, |header| header.xloadflags = 0);
    assert!(load(&image, 64).unwrap_err().contains("no 64-bit entry point"));
    let mut elf = b"\x7fELF".to_vec();
    elf.resize(8192, 0xff);
    assert!(load(&elf, 64).unwrap_err().contains("cannot load kernel"));
    let memory = memory::allocate(64).unwrap();
    let error = load_kernel(&memory, Path::new("/nonexistent/vmlinuz")).unwrap_err();
    assert_eq!(error.to_string(), "cannot read kernel /nonexistent/vmlinuz");
    assert!(load_kernel(&memory, Path::new("/")).is_err());
}

#[test]
fn a_truncated_kernel_says_how_much_is_missing() {
    let image = bzimage(4096, |_| ());
    let error = load(&image[..3000], 64).unwrap_err();
    assert!(error.ends_with("is truncated: 3000 bytes of at least 5120"), "{error}");
}

#[test]
fn a_kernel_larger_than_memory_says_so() {
    let image = bzimage(4096, |header| header.init_size = 0x1000_0000);
    let error = load(&image, 32).unwrap_err();
    assert!(error.starts_with("kernel of 256 MiB does not fit into 16 MiB"), "{error}");
}
