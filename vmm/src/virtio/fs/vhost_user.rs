//! A share for a virtual machine in another process: the same server, by the vhost-user protocol.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::vhost_user::VhostUserFsBackend;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use super::server::{self, detach_thread, is_detached};
use super::{FsError, open};
use crate::spec::ShareSpec;
use crate::virtio::vhost_user::{Client, Serving};

/// Serves a share to another process, once, until that closes the connection. Dropping this waits for that, unless
/// nobody has connected yet.
pub struct ShareServer {
    _server: Serving,
    /// Outlives the server, which rests on it.
    _root: File,
}

impl ShareServer {
    /// Serves to the process that listens, or will, at `socket`. As [`super::Fs::limited`].
    ///
    /// # Errors
    /// As [`super::Fs::new`].
    pub fn start(spec: &ShareSpec, descriptors: u64, socket: PathBuf) -> Result<Self, FsError> {
        let root = open(spec)?;
        let client = Client { name: format!("share {}", spec.tag), socket };
        let server = server::start_elsewhere(spec, &root, descriptors, client);
        let server = server.map_err(|source| FsError::Server {
            tag: spec.tag.to_string(),
            path: spec.source.clone(),
            source,
        })?;
        Ok(Self { _server: server, _root: root })
    }
}

/// Serves a file system.
pub(super) fn serve<F>(fs: F, client: Client) -> io::Result<Serving>
where
    F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
{
    let backend = Backend(VhostUserFsBackend::new(fs).map_err(io::Error::from)?);
    client.serve(backend, |_| Ok(()))
}

/// virtiofsd's own, on threads that may serve, and without what moves a machine to another host.
struct Backend<F: FileSystem + SerializableFileSystem + Send + Sync + 'static>(
    VhostUserFsBackend<F>,
);

impl<F> VhostUserBackend for Backend<F>
where
    F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
{
    type Bitmap = <VhostUserFsBackend<F> as VhostUserBackend>::Bitmap;
    type Vring = <VhostUserFsBackend<F> as VhostUserBackend>::Vring;

    fn num_queues(&self) -> usize {
        self.0.num_queues()
    }

    fn max_queue_size(&self) -> usize {
        self.0.max_queue_size()
    }

    fn features(&self) -> u64 {
        self.0.features() & !VhostUserVirtioFeatures::LOG_ALL.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.0.reset_device();
    }

    fn set_event_idx(&self, enabled: bool) {
        self.0.set_event_idx(enabled);
    }

    fn update_memory(
        &self,
        memory: GuestMemoryAtomic<GuestMemoryMmap<Self::Bitmap>>,
    ) -> io::Result<()> {
        self.0.update_memory(memory)
    }

    fn exit_event(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.0.exit_event(thread)
    }

    fn handle_event(
        &self,
        event: u16,
        set: EventSet,
        vrings: &[Self::Vring],
        thread: usize,
    ) -> io::Result<()> {
        // The threads are the daemon's, each for this share alone.
        if !is_detached() {
            detach_thread()?;
        }
        self.0.handle_event(event, set, vrings, thread)
    }
}
