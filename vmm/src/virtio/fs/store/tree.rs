//! The files of a directory that nobody changes, as far as guests have asked for them.
//!
//! A node is a place in an append-only table: it is never forgotten, moved or used for another file, so it stays true
//! for every guest that has ever seen it. Its attributes, entries and target are looked up once. One thing may change:
//! a store gets and loses paths at its top, so a look-up there asks the host each time.
//!
//! No look at the host follows a link: each names one component below a directory that is open, which was found to be
//! the one that its node stands for.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::libc::stat as Stat;
use nix::sys::stat::{Mode, fstat, fstatat};
use virtiofsd::fuse::Attr;

use super::filter::Filter;
use super::open::{Open, OpenFiles};
use crate::virtio::fs::server::effective_ids;

/// The table's first node: the directory itself.
pub(super) const ROOT: u32 = 0;
/// Most nodes, of some 300 bytes each.
const MAX_NODES: usize = 1 << 24;

/// A file's place on the host, device and inode, and its kind: places are used again.
type Identity = (u64, u64, u32);

/// All that is known of a directory and what is below it.
pub(super) struct Tree {
    nodes: RwLock<Vec<Arc<Node>>>,
    /// Files that have several names.
    linked: Mutex<HashMap<Identity, u32>>,
    open: OpenFiles,
    filter: Filter,
    /// Its files belong to root in guests.
    user: (u32, u32),
}

/// One file, under one of its names.
pub(super) struct Node {
    index: u32,
    parent: u32,
    name: Arc<CStr>,
    known: OnceLock<Known>,
    /// What has been found in a directory.
    children: Mutex<BTreeMap<Arc<CStr>, u32>>,
    contents: OnceLock<Contents>,
}

#[derive(Clone, Copy)]
struct Known {
    identity: Identity,
    attr: Attr,
}

/// A directory's entries: of a file that has several names, not its node's own.
type Entries = Arc<[(Arc<CStr>, u32)]>;

enum Contents {
    Entries(Entries),
    Target(Arc<[u8]>),
}

/// Where a node is: its parent's place in the table, and its name.
pub(in crate::virtio::fs) type Place = (u32, Vec<u8>);

pub(super) fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// The errors of a file that is not any more what it was.
fn stale() -> io::Error {
    errno(libc::ESTALE)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets one path component through.
pub(super) fn plain(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(()),
    }
}

fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino, stat.st_mode & libc::S_IFMT)
}

impl Known {
    /// Whether it still is as it was.
    fn is(&self, stat: &Stat) -> bool {
        let attr = &self.attr;
        self.identity == identity(stat)
            && attr.size == stat.st_size.cast_unsigned()
            && attr.mtime == stat.st_mtime.cast_unsigned()
            && attr.mtimensec == nanoseconds(stat.st_mtime_nsec)
    }
}

impl Node {
    fn new(index: u32, parent: u32, name: Arc<CStr>) -> Node {
        Node {
            index,
            parent,
            name,
            known: OnceLock::new(),
            children: Mutex::default(),
            contents: OnceLock::new(),
        }
    }

    /// Its place in the table.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Its directory's place.
    pub(super) fn parent(&self) -> u32 {
        self.parent
    }
}

impl Tree {
    /// The tree of what `filter` shows below `root`, keeping no more than `descriptors` open.
    pub(super) fn new(root: &File, filter: Filter, descriptors: u64) -> io::Result<Tree> {
        let top = Node::new(ROOT, ROOT, CString::default().into());
        let tree = Tree {
            nodes: RwLock::default(),
            linked: Mutex::default(),
            open: OpenFiles::new(root.try_clone()?, descriptors),
            filter,
            user: effective_ids(),
        };
        let known = tree.known_from(ROOT, &fstat(root)?);
        top.known.get_or_init(|| known);
        tree.nodes.write().unwrap_or_else(PoisonError::into_inner).push(Arc::new(top));
        Ok(tree)
    }

    /// The node at a place in the table.
    pub(super) fn node(&self, index: u32) -> Option<Arc<Node>> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(usize::try_from(index).ok()?).cloned()
    }

    fn at(&self, index: u32) -> io::Result<Arc<Node>> {
        self.node(index).ok_or_else(stale)
    }

    /// A file's attributes.
    pub(super) fn attr(&self, node: &Node) -> io::Result<Attr> {
        Ok(self.known(node)?.attr)
    }

    /// The file in `directory` by a name that a guest gave.
    pub(super) fn lookup(&self, directory: &Node, name: &CStr) -> io::Result<Arc<Node>> {
        plain(name)?;
        self.expect_kind(directory, libc::S_IFDIR, libc::ENOTDIR)?;
        let found = lock(&directory.children).get(name).copied();
        if let Some(found) = found
            && directory.index != ROOT
        {
            return self.at(found);
        }
        self.enter(directory, name)
    }

    /// Whether what a directory holds is known.
    pub(super) fn has_entries(&self, directory: &Node) -> bool {
        directory.contents.get().is_some()
    }

    /// What a directory holds.
    pub(super) fn entries(&self, directory: &Node) -> io::Result<Entries> {
        self.expect_kind(directory, libc::S_IFDIR, libc::ENOTDIR)?;
        if let Some(Contents::Entries(entries)) = directory.contents.get() {
            return Ok(Arc::clone(entries));
        }
        let mut entries = Vec::new();
        for name in self.names(directory)? {
            match self.enter(directory, &name) {
                Ok(node) => entries.push((name.into(), node.index)),
                // It has gone meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let entries: Entries = entries.into();
        let kept = directory.contents.get_or_init(|| Contents::Entries(Arc::clone(&entries)));
        // Another thread may have been first; positions count its entries, then.
        Ok(if let Contents::Entries(kept) = kept { Arc::clone(kept) } else { entries })
    }

    /// The names of what may be in a directory.
    fn names(&self, directory: &Node) -> io::Result<Vec<CString>> {
        if let Some(names) = self.filter.names().filter(|_| directory.index == ROOT) {
            return Ok(names.iter().map(|name| name.clone().into_c_string()).collect());
        }
        let open = self.directory(directory)?;
        // By the open directory: its path may be another one's by now.
        let entries = fs::read_dir(format!("/proc/self/fd/{}", open.file.as_raw_fd()))?;
        entries.map(|entry| Ok(CString::new(entry?.file_name().into_vec())?)).collect()
    }

    /// Whether there is a file of this name for guests in the directory at a place of the table, if the host has it.
    fn shows(&self, directory: u32, name: &CStr) -> bool {
        directory != ROOT || self.filter.shows(name)
    }

    /// What a symbolic link says.
    pub(super) fn target(&self, link: &Node) -> io::Result<Arc<[u8]>> {
        self.expect_kind(link, libc::S_IFLNK, libc::EINVAL)?;
        if let Some(Contents::Target(target)) = link.contents.get() {
            return Ok(Arc::clone(target));
        }
        let parent = self.directory(&*self.at(link.parent)?)?;
        let target = readlinkat(&parent.file, &*link.name).map_err(gone)?;
        let target: Arc<[u8]> = target.as_bytes().into();
        drop(link.contents.set(Contents::Target(Arc::clone(&target))));
        Ok(target)
    }

    /// A regular file, open for reading, and its size.
    pub(super) fn file(&self, node: &Node) -> io::Result<(Arc<Open>, u64)> {
        let known = self.known(node)?;
        match known.attr.mode & libc::S_IFMT {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(errno(libc::EISDIR)),
            _ => return Err(errno(libc::EINVAL)),
        }
        let open = match self.open.get(node.index) {
            Some(open) => open,
            None => {
                let parent = self.directory(&*self.at(node.parent)?)?;
                // Should it be a FIFO by now, nobody waits for its other end.
                self.open_below(&parent, node, known.identity, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?
            }
        };
        Ok((open, known.attr.size))
    }

    /// The file system's size and limits.
    pub(super) fn statfs(&self) -> io::Result<libc::statvfs64> {
        self.open.statfs()
    }

    /// Where each node is, but the first.
    pub(super) fn places(&self) -> Vec<Place> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.iter().skip(1).map(|node| (node.parent, node.name.to_bytes().to_vec())).collect()
    }

    /// Takes nodes that another tree gave out by [`Self::places`]. False if this one has others there.
    pub(super) fn adopt(&self, places: &[Place]) -> io::Result<bool> {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        let own = nodes.iter().skip(1);
        if own.zip(places).any(|(node, (parent, name))| {
            node.parent != *parent || node.name.to_bytes() != name.as_slice()
        }) {
            return Ok(false);
        }
        let mut entered = Vec::new();
        for (parent, name) in places.iter().skip(nodes.len() - 1) {
            let name: Arc<CStr> = CString::new(name.as_slice())?.into();
            plain(&name)?;
            if !self.shows(*parent, &name) {
                return Err(errno(libc::EINVAL));
            }
            let directory = usize::try_from(*parent).ok().and_then(|parent| nodes.get(parent));
            let directory = Arc::clone(directory.ok_or_else(stale)?);
            let node = Tree::push(&mut nodes, *parent, Arc::clone(&name))?;
            entered.push((directory, name, node.index));
        }
        // Whoever enters a name holds its directory's lock first.
        drop(nodes);
        for (directory, name, index) in entered {
            lock(&directory.children).insert(name, index);
        }
        Ok(true)
    }

    fn push(nodes: &mut Vec<Arc<Node>>, parent: u32, name: Arc<CStr>) -> io::Result<Arc<Node>> {
        if nodes.len() >= MAX_NODES {
            return Err(errno(libc::ENFILE));
        }
        let index = u32::try_from(nodes.len()).map_err(|_| errno(libc::ENFILE))?;
        let node = Arc::new(Node::new(index, parent, name));
        nodes.push(Arc::clone(&node));
        Ok(node)
    }

    /// Looks a name up on the host.
    fn enter(&self, directory: &Node, name: &CStr) -> io::Result<Arc<Node>> {
        if !self.shows(directory.index, name) {
            return Err(errno(libc::ENOENT));
        }
        let open = self.directory(directory)?;
        let stat = fstatat(&open.file, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let mut children = lock(&directory.children);
        if let Some(&child) = children.get(name) {
            let child = self.at(child)?;
            // At the top another file may have taken the name.
            if child.known.get_or_init(|| self.known_from(child.index, &stat)).is(&stat) {
                return Ok(child);
            }
        }
        let name: Arc<CStr> = name.into();
        let several = stat.st_nlink > 1 && stat.st_mode & libc::S_IFMT != libc::S_IFDIR;
        let mut linked = several.then(|| lock(&self.linked));
        let earlier = linked.as_ref().and_then(|linked| linked.get(&identity(&stat)).copied());
        let earlier = earlier.and_then(|earlier| self.node(earlier));
        let node = match earlier.filter(|node| node.known.get().is_some_and(|k| k.is(&stat))) {
            Some(earlier) => earlier,
            None => {
                let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
                Tree::push(&mut nodes, directory.index, Arc::clone(&name))?
            }
        };
        node.known.get_or_init(|| self.known_from(node.index, &stat));
        if let Some(linked) = &mut linked {
            linked.insert(identity(&stat), node.index);
        }
        children.insert(name, node.index);
        Ok(node)
    }

    /// What the host says of a node. Of those that were adopted it is asked when they are first needed.
    fn known(&self, node: &Node) -> io::Result<Known> {
        if let Some(known) = node.known.get() {
            return Ok(*known);
        }
        let parent = self.directory(&*self.at(node.parent)?)?;
        let stat =
            fstatat(&parent.file, &*node.name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(gone)?;
        Ok(*node.known.get_or_init(|| self.known_from(node.index, &stat)))
    }

    fn known_from(&self, index: u32, stat: &Stat) -> Known {
        let shown = |id: u32, own: u32| if id == own { 0 } else { id };
        let attr = Attr {
            // Unique even where several file systems are mounted below.
            ino: u64::from(index) + 1,
            size: stat.st_size.cast_unsigned(),
            blocks: stat.st_blocks.cast_unsigned(),
            atime: stat.st_atime.cast_unsigned(),
            mtime: stat.st_mtime.cast_unsigned(),
            ctime: stat.st_ctime.cast_unsigned(),
            atimensec: nanoseconds(stat.st_atime_nsec),
            mtimensec: nanoseconds(stat.st_mtime_nsec),
            ctimensec: nanoseconds(stat.st_ctime_nsec),
            mode: stat.st_mode,
            nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
            uid: shown(stat.st_uid, self.user.0).into(),
            gid: shown(stat.st_gid, self.user.1).into(),
            rdev: u32::try_from(stat.st_rdev).unwrap_or(0),
            blksize: u32::try_from(stat.st_blksize).unwrap_or(4096),
            flags: 0,
        };
        Known { identity: identity(stat), attr }
    }

    fn expect_kind(&self, node: &Node, kind: u32, otherwise: i32) -> io::Result<()> {
        match self.known(node)?.attr.mode & libc::S_IFMT == kind {
            true => Ok(()),
            false => Err(errno(otherwise)),
        }
    }

    /// An open directory. Those on the way to it that are not open are opened.
    fn directory(&self, node: &Node) -> io::Result<Arc<Open>> {
        let mut way = Vec::new();
        let mut open = self.open.get(node.index);
        let mut at = node.index;
        while open.is_none() {
            let next = self.at(at)?;
            at = next.parent;
            way.push(next);
            open = self.open.get(at);
        }
        let mut open = open.ok_or_else(stale)?;
        for node in way.iter().rev() {
            let stat =
                fstatat(&open.file, &*node.name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(gone)?;
            let known = *node.known.get_or_init(|| self.known_from(node.index, &stat));
            open =
                self.open_below(&open, node, known.identity, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        }
        Ok(open)
    }

    /// Opens a file in an open directory, if it is still the same one.
    fn open_below(
        &self,
        parent: &Open,
        node: &Node,
        expected: Identity,
        flags: OFlag,
    ) -> io::Result<Arc<Open>> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(&parent.file, &*node.name, flags, Mode::empty()).map_err(gone)?;
        if identity(&fstat(&file)?) != expected {
            return Err(stale());
        }
        Ok(self.open.keep(node.index, file.into()))
    }
}

/// The error for a file that a guest knows.
fn gone(error: nix::Error) -> io::Error {
    match error {
        // With O_NOFOLLOW and O_DIRECTORY, something else has its name.
        nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP => stale(),
        error => error.into(),
    }
}

fn nanoseconds(value: i64) -> u32 {
    u32::try_from(value).unwrap_or(0)
}
