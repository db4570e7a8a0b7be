//! The console's control messages (virtio 1.2, 5.3.6.2): how guest and device speak about ports.

use std::io::Write;

use serde::{Deserialize, Serialize};

use super::port::Port;
use crate::memory::MemoryMap;
use crate::virtio::queue::{Chain, Served};

/// `struct virtio_console_control`, without the name that may follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    /// The port.
    pub id: u32,
    /// What happens, one of [`event`].
    pub event: u16,
    /// More on it.
    pub value: u16,
}

/// Values of [`Message::event`].
pub(super) mod event {
    /// From the guest: the driver is ready (1) or failed (0).
    pub const DEVICE_READY: u16 = 0;
    /// To the guest: there is a port.
    pub const DEVICE_ADD: u16 = 1;
    /// From the guest: the port was taken (1) or not (0).
    pub const PORT_READY: u16 = 3;
    /// To the guest: the port is a console.
    pub const CONSOLE_PORT: u16 = 4;
    /// Both ways: the other side of the port was opened (1) or closed (0).
    pub const PORT_OPEN: u16 = 6;
    /// To the guest: the port's name follows.
    pub const PORT_NAME: u16 = 7;
}

impl Message {
    /// Length in bytes.
    pub const LEN: usize = 8;

    /// The message at the start of a chain, if it is long enough to be one.
    pub fn read(chain: Chain, memory: &MemoryMap) -> Option<Message> {
        let bytes = chain.reader(memory).ok()?.read_obj().ok()?;
        Some(Message::from_bytes(bytes))
    }

    /// From the guest's bytes.
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Message {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = bytes;
        Message {
            id: u32::from_le_bytes([i0, i1, i2, i3]),
            event: u16::from_le_bytes([e0, e1]),
            value: u16::from_le_bytes([v0, v1]),
        }
    }

    /// To the guest's bytes.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.id.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.event.to_le_bytes());
        bytes[6..].copy_from_slice(&self.value.to_le_bytes());
        bytes
    }
}

/// Messages about a port that are still to be sent to the guest, in field order. A set, not a list: the guest may
/// keep asking without providing buffers for the answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owed {
    /// DEVICE_ADD.
    pub add: bool,
    /// PORT_NAME, or CONSOLE_PORT for a port without a name.
    pub role: bool,
    /// PORT_OPEN, with what is then true.
    pub open: bool,
}

/// Does what one message of the guest asks for. Messages that make no sense are ignored, as the specification leaves
/// them undefined: too short, an unknown event, a port that does not exist.
pub(super) fn obey(message: Message, ports: &mut [Port]) {
    let on = message.value != 0;
    if message.event == event::DEVICE_READY {
        for port in ports.iter_mut().filter(|_| on) {
            port.state.owed.add = true;
        }
        return;
    }
    let port = usize::try_from(message.id).ok().and_then(|id| ports.get_mut(id));
    let Some(port) = port else { return };
    match message.event {
        event::PORT_READY => {
            port.state.ready = on;
            port.state.owed.role = on;
            // Closed is what the guest takes for granted.
            port.state.owed.open = on && port.host_open();
        }
        event::PORT_OPEN => port.state.guest_open = on,
        _ => {}
    }
}

/// Fills one buffer of the control receive queue with the first pending message.
pub(super) fn answer(chain: Chain, memory: &MemoryMap, ports: &mut [Port]) -> Served {
    let Some((bytes, port)) = next_owed(ports) else {
        return Served::Stop;
    };
    let Ok(mut writer) = chain.writer(memory) else {
        return Served::Done(0);
    };
    // A buffer that is too small costs the guest the message, not this side its time.
    paid(&mut port.state.owed);
    if writer.available_bytes() < bytes.len() || writer.write_all(&bytes).is_err() {
        return Served::Done(0);
    }
    Served::Done(u32::try_from(bytes.len()).unwrap_or(u32::MAX))
}

/// The first message owed, and the port it is about.
fn next_owed(ports: &mut [Port]) -> Option<(Vec<u8>, &mut Port)> {
    let (id, port) = (0..).zip(ports).find(|(_, port)| port.state.owed != Owed::default())?;
    let owed = port.state.owed;
    let (event, value, name) = match &port.name {
        _ if owed.add => (event::DEVICE_ADD, 0, ""),
        Some(name) if owed.role => (event::PORT_NAME, 1, name.as_str()),
        None if owed.role => (event::CONSOLE_PORT, 1, ""),
        _ => (event::PORT_OPEN, u16::from(port.host_open()), ""),
    };
    let mut bytes = Message { id, event, value }.to_bytes().to_vec();
    bytes.extend_from_slice(name.as_bytes());
    Some((bytes, port))
}

/// Strikes the first message off.
fn paid(owed: &mut Owed) {
    *owed = match *owed {
        Owed { add: true, role, open } => Owed { add: false, role, open },
        Owed { add: false, role: true, open } => Owed { add: false, role: false, open },
        _ => Owed::default(),
    };
}
