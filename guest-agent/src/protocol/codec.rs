//! Frames to bytes and back, without I/O.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::greeting::MAGIC;
use super::{Frame, GREETING_LEN, Greeting, MAX_PAYLOAD};

const LENGTH: usize = 4;

/// Why a stream is not, or can no longer be, one of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// A frame announces a length outside of 1 to [`MAX_PAYLOAD`].
    #[error("frame of {length} bytes, allowed are 1 to {MAX_PAYLOAD}")]
    Length {
        /// The announced length in bytes.
        length: u32,
    },
    /// A frame's payload is no message: an unknown kind, or a field that does not decode.
    #[error("frame of {length} bytes does not decode: {problem}")]
    Undecodable {
        /// The payload's length in bytes.
        length: usize,
        /// What postcard found.
        problem: postcard::Error,
    },
    /// A frame's payload has more bytes than its message.
    #[error("{surplus} bytes too many after a message")]
    Surplus {
        /// The number of bytes left over.
        surplus: usize,
    },
    /// A message that its sender must not send now.
    #[error("request {id}: {what}")]
    Misplaced {
        /// The request the message belongs to.
        id: super::RequestId,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The other side does not greet.
    #[error("{length} bytes, and no greeting in them")]
    NoGreeting {
        /// How many bytes it has sent.
        length: usize,
    },
    /// This side was about to send a frame above [`MAX_PAYLOAD`].
    #[error("message of {length} bytes is too long to send, the most is {MAX_PAYLOAD}")]
    TooLong {
        /// The payload's length in bytes.
        length: usize,
    },
    /// This side could not encode a message.
    #[error("message cannot be encoded: {0}")]
    Encode(postcard::Error),
}

/// Appends `frame` to `out`. On error `out` is as before.
///
/// # Errors
/// [`ProtocolError::TooLong`] if the payload is above [`MAX_PAYLOAD`].
pub fn encode<M: Serialize>(frame: &Frame<M>, out: &mut Vec<u8>) -> Result<(), ProtocolError> {
    let start = out.len();
    let result = append(frame, out, start);
    if result.is_err() {
        out.truncate(start);
    }
    result
}

fn append<M: Serialize>(
    frame: &Frame<M>,
    out: &mut Vec<u8>,
    start: usize,
) -> Result<(), ProtocolError> {
    out.extend_from_slice(&[0; LENGTH]);
    postcard::serialize_with_flavor(frame, Append(out)).map_err(ProtocolError::Encode)?;
    let length = out.len() - start - LENGTH;
    let prefix = u32::try_from(length).ok().filter(|_| length <= MAX_PAYLOAD);
    let prefix = prefix.ok_or(ProtocolError::TooLong { length })?;
    out[start..start + LENGTH].copy_from_slice(&prefix.to_le_bytes());
    Ok(())
}

/// Lets postcard write into a vector that already holds other frames.
struct Append<'a>(&'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Append<'_> {
    type Output = ();

    fn try_push(&mut self, data: u8) -> postcard::Result<()> {
        self.0.push(data);
        Ok(())
    }

    fn try_extend(&mut self, data: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(data);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// What a [`Decoder`] finds between two frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item<M> {
    /// A frame.
    Frame(Frame<M>),
    /// A greeting: the other side wants a new session, or repeats itself.
    Greeting(Greeting),
}

/// Turns a stream of bytes, cut anywhere, into frames and greetings.
///
/// It holds what has been pushed and not yet been taken, so who takes everything before pushing more never holds
/// above [`MAX_PAYLOAD`] and the pushed bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// A decoder without bytes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start >= MAX_PAYLOAD {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Forgets all bytes.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }

    /// The bytes it holds at the moment, taken ones included.
    #[cfg(test)]
    pub(super) fn buffered(&self) -> usize {
        self.bytes.len()
    }

    /// The next greeting, skipping whatever comes before it. `None`: more bytes are needed.
    pub fn find_greeting(&mut self) -> Option<Greeting> {
        loop {
            let bytes = &self.bytes[self.start..];
            let Some(at) = bytes.windows(MAGIC.len()).position(|window| window == MAGIC) else {
                // The last bytes may be the magic's beginning.
                self.start += bytes.len().saturating_sub(MAGIC.len() - 1);
                return None;
            };
            self.start += at;
            let candidate = self.bytes[self.start..].first_chunk::<GREETING_LEN>()?;
            if let Some(greeting) = Greeting::from_bytes(candidate) {
                self.start += GREETING_LEN;
                return Some(greeting);
            }
            self.start += 1;
        }
    }

    /// The next frame or greeting; `None`: more bytes are needed.
    ///
    /// # Errors
    /// Any [`ProtocolError`] of receiving. The bytes at fault stay, so that [`Self::find_greeting`] searches them.
    pub fn next_item<M: DeserializeOwned>(&mut self) -> Result<Option<Item<M>>, ProtocolError> {
        let bytes = &self.bytes[self.start..];
        let Some((prefix, rest)) = bytes.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let announced = u32::from_le_bytes(*prefix);
        if MAGIC.starts_with(prefix) {
            let Some(greeting) = bytes.first_chunk::<GREETING_LEN>() else {
                return Ok(None);
            };
            let greeting = Greeting::from_bytes(greeting)
                .ok_or(ProtocolError::Length { length: announced })?;
            self.start += GREETING_LEN;
            return Ok(Some(Item::Greeting(greeting)));
        }
        let length =
            usize::try_from(announced).ok().filter(|length| (1..=MAX_PAYLOAD).contains(length));
        let length = length.ok_or(ProtocolError::Length { length: announced })?;
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let (frame, surplus) = postcard::take_from_bytes::<Frame<M>>(payload)
            .map_err(|problem| ProtocolError::Undecodable { length, problem })?;
        if !surplus.is_empty() {
            return Err(ProtocolError::Surplus { surplus: surplus.len() });
        }
        self.start += LENGTH + length;
        Ok(Some(Item::Frame(frame)))
    }
}
