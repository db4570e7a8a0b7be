//! The network card (virtio 1.2, 5.1), plugged into a port of firn's switch.
//!
//! A frame is copied once: the sender's device hands the network slices of its guest's memory, and
//! the receiver's [`Receiver`](firn_net_switch::Receiver) copies them into the receive queue of
//! its own guest, on the sender's thread. Checksums and segmentation that the sender left to its
//! card stay undone if the receiver takes that upon itself.
//!
//! Frames that wait for buffers survive a pause, and are part of what is saved.

mod header;
mod receive;
mod transmit;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use firn_net_switch::{NetPort, Offloads, OwnedFrame, Receiver};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vm_memory::Le16;

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::queue::{Position, VirtQueue};
use super::turn::Again;
use super::{Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError};
use super::{SavedState, VirtioDevice};
use crate::spec::{Mac, NetSpec};
use receive::Card;
use transmit::transmit;

/// The receive queue (5.1.2).
const RX: usize = 0;
/// The transmit queue (5.1.2).
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// VIRTIO_NET_S_LINK_UP (5.1.4).
const STATUS_LINK_UP: u16 = 1;
/// Layout of the saved state, [`NetState`].
const STATE_VERSION: u16 = 2;

/// Feature bits (virtio 1.2, 5.1.3). No control queue: Linux needs none, and the card passes on
/// whatever the switch sends, so there is nothing to set.
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;

    /// What the card offers.
    pub const ALL: u64 = CSUM
        | GUEST_CSUM
        | MAC
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | STATUS;
}

config_space! {
    /// 5.1.4; what would follow belongs to features that are not offered.
    struct Config {
        mac: [u8; 6],
        status: Le16,
    }
}

/// A network card: without queues as `Net`, with them as `Net<Queues>`.
pub struct Net<Q = ()> {
    mac: [u8; 6],
    port: Arc<dyn NetPort>,
    again: Arc<Again>,
    restored: Option<NetState>,
    queues: Q,
}

/// The queues of an active card.
pub struct Queues {
    tx: VirtQueue,
    /// Shared with the network; holds the receive queue.
    card: Arc<Card>,
    /// Pulls the card when the queues go.
    _plug: Plug,
}

/// A card plugged into a port.
struct Plug(Arc<dyn NetPort>);

impl Plug {
    fn new(port: Arc<dyn NetPort>, card: &Arc<Card>) -> Plug {
        port.attach(Arc::clone(card) as Arc<dyn Receiver>);
        Plug(port)
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        self.0.detach();
    }
}

/// The saved state of a card.
#[derive(Serialize, Deserialize)]
struct NetState {
    /// What the guest knows of the cable.
    link_up: bool,
    /// What waits for buffers, oldest first.
    frames: Vec<SavedFrame>,
}

#[derive(Serialize, Deserialize)]
struct SavedFrame {
    header: [u8; header::LEN],
    data: Vec<u8>,
}

impl From<OwnedFrame> for SavedFrame {
    fn from(frame: OwnedFrame) -> Self {
        Self { header: header::compose(&frame.header, 0), data: frame.data }
    }
}

impl From<SavedFrame> for OwnedFrame {
    fn from(frame: SavedFrame) -> Self {
        Self { header: header::parse(frame.header), data: frame.data }
    }
}

/// What a card with or without queues keeps for the guest.
pub trait Waiting: Send {
    /// The frames that wait for buffers, oldest first.
    fn frames(&self) -> Vec<OwnedFrame>;
}

impl Waiting for () {
    fn frames(&self) -> Vec<OwnedFrame> {
        Vec::new()
    }
}

impl Waiting for Queues {
    fn frames(&self) -> Vec<OwnedFrame> {
        self.card.waiting()
    }
}

impl DeviceSpec for NetSpec {
    fn build(&self, host: &mut Host<'_>) -> Result<Built, BuildError> {
        let port = host.connect.net(self).map_err(BuildError::host("network card"))?;
        let card = Net::new(self, port).map_err(BuildError::host("network card"))?;
        Ok((Box::new(card), Handle::None))
    }
}

impl Net {
    /// Builds a card with the address of `spec`, plugged into `port`.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(spec: &NetSpec, port: Arc<dyn NetPort>) -> io::Result<Net> {
        let again = Arc::new(Again::new()?);
        Ok(Net { mac: spec.mac.0, port, again, restored: None, queues: () })
    }
}

impl<Q> Net<Q> {
    /// The same card with other queues.
    fn with_queues<R>(self, queues: R) -> Net<R> {
        Net { mac: self.mac, port: self.port, again: self.again, restored: None, queues }
    }
}

impl<Q: Waiting> DeviceConfig for Net<Q> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }
    fn name(&self) -> String {
        "net".into()
    }
    fn identity(&self) -> String {
        Mac(self.mac).to_string()
    }
    fn features(&self) -> u64 {
        feature::ALL
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.port.link_up() { STATUS_LINK_UP } else { 0 };
        read_config_space(&Config { mac: self.mac, status: status.into() }, offset, data);
    }
    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.again.as_raw_fd()]
    }
    fn save(&self) -> SavedState {
        let frames = self.queues.frames().into_iter().map(SavedFrame::from).collect();
        SavedState::encode(STATE_VERSION, &NetState { link_up: self.port.link_up(), frames })
    }
}

impl VirtioDevice for Net {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.restored = Some(state.decode(STATE_VERSION)?);
        Ok(())
    }

    fn activate(
        mut self: Box<Self>,
        mut activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        let queues = activation.take_queue(RX).and_then(|rx| Ok((rx, activation.take_queue(TX)?)));
        let (rx, tx) = match queues {
            Ok(queues) => queues,
            Err(error) => return Err((self, error)),
        };
        let has = |bit| activation.features & bit != 0;
        let offloads = Offloads {
            csum: has(feature::GUEST_CSUM),
            tso4: has(feature::GUEST_TSO4),
            tso6: has(feature::GUEST_TSO6),
            ecn: has(feature::GUEST_ECN),
            uso: false,
        };
        let interrupt = has(feature::STATUS).then(|| Arc::clone(&activation.interrupt));
        let again = Arc::clone(&self.again);
        let card = Card::new(rx, offloads, has(feature::MRG_RXBUF), interrupt, again);
        let card = Arc::new(card);
        let link_known = self.restored.take().map(|NetState { link_up, frames }| {
            // Before the first sender finds the card.
            card.put_back(frames.into_iter().map(OwnedFrame::from));
            link_up
        });
        let plug = Plug::new(Arc::clone(&self.port), &card);
        if link_known.is_some_and(|link_up| link_up != self.port.link_up()) {
            card.link_changed(self.port.link_up());
        }
        Ok(Box::new(self.with_queues(Queues { tx, card, _plug: plug })))
    }
}

impl Net<Queues> {
    fn receive(&self) -> Result<(), DeviceError> {
        self.queues.card.resume().map_err(|error| error.in_queue(RX))
    }

    fn transmit(&mut self) -> Result<(), DeviceError> {
        let port = &*self.port;
        self.again.serve_turn(&mut self.queues.tx, |chain, memory, turn| {
            transmit(chain, memory, port, turn)
        })
    }
}

impl ActiveDevice for Net<Queues> {
    fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            RX => self.receive(),
            TX => self.transmit(),
            _ => Ok(()),
        }
    }

    fn host_event(&mut self) -> Result<(), DeviceError> {
        self.receive()?;
        self.transmit()
    }

    fn pause(&mut self) {
        self.queues.card.pause();
    }

    fn queue_positions(&self) -> Vec<Option<Position>> {
        vec![Some(self.queues.card.position()), Some(self.queues.tx.position())]
    }

    fn reset(self: Box<Self>) -> Box<dyn VirtioDevice> {
        // On return no sender is in the receive queue.
        Box::new(self.with_queues(()))
    }
}

#[cfg(test)]
mod tests;
