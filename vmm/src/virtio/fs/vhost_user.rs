//! A share for a virtual machine in another process: the same server, by the vhost-user protocol, which brings that
//! machine's memory and queues here.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::vhost_user::VhostUserFsBackend;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use super::server::{self, detach_thread, is_detached};
use super::{FsError, open};
use crate::spec::ShareSpec;

/// How long is waited before the other process is looked for again.
const PAUSE: Duration = Duration::from_millis(10);

/// Serves a share to another process, once, until that closes the connection. Dropping this waits for that, unless
/// nobody has connected yet.
pub struct ShareServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
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
        let stop = Arc::new(AtomicBool::new(false));
        let client = Client { name: spec.tag.to_string(), socket, stop: Arc::clone(&stop) };
        let thread = server::start_elsewhere(spec, &root, descriptors, client);
        let thread = thread.map_err(|source| FsError::Server {
            tag: spec.tag.to_string(),
            path: spec.source.clone(),
            source,
        })?;
        Ok(Self { stop, thread: Some(thread), _root: root })
    }
}

impl Drop for ShareServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // One that has panicked has ended, too.
            let _ = thread.join();
        }
    }
}

/// Whom a file system is served to.
pub(super) struct Client {
    name: String,
    socket: PathBuf,
    stop: Arc<AtomicBool>,
}

impl Client {
    /// Serves on a thread of its own.
    pub(super) fn serve<F>(self, fs: F) -> io::Result<JoinHandle<()>>
    where
        F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
    {
        let backend = Backend(VhostUserFsBackend::new(fs).map_err(io::Error::from)?);
        let thread = thread::Builder::new().name(format!("share {}", self.name));
        thread.spawn(move || {
            if let Err(error) = self.attend(Arc::new(backend)) {
                tracing::warn!(share = self.name, %error, "a share has ended");
            }
        })
    }

    fn attend<F>(&self, backend: Arc<Backend<F>>) -> Result<(), vhost_user_backend::Error>
    where
        F: FileSystem + SerializableFileSystem + Send + Sync + 'static,
    {
        let socket: &Path = &self.socket;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new(self.name.clone(), backend, memory)?;
        while !self.stop.load(Ordering::Acquire) {
            // Who listens there will do so soon.
            if daemon.start_client(&socket.to_string_lossy()).is_ok() {
                // However it ends, the other process has gone.
                let ended = daemon.wait();
                tracing::debug!(share = self.name, ?ended, "a share is not used any more");
                return Ok(());
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }
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
