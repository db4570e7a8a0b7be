mod client;
mod hostile;
mod listing;
mod process;
mod rights;
mod store;
mod workers;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use tempfile::TempDir;
use virtiofsd::fuse::{EntryOut, ForgetIn, Opcode};
use vm_memory::ByteValued;

use super::{Fs, FsError};
use crate::spec::{CachePolicy, ShareSpec};
use crate::virtio::testing::Part;
use crate::virtio::{DeviceConfig, RestoreError, SavedState, VirtioDevice};
use client::{Mount, ROOT, c_string};

fn spec(source: &Path) -> ShareSpec {
    ShareSpec::new("test".try_into().unwrap(), source.into())
}

fn share() -> (TempDir, ShareSpec) {
    let directory = tempfile::tempdir().unwrap();
    let spec = spec(directory.path());
    (directory, spec)
}

/// Mounts a share that cannot be changed, with a `file` that says "kept"; returns its node too.
fn refuses_changes(spec: &ShareSpec) -> (Mount, u64) {
    fs::write(spec.source.join("file"), "kept").unwrap();
    let mut mount = Mount::new(spec);
    let node = mount.lookup(ROOT, "file").unwrap().nodeid;
    let refused = Some(libc::EROFS);
    assert_eq!(mount.open(node, libc::O_RDWR).err(), refused);
    assert_eq!(mount.create(ROOT, "new", 0o644).err(), refused);
    assert_eq!(mount.mkdir(ROOT, "new").err(), refused);
    (mount, node)
}

#[test]
fn configuration_space() {
    let (_directory, spec) = share();
    let fs = Fs::new(&spec).unwrap();
    assert_eq!(fs.device_type(), 26);
    assert_eq!(fs.name(), "fs test");
    let mut config = [0xff; 48];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..4], b"test");
    assert_eq!(config[4..36], [0; 32]);
    assert_eq!(config[36..40], 1_u32.to_le_bytes());
    assert_eq!(config[40..], [0; 8]);
    let mut beyond = [0xff; 4];
    fs.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 4]);
    // The longest tag has no zero behind it.
    let tag = "x".repeat(36).try_into().unwrap();
    let fs = Fs::new(&ShareSpec { tag, ..spec }).unwrap();
    fs.read_config(0, &mut config);
    assert_eq!(config[..36], [b'x'; 36]);
}

#[test]
fn bad_specs_name_the_tag_and_the_path() {
    let (directory, _) = share();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let error = |spec: &ShareSpec| {
        let error = Fs::new(spec).err().unwrap();
        let text = error.to_string();
        assert!(text.contains(&format!("{:?}", &*spec.tag)), "{text}");
        assert!(text.contains(spec.source.to_str().unwrap()), "{text}");
        error
    };
    for (path, kind) in [
        (directory.path().join("missing"), std::io::ErrorKind::NotFound),
        (file, std::io::ErrorKind::NotADirectory),
    ] {
        let FsError::Source { source, .. } = error(&spec(&path)) else {
            panic!("the source is wrong");
        };
        assert_eq!(source.kind(), kind);
    }
}

#[test]
fn files_both_ways() {
    let (directory, spec) = share();
    let data: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(directory.path().join("in"), &data).unwrap();
    let mut mount = Mount::new(&spec);

    let node = mount.lookup(ROOT, "in").unwrap().nodeid;
    let fh = mount.open(node, libc::O_RDONLY).unwrap().fh;
    let size = u32::try_from(data.len()).unwrap();
    assert_eq!(mount.read(node, fh, 0, size + 4096), Ok(data.clone()));
    assert_eq!(mount.read(node, fh, 400, 8), Ok(data[400..408].to_vec()));
    assert_eq!(mount.release(node, fh), Ok(()));

    let (entry, open) = mount.create(ROOT, "out", 0o666).unwrap();
    for (at, piece) in (0..).step_by(65536).zip(data.chunks(65536)) {
        let written = mount.write(entry.nodeid, open.fh, at, piece).unwrap();
        assert_eq!(usize::try_from(written).unwrap(), piece.len());
    }
    assert_eq!(mount.release(entry.nodeid, open.fh), Ok(()));
    assert_eq!(fs::read(directory.path().join("out")).unwrap(), data);
    // The guest's kernel has applied its umask; the host's must not be applied on top.
    let metadata = fs::metadata(directory.path().join("out")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o666);
    assert_eq!(mount.lookup(ROOT, "missing").err(), Some(libc::ENOENT));
    let flush = mount.call(Opcode::Flush, entry.nodeid, &[&[0; 24]]);
    assert_eq!(flush.err(), Some(libc::ENOSYS));
}

#[test]
fn directories_are_listed_with_attributes() {
    let (directory, mut spec) = share();
    spec.cache = CachePolicy::Always;
    for name in ["a", "b", "c"] {
        fs::write(directory.path().join(name), name).unwrap();
    }
    let mut mount = Mount::new(&spec);
    let fh = mount.open_as(Opcode::Opendir, ROOT, 0).unwrap().fh;
    let listing = mount.read_as(Opcode::Readdirplus, ROOT, fh, 0, 4096).unwrap();
    let mut names = Vec::new();
    let mut rest = &listing[..];
    while !rest.is_empty() {
        let entry: EntryOut = client::object(rest);
        let (name, _, others) = client::dirent(&rest[size_of::<EntryOut>()..]);
        let name = String::from_utf8(name).unwrap();
        if !name.starts_with('.') {
            assert_eq!(entry.attr.size, 1);
            assert_eq!(entry.attr_valid, 86400);
            names.push(name);
        }
        rest = others;
    }
    names.sort();
    assert_eq!(names, ["a", "b", "c"]);
}

#[test]
fn forget_goes_through_the_urgent_queue() {
    let (directory, spec) = share();
    fs::write(directory.path().join("file"), "x").unwrap();
    let mut mount = Mount::new(&spec);
    let node = mount.lookup(ROOT, "file").unwrap().nodeid;
    assert!(mount.getattr(node).is_ok());
    let forget = ForgetIn { nlookup: 1 };
    let header = mount.header(Opcode::Forget as u32, node, size_of::<ForgetIn>());
    let parts = [Part::Read(header.as_slice()), Part::Read(forget.as_slice())];
    mount.drivers[0].add(&parts);
    let used = mount.settle(0);
    assert_eq!((used.len(), used[0].len), (1, 0));
    assert_eq!(mount.getattr(node).err(), Some(libc::EBADF));
}

#[test]
fn read_only_shares_refuse_changes() {
    let (directory, mut spec) = share();
    spec.read_only = true;
    let (mut mount, _) = refuses_changes(&spec);
    let unlink = mount.call(Opcode::Unlink, ROOT, &[&c_string("file")]);
    assert_eq!(unlink.err(), Some(libc::EROFS));
    assert_eq!(mount.cat("file").unwrap(), b"kept");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn two_guests_and_the_host_see_each_other_at_once() {
    let (directory, spec) = share();
    let mut one = Mount::new(&spec);
    let mut two = Mount::new(&spec);
    let (entry, open) = one.create(ROOT, "file", 0o644).unwrap();
    assert_eq!((entry.attr_valid, entry.attr_valid_nsec), (0, 0));
    assert_eq!((entry.entry_valid, entry.entry_valid_nsec), (0, 0));
    assert_ne!(open.open_flags & 1, 0, "FOPEN_DIRECT_IO: data is not cached");
    one.write(entry.nodeid, open.fh, 0, b"from one").unwrap();
    assert_eq!(two.cat("file").unwrap(), b"from one");
    fs::write(directory.path().join("file"), "from the host").unwrap();
    assert_eq!(two.cat("file").unwrap(), b"from the host");
    let through_old_handle = one.read(entry.nodeid, open.fh, 0, 64);
    assert_eq!(through_old_handle.unwrap(), b"from the host");
}

#[test]
fn a_guest_may_mount_again_after_a_reset() {
    let (directory, spec) = share();
    fs::write(directory.path().join("file"), "x").unwrap();
    let mut mount = Mount::new(&spec);
    let node = mount.lookup(ROOT, "file").unwrap().nodeid;
    mount.open(node, libc::O_RDONLY).unwrap();
    let mut mount = mount.reboot();
    assert_eq!(mount.getattr(node).err(), Some(libc::EBADF));
    mount.init();
    assert_eq!(mount.cat("file").unwrap(), b"x");
}

#[test]
fn pausing_holds_new_requests() {
    let (_directory, spec) = share();
    let mut mount = Mount::new(&spec);
    mount.device.pause();
    let positions = mount.device.queue_positions();
    mount.offer(Opcode::Getattr, ROOT, &[&[0; 16]], 256);
    assert_eq!(mount.device.queue_positions(), positions);
    assert_eq!(mount.drivers[1].used(), None);
    mount.device.host_event().unwrap();
    mount.device.pause();
    assert!(mount.drivers[1].used().is_some());
}

#[test]
fn a_restored_share_goes_on_where_it_was() {
    let (directory, spec) = share();
    fs::create_dir(directory.path().join("dir")).unwrap();
    fs::write(directory.path().join("dir/file"), "0123456789").unwrap();
    fs::write(directory.path().join("gone"), "x").unwrap();
    let mut mount = Mount::new(&spec);
    let dir = mount.lookup(ROOT, "dir").unwrap().nodeid;
    let node = mount.lookup(dir, "file").unwrap().nodeid;
    let fh = mount.open(node, libc::O_RDWR).unwrap().fh;
    let gone = mount.lookup(ROOT, "gone").unwrap().nodeid;
    let saved = mount.device.save();
    // The one that was saved goes on as well.
    assert_eq!(mount.read(node, fh, 2, 3).unwrap(), b"234");
    drop(mount);
    fs::remove_file(directory.path().join("gone")).unwrap();

    let mut fs = Fs::new(&spec).unwrap();
    fs.restore(&saved).unwrap();
    let mut mount = Mount::activate(Box::new(fs));
    assert_eq!(mount.getattr(node).unwrap().attr.size, 10);
    assert_eq!(mount.read(node, fh, 4, 3).unwrap(), b"456");
    assert_eq!(mount.write(node, fh, 0, b"new"), Ok(3));
    assert!(mount.getattr(gone).is_err());
    let text = fs::read(directory.path().join("dir/file")).unwrap();
    assert_eq!(text, b"new3456789");
    assert!(mount.create(ROOT, "more", 0o644).is_ok());
}

#[test]
fn states_of_unmounted_shares_and_bad_states() {
    let (_directory, spec) = share();
    let mut fs = Fs::new(&spec).unwrap();
    let saved = fs.save();
    fs.restore(&saved).unwrap();
    let bad = SavedState { version: saved.version, data: vec![1, 200, 1, 2, 3] };
    assert!(matches!(fs.restore(&bad), Err(RestoreError::Decode(_))));
    let other = SavedState { version: 99, ..saved };
    assert!(matches!(fs.restore(&other), Err(RestoreError::Version { .. })));
    let mut mount = Mount::activate(Box::new(fs));
    mount.init();
    assert!(mount.getattr(ROOT).is_ok());
}

#[test]
fn the_share_stays_the_directory_that_was_opened() {
    let (directory, _) = share();
    let path = directory.path().join("share");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("file"), "right").unwrap();
    let link = directory.path().join("link");
    symlink(&path, &link).unwrap();
    let device = Fs::new(&spec(&link)).unwrap();
    fs::rename(&path, directory.path().join("moved")).unwrap();
    fs::create_dir(&path).unwrap();
    fs::write(path.join("file"), "wrong").unwrap();
    let mut mount = Mount::activate(Box::new(device));
    mount.init();
    assert_eq!(mount.cat("file").unwrap(), b"right");
}
