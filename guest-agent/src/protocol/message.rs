//! The messages. Both enums grow at their end only, with a new protocol version.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{MESSAGE_COST, SEED_LEN};

/// A guest path or file name: any bytes but NUL, as Linux has it.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BytePath(#[serde(with = "serde_bytes")] Vec<u8>);

impl BytePath {
    /// The path.
    #[must_use]
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<P: AsRef<OsStr> + ?Sized> From<&P> for BytePath {
    fn from(path: &P) -> Self {
        Self(path.as_ref().as_bytes().to_vec())
    }
}

impl fmt::Debug for BytePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_path().fmt(f)
    }
}

impl fmt::Display for BytePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_path().display().fmt(f)
    }
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Program {
    /// A program and its arguments, the program's name first; looked up in the command's `PATH` if it has no slash.
    Argv(Vec<String>),
    /// A script for bash, or for sh where there is no bash.
    Shell(String),
}

/// Where a command's standard error goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum StderrMode {
    /// To the host, apart from standard output.
    #[default]
    Stream,
    /// To the console given to the agent, else to its own standard error, which is the console if it is PID 1.
    Console,
    /// Away.
    Null,
    /// Into standard output.
    ToStdout,
}

/// A command to run, in a process group of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// What to run.
    pub program: Program,
    /// Variables set over the agent's defaults (`PATH`, `HOME=/root`, `USER`, `LOGNAME`, `SHELL`). The agent's own
    /// environment is not passed on.
    pub env: Vec<(String, String)>,
    /// The working directory; without one `/tmp`, or `/` where there is none.
    pub cwd: Option<BytePath>,
    /// Whether standard input is streamed by [`ToAgent::Data`] and ended by [`ToAgent::Eof`]; otherwise `/dev/null`.
    pub stdin: bool,
    /// Where standard error goes.
    pub stderr: StderrMode,
    /// After this many milliseconds the process group gets SIGTERM, and two seconds later SIGKILL. It does not bound
    /// how long background processes keep the output open once the command has exited.
    pub timeout_ms: Option<u64>,
}

impl ExecRequest {
    /// Runs `program` with the defaults: no input, error streamed, no timeout.
    #[must_use]
    pub fn new(program: Program) -> Self {
        Self {
            program,
            env: Vec::new(),
            cwd: None,
            stdin: false,
            stderr: StderrMode::default(),
            timeout_ms: None,
        }
    }

    /// Runs a shell script with the defaults.
    #[must_use]
    pub fn shell(script: impl Into<String>) -> Self {
        Self::new(Program::Shell(script.into()))
    }

    /// Runs a program with arguments and the defaults.
    #[must_use]
    pub fn argv<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self::new(Program::Argv(argv.into_iter().map(Into::into).collect()))
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this status (0 to 255).
    Code(u8),
    /// By this signal; 0 stands for any of the real-time signals.
    Signal(i32),
    /// Its time was over, and the agent ended it.
    TimedOut,
}

impl Exit {
    /// Whether it ended by itself with status 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// The status a shell would give: 128 and the signal's number, 124 (as `timeout` does) if its time was over.
    #[must_use]
    pub fn shell_status(self) -> i32 {
        match self {
            Self::Code(code) => i32::from(code),
            Self::Signal(signal) => 128_i32.saturating_add(signal),
            Self::TimedOut => 124,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::TimedOut => f.write_str("timed out"),
        }
    }
}

/// One of a command's output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Anything else: device, FIFO, socket.
    Other,
}

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Its kind.
    pub kind: FileKind,
    /// Permission bits with set-uid, set-gid and sticky: `mode & 0o7777`.
    pub mode: u32,
    /// Its size in bytes, as the file system says; 0 for many files of `/proc` that do have bytes.
    pub size: u64,
    /// A symbolic link's target.
    pub target: Option<BytePath>,
}

/// A directory's entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name within the directory.
    pub name: BytePath,
    /// What it is; a symbolic link is not followed.
    pub info: FileInfo,
}

impl Entry {
    /// What the entry counts for in [`ToHost::cost`]: its variable bytes, and a bound on the others.
    #[must_use]
    pub fn cost(&self) -> usize {
        self.name.len() + self.info.target.as_ref().map_or(0, BytePath::len) + 32
    }
}

/// What can be waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Condition {
    /// There is something at the path; symbolic links are followed.
    Exists(BytePath),
    /// Something listens on the TCP port.
    PortOpen {
        /// An address, `localhost`, or a name of `/etc/hosts`.
        host: String,
        /// The port.
        port: u16,
    },
    /// Nothing listens on the TCP port.
    PortClosed {
        /// As for `PortOpen`.
        host: String,
        /// The port.
        port: u16,
    },
    /// Something listens on the UNIX socket.
    SocketOpen {
        /// The socket.
        path: BytePath,
        /// Whether it is one of datagrams.
        datagram: bool,
    },
}

/// Why a request failed. The host knows the request itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What failed, for example `open /etc/x: No such file or directory`.
    pub message: String,
    /// The Linux error number, if that is what it was.
    pub errno: Option<i32>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What the agent says of itself and of the guest when it can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The agent's package version.
    pub agent_version: String,
    /// Whether it is PID 1.
    pub init: bool,
    /// Whether the agent was started before its system is up: [`super::SYSTEM_UP`] tells when it is.
    pub early: bool,
    /// The guest's host name.
    pub hostname: String,
    /// The guest's kernel release.
    pub kernel: String,
    /// Milliseconds since the guest's kernel started (`CLOCK_BOOTTIME`).
    pub uptime_ms: u64,
    /// How `/etc/firn/boot` ended, if the agent is PID 1 and there is one.
    pub boot: Option<Exit>,
    /// What went wrong while the agent set the guest up as PID 1, a line each. The agent serves all the same.
    pub warnings: Vec<String>,
}

/// From host to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// Request: run a command. Answers: `Started`, then `Output`, `Closed` and `Exited` as they come, and `Done` when
    /// the command has exited and its streams are closed.
    Exec(ExecRequest),
    /// Request: write a file, given by `Data` and ended by `Eof`. Parents are made (0755). An existing file is
    /// truncated and gets the mode too. Answer: `Done`.
    WriteFile {
        /// Where.
        path: BytePath,
        /// Permission bits; the umask does not apply.
        mode: u32,
    },
    /// Request: read a file. Answers: `Info`, `Data`, `Done`.
    ReadFile {
        /// Which.
        path: BytePath,
    },
    /// Request: what is there. Answers: `Info`, `Done`.
    Stat {
        /// Which.
        path: BytePath,
        /// Whether a symbolic link is followed.
        follow: bool,
    },
    /// Request: a directory's entries, without `.` and `..`, in the file system's order. Answers: `Entries`, `Done`.
    List {
        /// Which.
        path: BytePath,
    },
    /// Request: make a directory and its parents (0755) and give it the mode; it may exist. Answer: `Done`.
    MakeDirectory {
        /// Which.
        path: BytePath,
        /// Permission bits; the umask does not apply.
        mode: u32,
    },
    /// Request: make a symbolic link and the parents, in place of an existing file or link. Answer: `Done`.
    Symlink {
        /// Where.
        path: BytePath,
        /// What it points to.
        target: BytePath,
    },
    /// Request: write all dirty data back. Answer: `Done`.
    Sync,
    /// Request: power the guest off cleanly. Answer: `Done`, before it begins.
    PowerOff,
    /// Request: reboot the guest cleanly. Answer: `Done`, before it begins.
    Reboot,
    /// Session: send a [`ToHost::Heartbeat`] every this many milliseconds (at least 10), or none (0, the default).
    Heartbeat {
        /// The interval.
        interval_ms: u32,
    },
    /// For `Exec`: send a signal to the process group, if the command has not exited.
    Signal {
        /// The signal's number, 1 to 64.
        signal: i32,
    },
    /// For any request: end it; the answer is `Done` or `Failed`. A command that has not exited is killed with its
    /// process group. A file that was being written stays as it is.
    Cancel,
    /// For `Exec`: let it run on without a timeout and throw its output away. The answer is `Done`, at once.
    Detach,
    /// For `Exec` with stdin and `WriteFile`: the next bytes, at most [`super::MAX_CHUNK`].
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The end of `Data`.
    Eof,
    /// For any request: this many more bytes, by [`ToHost::cost`], may be sent.
    Credit(u32),
    /// Request: wait until something holds. Answer: `Done`, when it does.
    Wait(Condition),
    /// Request: have the kernel draw its random numbers afresh, with these random bytes, because the guest is a copy
    /// of another. Answer: `Done`, when whatever is drawn differs from what others draw.
    Reseed([u8; SEED_LEN]),
}

/// From agent to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// Session: the agent can be used; once a session, after `/etc/firn/boot` has ended.
    Ready(Ready),
    /// Session: the agent is alive.
    Heartbeat {
        /// Milliseconds since the guest's kernel started.
        uptime_ms: u64,
    },
    /// The command runs.
    Started {
        /// Its process id, which is its process group's too.
        pid: u32,
    },
    /// Bytes of a command's output, at most [`super::MAX_CHUNK`].
    Output {
        /// Of which stream.
        stream: Stream,
        /// The bytes.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// No process holds this stream open any more; nothing more will come from it.
    Closed(Stream),
    /// The command itself has ended; processes it left behind may still hold its streams.
    Exited(Exit),
    /// What is known of the file.
    Info(FileInfo),
    /// Bytes of a file, at most [`super::MAX_CHUNK`].
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Some of a directory's entries.
    Entries(Vec<Entry>),
    /// So many more bytes, by [`ToAgent::cost`], may be sent.
    Credit(u32),
    /// The request's end.
    Done,
    /// The request's end: it could not be carried out.
    Failed(Failure),
}

impl ToAgent {
    /// What the message takes from its direction's window; 0 if it is not limited.
    #[must_use]
    pub fn cost(&self) -> u32 {
        match self {
            Self::Data(bytes) => cost(bytes.len()),
            _ => 0,
        }
    }
}

impl ToHost {
    /// What the message takes from its direction's window; 0 if it is not limited.
    #[must_use]
    pub fn cost(&self) -> u32 {
        match self {
            Self::Data(bytes) | Self::Output { bytes, .. } => cost(bytes.len()),
            Self::Entries(entries) => cost(entries.iter().map(Entry::cost).sum()),
            _ => 0,
        }
    }
}

fn cost(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX).saturating_add(MESSAGE_COST)
}
