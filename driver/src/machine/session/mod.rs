//! The way into the guest: firn's agent, or the shell that NixOS's test instrumentation starts on hvc0.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use firn_agent_client::{AgentError, Entry, FileInfo, Lost, ProtocolError};

mod agent;
mod shell;
#[cfg(test)]
mod tests;

pub(super) use agent::{AgentSession, Environment};
pub(super) use shell::ShellSession;

use shell::ShellError;

/// Most bytes kept of a command's output: a guest must not fill the host's memory.
const MAX_OUTPUT: usize = 256 << 20;

/// How long a command that ignores SIGTERM lives after its timeout.
const KILL_AFTER: Duration = Duration::from_secs(2);

/// Longest script passed to a shell as an argument: Linux's limit is 128 KiB.
const MAX_ARGUMENT: usize = 64 << 10;

/// A command for the guest's shell, whose standard error goes to the console.
#[derive(Clone, Debug)]
pub(super) struct Command {
    pub(super) script: String,
    /// It is killed after this time.
    pub(super) timeout: Option<Duration>,
}

/// The result of a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Output {
    /// The exit status as a shell reports it.
    pub(super) status: i32,
    pub(super) stdout: Vec<u8>,
}

/// A way into the guest. Clones are handles to the same one.
#[derive(Clone)]
pub(super) enum Session {
    /// firn's own program in the guest: any number of calls at once.
    Agent(AgentSession),
    /// The backdoor: one call after the other.
    Shell(ShellSession),
}

/// Why a call through a session failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Shell(#[from] ShellError),
    #[error("the command printed more than {} MiB", MAX_OUTPUT >> 20)]
    TooMuchOutput,
}

impl SessionError {
    /// Whether the session itself is gone.
    pub(super) fn lost(&self) -> bool {
        match self {
            Self::Agent(AgentError::Lost(_) | AgentError::Version { .. }) => true,
            Self::Shell(error) => error.lost(),
            Self::Agent(_) | Self::TooMuchOutput => false,
        }
    }

    /// Whether the guest refused the request.
    pub(super) fn refused(&self) -> bool {
        matches!(
            self,
            Self::Agent(AgentError::Refused(_)) | Self::Shell(ShellError::Refused { .. })
        )
    }

    /// Whether this end of the session cannot be used again.
    pub(super) fn is_final(&self) -> bool {
        use AgentError::{Lost as Gone, Version};
        use ProtocolError::NoGreeting;
        match self {
            Self::Agent(Gone(lost)) => {
                matches!(lost, Lost::Closed | Lost::Io(_) | Lost::Garbage(NoGreeting { .. }))
            }
            Self::Agent(Version { .. }) => true,
            Self::Shell(error) => error.lost(),
            Self::Agent(_) | Self::TooMuchOutput => false,
        }
    }
}

type Result<T> = std::result::Result<T, SessionError>;

/// Dispatches a call to the way in use.
macro_rules! each {
    ($self:ident, $session:ident => $call:expr) => {
        match $self {
            Self::Agent($session) => $call,
            Self::Shell($session) => $call,
        }
    };
}

impl Session {
    /// Its name in the log.
    pub(super) fn description(&self) -> &'static str {
        match self {
            Self::Agent(_) => "firn's agent",
            Self::Shell(_) => "the backdoor shell; no agent answered",
        }
    }

    /// Whether both are the same one.
    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Agent(one), Self::Agent(other)) => one.is(other),
            (Self::Shell(one), Self::Shell(other)) => one.is(other),
            _ => false,
        }
    }

    /// A script equivalent to `script` that is short enough to be an argument of the shell.
    pub(super) async fn as_argument(&self, script: String) -> Result<String> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        if script.len() <= MAX_ARGUMENT {
            return Ok(script);
        }
        let file = format!("/run/firn-script-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.write_file(Path::new(&file), 0o600, &mut script.as_bytes()).await?;
        // The shell itself still runs it, with the same $0, $$ and standard input.
        Ok(format!("eval \"$(cat {file}; rm -f {file})\""))
    }

    /// Ends all present and future calls, because the guest is gone.
    pub(super) fn close(&self) {
        each!(self, session => session.close());
    }

    /// Ends it without a word to those who wait for answers.
    pub(super) fn abandon(&self) {
        match self {
            Self::Agent(agent) => agent.client().abandon(),
            // Only those who wait read from its console.
            Self::Shell(_) => {}
        }
    }

    /// Whether it can no longer be used.
    pub(super) fn is_lost(&self) -> bool {
        each!(self, session => session.is_lost())
    }

    /// Waits until it is lost or replaced; returns why.
    pub(super) async fn lost(&self) -> SessionError {
        each!(self, session => session.lost().await)
    }

    /// Makes the task that waits for its loss connect to the next one. An agent's port announces this itself.
    pub(super) fn leave(&self) {
        if let Self::Shell(shell) = self {
            shell.leave();
        }
    }

    /// Starts a command and leaves it alone.
    pub(super) async fn spawn(&self, command: Command) -> Result<()> {
        each!(self, session => session.spawn(command).await)
    }

    /// Runs a command until its standard output is closed. Calls `lingering` if the output is still open `patience`
    /// after the command has exited, where that can be seen.
    pub(super) async fn run(
        &self,
        command: Command,
        patience: Duration,
        lingering: impl FnOnce(),
    ) -> Result<Output> {
        match self {
            Self::Agent(session) => session.run(command, patience, lingering).await,
            Self::Shell(session) => session.run(&command).await,
        }
    }

    /// Makes the guest power off cleanly; returns when it has begun to.
    pub(super) async fn power_off(&self) -> Result<()> {
        each!(self, session => session.power_off().await)
    }

    /// Makes the guest restart cleanly; returns when it has begun to.
    pub(super) async fn reboot(&self) -> Result<()> {
        each!(self, session => session.reboot().await)
    }

    /// Syncs the guest's disks.
    pub(super) async fn sync(&self) -> Result<()> {
        each!(self, session => session.sync().await)
    }

    /// Has the guest draw fresh random numbers.
    pub(super) async fn reseed(&self) -> Result<()> {
        each!(self, session => session.reseed().await)
    }

    /// Writes a file with these permission bits, creating missing parents.
    pub(super) async fn write_file(
        &self,
        path: &Path,
        mode: u32,
        source: &mut (impl AsyncRead + Unpin + Send),
    ) -> Result<()> {
        each!(self, session => session.write_file(path, mode, source).await)
    }

    /// Reads a file.
    pub(super) async fn read_file(
        &self,
        path: &Path,
        target: &mut (impl AsyncWrite + Unpin + Send),
    ) -> Result<()> {
        each!(self, session => session.read_file(path, target).await)
    }

    /// Creates a directory with these permission bits, and missing parents.
    pub(super) async fn make_directory(&self, path: &Path, mode: u32) -> Result<()> {
        each!(self, session => session.make_directory(path, mode).await)
    }

    /// What is at `path`.
    pub(super) async fn stat(&self, path: &Path, follow: bool) -> Result<FileInfo> {
        each!(self, session => session.stat(path, follow).await)
    }

    /// What is in a directory.
    pub(super) async fn list(&self, path: &Path) -> Result<Vec<Entry>> {
        each!(self, session => session.list(path).await)
    }
}
