//! Directories that no other user can look into or put anything into.
//!
//! Runs keep their state in places whose names everybody knows, such as /tmp. Nothing there is used that another user
//! owns or could have made. For that, a directory is opened once, from the root on and without following links, and
//! counts as a [`Place`] only if it and all directories above it belong to this user or root, and nobody else may write
//! to them; where others may, the sticky bit must keep them from renaming what is not theirs. An entry of a place that
//! belongs to this user can then be exchanged by nobody else, so that its path means the same from then on.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::geteuid;

/// The mode of a directory for this user alone.
pub(crate) const DIR_MODE: u32 = 0o700;
/// The mode of a file for this user alone.
pub(crate) const FILE_MODE: u32 = 0o600;
/// Whom files of users belong to that a user namespace does not know, such as the root of the system around it.
const UNKNOWN_USER: u32 = 65534;
/// The map of users where there is no such namespace.
const ALL_USERS: [&str; 3] = ["0", "0", "4294967295"];

/// A directory in which nobody else can exchange what belongs to this user.
#[derive(Debug)]
pub struct Place {
    dir: File,
    path: PathBuf,
}

impl Place {
    /// The directory `path`, if it is such a one.
    ///
    /// # Errors
    /// If it is not, or is not there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut dir = File::from(open("/", flags, Mode::empty())?);
        let mut walked = PathBuf::from("/");
        vet(&dir.metadata()?, &walked)?;
        for name in path.strip_prefix("/").into_iter().flatten() {
            dir = File::from(openat(&dir, name, flags, Mode::empty())?);
            walked.push(name);
            vet(&dir.metadata()?, &walked)?;
        }
        Ok(Self { dir, path })
    }

    /// The directory `path`, if it is such a one and only this user and root write to it.
    ///
    /// # Errors
    /// If it is not, or is not there.
    pub fn closed(path: &Path) -> io::Result<Self> {
        let place = Self::open(path)?;
        match others_write(&place.dir.metadata()?) {
            true => Err(written_by_others(&place.path)),
            false => Ok(place),
        }
    }

    /// Where it is, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of an entry, by the descriptor: it stays in this directory whatever becomes of the names above.
    pub(crate) fn entry(&self, name: &OsStr) -> PathBuf {
        Path::new("/proc/self/fd").join(self.dir.as_raw_fd().to_string()).join(name)
    }

    /// Closes it to all other users, if it is this user's.
    ///
    /// # Errors
    /// If that cannot be done.
    pub fn close(&self) -> io::Result<()> {
        let meta = self.dir.metadata()?;
        if meta.uid() != me() || meta.mode() & 0o077 == 0 {
            return Ok(());
        }
        match fs::set_permissions(self.entry(".".as_ref()), Permissions::from_mode(DIR_MODE)) {
            // Nor can anybody else change anything there, as in the carrier.
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => Ok(()),
            done => done,
        }
    }

    /// Whether nobody but this user can look into it.
    fn is_private(&self) -> io::Result<bool> {
        let meta = self.dir.metadata()?;
        Ok(meta.uid() == me() && meta.mode() & 0o077 == 0)
    }

    /// Opens the directory `name`, made with `mode` if it is not there. One that is there must be this user's, and
    /// nobody else may have put anything into it.
    pub(crate) fn make(&self, name: &OsStr, mode: u32) -> io::Result<File> {
        match DirBuilder::new().mode(mode).create(self.entry(name)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => made?,
        }
        self.open_own(name)
    }

    /// Opens the directory `name`, which must be this user's, and nobody else may have put anything into it.
    ///
    /// # Errors
    /// If it is not so, or is not there.
    pub fn open_own(&self, name: &OsStr) -> io::Result<File> {
        self.is_mine(name)?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let dir = File::options().read(true).custom_flags(flags.bits()).open(self.entry(name));
        let path = self.path.join(name);
        let dir = dir.map_err(|error| match error.kind() {
            ErrorKind::NotADirectory => other(&path, "is no directory"),
            _ => error,
        })?;
        let meta = dir.metadata()?;
        if meta.uid() != me() {
            return Err(foreign(&path, meta.uid()));
        }
        if others_write(&meta) {
            return Err(written_by_others(&path));
        }
        Ok(dir)
    }

    /// Opens the file `name`, made if it is not there; never waits. It must be this user's.
    pub(crate) fn open_file(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .custom_flags(flags.bits())
            .open(self.entry(name));
        // If another user made it, that is what there is to say.
        let file = file.or_else(|error| self.is_mine(name).and(Err(error)))?;
        let meta = file.metadata()?;
        let path = self.path.join(name);
        if meta.uid() != me() {
            return Err(foreign(&path, meta.uid()));
        }
        if !meta.is_file() {
            return Err(other(&path, "is no regular file"));
        }
        Ok(file)
    }

    /// Removes `name`, if it is there, and everything in it. It must be this user's.
    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        match self.is_mine(name) {
            Ok(()) => remove_tree(&self.entry(name)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn is_mine(&self, name: &OsStr) -> io::Result<()> {
        match fs::symlink_metadata(self.entry(name))?.uid() {
            uid if uid == me() => Ok(()),
            uid => Err(foreign(&self.path.join(name), uid)),
        }
    }
}

/// Makes a directory that only this user can look into, and the ones above it that are missing. One that is there must
/// be this user's, and nobody else may have put anything into it.
///
/// # Errors
/// If it is not so, or cannot be made.
pub fn make(path: &Path) -> io::Result<()> {
    let (parent, name) = split(path)?;
    above(parent)?.make(name, DIR_MODE).map(drop)
}

/// As [`make`], for a directory that guests see: all their users may look into it, if this host's cannot come there.
pub(crate) fn make_for_guests(path: &Path) -> io::Result<()> {
    let (parent, name) = split(path)?;
    let place = above(parent)?;
    let mode = if place.is_private()? { 0o755 } else { DIR_MODE };
    place.make(name, mode).map(drop)
}

/// Writes a file that only this user can read.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(FILE_MODE)
        .custom_flags(flags.bits())
        .open(path);
    file?.write_all(bytes)
}

/// Removes `path`, if it is there, and everything in it. It must be this user's.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let (parent, name) = split(path)?;
    match Place::open(parent) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        place => place?.remove(name),
    }
}

/// Closes a directory of this user to all others.
pub(crate) fn close(dir: &File) -> io::Result<()> {
    if dir.metadata()?.mode() & 0o077 == 0 {
        return Ok(());
    }
    dir.set_permissions(Permissions::from_mode(DIR_MODE))
}

/// Makes a temporary directory in `place`, for this user alone.
///
/// # Errors
/// If it cannot be made.
pub fn temporary(place: &Place, prefix: &str) -> io::Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix(prefix)
        .permissions(Permissions::from_mode(DIR_MODE))
        .tempdir_in(place.path())
}

/// Whether this is a regular file of this user's.
pub(crate) fn is_own_file(file: &File) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.uid() == me())
}

fn above(path: &Path) -> io::Result<Place> {
    match Place::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            make(path)?;
            Place::open(path)
        }
        place => place,
    }
}

fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if parent != Path::new("") => Ok((parent, name)),
        (Some(_), Some(name)) => Ok((Path::new("."), name)),
        _ => Err(other(path, "is no name of a directory that can be made")),
    }
}

/// Removes a tree of this user's. Guests may have left directories in it that its owner must open first.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            open_up(path);
            fs::remove_dir_all(path)
        }
        done => done,
    }
}

fn open_up(dir: &Path) {
    // What cannot be changed cannot be removed, either: that will say why.
    let _ = fs::set_permissions(dir, Permissions::from_mode(DIR_MODE));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

fn me() -> u32 {
    geteuid().as_raw()
}

/// Whether the directory `path` is one in which others cannot exchange what is this user's.
fn vet(meta: &Metadata, path: &Path) -> io::Result<()> {
    let uid = meta.uid();
    if uid != me() && uid != 0 && !(uid == UNKNOWN_USER && in_user_namespace()) {
        return Err(foreign(path, uid));
    }
    if others_write(meta) && meta.mode() & 0o1000 == 0 {
        return Err(written_by_others(path));
    }
    Ok(())
}

/// Whether others than this user and root may write to it. A group that has the user's number is the user's own: most
/// distributions give each user one.
fn others_write(meta: &Metadata) -> bool {
    let mode = meta.mode();
    mode & 0o002 != 0 || (mode & 0o020 != 0 && meta.gid() != 0 && meta.gid() != me())
}

fn in_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !map.split_whitespace().eq(ALL_USERS)
}

fn foreign(path: &Path, uid: u32) -> io::Error {
    other(path, format_args!("belongs to another user ({uid})"))
}

fn written_by_others(path: &Path) -> io::Error {
    other(path, "can be written to by other users")
}

fn other(path: &Path, what: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("{} {what}", path.display()))
}

#[cfg(test)]
mod tests;
