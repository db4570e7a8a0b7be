use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use tempfile::NamedTempFile;
use vm_memory::GuestMemory;

use super::*;
use crate::arch::layout;
use crate::memory;

fn file(content: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file
}

fn kernel() -> Kernel {
    Kernel::unloaded(layout::HIGH_START + (1 << 20))
}

#[test]
fn initrds_lie_one_after_the_other_at_the_end_of_low_memory() {
    let memory = memory::allocate(64).unwrap();
    let kernel = kernel();
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
    let kernel = kernel();
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
    let kernel = kernel();
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
