//! The way into the guest: today the agent. The shell on hvc0 will be another.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use firn_guest_agent::protocol::{Entry, FileInfo};
use tokio::io::{AsyncRead, AsyncWrite};

/// A command for the guest's shell, whose standard error goes to the console.
pub(super) struct Command {
    pub(super) script: String,
    pub(super) timeout: Option<Duration>,
}

/// A way into the guest. Clones are handles to the same one.
#[derive(Clone)]
pub(super) enum Session {
}

/// A call through a session failed.
pub(super) struct SessionError {
    /// Whether the session itself is gone.
    pub(super) lost: bool,
    pub(super) source: Box<dyn std::error::Error + Send + Sync>,
}

type Result<T> = std::result::Result<T, SessionError>;

impl Session {
    pub(super) async fn connect(_stream: &UnixStream) -> Result<Self> { std::future::pending().await }
    pub(super) async fn lost(&self) -> SessionError { match *self {} }
    pub(super) async fn spawn(&self, _c: Command) -> Result<()> { match *self {} }
    pub(super) async fn run(&self, _c: Command, _linger: Duration, _l: impl FnOnce()) -> Result<(i32, Vec<u8>)> { match *self {} }
    pub(super) async fn power_off(&self) -> Result<()> { match *self {} }
    pub(super) async fn sync(&self) -> Result<()> { match *self {} }
    pub(super) async fn write_file(&self, _p: &Path, _m: u32, _f: &mut (impl AsyncRead + Unpin + Send)) -> Result<()> { match *self {} }
    pub(super) async fn read_file(&self, _p: &Path, _f: &mut (impl AsyncWrite + Unpin + Send)) -> Result<()> { match *self {} }
    pub(super) async fn make_directory(&self, _p: &Path, _m: u32) -> Result<()> { match *self {} }
    pub(super) async fn symlink(&self, _p: &Path, _t: &Path) -> Result<()> { match *self {} }
    pub(super) async fn stat(&self, _p: &Path, _f: bool) -> Result<FileInfo> { match *self {} }
    pub(super) async fn list(&self, _p: &Path) -> Result<Vec<Entry>> { match *self {} }
}
