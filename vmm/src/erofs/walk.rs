//! What is below a directory of the host: names, kinds, sizes and targets, but no contents.
//!
//! No look follows a link or leaves the directory. Directories are opened by their paths from there, so it makes no
//! difference how deep they are.

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::libc::stat as Stat;
use nix::sys::stat::{Mode, fstat, fstatat};
use nix::unistd::{getegid, geteuid};

use super::ComposeError;
use super::format::device_number;
use crate::Cancel;
use crate::virtio::fs::Filter;

/// The directory itself.
pub(super) const ROOT: u32 = 0;
/// Most files: each takes some 100 bytes while an image is composed.
pub(super) const MAX_NODES: usize = 1 << 24;
/// `EROFS_NAME_LEN`: a directory with a longer name cannot be read. Linux's other file systems may have such.
const MAX_NAME: usize = 255;
/// How long a path may be for one look-up; Linux takes 4,095 bytes (`PATH_MAX`).
const MAX_PATH: usize = 3840;

/// `S_ISUID` and `S_ISGID`.
const SET_UID: u16 = 0o4000;
const SET_GID: u16 = 0o2000;

/// A file, under the first of its names.
pub(super) struct Node {
    /// Its directory.
    pub(super) parent: u32,
    name: Range<usize>,
    pub(super) mode: u16,
    /// How many names it has here.
    pub(super) links: u32,
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    /// Where its entries are in [`Tree::entries`].
    Directory(Range<usize>),
    File(Contents),
    /// A symbolic link, and its target.
    Link(Box<[u8]>),
    /// By its number, as an image has it.
    Device(u32),
    /// A FIFO or socket.
    Other,
}

/// What is known of a file's contents.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Contents {
    pub(super) size: u64,
    /// Device and inode.
    pub(super) place: (u64, u64),
    /// When it was last changed: seconds and nanoseconds.
    pub(super) modified: (i64, i64),
}

impl Contents {
    pub(super) fn of(stat: &Stat) -> Self {
        Self {
            size: stat.st_size.cast_unsigned(),
            place: (stat.st_dev, stat.st_ino),
            modified: (stat.st_mtime, stat.st_mtime_nsec),
        }
    }
}

/// A directory's entry.
pub(super) struct Entry {
    name: Range<usize>,
    pub(super) node: u32,
}

/// All of it. A directory comes before what it holds, and what it holds is all together.
pub(super) struct Tree {
    cancel: Cancel,
    root: File,
    source: PathBuf,
    pub(super) nodes: Vec<Node>,
    entries: Vec<Entry>,
    /// Each with a zero behind it.
    names: Vec<u8>,
}

impl Tree {
    /// Looks at what `filter` shows below `root`, which is called `source`.
    pub(super) fn walk(
        root: &File,
        source: &Path,
        filter: &Filter,
        cancel: &Cancel,
    ) -> Result<Self, ComposeError> {
        let unreadable = |error| ComposeError::file(source, error);
        let top = Node {
            parent: ROOT,
            name: 0..0,
            mode: mode(&fstat(root).map_err(|error| unreadable(error.into()))?),
            links: 2,
            kind: Kind::Directory(0..0),
        };
        let mut tree = Self {
            cancel: cancel.clone(),
            root: root.try_clone().map_err(unreadable)?,
            source: source.to_owned(),
            nodes: vec![top],
            entries: Vec::new(),
            names: vec![0],
        };
        let mut linked = HashMap::new();
        let mut next = 0;
        while next < tree.nodes.len() {
            if matches!(tree.nodes[next].kind, Kind::Directory(_)) {
                tree.enter(next, filter, &mut linked)?;
            }
            next += 1;
        }
        Ok(tree)
    }

    /// Looks at what is in a directory.
    fn enter(
        &mut self,
        index: usize,
        filter: &Filter,
        linked: &mut HashMap<(u64, u64), u32>,
    ) -> Result<(), ComposeError> {
        let node = self.number(index)?;
        let mut dir = Dir::from_fd(self.open(node)?).map_err(|error| self.failed(node, error))?;
        let (own, parent) = (self.add_name(c"."), self.add_name(c".."));
        let mut found = Vec::new();
        match filter.names().filter(|_| node == ROOT) {
            Some(names) => found.extend(names.iter().map(|name| self.add_name(name))),
            None => {
                for entry in dir.iter() {
                    let entry = entry.map_err(|error| self.failed(node, error))?;
                    self.wanted()?;
                    // A directory may have no end, and other names of a file are no nodes.
                    self.number(self.entries.len() + found.len())?;
                    if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                        found.push(self.add_name(entry.file_name()));
                    }
                }
            }
        }
        let first = self.entries.len();
        self.entries.push(Entry { name: own, node });
        self.entries.push(Entry { name: parent, node: self.nodes[index].parent });
        // So that the same directory makes the same image.
        found
            .sort_unstable_by(|one, other| self.names[one.clone()].cmp(&self.names[other.clone()]));
        for name in found {
            if let Some(child) = self.look(&dir, node, name.clone(), linked)? {
                self.entries.push(Entry { name, node: child });
            }
        }
        // As Linux looks names up (`erofs_dirnamecmp` in fs/erofs/namei.c), these two too.
        let names = &self.names;
        let name = |entry: &Entry| &names[entry.name.clone()];
        self.entries[first..].sort_unstable_by(|one, other| name(one).cmp(name(other)));
        self.nodes[index].kind = Kind::Directory(first..self.entries.len());
        Ok(())
    }

    /// Looks at a file in an open directory. None if it has gone meanwhile.
    fn look(
        &mut self,
        dir: &Dir,
        parent: u32,
        name: Range<usize>,
        linked: &mut HashMap<(u64, u64), u32>,
    ) -> Result<Option<u32>, ComposeError> {
        self.wanted()?;
        let c_name = self.c_name(&name);
        let failed = |error: Errno| {
            let path = self.path(parent).join(OsStr::from_bytes(c_name.to_bytes()));
            ComposeError::file(path, error.into())
        };
        if c_name.count_bytes() > MAX_NAME {
            return Err(failed(Errno::ENAMETOOLONG));
        }
        let stat = match fstatat(dir, c_name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(None),
            found => found.map_err(failed)?,
        };
        let kind = match stat.st_mode & libc::S_IFMT {
            libc::S_IFDIR => Kind::Directory(0..0),
            libc::S_IFREG => Kind::File(Contents::of(&stat)),
            libc::S_IFLNK => {
                let target = readlinkat(dir, c_name).map_err(failed)?;
                Kind::Link(target.as_bytes().into())
            }
            libc::S_IFCHR | libc::S_IFBLK => {
                let device = stat.st_rdev;
                let number = device_number(libc::major(device), libc::minor(device));
                Kind::Device(number.ok_or_else(|| failed(Errno::EOVERFLOW))?)
            }
            _ => Kind::Other,
        };
        let directory = matches!(kind, Kind::Directory(_));
        let next = self.number(self.nodes.len())?;
        if stat.st_nlink > 1 && !directory {
            let earlier = *linked.entry((stat.st_dev, stat.st_ino)).or_insert(next);
            if let Some(earlier_node) = self.nodes.get_mut(earlier as usize) {
                earlier_node.links += 1;
                return Ok(Some(earlier));
            }
        }
        if directory {
            self.nodes[parent as usize].links += 1;
        }
        let links = if directory { 2 } else { 1 };
        self.nodes.push(Node { parent, name, mode: mode(&stat), links, kind });
        Ok(Some(next))
    }

    fn add_name(&mut self, name: &CStr) -> Range<usize> {
        let start = self.names.len();
        self.names.extend_from_slice(name.to_bytes_with_nul());
        start..self.names.len()
    }

    fn c_name(&self, name: &Range<usize>) -> &CStr {
        self.names
            .get(name.clone())
            .and_then(|name| CStr::from_bytes_with_nul(name).ok())
            .unwrap_or_default()
    }

    /// A file's name in its directory.
    pub(super) fn name(&self, node: &Node) -> &CStr {
        self.c_name(&node.name)
    }

    /// The entries of a directory: names and nodes.
    pub(super) fn entries(
        &self,
        range: &Range<usize>,
    ) -> impl ExactSizeIterator<Item = (&[u8], u32)> + Clone {
        let entries = self.entries.get(range.clone()).unwrap_or_default();
        entries.iter().map(|entry| (self.c_name(&entry.name).to_bytes(), entry.node))
    }

    /// The way to a file, without the root.
    fn way(&self, node: u32) -> Vec<&[u8]> {
        let mut way = Vec::new();
        let mut at = node;
        while at != ROOT {
            let node = &self.nodes[at as usize];
            way.push(self.name(node).to_bytes());
            at = node.parent;
        }
        way.reverse();
        way
    }

    /// A file's path, for people.
    pub(super) fn path(&self, node: u32) -> PathBuf {
        let mut path = self.source.clone();
        path.extend(self.way(node).into_iter().map(OsStr::from_bytes));
        path
    }

    /// A file's path below the root.
    pub(super) fn relative(&self, node: u32) -> Vec<u8> {
        self.way(node).join(&b'/')
    }

    pub(super) fn failed(&self, node: u32, error: impl Into<io::Error>) -> ComposeError {
        ComposeError::file(self.path(node), error.into())
    }

    pub(super) fn changed(&self, node: u32) -> ComposeError {
        ComposeError::Changed(self.path(node))
    }

    pub(super) fn too_large(&self, node: u32) -> ComposeError {
        ComposeError::TooLarge(self.path(node))
    }

    /// Whether the image is still wanted.
    pub(super) fn wanted(&self) -> Result<(), ComposeError> {
        self.cancel.check().map_err(|error| ComposeError::file(&self.source, error))
    }

    fn number(&self, index: usize) -> Result<u32, ComposeError> {
        let number = u32::try_from(index).ok().filter(|_| index < MAX_NODES);
        number.ok_or_else(|| ComposeError::TooMany(self.source.clone()))
    }

    /// Opens a directory.
    pub(super) fn open(&self, node: u32) -> Result<OwnedFd, ComposeError> {
        let failed = |error: Errno| self.failed(node, error);
        let mut above: Option<OwnedFd> = None;
        let mut path = b".".to_vec();
        for name in self.way(node) {
            if path.len() + name.len() > MAX_PATH {
                above = Some(self.open_below(above.as_ref(), &path).map_err(failed)?);
                path.truncate(1);
            }
            path.push(b'/');
            path.extend_from_slice(name);
        }
        self.open_below(above.as_ref(), &path).map_err(failed)
    }

    /// Opens a directory below another one, or the root, without following any link.
    fn open_below(&self, above: Option<&OwnedFd>, path: &[u8]) -> nix::Result<OwnedFd> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let above = above.map_or(self.root.as_fd(), AsFd::as_fd);
        openat2(above, path, OpenHow::new().flags(flags).resolve(resolve))
    }
}

/// Opens a file in a directory for reading.
pub(super) fn open_file(directory: &OwnedFd, name: &CStr) -> nix::Result<File> {
    // Should it be a FIFO by now, nobody waits for its other end.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(directory, name, flags, Mode::empty())?.into())
}

/// Kind and permissions. All files are root's: a program of another user's does not become one that runs as root.
fn mode(stat: &Stat) -> u16 {
    let mut mode = u16::try_from(stat.st_mode & 0xffff).unwrap_or_default();
    // Few files have these, and only for them this process is asked who it is.
    if mode & SET_UID != 0 && ![0, geteuid().as_raw()].contains(&stat.st_uid) {
        mode &= !SET_UID;
    }
    let directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
    if mode & SET_GID != 0 && !directory && ![0, getegid().as_raw()].contains(&stat.st_gid) {
        mode &= !SET_GID;
    }
    mode
}
