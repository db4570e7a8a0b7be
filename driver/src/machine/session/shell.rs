//! A session with the backdoor: a root shell that reads commands from hvc0, raw and without echo.
//!
//! Each call writes one line and reads three: a marker, the output as one line of base64, and the status. The marker
//! lets the next call find its own answer after one that was abandoned.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use memchr::memmem;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net;
use tokio::sync::{Mutex, mpsc, watch};

use super::agent::cloned;
use super::{Command, KILL_AFTER, MAX_OUTPUT, Output, Result, SessionError};
use crate::machine::exec;
use firn_agent_client::Clock;
use firn_agent_client::{
    ANSWER_WITHIN, AgentError, BytePath, Entry, FileInfo, FileKind, MAX_FILE, MAX_LISTING,
};

#[cfg(test)]
mod tests;

/// What the guest's service prints before its shell takes commands.
const BANNER: &[u8] = b"Spawning backdoor root shell...";
/// Longest line considered before the banner.
const MAX_LINE: usize = 64 << 10;
/// Bytes of a file per call.
const CHUNK: usize = 1 << 20;
/// How much longer than a command's own timeout its answer may take. Emulated guests are slow.
const GRACE: Duration = Duration::from_secs(60);

/// Why a call through the shell failed.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum ShellError {
    #[error("the guest closed the backdoor's console")]
    Closed,
    #[error("the backdoor's console failed")]
    Io(#[source] Arc<io::Error>),
    #[error("the backdoor shell does not answer: it is gone, or something else reads its console")]
    Mute,
    #[error("the backdoor shell ended and was started again")]
    Restarted,
    #[error("the backdoor shell answered what is no answer: {0:?}")]
    Garbage(String),
    #[error("a command cannot contain a NUL byte")]
    Nul,
    #[error("in the guest: {what} failed with status {status}")]
    Refused { what: String, status: i32 },
    #[error("on the host")]
    Local(#[source] Arc<io::Error>),
    #[error("the backdoor shell was left for the next one")]
    Left,
}

impl ShellError {
    fn local(error: io::Error) -> Self {
        Self::Local(Arc::new(error))
    }

    /// Whether the shell can no longer be used.
    pub(super) fn lost(&self) -> bool {
        matches!(self, Self::Closed | Self::Io(_) | Self::Mute | Self::Garbage(_))
    }
}

impl From<io::Error> for ShellError {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

/// A session with the backdoor. Clones are handles to the same one.
#[derive(Clone)]
pub(crate) struct ShellSession {
    line: Arc<Mutex<Line>>,
    clock: Clock,
    /// Why it is lost, or has to be left for another.
    end: Arc<watch::Sender<Option<ShellError>>>,
}

/// The console, which one call at a time may use.
struct Line {
    reader: BufReader<ReadHalf<net::UnixStream>>,
    /// A cancelled call must not leave half a line behind, so a separate task writes.
    writer: mpsc::UnboundedSender<Vec<u8>>,
    calls: u64,
}

impl ShellSession {
    /// Waits for the backdoor's shell at the other end of `stream`, which is left open.
    pub(crate) async fn connect(stream: &UnixStream, clock: &Clock) -> Result<Self> {
        // The socket's own split halves would shut it down when dropped.
        let (reader, writer) = tokio::io::split(cloned(stream).map_err(ShellError::from)?);
        let mut reader = BufReader::new(reader);
        let mut seen = Vec::new();
        // Anything may come before it: a guest without a backdoor may use hvc0 for anything.
        while !is_banner(&seen) {
            seen.clear();
            read_line(&mut reader, MAX_LINE, &mut seen).await?;
        }
        Ok(Self::open(reader, writer, clock))
    }

    /// Goes on with a shell that waits for a command.
    pub(crate) fn resume(stream: &UnixStream, clock: &Clock) -> Result<Self> {
        let (reader, writer) = tokio::io::split(cloned(stream).map_err(ShellError::from)?);
        Ok(Self::open(BufReader::new(reader), writer, clock))
    }

    fn open(
        reader: BufReader<ReadHalf<net::UnixStream>>,
        writer: WriteHalf<net::UnixStream>,
        clock: &Clock,
    ) -> Self {
        let (sender, lines) = mpsc::unbounded_channel();
        tokio::spawn(write_lines(writer, lines));
        let line = Arc::new(Mutex::new(Line { reader, writer: sender, calls: 0 }));
        Self { line, clock: clock.clone(), end: Arc::new(watch::Sender::new(None)) }
    }

    /// Whether nobody waits for an answer.
    pub(crate) fn is_idle(&self) -> bool {
        self.line.try_lock().is_ok()
    }

    /// Whether both are the same one.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.line, &other.line)
    }

    /// Ends all calls, now and later, because the guest is gone.
    pub(super) fn close(&self) {
        self.end.send_replace(Some(ShellError::Closed));
    }

    pub(super) fn is_lost(&self) -> bool {
        self.end.borrow().as_ref().is_some_and(ShellError::lost)
    }

    /// Waits until a call has found it gone or it is left: nothing else announces the end of a shell on a console.
    pub(super) async fn lost(&self) -> SessionError {
        match self.ended(|_| true).await {
            Some(error) => error.into(),
            None => std::future::pending().await,
        }
    }

    /// Announces that another shell will come on its console. Calls in progress may still be answered.
    pub(super) fn leave(&self) {
        self.end_with(ShellError::Left);
    }

    fn end_with(&self, error: ShellError) {
        self.end.send_if_modified(|end| {
            let news = !end.as_ref().is_some_and(ShellError::lost);
            if news {
                *end = Some(error);
            }
            news
        });
    }

    async fn ended(&self, how: impl Fn(&ShellError) -> bool) -> Option<ShellError> {
        let mut end = self.end.subscribe();
        // The sender lives in self.
        end.wait_for(|end| end.as_ref().is_some_and(&how)).await.ok()?.clone()
    }

    /// Starts a command and leaves it alone.
    pub(super) async fn spawn(&self, command: Command) -> Result<()> {
        let pipeline = format!("({} >/dev/null &)", shell(&command)?);
        self.call(&pipeline, &[], command.timeout, 0).await.map(drop)
    }

    /// Runs a command until its standard output is closed; returns its status and output.
    pub(super) async fn run(&self, command: &Command) -> Result<Output> {
        self.call(&shell(command)?, &[], command.timeout, MAX_OUTPUT).await
    }

    /// Runs a quick command that must succeed and prints little.
    async fn expect(&self, what: &str, script: String) -> Result<Vec<u8>> {
        let pipeline = shell(&Command { script, timeout: Some(ANSWER_WITHIN) })?;
        let output = self.call(&pipeline, &[], Some(ANSWER_WITHIN), MAX_LISTING).await?;
        succeeded(what, output.status)?;
        Ok(output.stdout)
    }

    pub(super) async fn power_off(&self) -> Result<()> {
        self.spawn(Command { script: "poweroff".to_owned(), timeout: None }).await
    }

    pub(super) async fn reboot(&self) -> Result<()> {
        self.spawn(Command { script: "reboot".to_owned(), timeout: None }).await
    }

    pub(super) async fn sync(&self) -> Result<()> {
        // Disks take their time.
        let sync = self.run(&Command { script: "sync".to_owned(), timeout: None }).await?;
        succeeded("sync", sync.status)
    }

    /// A shell has no means to; the guest has been told by its generation ID.
    #[allow(clippy::unused_async, reason = "as the agent's")]
    pub(super) async fn reseed(&self) -> Result<()> {
        Ok(())
    }

    pub(super) async fn write_file(
        &self,
        path: &Path,
        mode: u32,
        source: &mut (impl AsyncRead + Unpin + Send),
    ) -> Result<()> {
        let file = quote(path)?;
        let what = || format!("write {}", path.display());
        let parent = quote(parent(path))?;
        self.expect(&what(), format!("mkdir -p -- {parent}; : >{file}")).await?;
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let limit = u64::try_from(CHUNK).unwrap_or(u64::MAX);
            (&mut *source).take(limit).read_to_end(&mut bytes).await.map_err(ShellError::local)?;
            if bytes.is_empty() {
                break;
            }
            let payload = BASE64.encode(&bytes);
            // All of the payload must be read even on errors: the shell would take the rest for commands.
            let pipeline = format!(
                "(set -o pipefail; head -c {} | {{ base64 -d >>{file} || {{ cat >/dev/null; false; }}; }})",
                payload.len()
            );
            let written = self.call(&pipeline, payload.as_bytes(), Some(ANSWER_WITHIN), 0).await?;
            succeeded(&what(), written.status)?;
        }
        self.expect(&what(), format!("chmod {mode:o} -- {file}")).await.map(drop)
    }

    pub(super) async fn read_file(
        &self,
        path: &Path,
        target: &mut (impl AsyncWrite + Unpin + Send),
    ) -> Result<()> {
        let file = quote(path)?;
        let what = format!("read {}", path.display());
        let mut offset = 0_usize;
        loop {
            // It is no failure if the reader leaves a rest.
            let script = format!(
                "set +o pipefail; test -r {file}; tail -c +{} -- {file} | head -c {CHUNK}",
                offset + 1
            );
            let bytes = self.expect(&what, script).await?;
            target.write_all(&bytes).await.map_err(ShellError::local)?;
            offset += bytes.len();
            if u64::try_from(offset).is_ok_and(|offset| offset > MAX_FILE) {
                return Err(SessionError::Agent(AgentError::TooMuch {
                    what: "a file",
                    limit: MAX_FILE,
                }));
            }
            if bytes.len() < CHUNK {
                return target.flush().await.map_err(|e| ShellError::local(e).into());
            }
        }
    }

    pub(super) async fn make_directory(&self, path: &Path, mode: u32) -> Result<()> {
        let dir = quote(path)?;
        let script = format!("mkdir -p -- {dir}; chmod {mode:o} -- {dir}");
        self.expect(&format!("make {}", path.display()), script).await.map(drop)
    }

    pub(super) async fn stat(&self, path: &Path, follow: bool) -> Result<FileInfo> {
        let follow = if follow { "-H" } else { "-P" };
        let script = format!("find {follow} {} -maxdepth 0 {PRINT}", operand(path)?);
        let what = format!("look at {}", path.display());
        let output = self.expect(&what, script).await?;
        let entry = parse_entries(&output)?.into_iter().next();
        Ok(entry.ok_or_else(|| garbage(&output))?.info)
    }

    pub(super) async fn list(&self, path: &Path) -> Result<Vec<Entry>> {
        let script = format!("find -H {} -mindepth 1 -maxdepth 1 {PRINT}", operand(path)?);
        let output = self.expect(&format!("list {}", path.display()), script).await?;
        parse_entries(&output)
    }

    /// Has the shell run `pipeline` with `payload` as what follows the line; answers its first part's status, and its
    /// output, which may have `room` bytes.
    async fn call(
        &self,
        pipeline: &str,
        payload: &[u8],
        limit: Option<Duration>,
        room: usize,
    ) -> Result<Output> {
        let answer = tokio::select! {
            biased;
            Some(error) = self.ended(ShellError::lost) => Err(error.into()),
            answer = self.call_open(pipeline, payload, limit, room) => answer,
        };
        if let Err(SessionError::Shell(error)) = &answer
            && error.lost()
        {
            self.end_with(error.clone());
        }
        answer
    }

    async fn call_open(
        &self,
        pipeline: &str,
        payload: &[u8],
        limit: Option<Duration>,
        room: usize,
    ) -> Result<Output> {
        let mut line = self.line.lock().await;
        line.calls += 1;
        let marker = format!("firn-{}", line.calls);
        let mut bytes =
            format!("echo {marker}; {pipeline} | (base64 -w 0; echo); echo ${{PIPESTATUS[0]}}\n")
                .into_bytes();
        bytes.extend(payload);
        // The task that writes ends with the stream, and then reading says so.
        let _ = line.writer.send(bytes);
        let answer = line.answer(&marker, room);
        match limit {
            None => answer.await,
            Some(limit) => self
                .clock
                .timeout(limit.saturating_add(GRACE), answer)
                .await
                .unwrap_or(Err(ShellError::Mute.into())),
        }
    }
}

impl Line {
    async fn answer(&mut self, marker: &str, room: usize) -> Result<Output> {
        let mut line = Vec::new();
        while line != marker.as_bytes() {
            line.clear();
            // Before the marker there may be the output of an abandoned call.
            read_line(&mut self.reader, MAX_LINE, &mut line).await?;
        }
        let mut output = Vec::new();
        let whole = read_line(&mut self.reader, encoded(room).max(MAX_LINE), &mut output).await?;
        line.clear();
        // If a shell is killed, its command's output may be incomplete.
        if !is_banner(&output) {
            read_line(&mut self.reader, MAX_LINE, &mut line).await?;
        }
        if is_banner(&output) || is_banner(&line) {
            return Err(ShellError::Restarted.into());
        }
        if !whole {
            return Err(SessionError::TooMuchOutput);
        }
        let status = std::str::from_utf8(&line).ok().and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| garbage(&line))?;
        let output = BASE64.decode(&output).map_err(|_| garbage(&output))?;
        Ok(Output { status, stdout: output })
    }
}

/// Whether a shell announces itself.
fn is_banner(line: &[u8]) -> bool {
    memmem::find(line, BANNER).is_some()
}

/// The result of a status, where 0 is success.
fn succeeded(what: &str, status: i32) -> Result<()> {
    match status {
        0 => Ok(()),
        status => Err(ShellError::Refused { what: what.to_owned(), status }.into()),
    }
}

fn garbage(bytes: &[u8]) -> SessionError {
    let shown = &bytes[..bytes.len().min(200)];
    ShellError::Garbage(String::from_utf8_lossy(shown).into_owned()).into()
}

/// The base64 length of this many bytes.
const fn encoded(length: usize) -> usize {
    length.div_ceil(3) * 4
}

/// Appends a line, without its end, to `line`. Returns false for a line longer than `limit`, of which only that much is
/// kept.
async fn read_line(
    reader: &mut BufReader<ReadHalf<net::UnixStream>>,
    limit: usize,
    line: &mut Vec<u8>,
) -> Result<bool> {
    loop {
        let bytes = reader.fill_buf().await.map_err(ShellError::from)?;
        if bytes.is_empty() {
            return Err(ShellError::Closed.into());
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let part = &bytes[..end.unwrap_or(bytes.len())];
        let room = limit.saturating_sub(line.len()).min(part.len());
        let whole = room == part.len();
        line.extend(&part[..room]);
        let used = end.map_or(bytes.len(), |end| end + 1);
        reader.consume(used);
        if end.is_some() {
            // A console that is not raw ends its lines as a terminal does.
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            return Ok(whole && line.len() < limit);
        }
    }
}

async fn write_lines(
    mut writer: WriteHalf<net::UnixStream>,
    mut lines: mpsc::UnboundedReceiver<Vec<u8>>,
) {
    while let Some(line) = lines.recv().await {
        if writer.write_all(&line).await.is_err() {
            return;
        }
    }
}

/// The parent directory of `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        parent => parent.unwrap_or(path),
    }
}

/// The first part of a pipeline that runs a command.
fn shell(command: &Command) -> Result<String> {
    let script = quote(format!("set -euo pipefail; {}", command.script))?;
    let limit = command.timeout.map_or(String::new(), |limit| {
        // 0 would mean none.
        let seconds = limit.as_secs_f64().max(0.001);
        format!("timeout -k {} {seconds} ", KILL_AFTER.as_secs())
    });
    // Its input is not the shell's, which must not lose any.
    Ok(format!("{limit}bash -c {script} </dev/null"))
}

/// A shell word for any bytes but NUL.
fn quote(word: impl AsRef<std::ffi::OsStr>) -> Result<String> {
    let bytes = word.as_ref().as_bytes();
    if bytes.contains(&0) {
        return Err(ShellError::Nul.into());
    }
    // Only text is sent, because the console's line is UTF-8 on the way; other bytes are written as escapes.
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(exec::quote(text)),
        Err(_) => {
            let escaped: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            Ok(format!("$'{escaped}'"))
        }
    }
}

/// A path that a program cannot mistake for an option.
fn operand(path: &Path) -> Result<String> {
    if path.as_os_str().as_bytes().starts_with(b"-") {
        return quote(Path::new(".").join(path));
    }
    quote(path)
}

/// Makes `find` print what [`parse_entries`] reads: kind, mode, size, name and link target of a file.
const PRINT: &str = r"-printf '%y\0%m\0%s\0%f\0%l\0'";

fn parse_entries(output: &[u8]) -> Result<Vec<Entry>> {
    let fields: Vec<&[u8]> = output.split(|byte| *byte == 0).collect();
    let number = |bytes: &[u8], radix| {
        let number = std::str::from_utf8(bytes).ok();
        number.and_then(|n| u64::from_str_radix(n, radix).ok()).ok_or_else(|| garbage(output))
    };
    let path = |bytes: &[u8]| BytePath::from(std::ffi::OsStr::from_bytes(bytes));
    let entry = |fields: &[&[u8]]| {
        let &[kind, mode, size, name, target] = fields else { return Err(garbage(output)) };
        let kind = match kind {
            b"f" => FileKind::File,
            b"d" => FileKind::Directory,
            b"l" => FileKind::Symlink,
            _ => FileKind::Other,
        };
        let mode = u32::try_from(number(mode, 8)?).map_err(|_| garbage(output))?;
        let target = (kind == FileKind::Symlink).then(|| path(target));
        let info = FileInfo { kind, mode, size: number(size, 10)?, target };
        Ok(Entry { name: path(name), info })
    };
    // Nothing follows the last NUL.
    fields[..fields.len() - 1].chunks(5).map(entry).collect()
}
