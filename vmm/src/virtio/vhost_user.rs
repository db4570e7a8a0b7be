//! Devices of a virtual machine in another process, by the vhost-user protocol, which brings that machine's memory and
//! queues here.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhost_user_backend::bitmap::BitmapReplace;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// How long is waited before the other process is looked for again.
const PAUSE: Duration = Duration::from_millis(10);

/// The thread that serves a device. Dropping this waits until the other process has gone, unless none has come yet.
pub(super) struct Serving {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // One that has panicked has ended, too.
            let _ = thread.join();
        }
    }
}

/// The other process.
pub(super) struct Client {
    /// What it is served, for the log.
    pub(super) name: String,
    /// Where it listens, or will.
    pub(super) socket: PathBuf,
}

impl Client {
    /// Serves a device to it, once, until it closes the connection. `prepare` is called on the thread that does so,
    /// before it connects.
    pub(super) fn serve<B>(
        self,
        backend: B,
        prepare: impl FnOnce(&VhostUserDaemon<Arc<B>>) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Serving>
    where
        B: VhostUserBackend + 'static,
        B::Bitmap: BitmapReplace + NewBitmap + Clone + Send + Sync,
        B::Vring: Clone + Send + Sync,
    {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name(self.name.clone()).spawn(move || {
            let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
            let daemon = VhostUserDaemon::new(self.name.clone(), Arc::new(backend), memory);
            let ready = daemon.map_err(|error| io::Error::other(error.to_string()));
            match ready.and_then(|daemon| prepare(&daemon).map(|()| daemon)) {
                Ok(daemon) => self.attend(daemon, &stopped),
                Err(error) => tracing::warn!(device = self.name, %error, "a device is not served"),
            }
        })?;
        Ok(Serving { stop, thread: Some(thread) })
    }

    fn attend<B>(&self, mut daemon: VhostUserDaemon<Arc<B>>, stop: &AtomicBool)
    where
        B: VhostUserBackend + 'static,
        B::Bitmap: BitmapReplace + NewBitmap + Clone + Send + Sync,
        B::Vring: Clone + Send + Sync,
    {
        while !stop.load(Ordering::Acquire) {
            // Who listens there will do so soon.
            if daemon.start_client(&self.socket.to_string_lossy()).is_ok() {
                // However it ends, the other process has gone.
                let ended = daemon.wait();
                tracing::debug!(device = self.name, ?ended, "a device is not used any more");
                return;
            }
            thread::sleep(PAUSE);
        }
    }
}
