//! Shared directories: a virtio-fs device (virtio 1.2, 5.11) and the FUSE server behind it.
//!
//! ```text
//! queues --> Pool --> vCPU or worker --> server: virtiofsd's Server
//!   ^                      |               Confined: plain names only
//!   +---- used chains -----+                 PassthroughFs on the directory
//! ```
//!
//! What nobody changes, a read-only share that is cached for ever, has a server of firn's own: see [`store`].
//!
//! **Owners.** As root, firn passes ids through: a file that uid 1000 of the guest creates belongs
//! to uid 1000 of the host. Otherwise the host lets firn create files for its own user only, so all
//! of the guest's users act as that user. In a share that can be written the guest sees that user
//! as uid 1000 and its group as gid 100, whatever they are on the host: then root in the guest (by
//! its privilege) and uid 1000 (as the owner) can both create, read, write and chmod, and `chown`
//! succeeds without effect. Other users of the guest have what the mode gives to others. In a
//! read-only share the guest sees root as the owner, as it must for a Nix store. In both, ids of
//! other users of the host stay as they are.
//!
//! **Set-uid and set-gid bits.** A write, a truncation or a change of owner takes them away, as on
//! any file system. In a share that can be written a guest gets none at all unless the spec allows
//! it: they are left out of each mode it sets, so that all see the same. Directories keep the
//! set-gid bit, which there only says whose the new files are.
//!
//! **Extended attributes** a share that can be written has where the directory's file system has
//! them (tmpfs: since Linux 6.6, or as root). Those of `trusted` and `security` are kept by other names; see
//! [`xattr`]. ACLs are those of the host.
//!
//! **One request queue.** Kernels of today's stable distributions use no more than one, and the
//! queue's lock is held only while a chain is taken or given back.
//!
//! **Quick requests.** Waking a thread costs ten times what a look-up in the host's cache does, and a guest that
//! boots from a share does tens of thousands of them, one at a time. So requests that only look at names and
//! attributes are served at once by the thread that rang: the guest's own vCPU, inside the exit, for its driver has
//! nothing else to do than wait. So a vCPU may stall on a cold disk, but never on data, `fsync` or another machine.
//! The rest goes to workers. Requests cannot wait for each other: Linux handles FIFOs and file locks in the guest.

mod confined;
mod listing;
mod server;
mod store;
#[cfg(test)]
mod tests;
mod vhost_user;
mod xattr;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::Le32;
use vmm_sys_util::eventfd::EventFd;

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::pool::{Active, Pooled, Server};
use super::queue::Chain;
use super::{
    Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError, SavedState, VirtioDevice,
    pmem,
};
use crate::event_loop::new_event;
use crate::spec::ShareSpec;
use server::{Fuse, Session, detach_thread};
pub(crate) use store::Filter;
pub use vhost_user::ShareServer;

/// Longest tag in bytes, and its room in the configuration space (virtio 1.2, 5.11.4).
pub const TAG_LEN: usize = 36;
/// Queue for urgent requests, in Linux only FORGET (virtio 1.2, 5.11.2).
const URGENT: u16 = 128;
/// Request queue. Linux caps a request at the queue's size in pages; this allows 1 MiB.
const REQUESTS: u16 = 1024;
/// Layout version of [`SavedState`].
const STATE_VERSION: u16 = 2;

/// Why a share could not be set up.
#[derive(Debug, Error)]
pub enum FsError {
    /// The directory does not exist, is no directory or cannot be read.
    #[error("share {tag:?}: cannot read directory {}", path.display())]
    Source {
        /// The share.
        tag: String,
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The list of what guests see cannot be used.
    #[error("share {tag:?}: cannot use the list {}", path.display())]
    List {
        /// The share.
        tag: String,
        /// The list.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host refused the server something it needs.
    #[error("share {tag:?}: cannot serve {}", path.display())]
    Server {
        /// The share.
        tag: String,
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

config_space! {
    /// 5.11.4.
    struct Config {
        tag: [u8; TAG_LEN],
        num_request_queues: Le32,
    }
}

/// A share without queues.
pub struct Fs {
    // Before `root`, on which it rests.
    server: Arc<dyn Fuse>,
    root: File,
    spec: ShareSpec,
    filter: Filter,
    /// Most that it keeps for the guest.
    descriptors: u64,
    alarm: Arc<EventFd>,
    config: Config,
}

impl DeviceSpec for ShareSpec {
    fn check(&self) -> Result<(), BuildError> {
        self.check_image().map_err(|(key, problem)| BuildError::Spec {
            device: "share",
            key,
            problem,
        })
    }

    fn build(&self, host: &mut Host<'_>) -> Result<Built, BuildError> {
        if self.image {
            return pmem::build(self, host);
        }
        Ok((Box::new(Fs::limited(self, host.share_descriptors)?), Handle::None))
    }
}

impl Fs {
    /// Opens the directory and makes its server. Threads are started when the guest mounts it.
    ///
    /// # Errors
    /// A bad tag, a directory that cannot be read, or a host that lacks `/proc` or
    /// `unshare(CLONE_FS)`.
    pub fn new(spec: &ShareSpec) -> Result<Fs, FsError> {
        Fs::limited(spec, u64::MAX)
    }

    /// As [`Self::new`], with a limit on the descriptors kept open for the guest: one for each inode that it
    /// remembers, and for each file that it has open. Beyond that it gets `ENFILE`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn limited(spec: &ShareSpec, descriptors: u64) -> Result<Fs, FsError> {
        let root = open(spec)?;
        let filter = read_filter(spec)?;
        let refused = |source| FsError::Server {
            tag: spec.tag.to_string(),
            path: spec.source.clone(),
            source,
        };
        let server = server::start(spec, &root, &filter, descriptors).map_err(refused)?;
        let alarm = new_event().map_err(refused)?;
        let mut config = Config { tag: [0; TAG_LEN], num_request_queues: 1.into() };
        for (byte, own) in config.tag.iter_mut().zip(spec.tag.bytes()) {
            *byte = own;
        }
        let (spec, alarm) = (spec.clone(), Arc::new(alarm));
        Ok(Fs { server, root, spec, filter, descriptors, alarm, config })
    }

    /// Ends the guest's session. The server is made anew, for a panic may have left the old one
    /// in any state.
    fn renew(&mut self) {
        let ended = catch_unwind(AssertUnwindSafe(|| self.server.end_session()));
        match server::start(&self.spec, &self.root, &self.filter, self.descriptors) {
            Ok(server) => self.server = server,
            Err(error) if ended.is_ok() => {
                tracing::debug!(share = &*self.spec.tag, %error, "the old server stays");
            }
            Err(error) => tracing::error!(share = &*self.spec.tag, %error, "the share is lost"),
        }
    }
}

/// Opens a share's directory.
fn open(spec: &ShareSpec) -> Result<File, FsError> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC);
    options.open(&spec.source).map_err(|source| FsError::Source {
        tag: spec.tag.to_string(),
        path: spec.source.clone(),
        source,
    })
}

/// Opens the directory of a share that nobody changes; with what guests see of it.
pub(super) fn open_store(spec: &ShareSpec) -> Result<(File, Filter), FsError> {
    Ok((open(spec)?, read_filter(spec)?))
}

/// Reads which names at the top of a share guests see.
fn read_filter(spec: &ShareSpec) -> Result<Filter, FsError> {
    let unusable = |path: &Path, source| FsError::List {
        tag: spec.tag.to_string(),
        path: path.to_owned(),
        source,
    };
    match &spec.only {
        Some(path) if !spec.is_store() => Err(unusable(
            path,
            io::Error::other("the share is not read-only with `cache = \"always\"`"),
        )),
        Some(path) => Filter::read(path, &spec.source).map_err(|error| unusable(path, error)),
        None => Ok(Filter::default()),
    }
}

impl DeviceConfig for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn name(&self) -> String {
        format!("fs {}", self.spec.tag)
    }

    fn identity(&self) -> String {
        self.spec.tag.to_string()
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![URGENT, REQUESTS]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.alarm.as_raw_fd()]
    }

    fn inline_queues(&self) -> u64 {
        // So that quick requests are served there.
        0b11
    }

    fn save(&self) -> SavedState {
        SavedState::encode(STATE_VERSION, &self.server.save())
    }
}

impl VirtioDevice for Fs {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let session: Session = state.decode(STATE_VERSION)?;
        self.server.restore(&session).map_err(|error| {
            tracing::error!(share = &*self.spec.tag, %error, "the state of a share is of no use");
            RestoreError::Decode(postcard::Error::SerdeDeCustom)
        })
    }

    fn activate(
        self: Box<Self>,
        activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        let server = Box::new(Arc::clone(&self.server));
        let alarm = Arc::clone(&self.alarm);
        Ok(Box::new(Active::new(*self, server, alarm, activation.queues)))
    }
}

impl Server for Arc<dyn Fuse> {
    fn serve(&self, chain: &Chain) -> Result<u32, DeviceError> {
        Ok(Fuse::serve(self.as_ref(), chain))
    }

    fn serve_quickly(&self, chain: &Chain) -> Result<Option<u32>, DeviceError> {
        Ok(Fuse::serve_quickly(self.as_ref(), chain))
    }

    fn prepare_thread(&self) -> Result<(), DeviceError> {
        let operation = "unshare a share's thread";
        detach_thread().map_err(|source| DeviceError::Host { operation, source })
    }

    fn gives_back_failed(&self) -> bool {
        // virtiofsd panicked: the guest's process that waits for this request goes on.
        true
    }
}

impl Pooled for Fs {
    fn alarm(&self) -> &EventFd {
        &self.alarm
    }

    fn ended(&mut self) {
        self.renew();
    }
}
