//! Directories that no other user can read or write.
//!
//! Runs keep their state in well-known places such as /tmp. Nothing there is used that another user owns or could have
//! created. So a directory is opened once, from the root on and without following links, and counts as a [`Place`] only
//! if it and all directories above it belong to this user or root and nobody else may write to them; where others may,
//! the sticky bit must keep them from renaming what is not theirs. Then nobody else can replace an entry of a place
//! that belongs to this user, and its path keeps its meaning.

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
/// The owner shown for files of users outside the user namespace, such as the root of the system around it.
const UNKNOWN_USER: u32 = 65534;
/// The user map outside of any such namespace.
const ALL_USERS: [&str; 3] = ["0", "0", "4294967295"];

/// A directory in which nobody else can replace what belongs to this user.
#[derive(Debug)]
pub struct Place {
    dir: File,
    path: PathBuf,
}

impl Place {
    /// Opens the directory `path`, if it is one.
    ///
    /// # Errors
    /// If it is not one, or does not exist.
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

    /// Opens the directory `path`, if it is one and only this user and root may write to it.
    ///
    /// # Errors
    /// If it is not one, or does not exist.
    pub fn closed(path: &Path) -> io::Result<Self> {
        let place = Self::open(path)?;
        match others_write(&place.dir.metadata()?) {
            true => Err(written_by_others(&place.path)),
            false => Ok(place),
        }
    }

    /// Its path, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of an entry through the descriptor, which stays in this directory whatever happens to the names above.
    pub(crate) fn entry(&self, name: &OsStr) -> PathBuf {
        Path::new("/proc/self/fd").join(self.dir.as_raw_fd().to_string()).join(name)
    }

    /// Removes all other users' permissions, if it is this user's.
    ///
    /// # Errors
    /// If that fails.
    pub fn close(&self) -> io::Result<()> {
        let meta = self.dir.metadata()?;
        if meta.uid() != me() || meta.mode() & 0o077 == 0 {
            return Ok(());
        }
        match fs::set_permissions(self.entry(".".as_ref()), Permissions::from_mode(DIR_MODE)) {
            // Nor can anybody else, as in the carrier.
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => Ok(()),
            done => done,
        }
    }

    /// Whether only this user can read it.
    fn is_private(&self) -> io::Result<bool> {
        let meta = self.dir.metadata()?;
        Ok(meta.uid() == me() && meta.mode() & 0o077 == 0)
    }

    /// Opens the directory `name`, created with `mode` if missing. An existing one must be this user's, and nobody else
    /// may have been able to write to it.
    pub(crate) fn make(&self, name: &OsStr, mode: u32) -> io::Result<File> {
        match DirBuilder::new().mode(mode).create(self.entry(name)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => made?,
        }
        self.open_own(name)
    }

    /// Opens the directory `name`, which must be this user's and never writable for anybody else.
    ///
    /// # Errors
    /// If that is not so, or it does not exist.
    pub fn open_own(&self, name: &OsStr) -> io::Result<File> {
        self.is_mine(name)?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let dir = File::options().read(true).custom_flags(flags.bits()).open(self.entry(name));
        let path = self.path.join(name);
        let dir = dir.map_err(|error| match error.kind() {
            ErrorKind::NotADirectory => other(&path, "is not a directory"),
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

    /// Opens the file `name`, created if missing, without blocking. It must be this user's.
    pub(crate) fn open_file(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .custom_flags(flags.bits())
            .open(self.entry(name));
        // If another user created it, that is the error to report.
        let file = file.or_else(|error| self.is_mine(name).and(Err(error)))?;
        let meta = file.metadata()?;
        let path = self.path.join(name);
        if meta.uid() != me() {
            return Err(foreign(&path, meta.uid()));
        }
        if !meta.is_file() {
            return Err(other(&path, "is not a regular file"));
        }
        Ok(file)
    }

    /// Removes `name` and everything in it, if it exists. It must be this user's.
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

/// Creates a directory that only this user can read, and missing ones above it. An existing one must be this user's,
/// and nobody else may have been able to write to it.
///
/// # Errors
/// If that is not so, or it cannot be created.
pub fn make(path: &Path) -> io::Result<()> {
    let (parent, name) = split(path)?;
    above(parent)?.make(name, DIR_MODE).map(drop)
}

/// Like [`make`], for a directory that guests see: all their users may read it, as this host's cannot reach it.
pub(crate) fn make_for_guests(path: &Path) -> io::Result<()> {
    let (parent, name) = split(path)?;
    let place = above(parent)?;
    let mode = if place.is_private()? { 0o755 } else { DIR_MODE };
    place.make(name, mode).map(drop)
}

/// Writes a file readable by this user only.
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

/// Removes `path` and everything in it, if it exists. It must be this user's.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let (parent, name) = split(path)?;
    match Place::open(parent) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        place => place?.remove(name),
    }
}

/// Removes all other users' permissions on a directory of this user's.
pub(crate) fn close(dir: &File) -> io::Result<()> {
    if dir.metadata()?.mode() & 0o077 == 0 {
        return Ok(());
    }
    dir.set_permissions(Permissions::from_mode(DIR_MODE))
}

/// Creates a temporary directory in `place`, for this user alone.
///
/// # Errors
/// If it cannot be created.
pub fn temporary(place: &Place, prefix: &str) -> io::Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix(prefix)
        .permissions(Permissions::from_mode(DIR_MODE))
        .tempdir_in(place.path())
}

/// Returns whether this is a regular file owned by this user.
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
        _ => Err(other(path, "is not a valid name for a directory")),
    }
}

/// Removes a tree of this user's. Guests may have left directories in it whose permissions must be changed first.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            open_up(path);
            fs::remove_dir_all(path)
        }
        done => done,
    }
}

fn open_up(dir: &Path) {
    // If permissions cannot be changed, the removal fails too and reports why.
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

/// Whether others cannot replace what is this user's in the directory `path`.
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

/// Whether anyone but this user and root may write to it. A group with the user's number counts as the user's own: most
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
