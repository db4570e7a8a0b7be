//! What can go wrong while a test runs.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use firn_vmm::error::chain;

/// An answer of the machine API.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call of the machine API failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What the script asked for did not come true.
    #[error("{0}")]
    Assertion(String),
    /// The machinery failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// The machinery failed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The guest ended while somebody waited for it.
    #[error("{machine} {end}{tail}")]
    Ended {
        /// Which machine.
        machine: String,
        /// What happened.
        end: Arc<End>,
        /// The last console lines.
        tail: Tail,
    },
    /// The guest runs, but its system does not come up.
    #[error("{machine} cannot be used: {why}{tail}")]
    NotUp {
        /// Which machine.
        machine: String,
        /// What keeps it from that.
        why: Arc<str>,
        /// The last console lines.
        tail: Tail,
    },
    /// The guest agent went away while somebody waited for it.
    #[error("{machine} lost its agent{tail}")]
    AgentLost {
        /// Which machine.
        machine: String,
        /// How it went.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
        /// The last console lines.
        tail: Tail,
    },
    /// The guest agent could not do something.
    #[error("{machine}: {what}")]
    Agent {
        /// Which machine.
        machine: String,
        /// What was to be done.
        what: String,
        /// Why it was not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine cannot be started.
    #[error("{machine} cannot start")]
    Start {
        /// Which machine.
        machine: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The user network could not do something.
    #[error("{machine}: {what}")]
    Network {
        /// Which machine.
        machine: String,
        /// What was to be done.
        what: String,
        /// Why it was not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine is not one that can do this, or KVM does not.
    #[error("{machine}: {what}")]
    Monitor {
        /// Which machine.
        machine: String,
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The call needs a machine that runs.
    #[error("{machine} is not running")]
    NotRunning {
        /// Which machine.
        machine: String,
    },
    /// What shall be copied from the host is not there.
    #[error("No such file or directory: {}", path.display())]
    Missing {
        /// What.
        path: PathBuf,
    },
    /// A file of the host cannot be used.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done with it.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// The machines' state cannot be kept somewhere.
    #[error("cannot keep state in {}: {reason}; set TMPDIR to another directory of yours", path.display())]
    State {
        /// Where.
        path: PathBuf,
        /// Why not.
        reason: io::Error,
    },
    /// The call makes no sense.
    #[error("{0}")]
    Usage(String),
}

impl MachineError {
    /// For `map_err`: what was being done to which file.
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum End {
    /// The guest powered itself off.
    #[error("powered off")]
    PoweredOff,
    /// The guest reset itself, and was not allowed to.
    #[error("reset itself (started without allow_reboot)")]
    Reset,
    /// The guest's kernel panicked.
    #[error("panicked: {0}")]
    Panicked(String),
    /// The guest halted without powering off: its processors wait for nothing.
    #[error("halted")]
    Halted,
    /// A processor can execute no more.
    #[error("died: vCPU {vcpu}: {reason}")]
    VcpuDied {
        /// Which one.
        vcpu: u8,
        /// Why.
        reason: String,
    },
    /// The script ended it.
    #[error("was stopped")]
    Stopped,
    /// The monitor could not go on.
    #[error("cannot go on: {0}")]
    Failed(String),
}

impl End {
    /// Whether a machine that ends so is off, as whoever waits for that wants it: a kernel that panicked is, and the log
    /// says so. One that stands still is not.
    #[must_use]
    pub fn is_off(&self) -> bool {
        match self {
            Self::PoweredOff | Self::Reset | Self::Stopped | Self::Panicked(_) => true,
            Self::Halted | Self::VcpuDied { .. } | Self::Failed(_) => false,
        }
    }
}

/// The last console lines of a machine, for a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tail(pub Vec<String>);

impl std::fmt::Display for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("; its console is empty");
        }
        f.write_str("; the last lines of its console:")?;
        self.0.iter().try_for_each(|line| write!(f, "\n    {line}"))
    }
}
