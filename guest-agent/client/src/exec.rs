//! Commands in the guest.

use firn_guest_agent::protocol::{ExecRequest, Exit, MAX_CHUNK, Stream, ToAgent, ToHost};

use super::request::{Contents, Request};
use super::{AgentClient, AgentError, MAX_COLLECTED};

/// A running command. Dropping it before its end kills it with its process group; see [`Self::detach`].
#[derive(Debug)]
pub struct Exec {
    request: Request,
    pid: u32,
    stdin: Option<ExecStdin>,
}

/// What happens to a command. After the last, [`Exec::next`] gives `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It has written.
    Output {
        /// Where.
        stream: Stream,
        /// What.
        bytes: Vec<u8>,
    },
    /// No process holds the stream any more.
    Closed(Stream),
    /// The command itself has exited. Its streams may stay open in processes that it left behind.
    Exited(Exit),
}

/// What a command left when all was over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// How it ended.
    pub exit: Exit,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error, if that was streamed.
    pub stderr: Vec<u8>,
}

impl AgentClient {
    /// Starts a command.
    ///
    /// # Errors
    /// [`AgentError::Refused`] if it cannot be started.
    pub async fn exec(&self, request: ExecRequest) -> Result<Exec, AgentError> {
        let stdin = request.stdin;
        let mut request = Request::begin(self, ToAgent::Exec(request))?;
        match self.soon(request.next()).await? {
            Some(ToHost::Started { pid }) => {
                let stdin = stdin.then(|| ExecStdin { contents: request.contents(), open: true });
                Ok(Exec { request, pid, stdin })
            }
            _ => Err(request.misplaced()),
        }
    }

    /// Runs a command until it has exited and its streams are closed, and keeps all that it wrote.
    ///
    /// # Errors
    /// As [`Exec::collect`].
    pub async fn exec_collect(&self, request: ExecRequest) -> Result<Collected, AgentError> {
        let mut exec = self.exec(request).await?;
        drop(exec.take_stdin());
        exec.collect().await
    }

    /// The same with input.
    ///
    /// # Errors
    /// As [`Exec::collect`].
    pub async fn exec_with_input(
        &self,
        mut request: ExecRequest,
        input: &[u8],
    ) -> Result<Collected, AgentError> {
        request.stdin = true;
        let mut exec = self.exec(request).await?;
        let stdin = exec.take_stdin();
        let feed = async {
            match stdin {
                Some(mut stdin) => stdin.write_all(input).await,
                None => Ok(true),
            }
        };
        let (collected, fed) = tokio::join!(exec.collect(), feed);
        let collected = collected?;
        fed?;
        Ok(collected)
    }
}

impl Exec {
    /// The command's process id in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The way to the command's standard input, once, if it was asked for. Dropping it ends the input.
    pub fn take_stdin(&mut self) -> Option<ExecStdin> {
        self.stdin.take()
    }

    /// The next event; `None` when the command has exited and its streams are closed. May be cancelled without loss.
    ///
    /// # Errors
    /// [`AgentError::Lost`].
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, AgentError> {
        Ok(match self.request.next().await? {
            None => None,
            Some(ToHost::Output { stream, bytes }) => Some(ExecEvent::Output { stream, bytes }),
            Some(ToHost::Closed(stream)) => Some(ExecEvent::Closed(stream)),
            Some(ToHost::Exited(exit)) => Some(ExecEvent::Exited(exit)),
            Some(_) => return Err(self.request.misplaced()),
        })
    }

    /// Sends a signal (1 to 31) to the command's process group; nothing if the command has exited.
    ///
    /// # Errors
    /// [`AgentError::Lost`].
    pub fn signal(&self, signal: i32) -> Result<(), AgentError> {
        self.request.send(ToAgent::Signal { signal })
    }

    /// Lets the command run on, without a timeout and with its output thrown away.
    ///
    /// # Errors
    /// [`AgentError::Lost`].
    pub fn detach(self) -> Result<(), AgentError> {
        self.request.send(ToAgent::Detach)?;
        self.request.leave();
        Ok(())
    }

    /// Gathers all events until the end.
    ///
    /// # Errors
    /// [`AgentError::Lost`]; [`AgentError::TooMuch`] beyond [`MAX_COLLECTED`].
    pub async fn collect(mut self) -> Result<Collected, AgentError> {
        let (mut stdout, mut stderr, mut exit) = (Vec::new(), Vec::new(), None);
        while let Some(event) = self.next().await? {
            if let ExecEvent::Output { bytes, .. } = &event
                && stdout.len() + stderr.len() + bytes.len() > MAX_COLLECTED
            {
                return Err(AgentError::too_much("output", MAX_COLLECTED));
            }
            match event {
                ExecEvent::Output { stream: Stream::Stdout, bytes } => stdout.extend(bytes),
                ExecEvent::Output { stream: Stream::Stderr, bytes } => stderr.extend(bytes),
                ExecEvent::Closed(_) => {}
                ExecEvent::Exited(how) => exit = Some(how),
            }
        }
        let exit = exit.ok_or_else(|| self.request.misplaced())?;
        Ok(Collected { exit, stdout, stderr })
    }
}

/// A command's standard input. Dropping it ends the input.
#[derive(Debug)]
pub struct ExecStdin {
    contents: Contents,
    open: bool,
}

impl ExecStdin {
    /// Sends all of `bytes`, waiting while the command does not read. False if the command has ended; one that has
    /// only closed its input takes and forgets them.
    ///
    /// # Errors
    /// [`AgentError::Lost`].
    pub async fn write_all(&mut self, bytes: &[u8]) -> Result<bool, AgentError> {
        for chunk in bytes.chunks(MAX_CHUNK) {
            if !self.contents.send(chunk.to_vec()).await? {
                self.open = false;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for ExecStdin {
    fn drop(&mut self) {
        if self.open {
            // An agent that cannot be told is lost, and the command with it.
            self.contents.end().ok();
        }
    }
}
