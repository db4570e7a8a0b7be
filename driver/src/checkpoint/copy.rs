//! Copies of directories that guests write to.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::mkfifo;

use crate::private;

/// How deep directories may lie in each other: a guest could make a path that no call takes.
const MAX_DEPTH: usize = 256;

/// Makes `to` hold what `from` does, and nothing else: files, directories, symbolic links and pipes. Nobody changes
/// either meanwhile. Sockets are left out, and a file with several names becomes several files. `to` itself stays.
pub(super) fn mirror(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => private::remove_tree(&entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    copy(from, to, 0)
}

fn copy(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other("its directories lie too deep"));
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy_entry(&entry.path(), &to.join(entry.file_name()), depth)?;
    }
    Ok(())
}

fn copy_entry(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    let meta = fs::symlink_metadata(from)?;
    let kind = meta.file_type();
    if kind.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else if kind.is_dir() {
        fs::create_dir(to)?;
        copy(from, to, depth + 1)?;
    } else if kind.is_file() {
        fs::copy(from, to)?;
    } else if kind.is_fifo() {
        mkfifo(to, Mode::S_IRWXU)?;
    } else {
        return Ok(());
    }
    // Only root may give files away, but then nobody else has made any.
    match lchown(to, Some(meta.uid()), Some(meta.gid())) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        done => done?,
    }
    if !kind.is_symlink() {
        fs::set_permissions(to, Permissions::from_mode(meta.mode() & 0o7777))?;
    }
    let read = TimeSpec::new(meta.atime(), meta.atime_nsec());
    let changed = TimeSpec::new(meta.mtime(), meta.mtime_nsec());
    Ok(utimensat(AT_FDCWD, to, &read, &changed, UtimensatFlags::NoFollowSymlink)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_put_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let [work, kept] = ["work", "kept"].map(|name| dir.path().join(name));
        fs::create_dir_all(work.join("a/b")).unwrap();
        fs::create_dir(&kept).unwrap();
        fs::write(work.join("a/b/file"), "one").unwrap();
        fs::set_permissions(work.join("a/b/file"), Permissions::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", work.join("link")).unwrap();
        mkfifo(&work.join("pipe"), Mode::S_IRWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(work.join("socket")).unwrap();
        let before = fs::symlink_metadata(work.join("a/b/file")).unwrap();
        mirror(&work, &kept).unwrap();

        fs::write(work.join("a/b/file"), "two").unwrap();
        fs::remove_file(work.join("link")).unwrap();
        // What leads out is removed, not followed.
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("mine"), "").unwrap();
        symlink(&outside, work.join("link")).unwrap();
        fs::create_dir_all(work.join("new/dir")).unwrap();
        fs::set_permissions(work.join("new"), Permissions::from_mode(0o0)).unwrap();
        for _ in 0..2 {
            mirror(&kept, &work).unwrap();
            let after = fs::symlink_metadata(work.join("a/b/file")).unwrap();
            assert_eq!(fs::read_to_string(work.join("a/b/file")).unwrap(), "one");
            assert_eq!((after.mode(), after.mtime()), (before.mode(), before.mtime()));
            assert_eq!(fs::read_link(work.join("link")).unwrap(), Path::new("/etc/passwd"));
            assert!(outside.join("mine").exists() && !work.join("new").exists());
            assert!(fs::symlink_metadata(work.join("pipe")).unwrap().file_type().is_fifo());
            assert!(!work.join("socket").exists());
        }
    }
}
