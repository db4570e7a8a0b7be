//! The client of the guest agent: commands and files of a running machine over one byte stream.
//!
//! [`AgentClient::connect`] takes the host's end of the agent's port and waits until the agent is ready. All requests
//! share the stream; each has its own flow-control window, so one whose caller does not read holds up no other and
//! keeps at most [`WINDOW`](firn_guest_agent::protocol::WINDOW) bytes. When the stream ends, or the agent sends what
//! it must not, every waiting call fails at once with the same [`Lost`].
#![forbid(unsafe_code)]

mod client;
mod clock;
mod exec;
mod files;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

pub use firn_guest_agent::protocol::{
    BytePath, Condition, Entry, ExecRequest, Exit, Failure, FileInfo, FileKind, Program,
    ProtocolError, Ready, StderrMode, Stream,
};
use thiserror::Error;

pub use client::AgentClient;
pub use clock::Clock;
pub use exec::{Collected, Exec, ExecEvent, ExecStdin};

/// How long an answer may take that needs no work worth mentioning, and how long the next part of a longer one.
/// Emulated guests are slow.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(300);

/// How often an agent says that it is alive, once its silence is to be noticed.
pub const HEARTBEAT: Duration = Duration::from_secs(10);

/// After this long without a word the guest is taken for frozen. Hosts that emulate guests are slow, so it is long.
pub const SILENCE: Duration = Duration::from_secs(60);

/// Most bytes of a command's streams that [`Exec::collect`] keeps. Who wants more takes it by [`Exec::next`].
pub const MAX_COLLECTED: usize = 16 << 20;

/// Most bytes of a directory's names and links that [`AgentClient::list`] keeps: some hundred thousand entries.
pub const MAX_LISTING: usize = 32 << 20;

/// Most bytes of a file that [`AgentClient::read_file`] passes on.
pub const MAX_FILE: u64 = 64 << 30;

/// Why an agent can no longer be used.
#[derive(Debug, Clone, Error)]
pub enum Lost {
    /// The stream has ended: the guest is gone, or has closed the port.
    #[error("the guest closed the agent's port")]
    Closed,
    /// The stream cannot be read or written.
    #[error("the agent's port failed: {0}")]
    Io(Arc<io::Error>),
    /// The agent sent what is no message, or none that it may send.
    #[error("the agent sent garbage: {0}")]
    Garbage(ProtocolError),
    /// It lives for the kernel that carries its port, but has not said a word for too long.
    #[error("it has not said a word for {} seconds", SILENCE.as_secs())]
    Silent,
    /// The agent ended the session, because it did not understand the host, or was started again.
    #[error("the agent ended the session: {0}")]
    Ended(String),
}

/// Why a request to the agent failed.
#[derive(Debug, Clone, Error)]
pub enum AgentError {
    /// The agent is lost, and with it everything that was under way.
    #[error("the agent is lost: {0}")]
    Lost(Lost),
    /// Agent and host do not speak the same version of the protocol.
    #[error("the agent speaks protocol version {agent}, this firn speaks {host}")]
    Version {
        /// The agent's version.
        agent: u16,
        /// This side's version.
        host: u16,
    },
    /// The agent could not do what was asked.
    #[error("in the guest: {0}")]
    Refused(Failure),
    /// The agent lives, but does not answer.
    #[error("the guest has not answered for {} seconds", .0.as_secs())]
    Late(Duration),
    /// The agent answers with more than can be wanted.
    #[error("the guest answers with more than {limit} bytes of {what}")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// The request cannot be sent, for example because a script is too long.
    #[error("the request cannot be sent: {0}")]
    Unsendable(ProtocolError),
    /// The host's own side of a transfer failed: the source could not be read, or the destination not be written.
    #[error("on the host: {0}")]
    Local(Arc<io::Error>),
}

impl From<ProtocolError> for Lost {
    fn from(error: ProtocolError) -> Self {
        Self::Garbage(error)
    }
}

impl From<Lost> for AgentError {
    fn from(lost: Lost) -> Self {
        Self::Lost(lost)
    }
}

impl AgentError {
    fn local(error: io::Error) -> Self {
        Self::Local(Arc::new(error))
    }

    fn too_much(what: &'static str, limit: usize) -> Self {
        Self::TooMuch { what, limit: u64::try_from(limit).unwrap_or(u64::MAX) }
    }
}
