//! UNIX sockets on the host that have a place in the file system.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

use thiserror::Error;

/// A socket cannot be listened at.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// Another process listens there.
    #[error("socket {path} is in use by another process")]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// There is a file that is not a socket; it is left alone.
    #[error("cannot make socket {path}: there is something that is not a socket")]
    NotASocket {
        /// Where.
        path: PathBuf,
    },
    /// The socket's file cannot be made or replaced.
    #[error("cannot {operation} socket {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A listening socket, and its file. Dropping it removes the file.
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that only this one is removed.
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`, for this user only. A stale socket without a listener is replaced.
    ///
    /// # Errors
    /// The path is taken, or no file can be created there.
    pub fn bind(path: &Path) -> Result<Listener, SocketError> {
        let failed =
            |operation| move |source| SocketError::Io { operation, path: path.into(), source };
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => remove_stale(path)?,
            Ok(_) => return Err(SocketError::NotASocket { path: path.into() }),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at")(error)),
        }
        let listener = bind_closed(path).map_err(failed("listen at"))?;
        let identity =
            fs::symlink_metadata(path).map(|file| identity(&file)).map_err(failed("look at"))?;
        Ok(Listener { listener, path: path.into(), identity })
    }

    /// The next client that waits; `None` if none does.
    ///
    /// # Errors
    /// The process is out of descriptors or memory.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    return Ok(Some(stream));
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Ok(None),
                    // A client that has gone again.
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// The socket itself, for those who wait for clients by other means. It does not block.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// The socket that programs on the host listen at for connections to `port`.
    pub fn path_of_port(&self, port: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        path.into()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> i32 {
        self.listener.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|file| identity(&file) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "cannot remove a socket");
        }
    }
}

fn identity(file: &fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// A socket that listens at `path` and does not block. No other user can ever connect to it: its file's mode is that of
/// the socket when it is bound, as far as the umask allows.
fn bind_closed(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let end = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&end, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(end.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&end, Backlog::MAXCONN)?;
    Ok(UnixListener::from(end))
}

/// Removes the socket at `path` unless a process listens on it.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |operation| move |source| SocketError::Io { operation, path: path.into(), source };
    match connect_to(path) {
        // Who has no room for a connection listens, too.
        Ok(_) => Err(SocketError::InUse { path: path.into() }),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Err(SocketError::InUse { path: path.into() })
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove stale"))
        }
        Err(error) => Err(failed("connect to")(error)),
    }
}

/// Connects to the Unix socket at `path`, without waiting for who listens there.
///
/// # Errors
/// Nobody listens there, or has no room for more.
pub fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let end = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    loop {
        match connect(end.as_raw_fd(), &UnixAddr::new(path)?) {
            Ok(()) => return Ok(UnixStream::from(end)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
