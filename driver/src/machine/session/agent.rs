//! A session with firn's agent.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use firn_guest_agent::protocol::{SYSTEM_DOWN, SYSTEM_UP};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OnceCell;

use super::{Command, KILL_AFTER, MAX_OUTPUT, Output, Result, SessionError};
use firn_agent_client::Clock;
use firn_agent_client::{
    ANSWER_WITHIN, AgentClient, AgentError, Condition, Entry, Exec, ExecEvent, ExecRequest, Exit,
    FileInfo, Lost, StderrMode, Stream,
};

/// Signals, by number.
const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// Where root's login environment is set up.
const PROFILE: &str = "/etc/profile";
/// Prints that environment.
const ENVIRONMENT: &str = ". /etc/profile >/dev/null 2>&1; exec env -0";
/// Variables that the shell sets itself for each command.
const SHELLS_OWN: [&str; 4] = ["_", "OLDPWD", "PWD", "SHLVL"];

/// Name and value of each variable.
pub(crate) type Environment = Vec<(String, String)>;

/// A session with the agent. Clones are handles to the same one.
#[derive(Clone)]
pub(crate) struct AgentSession {
    client: AgentClient,
    clock: Clock,
    /// Root's login environment, computed once: most guests' profiles run programs.
    environment: Arc<OnceCell<Environment>>,
}

impl AgentSession {
    /// Waits for the guest's agent at the other end of `stream`, which stays open. With `again`, the agent may be in
    /// the middle of anything. The guest is asked for root's environment unless that is known.
    pub(crate) async fn connect(
        stream: &UnixStream,
        again: bool,
        environment: Option<Environment>,
        clock: &Clock,
    ) -> Result<Self> {
        let stream = cloned(stream).map_err(|e| AgentError::Lost(Lost::Io(Arc::new(e))))?;
        let client = AgentClient::connect_on(stream, clock, again).await?;
        let environment = Arc::new(OnceCell::new_with(environment));
        Ok(Self { client, clock: clock.clone(), environment })
    }

    /// Root's login environment, if a command has needed it.
    pub(crate) fn environment(&self) -> Option<Environment> {
        self.environment.get().cloned()
    }

    /// The agent itself, for what only it can do.
    pub(crate) fn client(&self) -> &AgentClient {
        &self.client
    }

    /// Whether both are the same one.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.environment, &other.environment)
    }

    /// What the guest reported as failed while it came up.
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

    /// Waits until it is certain that the system of an early agent will not come up by itself.
    pub(crate) async fn system_down(&self) -> Result<()> {
        self.wait(Condition::Exists(SYSTEM_DOWN.into())).await
    }

    pub(super) fn close(&self) {
        self.client.close();
    }

    pub(super) fn is_lost(&self) -> bool {
        self.client.lost_reason().is_some()
    }

    /// Waits until the session is lost; returns why.
    pub(super) async fn lost(&self) -> SessionError {
        AgentError::Lost(self.client.lost().await).into()
    }

    /// Starts a command. The caller enforces its timeout, as the guest's own clock runs on while the machine is paused.
    async fn exec(&self, script: &str) -> Result<Exec> {
        let environment = self.environment.get_or_try_init(|| self.login_environment()).await?;
        let mut request = ExecRequest::shell(format!("set -euo pipefail; {script}"));
        request.env.clone_from(environment);
        request.stderr = StderrMode::Console;
        Ok(self.client.exec(request).await?)
    }

    async fn login_environment(&self) -> Result<Environment> {
        let mut environment = match self.client.stat(Path::new(PROFILE), true).await {
            Ok(_) => {
                let mut request = ExecRequest::shell(ENVIRONMENT);
                request.stderr = StderrMode::Null;
                let answer = self.client.exec_collect(request);
                let answer = self.clock.timeout(ANSWER_WITHIN, answer).await;
                let answer = answer.ok_or(AgentError::Late(ANSWER_WITHIN))?;
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

    /// Starts a detached command.
    pub(super) async fn spawn(&self, command: Command) -> Result<()> {
        Ok(self.exec(&command.script).await?.detach()?)
    }

    /// See [`super::Session::run`].
    pub(super) async fn run(
        &self,
        command: Command,
        patience: Duration,
        lingering: impl FnOnce(),
    ) -> Result<Output> {
        let mut exec = self.exec(&command.script).await?;
        let mut running = Running::default();
        let Some(limit) = command.timeout else {
            running.until_exit(&mut exec).await?;
            return self.finish(running, exec, patience, lingering).await;
        };
        match self.clock.timeout(limit, running.until_exit(&mut exec)).await {
            Some(exited) => exited?,
            None => return self.end(running, exec, patience).await,
        }
        self.finish(running, exec, patience, lingering).await
    }

    /// Waits for the remaining output of a command that has exited.
    async fn finish(
        &self,
        mut running: Running,
        mut exec: Exec,
        patience: Duration,
        lingering: impl FnOnce(),
    ) -> Result<Output> {
        match self.clock.timeout(patience, running.drain(&mut exec)).await {
            Some(done) => done?,
            None => {
                lingering();
                running.drain(&mut exec).await?;
            }
        }
        Ok(running.finish())
    }

    /// Ends a command that timed out, as `timeout` would.
    async fn end(
        &self,
        mut running: Running,
        mut exec: Exec,
        patience: Duration,
    ) -> Result<Output> {
        exec.signal(SIGTERM)?;
        match self.clock.timeout(KILL_AFTER, running.until_exit(&mut exec)).await {
            Some(exited) => exited?,
            None => {
                exec.signal(SIGKILL)?;
                running.until_exit(&mut exec).await?;
            }
        }
        // Other processes that hold its output are not waited for.
        if let Some(done) = self.clock.timeout(patience, running.drain(&mut exec)).await {
            done?;
        }
        running.status = Some(Exit::TimedOut.shell_status());
        Ok(running.finish())
    }

    /// Waits for a condition.
    pub(crate) async fn wait(&self, condition: Condition) -> Result<()> {
        Ok(self.client.wait(condition).await?)
    }

    pub(super) async fn power_off(&self) -> Result<()> {
        Ok(self.client.power_off().await?)
    }

    pub(super) async fn reboot(&self) -> Result<()> {
        Ok(self.client.reboot().await?)
    }

    pub(super) async fn sync(&self) -> Result<()> {
        Ok(self.client.sync().await?)
    }

    pub(super) async fn reseed(&self) -> Result<()> {
        Ok(self.client.reseed().await?)
    }

    pub(super) async fn write_file(
        &self,
        path: &Path,
        mode: u32,
        source: &mut (impl AsyncRead + Unpin + Send),
    ) -> Result<()> {
        Ok(self.client.write_file(path, mode, source).await?)
    }

    pub(super) async fn read_file(
        &self,
        path: &Path,
        target: &mut (impl AsyncWrite + Unpin + Send),
    ) -> Result<()> {
        self.client.read_file(path, target).await?;
        Ok(())
    }

    pub(super) async fn make_directory(&self, path: &Path, mode: u32) -> Result<()> {
        Ok(self.client.make_directory(path, mode).await?)
    }

    pub(super) async fn stat(&self, path: &Path, follow: bool) -> Result<FileInfo> {
        Ok(self.client.stat(path, follow).await?)
    }

    pub(super) async fn list(&self, path: &Path) -> Result<Vec<Entry>> {
        Ok(self.client.list(path).await?)
    }
}

pub(super) fn cloned(stream: &UnixStream) -> io::Result<tokio::net::UnixStream> {
    let stream = stream.try_clone()?;
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

/// The variables in the output of `env -0` that are text; the protocol carries no others.
fn parse_environment(output: &[u8]) -> Environment {
    let variable = |entry: &[u8]| {
        let (name, value) = std::str::from_utf8(entry).ok()?.split_once('=')?;
        (!SHELLS_OWN.contains(&name)).then(|| (name.to_owned(), value.to_owned()))
    };
    output.split(|byte| *byte == 0).filter_map(variable).collect()
}

/// The state of a running command.
#[derive(Default)]
struct Running {
    stdout: Vec<u8>,
    status: Option<i32>,
}

impl Running {
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

    /// Takes events until the command has exited. Cancel-safe.
    async fn until_exit(&mut self, exec: &mut Exec) -> Result<()> {
        while self.status.is_none() {
            match exec.next().await? {
                Some(event) => self.take(event)?,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Takes events until the last one. Cancel-safe.
    async fn drain(&mut self, exec: &mut Exec) -> Result<()> {
        while let Some(event) = exec.next().await? {
            self.take(event)?;
        }
        Ok(())
    }

    fn finish(self) -> Output {
        // The protocol always sends an exit before the end; an agent that omits it has not reported success.
        Output { status: self.status.unwrap_or(-1), stdout: self.stdout }
    }
}
