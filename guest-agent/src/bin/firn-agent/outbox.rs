//! What is to be sent to the host in one session, filled by the main thread and by file workers.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use firn_guest_agent::protocol::{Frame, RequestId, ToHost, encode};
use nix::sys::eventfd::EventFd;

use crate::failure::failure;

/// Above this many unsent bytes no stream or file contents are added. Two chunks keep the port busy.
pub const HIGH: usize = 128 * 1024;

/// The frames of a session that the main thread has not yet taken.
pub struct Outbox {
    state: Mutex<State>,
    room: Condvar,
    wake: Arc<EventFd>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    finished: Vec<RequestId>,
    closed: bool,
}

/// The session has ended; nothing more can be sent in it.
pub struct Closed;

impl Outbox {
    /// An empty one, which wakes the main thread by `wake`.
    pub fn new(wake: Arc<EventFd>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), room: Condvar::new(), wake })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message at once. For the main thread, which takes it in the same turn.
    pub fn push(&self, id: RequestId, message: ToHost) {
        append(&mut self.state().bytes, id, message);
    }

    /// Adds contents from a worker as soon as there is room.
    pub fn push_contents(&self, id: RequestId, message: ToHost) -> Result<(), Closed> {
        let mut state = self.state();
        while state.bytes.len() >= HIGH && !state.closed {
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.add(state, id, message, false)
    }

    /// Adds a worker's short message, the last one of its request if `last`.
    pub fn push_from_worker(
        &self,
        id: RequestId,
        message: ToHost,
        last: bool,
    ) -> Result<(), Closed> {
        self.add(self.state(), id, message, last)
    }

    fn add(
        &self,
        mut state: MutexGuard<'_, State>,
        id: RequestId,
        message: ToHost,
        last: bool,
    ) -> Result<(), Closed> {
        if state.closed {
            return Err(Closed);
        }
        let quiet = state.bytes.is_empty() && state.finished.is_empty();
        append(&mut state.bytes, id, message);
        if last {
            state.finished.push(id);
        }
        drop(state);
        if quiet && let Err(error) = self.wake.write(1) {
            complain!("firn-agent: cannot wake the main thread: {}", error.desc());
        }
        Ok(())
    }

    /// The number of bytes that wait.
    pub fn len(&self) -> usize {
        self.state().bytes.len()
    }

    /// Takes all bytes in exchange for the empty `bytes`, and the requests that have ended.
    pub fn take(&self, bytes: &mut Vec<u8>) -> Vec<RequestId> {
        let mut state = self.state();
        std::mem::swap(&mut state.bytes, bytes);
        self.room.notify_all();
        std::mem::take(&mut state.finished)
    }

    /// Lets workers know that the session has ended.
    pub fn close(&self) {
        self.state().closed = true;
        self.room.notify_all();
    }
}

fn append(bytes: &mut Vec<u8>, id: RequestId, message: ToHost) {
    let Err(error) = encode(&Frame { id, message }, bytes) else {
        return;
    };
    let message = ToHost::Failed(failure(error.to_string()));
    if let Err(error) = encode(&Frame { id, message }, bytes) {
        complain!("firn-agent: request {id}: {error}");
    }
}
