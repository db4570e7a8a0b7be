//! Errors of a test run.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use firn_vmm::error::chain;

/// The result of a machine API call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a machine API call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What the script required did not happen.
    #[error("{0}")]
    Assertion(String),
    /// A machine, or firn itself, failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// A machine, or firn itself, failed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The guest ended during a call.
    #[error("{machine} {end}{tail}")]
    Ended {
        /// Which machine.
        machine: String,
        /// What happened.
        end: Arc<End>,
        /// The last console lines.
        tail: Tail,
    },
    /// The guest runs, but its system fails to come up.
    #[error("{machine} cannot be used: {why}{tail}")]
    NotUp {
        /// Which machine.
        machine: String,
        /// What prevents it.
        why: Arc<str>,
        /// The last console lines.
        tail: Tail,
    },
    /// The guest agent was lost during a call.
    #[error("{machine} lost its agent{tail}")]
    AgentLost {
        /// Which machine.
        machine: String,
        /// How it was lost.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
        /// The last console lines.
        tail: Tail,
    },
    /// The guest agent failed to do something.
    #[error("{machine}: {what}")]
    Agent {
        /// Which machine.
        machine: String,
        /// What was attempted.
        what: String,
        /// Why it failed.
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
    /// The user network failed.
    #[error("{machine}: {what}")]
    Network {
        /// Which machine.
        machine: String,
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine does not support this, or KVM failed.
    #[error("{machine}: {what}")]
    Monitor {
        /// Which machine.
        machine: String,
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The machine is not running.
    #[error("{machine} is not running")]
    NotRunning {
        /// Which machine.
        machine: String,
    },
    /// The file to copy from the host does not exist.
    #[error("No such file or directory: {}", path.display())]
    Missing {
        /// Its path.
        path: PathBuf,
    },
    /// A file of the host cannot be used.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A place cannot hold the machines' state.
    #[error("cannot keep state in {}: {reason}; set TMPDIR to another directory of yours", path.display())]
    State {
        /// Where.
        path: PathBuf,
        /// Why not.
        reason: io::Error,
    },
    /// Invalid use of a call.
    #[error("{0}")]
    Usage(String),
}

impl MachineError {
    /// For `map_err`: the action and the file.
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
    /// The guest reset itself without permission.
    #[error("reset itself (started without allow_reboot)")]
    Reset,
    /// The guest's kernel panicked.
    #[error("panicked: {0}")]
    Panicked(String),
    /// The guest halted for good without powering off.
    #[error("halted")]
    Halted,
    /// A vCPU cannot continue.
    #[error("died: vCPU {vcpu}: {reason}")]
    VcpuDied {
        /// Which one.
        vcpu: u8,
        /// Why.
        reason: String,
    },
    /// The script stopped it.
    #[error("was stopped")]
    Stopped,
    /// It went back to the checkpoint of this name, and goes on from there.
    #[error("went back to {0}")]
    WentBack(String),
    /// The monitor could not continue.
    #[error("cannot go on: {0}")]
    Failed(String),
}

impl End {
    /// Whether a machine that ends this way counts as off for calls that wait for that: one whose kernel panicked does,
    /// with a log message; one that hangs does not.
    #[must_use]
    pub fn is_off(&self) -> bool {
        match self {
            Self::PoweredOff | Self::Reset | Self::Stopped | Self::Panicked(_) => true,
            Self::Halted | Self::VcpuDied { .. } | Self::WentBack(_) | Self::Failed(_) => false,
        }
    }
}

/// A machine's last console lines, for a message.
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
