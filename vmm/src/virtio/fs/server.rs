//! The FUSE server of one share: `virtiofsd`, made safe to run inside this process.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::fuse::{InHeader, Opcode, OutHeader};
use virtiofsd::passthrough::credentials::UnixCredentials;
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{
    self, Config, InodeFileHandlesMode, MigrationOnError, NegotiationMode, PassthroughFs,
};
use virtiofsd::server::Server;
use virtiofsd::soft_idmap::cmdline::IdMap;
use vm_memory::{Address, Bytes};

use super::confined::{Confined, Rules};
use super::store::{Filter, Place, Store};
use super::vhost_user;
use super::xattr::{self, Names};
use crate::spec::{CachePolicy, ShareSpec};
use crate::virtio::queue::{Chain, readable, writable};
use crate::virtio::vhost_user::{Client, Serving};

/// What the guest sees as the owner of the files of a user firn runs as, when firn cannot act for
/// other users: the first normal user of NixOS and Debian, and the group `users` of both.
pub(super) const SQUASHED_UID: u32 = 1000;
/// See [`SQUASHED_UID`].
pub(super) const SQUASHED_GID: u32 = 100;

/// The user `nobody`, which every system has and which owns no files.
const OTHER_ID: u32 = 65534;

/// "For ever": a day, as `virtiofsd` itself uses.
pub(super) const FOR_EVER: Duration = Duration::from_secs(86400);

/// What a share's guest has open, for [`Fuse::save`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Session {
    /// Nothing: the share is not mounted.
    Unmounted,
    /// `virtiofsd`'s own encoding of its inodes and handles.
    Mounted(Vec<u8>),
    /// Something, but it could not be written down.
    Lost,
    /// The nodes of a [`Store`].
    Store(Vec<Place>),
}

/// The server of one share.
pub(super) trait Fuse: Send + Sync {
    /// Serves one request and gives the number of bytes written into the chain. May block.
    /// Must run on a thread that has called [`detach_thread`].
    ///
    /// # Panics
    /// `virtiofsd` may; the server is then not to be used again.
    fn serve(&self, chain: &Chain) -> u32;
    /// The same if it can be done on any thread, and at once.
    ///
    /// # Panics
    /// As [`Self::serve`].
    fn serve_quickly(&self, chain: &Chain) -> Option<u32>;
    /// Ends the guest's session: closes all it has open.
    fn end_session(&self);
    /// What the guest has open.
    fn save(&self) -> Session;
    /// Opens again what [`Fuse::save`] wrote down.
    fn restore(&self, session: &Session) -> io::Result<()>;
}

/// Gives the calling thread a working directory and umask of its own, and a umask that masks
/// nothing, because the guest's kernel has masked each mode already. The thread should belong to
/// the share.
pub(super) fn detach_thread() -> io::Result<()> {
    // SAFETY: unshare takes no pointers; with CLONE_FS it only copies the kernel's record of root,
    // working directory and umask for this thread.
    if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: umask takes no pointers and cannot fail.
    unsafe { libc::umask(0) };
    DETACHED.set(true);
    Ok(())
}

thread_local! {
    static DETACHED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread has called [`detach_thread`].
pub(super) fn is_detached() -> bool {
    DETACHED.get()
}

/// Refuses what only a thread that has called [`detach_thread`] may do. [`is_quick`] keeps such requests from others,
/// but a guest may change a request after it was checked.
pub(super) fn on_detached_thread() -> io::Result<()> {
    if is_detached() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EIO)) }
}

/// Makes the server for `spec` on its opened directory `root`, which must outlive it. It keeps no more than
/// `descriptors` for the guest, which holds one for each inode that it remembers. `filter` is for stores only.
pub(super) fn start(
    spec: &ShareSpec,
    root: &File,
    filter: &Filter,
    descriptors: u64,
) -> io::Result<Arc<dyn Fuse>> {
    if spec.is_store() {
        return Ok(Arc::new(Store::new(spec, root, filter, descriptors)?));
    }
    let (config, rules) = settings(spec, root, descriptors)?;
    // PassthroughFs::new sets the umask, which threads share until they say otherwise.
    on_own_thread(move || {
        detach_thread()?;
        let mounted = Arc::new(AtomicBool::new(false));
        Ok(if spec.read_only {
            share(PassthroughFsRo::new(config)?, rules, mounted)
        } else {
            share(PassthroughFs::new(config)?, rules, mounted)
        })
    })
}

/// As [`start`], for a machine in another process.
pub(super) fn start_elsewhere(
    spec: &ShareSpec,
    root: &File,
    descriptors: u64,
    client: Client,
) -> io::Result<Serving> {
    let (config, rules) = settings(spec, root, descriptors)?;
    on_own_thread(move || {
        detach_thread()?;
        let mounted = Arc::new(AtomicBool::new(false));
        if spec.read_only {
            vhost_user::serve(Confined::new(PassthroughFsRo::new(config)?, rules, mounted), client)
        } else {
            vhost_user::serve(Confined::new(PassthroughFs::new(config)?, rules, mounted), client)
        }
    })
}

fn settings(spec: &ShareSpec, root: &File, descriptors: u64) -> io::Result<(Config, Rules)> {
    let squash = !can_act_for_others()?;
    let names = if spec.read_only { None } else { Names::supported_by(root) };
    let config = config(spec, root, squash, names.is_some(), descriptors);
    // Without attributes the host refuses them by these names, too.
    let rules = Rules { allow_setuid: spec.allow_setuid, names: names.unwrap_or(Names::User) };
    Ok((config, rules))
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("fs-setup".into());
        let worker = thread.spawn_scoped(scope, work)?;
        let panicked = |_| Err(io::Error::other("the file server panicked"));
        worker.join().unwrap_or_else(panicked)
    })
}

fn share<F>(fs: F, rules: Rules, mounted: Arc<AtomicBool>) -> Arc<dyn Fuse>
where
    F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
{
    let server = Server::new(Confined::new(fs, rules, Arc::clone(&mounted)));
    Arc::new(Share { server, mounted })
}

/// Whether firn can create files for any user: it is root, and not only in a namespace of its own
/// or without capabilities.
pub(super) fn can_act_for_others() -> io::Result<bool> {
    if effective_ids().0 != 0 {
        return Ok(false);
    }
    // On its own thread: ids belong to threads, and a half-done change is not undone.
    on_own_thread(|| {
        let other = UnixCredentials::new(OTHER_ID.into(), OTHER_ID.into());
        Ok(other.supplementary_gid(true, Vec::new()).set().is_ok())
    })
}

pub(super) fn effective_ids() -> (u32, u32) {
    // SAFETY: both take no arguments and cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

fn config(
    spec: &ShareSpec,
    root: &File,
    squash: bool,
    attributes: bool,
    descriptors: u64,
) -> Config {
    // Never: whoever writes the directory, the next look sees it, for names, attributes and data.
    let (cache_policy, timeout) = match spec.cache {
        CachePolicy::Never => (passthrough::CachePolicy::Never, Duration::ZERO),
        CachePolicy::Auto => (passthrough::CachePolicy::Auto, Duration::from_secs(1)),
        CachePolicy::Always => (passthrough::CachePolicy::Always, FOR_EVER),
    };
    let (uid_map, gid_map) = if squash {
        let (uid, gid) = effective_ids();
        let (shown_uid, shown_gid) =
            if spec.read_only { (0, 0) } else { (SQUASHED_UID, SQUASHED_GID) };
        (Some(one_owner(uid, shown_uid)), Some(one_owner(gid, shown_gid)))
    } else {
        (None, None)
    };
    let acls = !spec.read_only && xattr::has(root, c"system.posix_acl_access");
    Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy,
        // The directory as it was opened, even if its name is taken by another one later. The
        // trailing dot is because the server does not follow a link at the end.
        root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
        // What is cached may be written by others too; so writes go through.
        writeback: false,
        // READDIRPLUS fetches attributes ahead of their use, in vain if they may not be kept; and
        // an entry that is deleted meanwhile would end the listing with an error.
        readdirplus: spec.cache == CachePolicy::Always,
        // Programs that map a file shared would fail on an uncached file otherwise (Linux 6.6).
        allow_mmap: true,
        // Directories of two mounts can have one inode number: `find` would see a loop.
        announce_submounts: true,
        // Handles could do without a descriptor for each inode but need CAP_DAC_READ_SEARCH.
        inode_file_handles: InodeFileHandlesMode::Never,
        guest_fd_limit: descriptors,
        // Names are mapped before they get there; see [`xattr`].
        xattr: acls || attributes,
        posix_acl: if acls { NegotiationMode::Auto } else { NegotiationMode::Never },
        security_label: NegotiationMode::Never,
        // Without it set-uid bits would survive a write, and with attributes each write of the
        // guest would look up security.capability first.
        killpriv_v2: !spec.read_only,
        // Guest buffers are not aligned as O_DIRECT on the host wants them.
        allow_direct_io: false,
        clean_noatime: true,
        // A file that is gone when the state is restored costs the guest that file.
        migration_on_error: MigrationOnError::GuestError,
        migration_confirm_paths: true,
        uid_map,
        gid_map,
        ..Config::default()
    }
}

/// All of the guest's ids act as the host's `id`, which the guest sees as `shown`.
fn one_owner(id: u32, shown: u32) -> Vec<IdMap> {
    let all = IdMap::SquashGuest { from_guest: 0, to_host: id, count: u32::MAX };
    let back = IdMap::Host { from_host: id, to_guest: shown, count: 1 };
    vec![all, back]
}

struct Share<F: FileSystem + Sync> {
    server: Server<Confined<F>>,
    mounted: Arc<AtomicBool>,
}

impl<F> Fuse for Share<F>
where
    F: FileSystem + SerializableFileSystem + Send + Sync,
{
    fn serve(&self, chain: &Chain) -> u32 {
        let memory = chain.memory();
        let buffers = Reader::new(memory, chain.clone())
            .and_then(|reader| Ok((reader, Writer::new(memory, chain.clone())?)));
        let Ok((reader, writer)) = buffers else {
            tracing::debug!("request outside guest memory");
            return refuse_outside(chain).unwrap_or(0);
        };
        // virtiofsd takes room for the header of a reply for granted.
        if writer.available_bytes() < size_of::<OutHeader>() && wants_reply(&reader) {
            tracing::debug!("request without room for a reply");
            return 0;
        }
        match self.server.handle_message(reader, writer, None::<&mut ()>) {
            Ok(written) => u32::try_from(written).unwrap_or(0),
            Err(error) => {
                tracing::debug!(%error, "malformed request");
                refuse(chain).unwrap_or(0)
            }
        }
    }

    fn serve_quickly(&self, chain: &Chain) -> Option<u32> {
        is_quick(chain).then(|| self.serve(chain))
    }

    fn end_session(&self) {
        self.server.destroy();
    }

    fn save(&self) -> Session {
        if !self.mounted.load(Ordering::Acquire) {
            return Session::Unmounted;
        }
        let saved = catch_unwind(AssertUnwindSafe(|| {
            self.server.prepare_serialization(Arc::new(AtomicBool::new(false)));
            through_pipe_out(|pipe| self.server.serialize(pipe))
        }));
        match saved.unwrap_or_else(|_| Err(io::Error::other("the file server panicked"))) {
            Ok(bytes) => Session::Mounted(bytes),
            Err(error) => {
                tracing::error!(%error, "the state of a share cannot be saved");
                Session::Lost
            }
        }
    }

    fn restore(&self, session: &Session) -> io::Result<()> {
        self.end_session();
        let bytes = match session {
            Session::Unmounted => return Ok(()),
            Session::Lost => return Err(io::Error::other("it could not be saved")),
            Session::Mounted(bytes) => bytes,
            Session::Store(_) => return Err(io::Error::other("it is that of a store")),
        };
        let restored = catch_unwind(AssertUnwindSafe(|| {
            through_pipe_in(bytes, |pipe| self.server.deserialize_and_apply(pipe))
        }));
        restored.unwrap_or_else(|_| Err(io::Error::other("the file server panicked")))
    }
}

/// All that `write` writes into a pipe.
fn through_pipe_out(write: impl FnOnce(File) -> io::Result<()>) -> io::Result<Vec<u8>> {
    let (mut reader, writer) = io::pipe()?;
    thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map(|_| bytes)
        });
        let written = write(File::from(OwnedFd::from(writer)));
        let bytes = reader.join().unwrap_or_else(|_| Err(io::Error::other("the reader panicked")));
        written.and(bytes)
    })
}

/// Lets `read` read `bytes` from a pipe.
fn through_pipe_in(bytes: &[u8], read: impl FnOnce(File) -> io::Result<()>) -> io::Result<()> {
    let (reader, mut writer) = io::pipe()?;
    thread::scope(|scope| {
        // If the reader gives up early, its error says why.
        scope.spawn(move || drop(writer.write_all(bytes)));
        read(File::from(OwnedFd::from(reader)))
    })
}

/// Whether a request can be served on any thread, and at once: it touches neither umask, working
/// directory nor the thread's user, and needs no more of the disk than an inode. (Forgetting or
/// closing the last of a deleted file frees its blocks, which takes a while for a huge one.)
pub(super) fn is_quick(chain: &Chain) -> bool {
    // Linux puts the whole header into the first buffer; elsewhere it is just not quick.
    let Some(first) = chain.clone().readable().next() else {
        return false;
    };
    let opcode = first.addr().checked_add(OPCODE_OFFSET);
    let opcode = opcode.and_then(|at| chain.memory().read_obj::<u32>(at).ok());
    matches!(
        opcode.map(Opcode::try_from),
        Some(Ok(Opcode::Lookup
            | Opcode::Forget
            | Opcode::Getattr
            | Opcode::Readlink
            | Opcode::Open
            | Opcode::Release
            | Opcode::Opendir
            | Opcode::Releasedir))
    )
}

/// Where a request's opcode is (FUSE protocol: `struct fuse_in_header`).
const OPCODE_OFFSET: u64 = 4;

/// Whether the guest waits for an answer (FUSE protocol: `FUSE_FORGET` and kin have none).
fn wants_reply(reader: &Reader<'_>) -> bool {
    let Ok(header) = reader.clone().read_obj::<InHeader>() else {
        return true;
    };
    !matches!(
        Opcode::try_from(header.opcode),
        Ok(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::Destroy)
    )
}

/// Answers a request of which only the header lies in memory, and what is written is where a program has mapped an image
/// (`image = true`).
fn refuse_outside(chain: &Chain) -> Option<u32> {
    let memory = chain.memory();
    let request: InHeader = readable(chain.clone(), memory).next()?.ok()?.read_obj(0).ok()?;
    let reply = writable(chain.clone(), memory).next()?.ok()?;
    let len = u32::try_from(size_of::<OutHeader>()).ok()?;
    reply.write_obj(OutHeader { len, error: -libc::EFAULT, unique: request.unique }, 0).ok()?;
    Some(len)
}

/// Answers a request that virtiofsd could not parse and so left unanswered: a guest that made a
/// mistake should get an error and not wait for ever.
fn refuse(chain: &Chain) -> Option<u32> {
    let mut reader = Reader::new(chain.memory(), chain.clone()).ok()?;
    let mut writer = Writer::new(chain.memory(), chain.clone()).ok()?;
    if !wants_reply(&reader) {
        return None;
    }
    let request: InHeader = reader.read_obj().ok()?;
    let len = u32::try_from(size_of::<OutHeader>()).ok()?;
    let reply = OutHeader { len, error: -libc::EINVAL, unique: request.unique };
    writer.write_obj(reply).ok()?;
    Some(len)
}
