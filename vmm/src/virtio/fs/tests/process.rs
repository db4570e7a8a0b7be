//! What concerns the whole process, so each test runs in one of its own.

use std::env;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use virtiofsd::fuse::{Opcode, SetattrIn};
use vm_memory::ByteValued;

use super::super::server::{SQUASHED_GID, SQUASHED_UID, can_act_for_others};
use super::super::{Fs, VirtioDevice};
use super::client::{Mount, ROOT};
use super::{share, spec};
use crate::virtio::pool::MAX_WORKERS;

/// Runs the ignored test `name` of this file alone in a process, as user `uid` if firn is root.
fn alone(name: &str, uid: Option<u32>, directory: &Path) {
    // By its own link: the user may not be able to reach the directory the program lies in.
    let mut test = Command::new("/proc/self/exe");
    test.args(["--exact", "--ignored", "--test-threads=1"])
        .arg(format!("virtio::fs::tests::process::{name}"))
        .env("FIRN_TEST_DIRECTORY", directory)
        .current_dir(directory);
    if let Some(uid) = uid.filter(|_| is_root()) {
        test.uid(uid).gid(uid);
    }
    let output = test.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{errors}");
}

/// Whether the tests run as a root that can become others, and not as one in a sandbox.
fn is_root() -> bool {
    can_act_for_others().unwrap()
}

fn directory() -> std::path::PathBuf {
    env::var_os("FIRN_TEST_DIRECTORY").expect("run by `alone`").into()
}

fn count(directory: &str) -> usize {
    fs::read_dir(directory).unwrap().count()
}

fn umask() -> String {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("Umask"));
    line.unwrap().to_owned()
}

#[test]
fn nothing_is_left_behind() {
    let (directory, _) = share();
    alone("nothing_is_left", None, directory.path());
}

#[test]
#[ignore = "run by nothing_is_left_behind"]
fn nothing_is_left() {
    let spec = spec(&directory());
    let mask = umask();
    let directory = env::current_dir().unwrap();
    // What the library opens once and keeps.
    drop(Mount::new(&spec));
    let (threads, descriptors) = (count("/proc/self/task"), count("/proc/self/fd"));

    let unmounted = Fs::new(&spec).unwrap();
    assert_eq!(count("/proc/self/task"), threads);
    let held = count("/proc/self/fd");
    drop(unmounted);
    assert_eq!(count("/proc/self/fd"), descriptors);

    let mut mount = Mount::new(&spec);
    for n in 0..40 {
        mount.create(ROOT, &format!("file{n}"), 0o600).unwrap();
    }
    assert!(count("/proc/self/fd") >= held + 80);
    for _ in 0..300 {
        mount.offer(Opcode::Getattr, ROOT, &[&[0; 16]], 256);
    }
    assert_eq!(mount.settle(1).len(), 300);
    assert!(count("/proc/self/task") <= threads + MAX_WORKERS);
    let Mount { device, .. } = mount;
    let inactive: Box<dyn VirtioDevice> = device.reset();
    assert_eq!(count("/proc/self/fd"), held);
    drop(inactive);
    assert_eq!(count("/proc/self/fd"), descriptors);

    let mut active = Mount::new(&spec);
    active.offer(Opcode::Getattr, ROOT, &[&[0; 16]], 256);
    active.device.notify(1).unwrap();
    drop(active);
    assert_eq!(count("/proc/self/fd"), descriptors);
    // A joined thread leaves /proc a moment later, of which nobody is told.
    let deadline = Instant::now() + Duration::from_secs(5);
    while count("/proc/self/task") != threads && Instant::now() < deadline {
        thread::yield_now();
    }
    assert_eq!(count("/proc/self/task"), threads);
    assert_eq!(umask(), mask);
    assert_eq!(env::current_dir().unwrap(), directory);
}

#[test]
fn without_privileges_all_users_of_the_guest_are_one() {
    for uid in [1000, 12345] {
        let (directory, _) = share();
        if is_root() {
            chown(directory.path(), Some(uid), Some(uid)).unwrap();
        }
        alone("unprivileged", Some(uid), directory.path());
    }
}

#[test]
#[ignore = "run by without_privileges_all_users_of_the_guest_are_one"]
fn unprivileged() {
    let path = directory();
    let host = fs::metadata(&path).unwrap();
    assert!(!is_root(), "the test is about an unprivileged firn");
    fs::write(path.join("host"), "from the host").unwrap();
    let mut mount = Mount::new(&spec(&path));
    let root = mount.getattr(ROOT).unwrap().attr;
    let squashed = (SQUASHED_UID.into(), SQUASHED_GID.into());
    assert_eq!((root.uid, root.gid), squashed);
    for (uid, gid) in [(0, 0), (1000, 100), (1001, 1001)] {
        (mount.uid, mount.gid) = (uid, gid);
        let name = format!("file{uid}");
        let (entry, open) = mount.create(ROOT, &name, 0o640).unwrap();
        assert_eq!((entry.attr.uid, entry.attr.gid), squashed);
        assert_eq!(entry.attr.mode & 0o7777, 0o640);
        assert_eq!(mount.write(entry.nodeid, open.fh, 0, b"guest"), Ok(5));
        assert_eq!(mount.cat(&name).unwrap(), b"guest");
        assert_eq!(mount.cat("host").unwrap(), b"from the host");
        assert!(mount.mkdir(ROOT, &format!("dir{uid}")).is_ok());
        let created = fs::metadata(path.join(&name)).unwrap();
        assert_eq!((created.uid(), created.gid()), (host.uid(), host.gid()));
        // chown to whomever: accepted, without effect.
        let chown = SetattrIn {
            valid: 1 << 1 | 1 << 2,
            uid: 33.into(),
            gid: 33.into(),
            ..Default::default()
        };
        let changed = mount.call(Opcode::Setattr, entry.nodeid, &[chown.as_slice()]);
        assert!(changed.is_ok(), "{changed:?}");
    }
    // A store, on the other hand, looks like root's.
    let mut store = spec(&path);
    store.read_only = true;
    let attr = Mount::new(&store).getattr(ROOT).unwrap().attr;
    assert_eq!((attr.uid, attr.gid), (0.into(), 0.into()));
}

#[test]
fn as_root_ids_are_kept() {
    if !is_root() {
        crate::skip::skipped("not root");
        return;
    }
    let (directory, spec) = share();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let mut mount = Mount::new(&spec);
    for (uid, gid) in [(0, 0), (1000, 100)] {
        (mount.uid, mount.gid) = (uid, gid);
        let name = format!("file{uid}");
        let (entry, open) = mount.create(ROOT, &name, 0o600).unwrap();
        assert_eq!((entry.attr.uid, entry.attr.gid), (uid.into(), gid.into()));
        assert_eq!(mount.write(entry.nodeid, open.fh, 0, b"guest"), Ok(5));
        let created = fs::metadata(directory.path().join(&name)).unwrap();
        assert_eq!((created.uid(), created.gid()), (uid, gid));
        assert_eq!(mount.cat(&name).unwrap(), b"guest");
    }
}
