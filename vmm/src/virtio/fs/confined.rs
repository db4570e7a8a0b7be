//! What stands between a hostile guest and the passthrough file system.
//!
//! `virtiofsd` hands the names in requests to `unlinkat`, `renameat2`, `mkdirat` and their kin as they are and relies
//! on a chroot, which firn's one process does not have: a guest that writes its own FUSE requests could name
//! `../../etc/passwd`. Linux sends one path component at a time, so everything else is refused here. With that, and
//! with `O_NOFOLLOW` inside `virtiofsd`, a guest reaches nothing outside the share. Symbolic links are text for the
//! guest to resolve; the host follows none.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

use super::listing::{BATCH, Batch, Listing, Listings};
use super::server::on_detached_thread;
use super::xattr::Names;

/// What a guest may do.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    /// Give files set-uid and set-gid bits.
    pub(super) allow_setuid: bool,
    /// Set attributes, by these names.
    pub(super) names: Names,
}

/// A file system that takes plain names only.
pub(super) struct Confined<F> {
    inner: F,
    rules: Rules,
    listings: Listings,
    /// Set while the guest has a session, between INIT and DESTROY.
    mounted: Arc<AtomicBool>,
}

impl<F> Confined<F> {
    pub(super) fn new(inner: F, rules: Rules, mounted: Arc<AtomicBool>) -> Confined<F> {
        Confined { inner, rules, listings: Listings::default(), mounted }
    }

    /// The mode that a file gets when the guest asks for `mode`.
    fn allowed(&self, mode: u32) -> u32 {
        if self.rules.allow_setuid { mode } else { mode & !SETUID }
    }
}

impl<F: FileSystem> Confined<F> {
    /// The same where it may be a directory.
    fn allowed_for(&self, ctx: Context, inode: u64, mode: u32) -> io::Result<u32> {
        if mode & SETUID == 0 || self.rules.allow_setuid {
            return Ok(mode);
        }
        let (found, _) = self.inner.getattr(ctx, inode.into(), None)?;
        let directory = found.mode & libc::S_IFMT == libc::S_IFDIR;
        Ok(if directory { mode } else { self.allowed(mode) })
    }

    /// Takes a file's capabilities away, if it has any: the host does not know them by this name,
    /// and so does not do it when the file is written. It is no error if that cannot be done.
    fn forget_capabilities(&self, ctx: Context, inode: u64) {
        if let Ok(name) = self.rules.names.to_host(c"security.capability") {
            drop(self.inner.removexattr(ctx, inode.into(), &name));
        }
    }
}

const SETUID: u32 = libc::S_ISUID | libc::S_ISGID;
/// The longest value of an attribute, and list of names, that Linux knows.
const MAX_VALUE: u32 = 64 << 10;

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Lets one path component through.
fn plain(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(name),
    }
}

/// A guest has no use for a device node in a share, and as root it could make the host's disks
/// readable to others. The character device 0:0 is no device but an overlayfs whiteout.
fn harmless_node(mode: u32, rdev: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => Ok(()),
        libc::S_IFCHR if rdev == 0 => Ok(()),
        _ => Err(errno(libc::EPERM)),
    }
}

/// Without the caller's supplementary groups: `setgroups` needs a capability that firn may lack,
/// and the guest's kernel has checked the permissions already (`default_permissions`).
fn without_groups(mut extensions: Extensions) -> Extensions {
    extensions.sup_gids.clear();
    extensions
}

/// Methods that take no name and go straight on.
macro_rules! forward {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)*) $(-> $result:ty)?;)*) => {$(
        fn $name(&self $(, $arg: $type)*) $(-> $result)? {
            self.inner.$name($($arg),*)
        }
    )*};
}

/// The same for those that are not for each thread.
macro_rules! forward_detached {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)*) -> $result:ty;)*) => {$(
        fn $name(&self $(, $arg: $type)*) -> $result {
            on_detached_thread()?;
            self.inner.$name($($arg),*)
        }
    )*};
}

impl<F: FileSystem> FileSystem for Confined<F> {
    type Inode = F::Inode;
    type Handle = F::Handle;
    type DirIter = Listing;

    // What is quick (`is_quick`), or changes nothing.
    forward! {
        fn forget(&self, ctx: Context, inode: F::Inode, count: u64);
        fn batch_forget(&self, ctx: Context, requests: Vec<(F::Inode, u64)>);
        fn getattr(&self, ctx: Context, inode: F::Inode, handle: Option<F::Handle>)
            -> io::Result<(Attr, Duration)>;
        fn readlink(&self, ctx: Context, inode: F::Inode) -> io::Result<Vec<u8>>;
        fn open(&self, ctx: Context, inode: F::Inode, kill_priv: bool, flags: u32)
            -> io::Result<(Option<F::Handle>, OpenOptions)>;
        fn release(&self, ctx: Context, inode: F::Inode, flags: u32, handle: F::Handle,
            flush: bool, flock_release: bool, lock_owner: Option<u64>) -> io::Result<()>;
        fn opendir(&self, ctx: Context, inode: F::Inode, flags: u32)
            -> io::Result<(Option<F::Handle>, OpenOptions)>;
    }

    forward_detached! {
        fn fsync(&self, ctx: Context, inode: F::Inode, datasync: bool, handle: F::Handle)
            -> io::Result<()>;
        fn fallocate(&self, ctx: Context, inode: F::Inode, handle: F::Handle, mode: u32,
            offset: u64, length: u64) -> io::Result<()>;
        fn statfs(&self, ctx: Context, inode: F::Inode) -> io::Result<libc::statvfs64>;
        fn fsyncdir(&self, ctx: Context, inode: F::Inode, datasync: bool, handle: F::Handle)
            -> io::Result<()>;
        fn access(&self, ctx: Context, inode: F::Inode, mask: u32) -> io::Result<()>;
        fn lseek(&self, ctx: Context, inode: F::Inode, handle: F::Handle, offset: u64,
            whence: u32) -> io::Result<u64>;
        fn copyfilerange(&self, ctx: Context, inode_in: F::Inode, handle_in: F::Handle,
            offset_in: u64, inode_out: F::Inode, handle_out: F::Handle, offset_out: u64,
            len: u64, flags: u64) -> io::Result<usize>;
        fn syncfs(&self, ctx: Context, inode: F::Inode) -> io::Result<()>;
    }

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // A guest before Linux 5.10 ignores the mark on submounts; virtiofsd would write a line
        // to stderr for each of its INITs. And supplementary groups never reach virtiofsd, so it
        // must act as if the guest could not tell them.
        let capable = (capable | FsOptions::SUBMOUNTS) - FsOptions::CREATE_SUPP_GROUP;
        on_detached_thread()?;
        self.listings.clear();
        let wanted = self.inner.init(capable)?;
        self.mounted.store(true, Ordering::Release);
        Ok(wanted)
    }

    fn destroy(&self) {
        self.mounted.store(false, Ordering::Release);
        self.listings.clear();
        self.inner.destroy();
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        _size: u32,
        offset: u64,
    ) -> io::Result<Listing> {
        on_detached_thread()?;
        let (node, open) = (inode.into(), handle.into());
        if let Some(rest) = self.listings.find(node, open, offset) {
            return Ok(rest);
        }
        // The reply is filled from what comes of it as far as there is room.
        let entries = self.inner.readdir(ctx, node.into(), open.into(), BATCH, offset)?;
        Ok(self.listings.keep(node, open, Batch::new(offset, entries)))
    }

    fn releasedir(
        &self,
        ctx: Context,
        inode: F::Inode,
        flags: u32,
        handle: F::Handle,
    ) -> io::Result<()> {
        let open = handle.into();
        self.listings.forget(open);
        self.inner.releasedir(ctx, inode, flags, open.into())
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: F::Inode,
        mut attr: SetattrIn,
        handle: Option<F::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        on_detached_thread()?;
        let node = inode.into();
        if valid.contains(SetattrValid::MODE) {
            attr.mode = self.allowed_for(ctx, node, attr.mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID | SetattrValid::KILL_SUIDGID) {
            self.forget_capabilities(ctx, node);
        }
        self.inner.setattr(ctx, node.into(), attr, handle, valid)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: F::Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        on_detached_thread()?;
        self.inner.setxattr(ctx, inode, &self.rules.names.to_host(name)?, value, flags, extra)
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: F::Inode,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        on_detached_thread()?;
        let size = size.min(MAX_VALUE);
        self.inner.getxattr(ctx, inode, &self.rules.names.to_host(name)?, size)
    }

    fn listxattr(&self, ctx: Context, inode: F::Inode, size: u32) -> io::Result<ListxattrReply> {
        on_detached_thread()?;
        Ok(match self.inner.listxattr(ctx, inode, size.min(MAX_VALUE))? {
            ListxattrReply::Names(names) => {
                ListxattrReply::Names(self.rules.names.to_guest(&names))
            }
            // The names in the guest are shorter.
            count @ ListxattrReply::Count(_) => count,
        })
    }

    fn removexattr(&self, ctx: Context, inode: F::Inode, name: &CStr) -> io::Result<()> {
        on_detached_thread()?;
        self.inner.removexattr(ctx, inode, &self.rules.names.to_host(name)?)
    }

    fn flush(
        &self,
        _ctx: Context,
        _inode: F::Inode,
        _handle: F::Handle,
        _lock_owner: u64,
    ) -> io::Result<()> {
        // Each close() of the guest would wait for it, though nothing is kept back that could be
        // flushed. After this answer Linux does not ask again.
        Err(errno(libc::ENOSYS))
    }

    fn lookup(&self, ctx: Context, parent: F::Inode, name: &CStr) -> io::Result<Entry> {
        self.inner.lookup(ctx, parent, plain(name)?)
    }

    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: F::Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        on_detached_thread()?;
        let extensions = without_groups(extensions);
        self.inner.symlink(ctx, target, parent, plain(name)?, extensions)
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: F::Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        on_detached_thread()?;
        harmless_node(mode, rdev)?;
        let extensions = without_groups(extensions);
        let mode = self.allowed(mode);
        self.inner.mknod(ctx, parent, plain(name)?, mode, rdev, umask, extensions)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: F::Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        on_detached_thread()?;
        let extensions = without_groups(extensions);
        self.inner.mkdir(ctx, parent, plain(name)?, mode, umask, extensions)
    }

    fn unlink(&self, ctx: Context, parent: F::Inode, name: &CStr) -> io::Result<()> {
        on_detached_thread()?;
        self.inner.unlink(ctx, parent, plain(name)?)
    }

    fn rmdir(&self, ctx: Context, parent: F::Inode, name: &CStr) -> io::Result<()> {
        on_detached_thread()?;
        self.inner.rmdir(ctx, parent, plain(name)?)
    }

    fn rename(
        &self,
        ctx: Context,
        from: F::Inode,
        old: &CStr,
        to: F::Inode,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        on_detached_thread()?;
        self.inner.rename(ctx, from, plain(old)?, to, plain(new)?, flags)
    }

    fn link(
        &self,
        ctx: Context,
        inode: F::Inode,
        parent: F::Inode,
        name: &CStr,
    ) -> io::Result<Entry> {
        on_detached_thread()?;
        self.inner.link(ctx, inode, parent, plain(name)?)
    }

    fn create(
        &self,
        ctx: Context,
        parent: F::Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)> {
        on_detached_thread()?;
        // virtiofsd drops O_DIRECT from OPEN but not from CREATE; guest buffers are not aligned
        // as the host's file system may want them.
        let flags = flags & !libc::O_DIRECT.cast_unsigned();
        let extensions = without_groups(extensions);
        let (name, mode) = (plain(name)?, self.allowed(mode));
        self.inner.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        on_detached_thread()?;
        self.inner.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        on_detached_thread()?;
        let node = inode.into();
        if kill_priv {
            self.forget_capabilities(ctx, node);
        }
        let inode = node.into();
        self.inner.write(ctx, inode, handle, r, size, offset, lock_owner, delayed, kill_priv, flags)
    }
}

impl<F: SerializableFileSystem> SerializableFileSystem for Confined<F> {
    fn prepare_serialization(&self, cancel: Arc<AtomicBool>) {
        self.inner.prepare_serialization(cancel);
    }

    fn serialize(&self, pipe: File) -> io::Result<()> {
        self.inner.serialize(pipe)
    }

    fn deserialize_and_apply(&self, pipe: File) -> io::Result<()> {
        self.inner.deserialize_and_apply(pipe)?;
        self.mounted.store(true, Ordering::Release);
        Ok(())
    }
}
