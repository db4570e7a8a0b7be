//! Directories that nobody changes.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{geteuid, mkfifo};
use tempfile::TempDir;
use virtiofsd::fuse::{EntryOut, FsOptions, InHeader, Opcode, ReadIn, WriteIn};
use vm_memory::ByteValued;

use super::super::server::Fuse;
use super::super::store::{Filter, Store};
use super::client::{Mount, ROOT, Reply, c_string, dirent, object};
use super::{Fs, refuses_changes, share, spec};
use crate::spec::{CachePolicy, ShareSpec};
use crate::virtio::testing::{Guest, Part};
use crate::virtio::{DeviceConfig, VirtioDevice};

/// A share that is served as a store.
pub(super) fn store() -> (TempDir, ShareSpec) {
    let (directory, spec) = share();
    (directory, as_store(spec))
}

fn as_store(spec: ShareSpec) -> ShareSpec {
    ShareSpec { read_only: true, cache: CachePolicy::Always, ..spec }
}

/// What is found at `path` below the share's directory.
fn walk(mount: &mut Mount, path: &str) -> Reply<EntryOut> {
    let mut entry = EntryOut { nodeid: ROOT, ..Default::default() };
    for name in path.split('/') {
        entry = mount.lookup(entry.nodeid, name)?;
    }
    Ok(entry)
}

/// Reads without opening, as a guest does here.
fn read(mount: &mut Mount, node: u64, offset: u64, size: u32) -> Reply<Vec<u8>> {
    mount.read(node, 0, offset, size)
}

fn cat(mount: &mut Mount, path: &str) -> Reply<Vec<u8>> {
    let node = walk(mount, path)?.nodeid;
    read(mount, node, 0, 4096)
}

/// A directory's entries, by replies of `room` bytes.
fn list(mount: &mut Mount, node: u64, room: u32) -> BTreeMap<Vec<u8>, EntryOut> {
    let (mut all, mut at) = (BTreeMap::new(), 0);
    loop {
        let listing = mount.read_as(Opcode::Readdirplus, node, 0, at, room).unwrap();
        if listing.is_empty() {
            return all;
        }
        let mut rest = &listing[..];
        while !rest.is_empty() {
            let entry: EntryOut = object(rest);
            let (name, position, others) = dirent(&rest[size_of::<EntryOut>()..]);
            assert!(all.insert(name, entry).is_none());
            (at, rest) = (position, others);
        }
    }
}

#[test]
fn the_guest_is_told_not_to_ask_again() {
    let (directory, spec) = store();
    fs::write(directory.path().join("file"), "x").unwrap();
    let mut mount = Mount::activate(Box::new(Fs::new(&spec).unwrap()));
    let init = mount.init();
    let wanted = FsOptions::CACHE_SYMLINKS
        | FsOptions::ZERO_MESSAGE_OPEN
        | FsOptions::ZERO_MESSAGE_OPENDIR
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::DO_READDIRPLUS;
    let flags = FsOptions::from_bits_truncate(init.flags.into());
    assert!(flags.contains(wanted), "{flags:?}");
    assert!(!flags.contains(FsOptions::READDIRPLUS_AUTO));
    assert_eq!((init.max_pages, init.max_write), (256, 1 << 20));
    let file = mount.lookup(ROOT, "file").unwrap();
    assert_eq!((file.entry_valid, file.attr_valid), (86400, 86400));
    let node = file.nodeid;
    assert_eq!(mount.open(node, libc::O_RDONLY).err(), Some(libc::ENOSYS));
    assert_eq!(mount.open_as(Opcode::Opendir, ROOT, 0).err(), Some(libc::ENOSYS));
    assert_eq!(mount.xattr(node, "security.capability").err(), Some(libc::ENOSYS));
    assert_eq!(mount.xattrs(node).err(), Some(libc::ENOSYS));
    assert_eq!(mount.call(Opcode::Flush, node, &[&[0; 24]]).err(), Some(libc::ENOSYS));
    assert_eq!(mount.call(Opcode::Statfs, ROOT, &[]).unwrap().len(), 80);
    // What is missing below the top will always be; a store may get new paths.
    fs::create_dir(directory.path().join("dir")).unwrap();
    let dir = mount.lookup(ROOT, "dir").unwrap().nodeid;
    let missing = mount.lookup(dir, "missing").unwrap();
    assert_eq!((missing.nodeid, missing.entry_valid), (0, 86400));
    assert_eq!(mount.lookup(ROOT, "new").err(), Some(libc::ENOENT));
    fs::write(directory.path().join("new"), "here").unwrap();
    assert_eq!(cat(&mut mount, "new").unwrap(), b"here");
}

#[test]
fn a_large_directory_is_looked_through_by_a_worker() {
    let (directory, spec) = store();
    for n in 0..2000 {
        let name = format!("the-name-of-a-package-in-a-store-{n}");
        File::create(directory.path().join(name)).unwrap();
    }
    let root = File::open(directory.path()).unwrap();
    let store = Store::new(&spec, &root, &Filter::default(), 100).unwrap();
    let (mut driver, mut queue) = Guest::new().queue(0, 16);
    let list = ReadIn { size: 4096, ..Default::default() };
    let opcode = Opcode::Readdirplus as u32;
    let header = InHeader { len: 80, opcode, unique: 1, nodeid: ROOT, ..Default::default() };
    let parts = [header.as_slice(), list.as_slice()].map(Part::Read);
    driver.add(&[parts[0], parts[1], Part::Write(4112)]);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(store.serve_quickly(&chain), None);
    assert!(store.serve(&chain) > 3000);
    assert!(store.serve_quickly(&chain) > Some(3000), "it is known now");
}

#[test]
fn everything_that_a_directory_can_hold() {
    let (directory, spec) = store();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "s").unwrap();
    let dir = directory.path().join("dir");
    fs::create_dir(&dir).unwrap();
    let long = "n".repeat(255);
    let odd: [&[u8]; 5] = [b"new\nline", b"\xff\xfe", b" ", b"...", long.as_bytes()];
    for name in odd {
        fs::write(dir.join(OsStr::from_bytes(name)), name).unwrap();
    }
    fs::hard_link(dir.join("..."), directory.path().join("linked")).unwrap();
    symlink(outside.path().join("secret"), dir.join("out")).unwrap();
    symlink(outside.path(), dir.join("out-dir")).unwrap();
    mkfifo(&dir.join("fifo"), Mode::S_IRUSR).unwrap();
    let _listener = UnixListener::bind(dir.join("socket")).unwrap();
    let mut special = vec![&b"out"[..], b"out-dir", b"fifo", b"socket"];
    if geteuid().is_root() {
        mknod(&dir.join("null"), SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, 3)).unwrap();
        special.push(b"null");
    }

    let mut mount = Mount::new(&spec);
    let node = mount.lookup(ROOT, "dir").unwrap().nodeid;
    let listed = list(&mut mount, node, 4096);
    assert_eq!(listed.len(), 5 + special.len() + 2);
    for (name, entry) in &listed {
        let host = fs::symlink_metadata(dir.join(OsStr::from_bytes(name))).unwrap();
        if name != b"." && name != b".." {
            assert_eq!((entry.attr.mode, entry.attr.size), (host.mode(), host.size()));
            let times = (entry.attr.mtime.cast_signed(), i64::from(entry.attr.mtimensec));
            assert_eq!(times, (host.mtime(), host.mtime_nsec()));
            assert_eq!(entry.attr.uid, 0.into());
            assert_eq!(u64::from(entry.attr.nlink), host.nlink());
            assert_eq!(u64::from(entry.attr.rdev), host.rdev());
            let name = CString::new(name.as_slice()).unwrap();
            let again = mount.call(Opcode::Lookup, node, &[name.as_bytes_with_nul()]);
            assert_eq!(object::<EntryOut>(&again.unwrap()).nodeid, entry.nodeid);
        }
    }
    for name in odd {
        assert_eq!(read(&mut mount, listed[name].nodeid, 0, 4096).unwrap(), name);
    }
    // Two names of one file, each where it belongs.
    let top = list(&mut mount, ROOT, 4096);
    assert!(top.keys().eq([&b"."[..], b"..", b"dir", b"linked"]), "{top:?}");
    assert_eq!(mount.lookup(ROOT, "linked").unwrap().nodeid, listed[&b"..."[..]].nodeid);
    let link = listed[&b"out"[..]].nodeid;
    let secret = outside.path().join("secret");
    assert_eq!(mount.call(Opcode::Readlink, link, &[]).unwrap(), secret.as_os_str().as_bytes());
    for name in special {
        let node = listed[name].nodeid;
        assert_eq!(read(&mut mount, node, 0, 10).err(), Some(libc::EINVAL), "{name:?}");
        assert_eq!(mount.lookup(node, "secret").err(), Some(libc::ENOTDIR));
        let list = mount.read_as(Opcode::Readdirplus, node, 0, 0, 4096);
        assert_eq!(list.err(), Some(libc::ENOTDIR));
    }
    assert_eq!(read(&mut mount, node, 0, 10).err(), Some(libc::EISDIR));
    assert_eq!(mount.call(Opcode::Readlink, node, &[]).err(), Some(libc::EINVAL));
    for name in ["..", ".", "", "../dir", "dir/...", secret.to_str().unwrap()] {
        assert_eq!(mount.lookup(ROOT, name).err(), Some(libc::EINVAL), "{name}");
        assert_eq!(mount.lookup(node, name).err(), Some(libc::EINVAL), "{name}");
    }
    assert_eq!(mount.getattr(1 << 40).err(), Some(libc::ESTALE));
    assert_eq!(mount.getattr(0).err(), Some(libc::ESTALE));
}

#[test]
fn nothing_can_be_changed() {
    let (directory, spec) = store();
    let (mut mount, node) = refuses_changes(&spec);
    let refused = Some(libc::EROFS);
    assert_eq!(mount.set_xattr(node, "user.a", b"x").err(), refused);
    assert_eq!(mount.write(node, 0, 0, b"x").err(), refused);
    let write = WriteIn::default();
    for opcode in [
        Opcode::Setattr,
        Opcode::Symlink,
        Opcode::Mknod,
        Opcode::Unlink,
        Opcode::Rmdir,
        Opcode::Rename,
        Opcode::Rename2,
        Opcode::Link,
        Opcode::Removexattr,
        Opcode::TmpFile,
        Opcode::Fallocate,
        Opcode::CopyFileRange,
    ] {
        let body = [write.as_slice(), &c_string("file")];
        assert_eq!(mount.call(opcode, ROOT, &body).err(), refused, "{opcode:?}");
    }
    assert_eq!(cat(&mut mount, "file").unwrap(), b"kept");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn large_files_are_read_in_pieces_and_not_beyond_their_end() {
    let (directory, spec) = store();
    let data: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(directory.path().join("file"), &data).unwrap();
    let mut mount = Mount::new(&spec);
    let node = mount.lookup(ROOT, "file").unwrap().nodeid;
    let len = u64::try_from(data.len()).unwrap();
    let mut all = Vec::new();
    for at in (0..len).step_by(1 << 20) {
        all.extend(read(&mut mount, node, at, 1 << 20).unwrap());
    }
    assert!(all == data);
    assert_eq!(read(&mut mount, node, len - 3, 4096).unwrap(), data[data.len() - 3..]);
    for beyond in [len, len + 1, 1 << 50, u64::MAX] {
        assert_eq!(read(&mut mount, node, beyond, 4096).unwrap(), b"");
    }
}

/// What a file costs the guest that changes all the same: that file, and never more.
#[test]
fn files_that_are_cut_short_removed_or_replaced() {
    let (directory, spec) = store();
    let outside = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for dir in ["dir", "moved"] {
        fs::create_dir(path(dir)).unwrap();
        fs::write(path(dir).join("file"), [b'x'; 10_000]).unwrap();
    }
    let spare = ["spare", "spare too"];
    for file in ["cut", "removed", "replaced"].iter().chain(&spare) {
        fs::write(path(file), [b'x'; 10_000]).unwrap();
    }
    fs::write(outside.path().join("file"), "secret").unwrap();
    // Two files are open at a time.
    let mut mount = Mount::activate(Box::new(Fs::limited(&spec, 1).unwrap()));
    mount.init();
    let names = ["cut", "removed", "replaced", "dir/file", "moved/file"];
    let [cut, removed, replaced, inner, moved] =
        names.map(|name| walk(&mut mount, name).unwrap().nodeid);
    assert_eq!(read(&mut mount, cut, 0, 10_000).unwrap().len(), 10_000);
    File::options().write(true).open(path("cut")).unwrap().set_len(5000).unwrap();
    fs::remove_file(path("removed")).unwrap();
    fs::write(path("other"), "other").unwrap();
    fs::rename(path("other"), path("replaced")).unwrap();
    fs::remove_dir_all(path("dir")).unwrap();
    symlink(outside.path(), path("dir")).unwrap();
    fs::rename(path("moved"), path("elsewhere")).unwrap();
    fs::create_dir(path("moved")).unwrap();

    for file in spare {
        // Closes what was open before.
        assert_eq!(cat(&mut mount, file).unwrap().len(), 4096);
    }
    assert_eq!(read(&mut mount, cut, 0, 5000).unwrap().len(), 5000);
    assert_eq!(read(&mut mount, cut, 0, 10_000).err(), Some(libc::EIO));
    assert_eq!(read(&mut mount, cut, 8192, 100).err(), Some(libc::EIO));
    for node in [removed, replaced, inner, moved] {
        assert_eq!(read(&mut mount, node, 0, 100).err(), Some(libc::ESTALE));
    }
    // At the top, whoever looks again finds what is there now.
    assert_eq!(mount.lookup(ROOT, "removed").err(), Some(libc::ENOENT));
    assert_eq!(cat(&mut mount, "replaced").unwrap(), b"other");
    assert_eq!(mount.lookup(ROOT, "dir").unwrap().attr.mode & libc::S_IFMT, libc::S_IFLNK);
    mount.device.host_event().unwrap();
}

/// How many of the process's files are below `directory`.
fn open_below(directory: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let targets = open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    targets.filter(|target| target.starts_with(directory)).count()
}

#[test]
fn a_hundred_thousand_files() {
    const COUNT: usize = 100_000;
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let spec = as_store(spec(directory.path()));
    for number in 0..COUNT {
        fs::write(directory.path().join(number.to_string()), "").unwrap();
    }
    fs::write(directory.path().join("full"), "text").unwrap();
    let mut mount = Mount::new(&spec);
    let listed = list(&mut mount, ROOT, 1 << 20);
    assert_eq!(listed.len(), COUNT + 3);
    for (name, entry) in listed.iter().filter(|(name, _)| name[0].is_ascii_digit()).take(3000) {
        assert_eq!(read(&mut mount, entry.nodeid, 0, 10).unwrap(), b"", "{name:?}");
    }
    assert_eq!(read(&mut mount, listed[&b"full"[..]].nodeid, 0, 10).unwrap(), b"text");
    let open = open_below(directory.path());
    assert!((2..600).contains(&open), "{open} files are open");
    drop(mount);
    assert_eq!(open_below(directory.path()), 0);
}

#[test]
fn machines_share_what_is_known() {
    let (directory, spec) = store();
    for name in ["a", "b", "c"] {
        fs::write(directory.path().join(name), name).unwrap();
    }
    let (mut one, mut two) = (Mount::new(&spec), Mount::new(&spec));
    let a = one.lookup(ROOT, "a").unwrap().nodeid;
    let b = two.lookup(ROOT, "b").unwrap().nodeid;
    assert_ne!(a, b);
    assert_eq!(two.lookup(ROOT, "a").unwrap().nodeid, a);
    // Even what only the other one has looked up.
    assert_eq!(read(&mut one, b, 0, 10).unwrap(), b"b");
    drop(two);
    assert_eq!(read(&mut one, b, 0, 10).unwrap(), b"b");
    let mut one = one.reboot();
    one.init();
    assert_eq!(one.lookup(ROOT, "a").unwrap().nodeid, a);
}

#[test]
fn a_restored_guest_knows_what_it_knew() {
    let (directory, spec) = store();
    fs::create_dir_all(directory.path().join("dir/inner")).unwrap();
    fs::write(directory.path().join("dir/inner/file"), "0123456789").unwrap();
    fs::write(directory.path().join("other"), "other").unwrap();
    let mut mount = Mount::new(&spec);
    let inner = walk(&mut mount, "dir/inner").unwrap().nodeid;
    let node = mount.lookup(inner, "file").unwrap().nodeid;
    let saved = mount.device.save();
    // Here there are more by then: the same go on.
    let other = mount.lookup(ROOT, "other").unwrap().nodeid;
    let mut same = Fs::new(&spec).unwrap();
    same.restore(&saved).unwrap();
    let mut same = Mount::activate(Box::new(same));
    assert_eq!(read(&mut same, node, 4, 3).unwrap(), b"456");
    assert_eq!(same.lookup(ROOT, "other").unwrap().nodeid, other);
    drop((mount, same));

    // As in another process, with nothing known, and with what others have looked up there.
    for foreign in [false, true] {
        let mut first = Mount::new(&spec);
        if foreign {
            first.lookup(ROOT, "other").unwrap();
        }
        let mut fs = Fs::new(&spec).unwrap();
        fs.restore(&saved).unwrap();
        let mut mount = Mount::activate(Box::new(fs));
        assert_eq!(read(&mut mount, node, 4, 3).unwrap(), b"456", "{foreign}");
        assert_eq!(mount.getattr(node).unwrap().attr.size, 10);
        assert_eq!(mount.lookup(inner, "file").unwrap().nodeid, node);
        assert_eq!(cat(&mut mount, "other").unwrap(), b"other");
        assert_eq!(cat(&mut first, "other").unwrap(), b"other");
    }

    // A state is somebody else's bytes.
    let mut fs = Fs::new(&spec).unwrap();
    let (_changing, changing) = share();
    assert!(fs.restore(&Fs::new(&changing).unwrap().save()).is_err());
    let bad = [(0, &b"../x"[..]), (0, b".."), (0, b""), (7, b"x"), (0, b"a\0b")];
    for (parent, name) in bad {
        let places: Vec<super::super::store::Place> = vec![(parent, name.to_vec())];
        let session = super::super::server::Session::Store(places);
        let state = crate::virtio::SavedState::encode(saved.version, &session);
        assert!(fs.restore(&state).is_err(), "{parent} {name:?}");
    }
}

/// Writes a list of what guests see of a share.
fn listed(spec: &ShareSpec, list: &Path, lines: impl AsRef<[u8]>) -> ShareSpec {
    fs::write(list, lines).unwrap();
    ShareSpec { only: Some(list.to_owned()), ..spec.clone() }
}

#[test]
fn of_a_list_no_more_is_there() {
    let (directory, spec) = store();
    let lists = tempfile::tempdir().unwrap();
    for name in ["a", "b", "c"] {
        fs::create_dir(directory.path().join(name)).unwrap();
        fs::write(directory.path().join(name).join("file"), name).unwrap();
    }
    let whole_path = directory.path().join("b").display().to_string();
    let one = listed(&spec, &lists.path().join("one"), format!("a\n{whole_path}\nlater\n"));
    let two = listed(&spec, &lists.path().join("two"), "c");
    let [mut one, mut two, mut all] = [one, two, spec].map(|spec| Mount::new(&spec));
    let names = |mount: &mut Mount| {
        let names = list(mount, ROOT, 4096).into_keys();
        names.filter(|name| !name.starts_with(b".")).collect::<Vec<_>>()
    };
    assert_eq!(names(&mut one), [b"a", b"b"]);
    assert_eq!(names(&mut two), [b"c"]);
    assert_eq!(names(&mut all), [b"a", b"b", b"c"]);
    assert_eq!(cat(&mut one, "b/file").unwrap(), b"b");
    assert_eq!(cat(&mut one, "c/file").err(), Some(libc::ENOENT));
    assert_eq!(cat(&mut all, "c/file").unwrap(), b"c");
    assert_eq!(cat(&mut two, "a").err(), Some(libc::ENOENT));
    // Nobody reaches by its number what only others have looked up.
    for node in 0..20 {
        assert_ne!(read(&mut two, node, 0, 10).ok().as_deref(), Some(&b"b"[..]), "{node}");
    }
    assert_eq!(cat(&mut two, "c/file").unwrap(), b"c");
    // What is listed may come later.
    assert_eq!(one.lookup(ROOT, "later").err(), Some(libc::ENOENT));
    fs::write(directory.path().join("later"), "here").unwrap();
    assert_eq!(cat(&mut one, "later").unwrap(), b"here");
    assert_eq!(two.lookup(ROOT, "later").err(), Some(libc::ENOENT));
}

#[test]
fn a_state_shows_no_more_than_the_list() {
    let (directory, spec) = store();
    fs::write(directory.path().join("a"), "a").unwrap();
    let mut mount = Mount::new(&spec);
    mount.lookup(ROOT, "a").unwrap();
    let saved = mount.device.save();
    let lists = tempfile::tempdir().unwrap();
    let list = |line: &str| listed(&spec, &lists.path().join("list"), line);
    assert!(Fs::new(&list("b")).unwrap().restore(&saved).is_err());
    Fs::new(&list("a")).unwrap().restore(&saved).unwrap();
}

#[test]
fn a_list_that_cannot_be_meant_is_an_error() {
    let (directory, spec) = store();
    let lists = tempfile::tempdir().unwrap();
    let list = lists.path().join("list");
    let refused = |spec: &ShareSpec| {
        let error = Fs::new(spec).err().expect("it is refused");
        format!("{error}: {}", std::error::Error::source(&error).unwrap())
    };
    let below = format!("{}/a/b", directory.path().display());
    for bad in ["/elsewhere/a", "a/b", "..", ".", &below, "a\0b"] {
        let said = refused(&listed(&spec, &list, format!("fine\n\n{bad}\n")));
        assert!(said.contains("list: line 3: ") && said.contains("a name in /"), "{said}");
    }
    fs::remove_file(&list).unwrap();
    let spec = ShareSpec { only: Some(list), ..spec };
    assert!(refused(&spec).contains("No such file"), "{}", refused(&spec));
    let changing = ShareSpec { read_only: false, ..spec };
    assert!(refused(&changing).contains("not read-only"), "{}", refused(&changing));
}
