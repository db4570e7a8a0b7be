//! The way into the guest: today the agent. The shell on hvc0 will be another.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::agent::{
    AgentClient, AgentError, Entry, Exec, ExecEvent, ExecRequest, FileInfo, Lost, ProtocolError,
    StderrMode, Stream,
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

/// How often the agent shall say that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// After this long without a word the guest is taken for frozen. Hosts that emulate guests are slow, so it is long.
const SILENCE: Duration = Duration::from_secs(60);

/// A way into the guest. Clones are handles to the same one.
#[derive(Clone)]
pub(super) enum Session {
    /// firn's own program in the guest.
    Agent {
        client: AgentClient,
        /// Changes with each of the agent's heartbeats.
        alive: watch::Receiver<Option<Duration>>,
    },
}

/// A call through a session failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("the agent has not said a word for {} seconds", SILENCE.as_secs())]
    Silent,
}

impl SessionError {
    /// Whether the session itself is gone.
    pub(super) fn lost(&self) -> bool {
        matches!(self, Self::Silent | Self::Agent(AgentError::Lost(_) | AgentError::Version { .. }))
    }

    /// Whether this end of the session cannot be used again.
    pub(super) fn is_final(&self) -> bool {
        use AgentError::{Lost as Gone, Version};
        use ProtocolError::NoGreeting;
        let Self::Agent(Gone(lost)) = self else {
            return matches!(self, Self::Agent(Version { .. }));
        };
        matches!(lost, Lost::Closed | Lost::Io(_) | Lost::Garbage(NoGreeting { .. }))
    }
}

type Result<T> = std::result::Result<T, SessionError>;

impl Session {
    /// Waits for the guest's agent at the other end of `stream`, which is left open: with `again` the agent may
    /// have been left in the middle of anything.
    pub(super) async fn connect(stream: &UnixStream, again: bool) -> Result<Self> {
        let stream = cloned(stream).map_err(|e| AgentError::Lost(Lost::Io(Arc::new(e))))?;
        let client = match again {
            true => AgentClient::reconnect(stream).await?,
            false => AgentClient::connect(stream).await?,
        };
        let alive = client.heartbeat(HEARTBEAT);
        Ok(Self::Agent { client, alive })
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
        let Self::Agent { alive, .. } = self;
        let mut alive = alive.clone();
        alive.mark_unchanged();
        // It cannot be closed while the client is there.
        while let Ok(Ok(())) = timeout(SILENCE, alive.changed()).await {}
    }

    /// What the guest said went wrong while it came up.
    pub(super) fn warnings(&self) -> Vec<String> {
        let Self::Agent { client: agent, .. } = self;
        let ready = agent.ready();
        let boot =
            ready.boot.filter(|exit| !exit.success()).map(|exit| format!("/etc/firn/boot: {exit}"));
        ready.warnings.iter().cloned().chain(boot).collect()
    }

    /// Waits until the session is gone, and says why.
    pub(super) async fn lost(&self) -> SessionError {
        let Self::Agent { client: agent, .. } = self;
        let lost = async { Ok(agent.lost().await) };
        match self.attend(lost).await {
            Ok(lost) => AgentError::Lost(lost).into(),
            Err(error) => error,
        }
    }

    /// Starts a command and leaves it alone.
    pub(super) async fn spawn(&self, command: Command) -> Result<()> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { Ok(agent.exec(command.into()).await?.detach()?) }).await
    }

    /// Runs a command until its standard output is closed; answers its status as a shell gives it, and what it
    /// printed there. Calls `lingering` if the output is still open `patience` after the command has exited.
    pub(super) async fn run(
        &self,
        command: Command,
        patience: Duration,
        lingering: impl FnOnce(),
    ) -> Result<(i32, Vec<u8>)> {
        let Self::Agent { client: agent, .. } = self;
        let run = async {
            let mut exec = agent.exec(command.into()).await?;
            let mut output = Output::default();
            while output.status.is_none() {
                match exec.next().await? {
                    Some(event) => output.take(event),
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

    /// Has the guest power off cleanly; answers when it has begun to.
    pub(super) async fn power_off(&self) -> Result<()> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { Ok(agent.power_off().await?) }).await
    }

    /// Writes the guest's dirty data back.
    pub(super) async fn sync(&self) -> Result<()> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { Ok(agent.sync().await?) }).await
    }

    /// Writes a file with these permission bits, and makes missing parents.
    pub(super) async fn write_file(
        &self,
        path: &Path,
        mode: u32,
        source: &mut (impl AsyncRead + Unpin + Send),
    ) -> Result<()> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { Ok(agent.write_file(path, mode, source).await?) }).await
    }

    /// Reads a file.
    pub(super) async fn read_file(
        &self,
        path: &Path,
        target: &mut (impl AsyncWrite + Unpin + Send),
    ) -> Result<()> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { agent.read_file(path, target).await.map(drop).map_err(Into::into) })
            .await
    }

    /// Makes a directory with these permission bits, and missing parents.
    pub(super) async fn make_directory(&self, path: &Path, mode: u32) -> Result<()> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { Ok(agent.make_directory(path, mode).await?) }).await
    }

    /// Makes a symbolic link.
    pub(super) async fn symlink(&self, path: &Path, target: &Path) -> Result<()> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { Ok(agent.symlink(path, target).await?) }).await
    }

    /// What is at `path`.
    pub(super) async fn stat(&self, path: &Path, follow: bool) -> Result<FileInfo> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { Ok(agent.stat(path, follow).await?) }).await
    }

    /// What is in a directory.
    pub(super) async fn list(&self, path: &Path) -> Result<Vec<Entry>> {
        let Self::Agent { client: agent, .. } = self;
        self.attend(async { Ok(agent.list(path).await?) }).await
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

#[cfg(test)]
mod tests {
    use firn_guest_agent::protocol::{
        Decoder, Frame, Greeting, GreetingKind, Ready, ToHost, encode,
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// An agent that greets, is ready, and then says nothing any more.
    async fn mute_agent(stream: UnixStream) {
        let mut stream = cloned(&stream).expect("a socket");
        greet(&mut stream).await;
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.expect("the host leaves");
    }

    /// Answers the host's hello.
    async fn greet(stream: &mut tokio::net::UnixStream) {
        let mut decoder = Decoder::new();
        let hello = loop {
            if let Some(hello) = decoder.find_greeting() {
                break hello;
            }
            let byte = stream.read_u8().await.expect("the host says hello");
            decoder.push(&[byte]);
        };
        let welcome = Greeting::new(GreetingKind::Welcome, hello.nonce);
        let ready = ToHost::Ready(Ready {
            agent_version: String::new(),
            init: true,
            hostname: String::new(),
            kernel: String::new(),
            uptime_ms: 1,
            boot: None,
            warnings: vec!["no clock".to_owned()],
        });
        let mut bytes = welcome.to_bytes().to_vec();
        encode(&Frame { id: 0, message: ready }, &mut bytes).expect("it is short");
        stream.write_all(&bytes).await.expect("the host is there");
    }

    #[tokio::test]
    async fn an_agent_that_is_started_again_is_met_again() {
        let (host, guest) = UnixStream::pair().expect("sockets");
        let agent = tokio::spawn(async move {
            let mut stream = cloned(&guest).expect("a socket");
            for _ in 0..3 {
                greet(&mut stream).await;
                stream.write_all(&[0xff; 100]).await.expect("the host is there");
            }
        });
        for again in [false, true, true] {
            let session = Session::connect(&host, again).await.expect("the agent greets");
            let lost = session.lost().await;
            assert!(lost.lost() && !lost.is_final(), "{lost}");
        }
        agent.await.expect("no panic");
    }

    #[tokio::test(start_paused = true)]
    async fn a_frozen_guest_is_noticed() {
        let (host, guest) = UnixStream::pair().expect("sockets");
        let agent = tokio::spawn(mute_agent(guest));
        let session = Session::connect(&host, false).await.expect("the agent greets");
        assert_eq!(session.warnings(), ["no clock"]);
        let began = tokio::time::Instant::now();
        let command = Command { script: "true".to_owned(), timeout: None };
        let error = session.run(command, HEARTBEAT, || {}).await.expect_err("it is mute");
        assert!(matches!(error, SessionError::Silent) && error.lost() && !error.is_final());
        assert_eq!(began.elapsed().as_secs(), SILENCE.as_secs());
        drop((session, host));
        agent.await.expect("no panic");
    }

    #[tokio::test]
    async fn an_agent_that_goes_ends_calls_at_once() {
        let (host, guest) = UnixStream::pair().expect("sockets");
        let agent = tokio::spawn(mute_agent(guest));
        let session = Session::connect(&host, false).await.expect("the agent greets");
        let command = Command { script: "true".to_owned(), timeout: None };
        let run = session.run(command, HEARTBEAT, || {});
        let gone = async {
            tokio::task::yield_now().await;
            agent.abort();
        };
        let (answer, ()) = tokio::join!(run, gone);
        let error = answer.expect_err("the agent is gone");
        assert!(error.lost() && error.is_final(), "{error}");
    }
}
