//! Set-uid bits and extended attributes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use virtiofsd::fuse::{MkdirIn, MknodIn, Opcode, SetattrIn};
use vm_memory::ByteValued;

use super::client::{Mount, ROOT, c_string};
use super::share;

/// FUSE protocol: `FATTR_MODE`, `FATTR_SIZE`, `FATTR_KILL_SUIDGID`, `FUSE_WRITE_KILL_SUIDGID`.
const MODE: u32 = 1;
const SIZE: u32 = 1 << 3;
const KILL: u32 = 1 << 11;
const WRITE_KILL: u32 = 1 << 2;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_guest_gets_no_set_uid_bits_on_files() {
    let (directory, spec) = share();
    let at = |name: &str| directory.path().join(name);
    let mut mount = Mount::new(&spec);
    let (entry, _) = mount.create(ROOT, "created", 0o6755).unwrap();
    assert_eq!(entry.attr.mode & 0o7777, 0o755);
    let node = entry.nodeid;
    for lie in [libc::S_IFREG, libc::S_IFDIR, 0] {
        let attr = SetattrIn { mode: lie | 0o6711, ..Default::default() };
        let reply = mount.setattr(node, MODE, attr).unwrap();
        assert_eq!(reply.attr.mode & 0o7777, 0o711);
    }
    let mknod = MknodIn { mode: libc::S_IFREG | 0o4755, ..Default::default() };
    mount.call(Opcode::Mknod, ROOT, &[mknod.as_slice(), &c_string("made")]).unwrap();
    assert_eq!((mode(&at("created")), mode(&at("made"))), (0o711, 0o755));

    // On a directory the bit only says whose the new files are.
    let mkdir = MkdirIn { mode: 0o2755, umask: 0 };
    mount.call(Opcode::Mkdir, ROOT, &[mkdir.as_slice(), &c_string("dir")]).unwrap();
    let dir = mount.lookup(ROOT, "dir").unwrap().nodeid;
    let attr = SetattrIn { mode: libc::S_IFDIR | 0o2775, ..Default::default() };
    assert_eq!(mount.setattr(dir, MODE, attr).unwrap().attr.mode & 0o7777, 0o2775);
}

#[test]
fn allowed_set_uid_bits_go_with_a_write_or_a_truncation() {
    let (directory, mut spec) = share();
    spec.allow_setuid = true;
    let path = directory.path().join("file");
    let mut mount = Mount::new(&spec);
    let (entry, open) = mount.create(ROOT, "file", 0o755).unwrap();
    let node = entry.nodeid;
    let set = |mount: &mut Mount| {
        let attr = SetattrIn { mode: libc::S_IFREG | 0o6755, ..Default::default() };
        assert_eq!(mount.setattr(node, MODE, attr).unwrap().attr.mode & 0o7777, 0o6755);
    };
    set(&mut mount);
    mount.write_as(WRITE_KILL, node, open.fh, 0, b"text").unwrap();
    assert_eq!(mode(&path), 0o755);
    set(&mut mount);
    let attr = SetattrIn { size: 1, ..Default::default() };
    assert_eq!(mount.setattr(node, SIZE | KILL, attr).unwrap().attr.mode & 0o7777, 0o755);
    assert_eq!(fs::read(&path).unwrap(), b"t");
}

#[test]
fn privileged_attributes_are_kept_by_other_names() {
    let (directory, spec) = share();
    fs::write(directory.path().join("file"), "x").unwrap();
    let mut mount = Mount::new(&spec);
    let node = mount.lookup(ROOT, "file").unwrap().nodeid;
    let names = ["trusted.overlay.opaque", "security.capability", "user.note"];
    for name in names {
        match mount.set_xattr(node, name, name.as_bytes()) {
            // Of tests that need it, the guest tests say whether they ran.
            Err(libc::ENOTSUP | libc::ENOSYS) => return,
            set => set.unwrap(),
        }
        assert_eq!(mount.xattr(node, name).unwrap(), name.as_bytes());
    }
    let list = mount.xattrs(node).unwrap();
    let mut listed: Vec<_> =
        list.split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
    listed.sort_unstable();
    assert_eq!(listed, [&b"security.capability"[..], b"trusted.overlay.opaque", b"user.note"]);
    assert_eq!(mount.xattr(node, "user.virtiofs.user.note"), Err(libc::ENOTSUP));

    // A write takes the capabilities away, nothing else.
    let fh = mount.open(node, libc::O_RDWR).unwrap().fh;
    mount.write_as(WRITE_KILL, node, fh, 0, b"y").unwrap();
    assert_eq!(mount.xattr(node, "security.capability"), Err(libc::ENODATA));
    assert!(mount.xattr(node, "trusted.overlay.opaque").is_ok());
}
