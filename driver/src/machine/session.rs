//! The way into the guest: today the agent. The shell on hvc0 will be another.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::sleep;

use crate::agent::{
    AgentClient, AgentError, Entry, Exec, ExecEvent, ExecRequest, FileInfo, Lost, StderrMode,
    Stream,
};

/// A command for the guest's shell, whose standard error goes to the console.
pub(super) struct Command {
    pub(super) script: String,
    /// After this long it is killed.
    pub(super) timeout: Option<Duration>,
}

impl From<Command> for ExecRequest {
    fn from(command: Command) -> Self {
        let mut request = Self::shell(command.script);
        request.env = vec![("DISPLAY".to_owned(), ":0.0".to_owned())];
        request.stderr = StderrMode::Console;
        request.timeout_ms =
            command.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        request
    }
}

/// A way into the guest. Clones are handles to the same one.
#[derive(Clone)]
pub(super) enum Session {
    /// firn's own program in the guest.
    Agent(AgentClient),
}

/// A call through a session failed.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct SessionError(#[from] AgentError);

impl SessionError {
    /// Whether the session itself is gone.
    pub(super) fn lost(&self) -> bool {
        matches!(self.0, AgentError::Lost(_) | AgentError::Version { .. })
    }

    /// Whether this end of the session cannot be used again.
    pub(super) fn is_final(&self) -> bool {
        matches!(self.0, AgentError::Lost(Lost::Closed | Lost::Io(_)) | AgentError::Version { .. })
    }
}

type Result<T> = std::result::Result<T, SessionError>;

impl Session {
    /// Waits for the guest's agent at the other end of `stream`, which is left open: with `again` the agent may
    /// have been left in the middle of anything.
    pub(super) async fn connect(stream: &UnixStream, again: bool) -> Result<Self> {
        let stream = cloned(stream).map_err(|e| AgentError::Lost(Lost::Io(Arc::new(e))))?;
        let client = if again {
            AgentClient::reconnect(stream).await?
        } else {
            AgentClient::connect(stream).await?
        };
        Ok(Self::Agent(client))
    }

    /// What the guest said went wrong while it came up.
    pub(super) fn warnings(&self) -> Vec<String> {
        let Self::Agent(agent) = self;
        let ready = agent.ready();
        let boot =
            ready.boot.filter(|exit| !exit.success()).map(|exit| format!("/etc/firn/boot: {exit}"));
        ready.warnings.iter().cloned().chain(boot).collect()
    }

    /// Waits until the session is gone, and says why.
    pub(super) async fn lost(&self) -> SessionError {
        let Self::Agent(agent) = self;
        SessionError(agent.lost().await.into())
    }

    /// Starts a command and leaves it alone.
    pub(super) async fn spawn(&self, command: Command) -> Result<()> {
        let Self::Agent(agent) = self;
        Ok(agent.exec(command.into()).await?.detach()?)
    }

    /// Runs a command until its standard output is closed; answers its status as a shell gives it, and what it
    /// printed there. Calls `lingering` if the output is still open `patience` after the command has exited.
    pub(super) async fn run(
        &self,
        command: Command,
        patience: Duration,
        lingering: impl FnOnce(),
    ) -> Result<(i32, Vec<u8>)> {
        let Self::Agent(agent) = self;
        let mut exec = agent.exec(command.into()).await?;
        let mut output = Output::default();
        while output.status.is_none() {
            match exec.next().await? {
                Some(event) => output.take(event),
                None => return Ok(output.finish()),
            }
        }
        tokio::select! {
            done = output.drain(&mut exec) => { done?; }
            () = sleep(patience) => {
                lingering();
                output.drain(&mut exec).await?;
            }
        }
        Ok(output.finish())
    }

    /// Has the guest power off cleanly; answers when it has begun to.
    pub(super) async fn power_off(&self) -> Result<()> {
        let Self::Agent(agent) = self;
        Ok(agent.power_off().await?)
    }

    /// Writes the guest's dirty data back.
    pub(super) async fn sync(&self) -> Result<()> {
        let Self::Agent(agent) = self;
        Ok(agent.sync().await?)
    }

    /// Writes a file with these permission bits, and makes missing parents.
    pub(super) async fn write_file(
        &self,
        path: &Path,
        mode: u32,
        source: &mut (impl AsyncRead + Unpin + Send),
    ) -> Result<()> {
        let Self::Agent(agent) = self;
        agent.write_file(path, mode, source).await?;
        Ok(())
    }

    /// Reads a file.
    pub(super) async fn read_file(
        &self,
        path: &Path,
        target: &mut (impl AsyncWrite + Unpin + Send),
    ) -> Result<()> {
        let Self::Agent(agent) = self;
        agent.read_file(path, target).await?;
        Ok(())
    }

    /// Makes a directory with these permission bits, and missing parents.
    pub(super) async fn make_directory(&self, path: &Path, mode: u32) -> Result<()> {
        let Self::Agent(agent) = self;
        Ok(agent.make_directory(path, mode).await?)
    }

    /// Makes a symbolic link.
    pub(super) async fn symlink(&self, path: &Path, target: &Path) -> Result<()> {
        let Self::Agent(agent) = self;
        Ok(agent.symlink(path, target).await?)
    }

    /// What is at `path`.
    pub(super) async fn stat(&self, path: &Path, follow: bool) -> Result<FileInfo> {
        let Self::Agent(agent) = self;
        Ok(agent.stat(path, follow).await?)
    }

    /// What is in a directory.
    pub(super) async fn list(&self, path: &Path) -> Result<Vec<Entry>> {
        let Self::Agent(agent) = self;
        Ok(agent.list(path).await?)
    }
}

fn cloned(stream: &UnixStream) -> io::Result<tokio::net::UnixStream> {
    let stream = stream.try_clone()?;
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

/// What is known of a running command.
#[derive(Default)]
struct Output {
    stdout: Vec<u8>,
    status: Option<i32>,
}

impl Output {
    fn take(&mut self, event: ExecEvent) {
        match event {
            ExecEvent::Output { stream: Stream::Stdout, bytes } => self.stdout.extend(bytes),
            ExecEvent::Exited(exit) => self.status = Some(exit.shell_status()),
            ExecEvent::Output { .. } | ExecEvent::Closed(_) => {}
        }
    }

    /// Takes what comes until nothing more will. May be cancelled without loss.
    async fn drain(&mut self, exec: &mut Exec) -> Result<()> {
        while let Some(event) = exec.next().await? {
            self.take(event);
        }
        Ok(())
    }

    fn finish(self) -> (i32, Vec<u8>) {
        // The protocol has no end without an exit; an agent that leaves it out has not said that all is well.
        (self.status.unwrap_or(-1), self.stdout)
    }
}
