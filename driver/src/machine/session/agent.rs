//! A session with firn's agent.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use firn_guest_agent::protocol::{SYSTEM_DOWN, SYSTEM_UP};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OnceCell, watch};
use tokio::time::{sleep, timeout};

use super::{Command, MAX_OUTPUT, Result, SessionError};
use crate::agent::{
    ANSWER_WITHIN, AgentClient, AgentError, Condition, Entry, Exec, ExecEvent, ExecRequest,
    FileInfo, Lost, StderrMode, Stream,
};

/// How often the agent shall say that it is alive.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(10);
/// After this long without a word the guest is taken for frozen. Hosts that emulate guests are slow, so it is long.
pub(super) const SILENCE: Duration = Duration::from_secs(60);
/// How many times it is waited for within that.
const SILENCE_PIECES: u32 = 4;

/// Where root's login environment is made.
const PROFILE: &str = "/etc/profile";
/// Prints that environment.
const ENVIRONMENT: &str = ". /etc/profile >/dev/null 2>&1; exec env -0";
/// What the shell sets by itself for each command.
const SHELLS_OWN: [&str; 4] = ["_", "OLDPWD", "PWD", "SHLVL"];

/// Name and value of each variable.
type Environment = Vec<(String, String)>;

/// A session with the agent. Clones are handles to the same one.
#[derive(Clone)]
pub(crate) struct AgentSession {
    client: AgentClient,
    /// Changes with each of the agent's heartbeats.
    alive: watch::Receiver<Option<Duration>>,
    /// Root's login environment, made once: most guests' profiles run programs.
    environment: Arc<OnceCell<Environment>>,
}

impl AgentSession {
    /// Waits for the guest's agent at the other end of `stream`, which is left open: with `again` the agent may
    /// have been left in the middle of anything.
    pub(crate) async fn connect(stream: &UnixStream, again: bool) -> Result<Self> {
        let stream = cloned(stream).map_err(|e| AgentError::Lost(Lost::Io(Arc::new(e))))?;
        let client = match again {
            true => AgentClient::reconnect(stream).await?,
            false => AgentClient::connect(stream).await?,
        };
        let alive = client.heartbeat(HEARTBEAT);
        Ok(Self { client, alive, environment: Arc::default() })
    }

    /// The agent itself, for what only it can do.
    pub(crate) fn client(&self) -> &AgentClient {
        &self.client
    }

    /// Whether both are the same one.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.environment, &other.environment)
    }

    /// Waits for an answer as long as the agent lives.
    async fn attend<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            answer = answer => answer,
            () = self.silence() => Err(SessionError::Silent),
        }
    }

    /// Waits until the agent has been silent for too long.
    async fn silence(&self) {
        let mut alive = self.alive.clone();
        alive.mark_unchanged();
        let mut silent = 0;
        // In pieces, of which a clock that jumps ends only one: a host that was stopped for a minute has no silent guest.
        while silent < SILENCE_PIECES {
            // It cannot be closed while the client is there.
            match timeout(SILENCE / SILENCE_PIECES, alive.changed()).await {
                Ok(Ok(())) => silent = 0,
                Ok(Err(_)) | Err(_) => silent += 1,
            }
        }
    }

    /// What the guest said went wrong while it came up.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let ready = self.client.ready();
        let boot =
            ready.boot.filter(|exit| !exit.success()).map(|exit| format!("/etc/firn/boot: {exit}"));
        ready.warnings.iter().cloned().chain(boot).collect()
    }

    /// Whether the guest's system may not be up yet.
    pub(crate) fn early(&self) -> bool {
        self.client.ready().early
    }

    /// Waits until the system of an early agent is up.
    pub(crate) async fn system_up(&self) -> Result<()> {
        self.wait(Condition::Exists(SYSTEM_UP.into())).await
    }

    /// Waits until the system of an early agent will not come up by itself.
    pub(crate) async fn system_down(&self) -> Result<()> {
        self.wait(Condition::Exists(SYSTEM_DOWN.into())).await
    }

    /// Waits until the session is gone, and says why.
    pub(crate) async fn lost(&self) -> SessionError {
        let lost = async { Ok(self.client.lost().await) };
        match self.attend(lost).await {
            Ok(lost) => AgentError::Lost(lost).into(),
            Err(error) => error,
        }
    }

    async fn exec(&self, command: Command) -> Result<Exec> {
        let environment = self.environment.get_or_try_init(|| self.login_environment()).await?;
        let mut request = ExecRequest::shell(format!("set -euo pipefail; {}", command.script));
        request.env.clone_from(environment);
        request.stderr = StderrMode::Console;
        request.timeout_ms =
            command.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        Ok(self.client.exec(request).await?)
    }

    async fn login_environment(&self) -> Result<Environment> {
        let mut environment = match self.client.stat(Path::new(PROFILE), true).await {
            Ok(_) => {
                let mut request = ExecRequest::shell(ENVIRONMENT);
                request.stderr = StderrMode::Null;
                let answer = timeout(ANSWER_WITHIN, self.client.exec_collect(request)).await;
                let answer = answer.map_err(|_| AgentError::Late(ANSWER_WITHIN))?;
                parse_environment(&answer?.stdout)
            }
            Err(AgentError::Refused(_)) => Environment::new(),
            Err(error) => return Err(error.into()),
        };
        // After the profile, which may set them otherwise.
        let fixed = [("DISPLAY", ":0.0"), ("PAGER", ""), ("HOME", "/root"), ("USER", "root")];
        environment.extend(fixed.map(|(name, value)| (name.to_owned(), value.to_owned())));
        Ok(environment)
    }

    /// Starts a command and leaves it alone.
    pub(super) async fn spawn(&self, command: Command) -> Result<()> {
        self.attend(async { Ok(self.exec(command).await?.detach()?) }).await
    }

    /// See [`super::Session::run`].
    pub(super) async fn run(
        &self,
        command: Command,
        patience: Duration,
        lingering: impl FnOnce(),
    ) -> Result<(i32, Vec<u8>)> {
        let run = async {
            let mut exec = self.exec(command).await?;
            let mut output = Output::default();
            while output.status.is_none() {
                match exec.next().await? {
                    Some(event) => output.take(event)?,
                    None => return Ok(output.finish()),
                }
            }
            tokio::select! {
                done = output.drain(&mut exec) => done?,
                () = sleep(patience) => {
                    lingering();
                    output.drain(&mut exec).await?;
                }
            }
            Ok(output.finish())
        };
        self.attend(run).await
    }

    /// Waits until something holds.
    pub(crate) async fn wait(&self, condition: Condition) -> Result<()> {
        self.attend(async { Ok(self.client.wait(condition).await?) }).await
    }

    pub(super) async fn power_off(&self) -> Result<()> {
        self.attend(async { Ok(self.client.power_off().await?) }).await
    }

    pub(super) async fn reboot(&self) -> Result<()> {
        self.attend(async { Ok(self.client.reboot().await?) }).await
    }

    pub(super) async fn sync(&self) -> Result<()> {
        self.attend(async { Ok(self.client.sync().await?) }).await
    }

    pub(super) async fn write_file(
        &self,
        path: &Path,
        mode: u32,
        source: &mut (impl AsyncRead + Unpin + Send),
    ) -> Result<()> {
        self.attend(async { Ok(self.client.write_file(path, mode, source).await?) }).await
    }

    pub(super) async fn read_file(
        &self,
        path: &Path,
        target: &mut (impl AsyncWrite + Unpin + Send),
    ) -> Result<()> {
        self.attend(async {
            self.client.read_file(path, target).await.map(drop).map_err(Into::into)
        })
        .await
    }

    pub(super) async fn make_directory(&self, path: &Path, mode: u32) -> Result<()> {
        self.attend(async { Ok(self.client.make_directory(path, mode).await?) }).await
    }

    pub(super) async fn stat(&self, path: &Path, follow: bool) -> Result<FileInfo> {
        self.attend(async { Ok(self.client.stat(path, follow).await?) }).await
    }

    pub(super) async fn list(&self, path: &Path) -> Result<Vec<Entry>> {
        self.attend(async { Ok(self.client.list(path).await?) }).await
    }
}

pub(super) fn cloned(stream: &UnixStream) -> io::Result<tokio::net::UnixStream> {
    let stream = stream.try_clone()?;
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

/// The variables of `env -0`'s output, as far as they are text: the protocol carries no other.
fn parse_environment(output: &[u8]) -> Environment {
    let variable = |entry: &[u8]| {
        let (name, value) = std::str::from_utf8(entry).ok()?.split_once('=')?;
        (!SHELLS_OWN.contains(&name)).then(|| (name.to_owned(), value.to_owned()))
    };
    output.split(|byte| *byte == 0).filter_map(variable).collect()
}

/// What is known of a running command.
#[derive(Default)]
struct Output {
    stdout: Vec<u8>,
    status: Option<i32>,
}

impl Output {
    fn take(&mut self, event: ExecEvent) -> Result<()> {
        match event {
            ExecEvent::Output { stream: Stream::Stdout, bytes } => {
                if self.stdout.len() + bytes.len() > MAX_OUTPUT {
                    return Err(SessionError::TooMuchOutput);
                }
                self.stdout.extend(bytes);
            }
            ExecEvent::Exited(exit) => self.status = Some(exit.shell_status()),
            ExecEvent::Output { .. } | ExecEvent::Closed(_) => {}
        }
        Ok(())
    }

    /// Takes what comes until nothing more will. May be cancelled without loss.
    async fn drain(&mut self, exec: &mut Exec) -> Result<()> {
        while let Some(event) = exec.next().await? {
            self.take(event)?;
        }
        Ok(())
    }

    fn finish(self) -> (i32, Vec<u8>) {
        // The protocol has no end without an exit; an agent that leaves it out has not said that all is well.
        (self.status.unwrap_or(-1), self.stdout)
    }
}
