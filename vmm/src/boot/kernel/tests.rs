use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use tempfile::NamedTempFile;
use vm_memory::GuestMemory;

use super::*;
use crate::memory;

/// A bzImage of one setup sector and `code` bytes of protected-mode code.
fn bzimage(code: u32, change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        syssize: code / 16,
        boot_flag: 0xaa55,
        header: HEADER_MAGIC,
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
    let mut image = vec![0; 1024 + code as usize];
    let at = usize::try_from(SETUP_HEADER).unwrap();
    image[at..at + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image[1024..].fill(0x90);
    image
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
    assert!(load(&[0; 4096], 64).unwrap_err().contains("no magic number"));
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

#[test]
fn initrds_lie_one_after_the_other_at_the_end_of_low_memory() {
    let memory = memory::allocate(64).unwrap();
    let kernel = load(&bzimage(4096, |_| ()), 64).unwrap();
    let files = [file(b"first"), file(b"second")];
    let paths = files.each_ref().map(|file| file.path().to_owned());
    let initrd = load_initrd(&memory, &paths, &kernel).unwrap();
    assert_eq!(initrd, Initrd { start: (64 << 20) - 4096, len: 14 });
    let mut content = [0; 14];
    memory.read_slice(&mut content, GuestAddress(initrd.start)).unwrap();
    assert_eq!(&content, b"first\0\0\0second");
    assert_eq!(load_initrd(&memory, &[], &kernel).unwrap(), Initrd::default());
}

#[test]
fn an_initrd_that_is_missing_empty_or_too_large_is_named() {
    let memory = memory::allocate(64).unwrap();
    let kernel = load(&bzimage(4096, |_| ()), 64).unwrap();
    let error =
        |path: &Path| load_initrd(&memory, &[path.to_owned()], &kernel).unwrap_err().to_string();
    assert_eq!(error(Path::new("/nonexistent")), "cannot read initrd /nonexistent");
    assert_eq!(error(Path::new("/")), "cannot read initrd /");
    let empty = file(b"");
    assert_eq!(error(empty.path()), format!("initrd {} is empty", empty.path().display()));
    let large = file(b"");
    large.as_file().set_len(100 << 20).unwrap();
    assert!(error(large.path()).starts_with("initrd of 100 MiB does not fit"));
    assert!(memory.check_address(GuestAddress(0)).is_some());
}

#[test]
fn files_that_nobody_may_write_arrive_like_others() {
    let mut content: Vec<u8> = (0..3 * 4096 + 5_u32).map(|n| n.to_le_bytes()[0]).collect();
    content[4000..9000].fill(0);
    let kernel = load(&bzimage(4096, |_| ()), 64).unwrap();
    for mode in [0o444, 0o644] {
        let memory = memory::allocate(64).unwrap();
        let file = file(&content);
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(mode)).unwrap();
        let initrd = load_initrd(&memory, &[file.path().to_owned()], &kernel).unwrap();
        let mut loaded = vec![0; content.len()];
        memory.read_slice(&mut loaded, GuestAddress(initrd.start)).unwrap();
        let differs = loaded.iter().zip(&content).position(|(a, b)| a != b);
        assert_eq!(differs, None, "mode {mode:o}");
    }
}
