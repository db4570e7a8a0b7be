//! Keyboard and tablet (virtio 1.2, 5.8).
//!
//! [`InputHandle`] presses keys and moves the pointer. What it does waits until the guest's driver is there and has
//! given buffers, also when it is loaded long after: so nothing that is typed early is lost. All events of one report
//! come to the guest at once.
//!
//! What is down is released when the machine is paused: nobody can say how long it would seem to be held.

mod codes;
mod handle;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_INPUT;
use virtio_bindings::virtio_input::{
    virtio_input_config_select_VIRTIO_INPUT_CFG_ABS_INFO as CFG_ABS_INFO,
    virtio_input_config_select_VIRTIO_INPUT_CFG_EV_BITS as CFG_EV_BITS,
    virtio_input_config_select_VIRTIO_INPUT_CFG_ID_DEVIDS as CFG_ID_DEVIDS,
    virtio_input_config_select_VIRTIO_INPUT_CFG_ID_NAME as CFG_ID_NAME,
};

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::queue::{Position, Served, VirtQueue};
use super::turn::Again;
use super::{Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError};
use super::{SavedState, VirtioDevice};
use codes::{ABS_X, ABS_Y, EV_ABS, EV_KEY, EV_LED, EV_REL, Event, REL_WHEEL};
pub use codes::{BTN_EXTRA, BTN_LEFT, BTN_MIDDLE, BTN_RIGHT, BTN_SIDE};
pub use handle::{InputHandle, MAX_POSITION};
use handle::{Shared, Waiting};

/// Events for the guest (5.8.2).
const EVENTS: usize = 0;
/// What the guest says to the device: which lamps are lit.
const STATUS: usize = 1;
/// Linux gives as many buffers (`struct virtio_input` of drivers/virtio/virtio_input.c).
const QUEUE_SIZE: u16 = 64;
/// Layout of the saved state: [`State`].
const STATE_VERSION: u16 = 1;
/// The bus that Linux is told (`BUS_VIRTUAL` of linux/input.h), and a vendor: that of virtio itself.
const BUS_VIRTUAL: u16 = 6;
const VENDOR: u16 = 0x1af4;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A keyboard with every key that has a name.
    Keyboard,
    /// A pointer with buttons and a wheel, that says where on the screen it is.
    Tablet,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Kind::Keyboard => "keyboard",
            Kind::Tablet => "tablet",
        }
    }

    /// Whether the guest is told that there is such a key or button.
    fn has_key(self, code: u16) -> bool {
        match self {
            Kind::Keyboard => codes::KEYS.contains(&code),
            Kind::Tablet => codes::BUTTONS.contains(&code),
        }
    }

    /// What a selection stands for; nothing if it is unknown (5.8.4).
    fn describe(self, select: u8, subselect: u8) -> Vec<u8> {
        let subselect = u16::from(subselect);
        match (u32::from(select), subselect, self) {
            (CFG_ID_NAME, 0, _) => format!("firn {}", self.name()).into_bytes(),
            (CFG_ID_DEVIDS, 0, _) => {
                let product = self as u16 + 1;
                [BUS_VIRTUAL, VENDOR, product, 1].map(u16::to_le_bytes).concat()
            }
            // No EV_REP: Linux would repeat keys by its own clock, and a slow guest hears late that one is up again.
            (CFG_EV_BITS, EV_KEY, Kind::Keyboard) => bitmap(codes::KEYS),
            (CFG_EV_BITS, EV_KEY, Kind::Tablet) => bitmap(codes::BUTTONS),
            (CFG_EV_BITS, EV_LED, Kind::Keyboard) => bitmap(codes::LEDS),
            (CFG_EV_BITS, EV_REL, Kind::Tablet) => bitmap(REL_WHEEL..=REL_WHEEL),
            (CFG_EV_BITS, EV_ABS, Kind::Tablet) => bitmap(ABS_X..=ABS_Y),
            (CFG_ABS_INFO, ABS_X | ABS_Y, Kind::Tablet) => {
                [0, u32::from(MAX_POSITION), 0, 0, 0].map(u32::to_le_bytes).concat()
            }
            _ => Vec::new(),
        }
    }
}

/// A bit for each code, without bytes behind the last.
fn bitmap(codes: impl IntoIterator<Item = u16>) -> Vec<u8> {
    let mut bits = Vec::new();
    for code in codes {
        let byte = usize::from(code / 8);
        if bits.len() <= byte {
            bits.resize(byte + 1, 0);
        }
        bits[byte] |= 1 << (code % 8);
    }
    bits
}

config_space! {
    /// 5.8.4.
    struct Config {
        select: u8,
        subselect: u8,
        size: u8,
        reserved: [u8; 5],
        content: [u8; 128],
    }
}

/// Where the guest writes what it wants to see.
const SELECT: u64 = 0;
const SUBSELECT: u64 = 1;

/// What of the configuration space the guest has chosen to see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Selection {
    select: u8,
    subselect: u8,
}

#[derive(Serialize, Deserialize)]
struct State {
    selection: Selection,
    waiting: Waiting,
}

/// An input device: without queues as `Input`, with them as `Input<Queues>`.
pub struct Input<Q = ()> {
    shared: Arc<Shared>,
    selection: Selection,
    queues: Q,
}

/// The queues of an active input device.
pub struct Queues {
    events: VirtQueue,
    status: VirtQueue,
}

impl DeviceSpec for Kind {
    fn build(&self, _host: &mut Host<'_>) -> Result<Built, BuildError> {
        let input = Input::new(*self).map_err(BuildError::host(self.name()))?;
        let handle = Handle::Input(*self, input.handle());
        Ok((Box::new(input), handle))
    }
}

impl Input {
    /// Builds one of which nothing is pressed.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(kind: Kind) -> io::Result<Input> {
        let shared = Arc::new(Shared::new(kind, Again::new()?));
        Ok(Input { shared, selection: Selection::default(), queues: () })
    }
}

impl<Q> Input<Q> {
    /// The host's hand on it.
    pub fn handle(&self) -> InputHandle {
        InputHandle(Arc::clone(&self.shared))
    }
}

impl<Q: Send> DeviceConfig for Input<Q> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_INPUT
    }
    fn name(&self) -> String {
        self.shared.kind.name().into()
    }
    fn identity(&self) -> String {
        self.shared.kind.name().into()
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Selection { select, subselect } = self.selection;
        let described = self.shared.kind.describe(select, subselect);
        let mut content = [0; 128];
        let size = described.len().min(content.len());
        content[..size].copy_from_slice(&described[..size]);
        let size = u8::try_from(size).unwrap_or(u8::MAX);
        let config = Config { select, subselect, size, reserved: [0; 5], content };
        read_config_space(&config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (offset, &byte) in (offset..u64::MAX).zip(data).take(2) {
            match offset {
                SELECT => self.selection.select = byte,
                SUBSELECT => self.selection.subselect = byte,
                _ => {}
            }
        }
    }
    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.shared.again.as_raw_fd()]
    }
    fn save(&self) -> SavedState {
        let waiting = self.shared.waiting().clone();
        SavedState::encode(STATE_VERSION, &State { selection: self.selection, waiting })
    }
}

impl VirtioDevice for Input {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let State { selection, mut waiting } = state.decode(STATE_VERSION)?;
        waiting.release_all();
        self.selection = selection;
        *self.shared.waiting() = waiting;
        Ok(())
    }

    fn activate(
        self: Box<Self>,
        mut activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        let mut take = |index| activation.take_queue(index);
        match take(EVENTS).and_then(|events| Ok(Queues { events, status: take(STATUS)? })) {
            Ok(queues) => {
                Ok(Box::new(Input { shared: self.shared, selection: self.selection, queues }))
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl ActiveDevice for Input<Queues> {
    fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            EVENTS => self.deliver(),
            STATUS => {
                self.shared.again.serve_turn(&mut self.queues.status, |_, _, _| Served::Done(0))
            }
            _ => Ok(()),
        }
    }

    fn host_event(&mut self) -> Result<(), DeviceError> {
        [EVENTS, STATUS].into_iter().try_for_each(|index| self.notify(index))
    }

    fn pause(&mut self) {
        self.shared.waiting().release_all();
    }

    fn queue_positions(&self) -> Vec<Option<Position>> {
        vec![Some(self.queues.events.position()), Some(self.queues.status.position())]
    }

    fn reset(self: Box<Self>) -> Box<dyn VirtioDevice> {
        // The guest's next driver starts with nothing pressed, and is not to hear what was meant for the one before.
        *self.shared.waiting() = Waiting::default();
        Box::new(Input { shared: self.shared, selection: Selection::default(), queues: () })
    }
}

impl Input<Queues> {
    /// Sends waiting events to the guest while it has buffers.
    fn deliver(&mut self) -> Result<(), DeviceError> {
        let queue = &mut self.queues.events;
        let mut waiting = self.shared.waiting();
        while let Some(report) = waiting.reports.front()
            && give(queue, &report.events())?
        {
            waiting.reports.pop_front();
        }
        queue.signal().map_err(|error| error.in_queue(EVENTS))
    }
}

/// Puts `events` into a buffer each, if there are as many.
fn give(queue: &mut VirtQueue, events: &[Event]) -> Result<bool, DeviceError> {
    let mut used = Vec::with_capacity(events.len());
    for (taken, event) in events.iter().enumerate() {
        let Some(chain) = queue.pop().map_err(|error| error.in_queue(EVENTS))? else {
            for _ in 0..taken {
                queue.undo_pop();
            }
            return Ok(false);
        };
        let head = chain.head_index();
        let bytes = event.bytes();
        let written = chain.writer(queue.memory()).is_ok_and(|mut at| at.write_all(&bytes).is_ok());
        if !written {
            return Err(DeviceError::Request("a buffer is too small for an event"));
        }
        used.push((head, u32::try_from(bytes.len()).unwrap_or(u32::MAX)));
    }
    queue.add_used_together(&used).map_err(|error| error.in_queue(EVENTS))?;
    Ok(true)
}

#[cfg(test)]
mod tests;
