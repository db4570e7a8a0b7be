//! One request in flight.

use std::sync::Arc;

use firn_guest_agent::protocol::{MAX_CHUNK, ProtocolError, RequestId, ToAgent, ToHost};
use tokio::sync::{Semaphore, mpsc};

use super::{AgentClient, AgentError, Lost};

/// A request; dropping it before its end has the agent cancel it.
#[derive(Debug)]
pub(super) struct Request {
    client: AgentClient,
    id: RequestId,
    events: mpsc::Receiver<ToHost>,
    send: Arc<Semaphore>,
    ended: bool,
}

impl Request {
    pub(super) fn begin(client: &AgentClient, message: ToAgent) -> Result<Self, AgentError> {
        let (id, events, send) = client.shared.begin(message)?;
        Ok(Self { client: client.clone(), id, events, send, ended: false })
    }

    /// The next message; `None` when the request has ended well. May be cancelled without loss.
    pub(super) async fn next(&mut self) -> Result<Option<ToHost>, AgentError> {
        if self.ended {
            return Ok(None);
        }
        let Some(message) = self.events.recv().await else {
            self.ended = true;
            return Err(self.client.shared.lost().into());
        };
        match message {
            ToHost::Done => {
                self.ended = true;
                Ok(None)
            }
            ToHost::Failed(failure) => {
                self.ended = true;
                Err(AgentError::Refused(failure))
            }
            message => {
                self.client.shared.release(self.id, message.cost());
                Ok(Some(message))
            }
        }
    }

    /// Waits for the end of a request that has no answer but that.
    pub(super) async fn finish(mut self) -> Result<(), AgentError> {
        match self.next().await? {
            None => Ok(()),
            Some(_) => Err(self.misplaced()),
        }
    }

    /// Sends a message that needs no window.
    pub(super) fn send(&self, message: ToAgent) -> Result<(), AgentError> {
        self.client.shared.send(self.id, message)
    }

    /// The end through which contents are sent.
    pub(super) fn contents(&self) -> Contents {
        Contents { client: self.client.clone(), id: self.id, send: Arc::clone(&self.send) }
    }

    /// Forgets the request without cancelling it; the agent has been told what to do with it.
    pub(super) fn leave(mut self) {
        self.ended = true;
        self.client.shared.forget(self.id);
    }

    /// The error for a message of the wrong kind.
    pub(super) fn misplaced(&self) -> AgentError {
        Lost::from(ProtocolError::Misplaced {
            id: self.id,
            what: "answer of another kind of request",
        })
        .into()
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if !self.ended {
            self.client.shared.forget(self.id);
            // An agent that cannot be told is lost, and the request with it.
            self.send(ToAgent::Cancel).ok();
        }
    }
}

/// Sends contents of a request, as its window admits.
#[derive(Debug)]
pub(super) struct Contents {
    client: AgentClient,
    id: RequestId,
    send: Arc<Semaphore>,
}

impl Contents {
    /// Sends at most [`MAX_CHUNK`] bytes. False if the agent has ended the request or is lost.
    pub(super) async fn send(&self, bytes: Vec<u8>) -> Result<bool, AgentError> {
        debug_assert!(bytes.len() <= MAX_CHUNK, "a chunk is too long");
        let message = ToAgent::Data(bytes);
        let Ok(permit) = self.send.acquire_many(message.cost()).await else {
            return Ok(false);
        };
        permit.forget();
        self.client.shared.send(self.id, message)?;
        Ok(true)
    }

    /// Says that there is no more.
    pub(super) fn end(&self) -> Result<(), AgentError> {
        self.client.shared.send(self.id, ToAgent::Eof)
    }
}
