//! The agent protocol, version [`VERSION`].
//!
//! One reliable byte stream (a virtio-console port, or a UNIX socket in tests) carries, in each direction, greetings
//! and frames. Integers outside of postcard payloads are little-endian.
//!
//! # Handshake
//! Either side may find bytes of an earlier session in the stream, whole or cut, so a session starts with fixed-size
//! [`Greeting`]s, which a side looks for byte by byte:
//!
//! 1. The agent sends [`GreetingKind::Announce`] when it has opened the port.
//! 2. The host sends [`GreetingKind::Hello`] with a fresh nonce when it connects, and the same one again when it sees
//!    an announcement, because its first may have been dropped before the agent was there.
//! 3. The agent answers with [`GreetingKind::Welcome`] and the hello's nonce. If the versions are equal the session
//!    has begun; otherwise the agent waits for another hello and the host reports both versions.
//!
//! The host skips everything up to the welcome with its own nonce. The agent skips everything up to a hello, and
//! takes a hello between two frames as the start of a new session, unless its nonce is the current session's: then it
//! is a repetition and ignored. An agent that an earlier host left in the middle of a frame would take a hello as the
//! frame's rest. So a host that may meet one sends [`RESYNC_GUARD`] zero bytes first: a text that was cut off goes on
//! with a zero then, and no command is run that only begins as one that was asked for. If no welcome comes, the host
//! sends [`RESYNC_PADDING`] zero bytes, which no frame can outlast and which are no frame, and a hello with another
//! nonce.
//!
//! # Frames
//! A `u32` length (1 to [`MAX_PAYLOAD`]) and as many bytes of postcard: a [`Frame`]. What does not decode, or goes on
//! after it decoded, ends the session.
//!
//! # Requests
//! The host numbers its requests from 1 upwards and never uses a number twice in a session; number 0 is the session
//! itself, and a [`ToHost::Failed`] of number 0 says why the agent ends the session. Each request is ended by exactly
//! one [`ToHost::Done`] or [`ToHost::Failed`], also after [`ToAgent::Cancel`].
//!
//! # Flow control
//! In each direction of each request at most [`WINDOW`] bytes (as counted by `cost()` of the messages) are on their
//! way without the receiver having granted more by a `Credit`. So a receiver never has to choose between unbounded
//! memory and making other requests wait.

mod codec;
mod flow;
mod greeting;
mod message;
#[cfg(test)]
mod tests;

pub use codec::{Decoder, Item, ProtocolError, encode};
pub use flow::{ReceiveWindow, SendWindow};
pub use greeting::{GREETING_LEN, Greeting, GreetingKind};
pub use message::{
    BytePath, Condition, Entry, ExecRequest, Exit, Failure, FileInfo, FileKind, Program, Ready,
    StderrMode, Stream, ToAgent, ToHost,
};

use serde::{Deserialize, Serialize};

/// The protocol's version. Both sides must have the same one: agent and driver are built together.
pub const VERSION: u16 = 4;

/// How many random bytes a [`ToAgent::Reseed`] has: the size of the key of the kernel's generator.
pub const SEED_LEN: usize = 32;

/// The name of the virtio-console port that the agent serves.
pub const PORT_NAME: &str = "org.firn.agent";

/// What is there as long as a guest's system is up, where the agent is started before it is.
pub const SYSTEM_UP: &str = "/run/firn-system-up";

/// Exists while a guest's system has failed to come up and waits for repair.
pub const SYSTEM_DOWN: &str = "/run/firn-system-down";

/// The most bytes of a stream or file that one frame carries.
pub const MAX_CHUNK: usize = 64 * 1024;

/// The most bytes of a frame's payload. A shell script or an environment must fit into one frame; Linux itself takes
/// no single argument above 128 KiB (`MAX_ARG_STRLEN`).
pub const MAX_PAYLOAD: usize = 256 * 1024;

/// Bytes, by `cost()`, that a side may send on a request before the other has granted more.
pub const WINDOW: u32 = 1024 * 1024;

/// What a message that counts against the window costs beside its bytes, so that a window is also a bound on the
/// number of messages.
pub const MESSAGE_COST: u32 = 64;

/// The most messages that one window admits, each costing at least [`MESSAGE_COST`].
pub const WINDOW_MESSAGES: usize = (WINDOW / MESSAGE_COST) as usize;

/// The most requests that may be in flight in a session; the agent refuses more.
pub const MAX_REQUESTS: usize = 256;

/// Zero bytes before the hello to an agent that may be in the middle of a frame: no frame begins so.
pub const RESYNC_GUARD: usize = 4;

/// Zero bytes that bring an agent out of any frame: more than the longest one, and a length of 0 after it.
pub const RESYNC_PADDING: usize = MAX_PAYLOAD + 8;

/// The least that is worth a message: a sender whose window is open less than this waits for credit.
pub const MIN_CHUNK: usize = 4096;

/// The number of a request; 0 is the session itself.
pub type RequestId = u32;

/// A message and the request it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame<M> {
    /// The request.
    pub id: RequestId,
    /// The message.
    pub message: M,
}
