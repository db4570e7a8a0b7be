//! Programs outside of the process at a switch: QEMU, `vde_plug`, a tap, a sniffer.

mod outlet;
mod serve;
pub mod stream;
pub mod vde;

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::debug;

use crate::lock;
use crate::switch::{PortStats, Switch};
use serve::{Plugged, Server};

/// The longest packet for a plug: theirs is a network of ordinary Ethernet, as with `vde_switch`.
pub const MTU: usize = 1500;
/// The most plugs at once.
pub const MAX_PLUGS: usize = 128;
/// How many frames wait for a plug that has no room; more are dropped.
const QUEUE: usize = 256;

/// The names of the sockets in the directory: where VDE plugs ask, and QEMU's `-netdev stream` and `-netdev dgram` go.
const CONTROL: &str = "ctl";
const STREAM: &str = "stream";
const DATAGRAMS: &str = "dgram";
/// The longest name that a plug or the switch adds to the directory: `/.PPPPPPP-NNNNN`, with a process and a number.
const LONGEST_NAME: usize = 15;
/// The longest path of a directory, in bytes.
const MAX_DIR: usize = vde::SUN_PATH - 1 - LONGEST_NAME;

/// Why nothing can be plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The paths of sockets are limited.
    #[error(
        "the directory of sockets {} has a path of {} bytes, and at most {MAX_DIR} are possible",
        dir.display(), dir.as_os_str().len()
    )]
    TooLong {
        /// The directory.
        dir: PathBuf,
    },
    /// It cannot be made or used.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The directory or socket.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// What has become of the frames of a plug.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlugStats {
    /// What the plug says about itself, or how it is connected.
    pub name: String,
    /// What its port has seen. Frames are counted before they are cut.
    pub port: PortStats,
    /// Frames that were for the plug and it did not get, counted after they were cut.
    pub dropped: u64,
}

/// A directory by which programs outside plug into a [`Switch`]. Dropping it unplugs them all and removes it.
///
/// - VDE 2, as in `-netdev vde,sock=DIR` and `vde_plug vde://DIR`;
/// - QEMU's `-netdev stream,server=off,addr.type=unix,addr.path=DIR/stream`;
/// - QEMU's `-netdev dgram,local.type=unix,local.path=OWN,remote.type=unix,remote.path=DIR/dgram`, from the first
///   frame on that it sends.
///
/// No other user can come into it. Each plug has a port of its own. Frames for it are segmented, their checksums are
/// computed, and those longer than [`MTU`] allows are dropped. They wait for room up to a number, and nobody waits for
/// them.
#[derive(Debug)]
pub struct PlugDir {
    dir: OwnDir,
    plugged: Arc<Mutex<Vec<Arc<Plugged>>>>,
    stop: Arc<AtomicBool>,
    waker: Arc<EventFd>,
    /// Until it is dropped.
    thread: Option<JoinHandle<()>>,
}

/// Removed with all that is in it.
#[derive(Debug)]
struct OwnDir(PathBuf);

impl Drop for OwnDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            debug!(path = %self.0.display(), %error, "cannot remove a directory of sockets");
        }
    }
}

impl PlugDir {
    /// Creates the directory, which must not exist, and serves the plugs.
    ///
    /// # Errors
    /// The path is too long, or relative, or the directory or its sockets cannot be made.
    pub fn open(dir: impl Into<PathBuf>, switch: &Switch) -> Result<Self, PlugError> {
        let dir = dir.into();
        if !Self::has_room(&dir) {
            return Err(PlugError::TooLong { dir });
        }
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| PlugError::Io { operation, path, source }
        };
        DirBuilder::new().mode(0o700).create(&dir).map_err(failed("make directory", &dir))?;
        let dir = OwnDir(dir);
        let absolute = fs::canonicalize(&dir.0).map_err(failed("look at", &dir.0))?;
        let [control, stream, datagrams] =
            [CONTROL, STREAM, DATAGRAMS].map(|name| absolute.join(name));
        let listen = |path: &Path| {
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            close(path)?;
            Ok(listener)
        };
        let bound = |path: &Path| {
            let socket = UnixDatagram::bind(path)?;
            socket.set_nonblocking(true)?;
            close(path)?;
            Ok(socket)
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let waker = EventFd::from_flags(flags).map_err(io::Error::from);
        let waker = Arc::new(waker.map_err(failed("serve", &dir.0))?);
        let (plugged, stop) = (Arc::default(), Arc::default());
        let server = Server {
            switch: switch.clone(),
            control: listen(&control).map_err(failed("listen at", &control))?,
            stream: listen(&stream).map_err(failed("listen at", &stream))?,
            datagrams: bound(&datagrams).map_err(failed("listen at", &datagrams))?,
            dir: absolute,
            waker: Arc::clone(&waker),
            stop: Arc::clone(&stop),
            plugged: Arc::clone(&plugged),
        };
        let thread = thread::Builder::new().name("plugs".to_owned()).spawn(move || server.run());
        let thread = Some(thread.map_err(failed("serve", &dir.0))?);
        Ok(Self { dir, plugged, stop, waker, thread })
    }

    /// Whether the paths of sockets in this directory are short enough.
    #[must_use]
    pub fn has_room(dir: &Path) -> bool {
        dir.as_os_str().as_bytes().len() <= MAX_DIR
    }

    /// The socket in the directory `dir` that VDE plugs connect to.
    #[must_use]
    pub fn control(dir: &Path) -> PathBuf {
        dir.join(CONTROL)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir.0
    }

    /// What is plugged in.
    #[must_use]
    pub fn plugs(&self) -> Vec<PlugStats> {
        lock(&self.plugged).iter().map(|plug| plug.stats()).collect()
    }
}

impl Drop for PlugDir {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // It is awake if this fails.
        let _ = self.waker.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Closes a socket to other users, as the directory is already.
fn close(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(0o600))
}

#[cfg(test)]
mod tests;
