//! One port: bytes between the guest's two queues and a socket of the host.

use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use vm_memory::{ReadVolatile, VolatileSlice, WriteVolatile};

use super::control::Owed;
use crate::memory::MemoryMap;
use crate::virtio::queue::{Chain, GuestSlice, Served, readable, writable};
use crate::virtio::transfer::{Moved, transfer};
use crate::virtio::turn::Turn;

/// The saved state of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PortState {
    /// The guest's driver has taken the port.
    pub ready: bool,
    /// The port is open in the guest.
    pub guest_open: bool,
    /// What is still to be announced to the guest.
    pub owed: Owed,
    /// How many bytes of the chain at the head of the transmit queue the socket has taken.
    pub sent: usize,
}

/// One port, with or without queues.
pub(super) struct Port {
    /// Without a name it is a console.
    pub name: Option<String>,
    /// What a snapshot keeps.
    pub state: PortState,
    /// Non-blocking.
    socket: UnixStream,
    host_open: bool,
}

impl Port {
    pub fn new(name: Option<String>, socket: UnixStream) -> std::io::Result<Port> {
        socket.set_nonblocking(true)?;
        Ok(Port { name, state: PortState::default(), socket, host_open: true })
    }

    /// The socket to watch.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether the socket's other end is open, as far as is known.
    pub fn host_open(&self) -> bool {
        self.host_open
    }

    /// Sends one chain of the guest to the host, from where the last call stopped.
    pub fn transmit(&mut self, chain: Chain, memory: &MemoryMap, turn: &mut Turn) -> Served {
        let mut skip = self.state.sent;
        // Data after a buffer outside memory is lost; that is the guest's fault.
        for buffer in readable(chain, memory).map_while(Result::ok) {
            let start = skip.min(buffer.len());
            skip -= start;
            let Ok(mut rest) = buffer.offset(start) else {
                break;
            };
            while self.host_open && !rest.is_empty() {
                if turn.is_over() {
                    return Served::Stop;
                }
                match transfer(|| (&self.socket).write_volatile(&rest)) {
                    Moved::Bytes(count) => {
                        self.state.sent += count;
                        turn.spend(count);
                        let Ok(left) = rest.offset(count) else { break };
                        rest = left;
                    }
                    Moved::Later => return Served::Stop,
                    Moved::Closed => self.close_host(),
                }
            }
        }
        self.state.sent = 0;
        Served::Done(0)
    }

    /// Fills one chain of the guest with what the host has sent.
    pub fn receive(&mut self, chain: Chain, memory: &MemoryMap, turn: &mut Turn) -> Served {
        if !self.wants_input() {
            return Served::Stop;
        }
        let (mut received, mut asked) = (0, false);
        for mut buffer in writable(chain, memory).map_while(Result::ok) {
            if buffer.is_empty() {
                // Reading nothing would look like the end.
                continue;
            }
            asked = true;
            match self.fill(&mut buffer) {
                Moved::Bytes(count) => {
                    received += count;
                    if count < buffer.len() {
                        break;
                    }
                }
                Moved::Later => break,
                Moved::Closed => {
                    self.close_host();
                    break;
                }
            }
        }
        turn.spend(received);
        if received == 0 && asked {
            return Served::Stop;
        }
        Served::Done(u32::try_from(received).unwrap_or(u32::MAX))
    }

    /// Whether bytes of the host have somewhere to go. Until then they stay in the socket.
    pub fn wants_input(&self) -> bool {
        self.state.guest_open && self.host_open
    }

    /// Drops what the host has sent and the guest has not taken: it was meant for the guest of another time.
    pub fn forget_input(&mut self) {
        let mut dropped = [0; 4096];
        while let Moved::Bytes(1..) =
            transfer(|| (&self.socket).read_volatile(&mut VolatileSlice::from(&mut dropped[..])))
        {
        }
    }

    fn fill(&mut self, buffer: &mut GuestSlice<'_>) -> Moved {
        match transfer(|| (&self.socket).read_volatile(buffer)) {
            Moved::Bytes(0) => Moved::Closed,
            other => other,
        }
    }

    fn close_host(&mut self) {
        self.host_open = false;
        self.state.owed.open = self.state.ready;
    }
}
