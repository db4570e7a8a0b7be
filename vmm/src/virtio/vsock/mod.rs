//! Sockets between host and guest (virtio 1.2, 5.10), all in user space.
//!
//! The host's side is Unix sockets. A client of the device's own socket sends `CONNECT port\n`; once the guest has
//! accepted the connection the answer is `OK port\n`, with the port that the guest sees, and from then on bytes go
//! both ways. If the guest refuses, the socket is closed. (Firecracker and cloud-hypervisor do the same, so
//! systemd-ssh-proxy's `vsock-mux/` knows it.) A guest that connects to port N of the host reaches the listener at
//! the socket's path with `_N` appended, or is refused if there is none.
//!
//! * Clients that connect before the guest's driver is ready wait until it is.
//! * Each direction has flow control: what one side does not read, the other cannot send.
//! * One direction can be closed while the other goes on, on both sides.
//! * No connection outlives a restore: the guest is asked to close its ends (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET).

mod connection;
mod hub;
mod packet;
mod vhost_user;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::Le64;

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::queue::{Chain, Position, Served, VirtQueue};
use super::turn::Again;
use super::{Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError};
use super::{SavedState, VirtioDevice};
use crate::memory::MemoryMap;
use crate::socket::SocketError;
use crate::spec::VsockSpec;
use hub::Hub;

pub use hub::MAX_CONNECTIONS;
pub use vhost_user::VsockServer;

/// VIRTIO_VSOCK_F_STREAM (5.10.3).
const F_STREAM: u64 = 1 << 0;
/// To the guest (5.10.2).
const RECEIVE: usize = 0;
/// From the guest.
const TRANSMIT: usize = 1;
/// What happens to the device, to the guest.
const EVENTS: usize = 2;
const QUEUES: usize = 3;
const QUEUE_SIZE: u16 = 128;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7): all connections are gone and the guest's address
/// may have changed.
const TRANSPORT_RESET: u32 = 0;
/// Layout of the saved state: whether a driver may have connections.
const STATE_VERSION: u16 = 1;

/// Why a vsock device could not be built.
#[derive(Debug, Error)]
pub enum VsockError {
    /// Nobody on the host could connect to it.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The host refused a descriptor.
    #[error("cannot open the descriptors of a vsock device")]
    Host(#[source] io::Error),
}

config_space! {
    /// 5.10.4.
    struct Config {
        guest_cid: Le64,
    }
}

/// A vsock device: without queues as `Vsock`, with them as `Vsock<Queues>`.
pub struct Vsock<Q = ()> {
    hub: Hub,
    again: Again,
    /// A driver runs that may have connections, or will think so after a restore.
    driver_connected: bool,
    /// The guest still has to be informed that all connections are gone.
    owes_reset: bool,
    queues: Q,
}

/// The queues of an active device.
pub struct Queues {
    receive: VirtQueue,
    transmit: VirtQueue,
    events: VirtQueue,
}

impl DeviceSpec for VsockSpec {
    fn build(&self, host: &mut Host<'_>) -> Result<Built, BuildError> {
        let mut vsock = Vsock::new(self)?;
        vsock.limit(host.vsock_connections);
        Ok((Box::new(vsock), Handle::None))
    }
}

impl Vsock {
    /// Builds the device and listens at its socket.
    ///
    /// The process must ignore SIGPIPE, as programs in Rust and Python do.
    ///
    /// # Errors
    /// The address cannot be, the socket cannot be made, or the host is out of descriptors.
    pub fn new(spec: &VsockSpec) -> Result<Vsock, VsockError> {
        let again = Again::new().map_err(VsockError::Host)?;
        let hub = Hub::new(spec)?;
        Ok(Vsock { hub, again, driver_connected: false, owes_reset: false, queues: () })
    }

    /// Has no more connections at once than `max`, and never more than [`MAX_CONNECTIONS`].
    pub fn limit(&mut self, max: usize) {
        self.hub.max = max.min(MAX_CONNECTIONS);
    }
}

impl<Q: Send> DeviceConfig for Vsock<Q> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }
    fn name(&self) -> String {
        "vsock".into()
    }
    fn features(&self) -> u64 {
        F_STREAM
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config { guest_cid: u64::from(self.hub.cid()).into() };
        read_config_space(&config, offset, data);
    }
    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.hub.epoll_fd(), self.again.as_raw_fd()]
    }
    fn save(&self) -> SavedState {
        SavedState::encode(STATE_VERSION, &self.driver_connected)
    }
}

impl VirtioDevice for Vsock {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.driver_connected = state.decode(STATE_VERSION)?;
        self.owes_reset = self.driver_connected;
        Ok(())
    }

    fn activate(
        self: Box<Self>,
        mut activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        match take_queues(&mut activation) {
            Ok(queues) => {
                let Vsock { hub, again, owes_reset, .. } = *self;
                let driver_connected = true;
                Ok(Box::new(Vsock { hub, again, driver_connected, owes_reset, queues }))
            }
            Err(error) => Err((self, error)),
        }
    }
}

fn take_queues(activation: &mut Activation) -> Result<Queues, DeviceError> {
    Ok(Queues {
        receive: activation.take_queue(RECEIVE)?,
        transmit: activation.take_queue(TRANSMIT)?,
        events: activation.take_queue(EVENTS)?,
    })
}

impl Vsock<Queues> {
    /// Tells the guest of a restore, as soon as it has a buffer for that.
    fn announce_reset(&mut self) -> Result<(), DeviceError> {
        if !self.owes_reset {
            return Ok(());
        }
        let owes = &mut self.owes_reset;
        self.again.serve_turn(&mut self.queues.events, |chain, memory, _| {
            if !*owes {
                return Served::Stop;
            }
            let written = write_event(chain, memory);
            *owes = written == 0;
            Served::Done(written)
        })
    }

    fn exchange(&mut self) -> Result<(), DeviceError> {
        let Queues { receive, transmit, .. } = &mut self.queues;
        exchange(&mut self.hub, &self.again, receive, transmit)
    }
}

/// Takes in what has happened on the host's side.
fn hear_host(hub: &mut Hub) -> Result<(), DeviceError> {
    hub.on_ready().map_err(|source| DeviceError::Host {
        operation: "cannot wait for vsock descriptors",
        source,
    })
}

/// Moves packets both ways.
fn exchange(
    hub: &mut Hub,
    again: &Again,
    receive: &mut VirtQueue,
    transmit: &mut VirtQueue,
) -> Result<(), DeviceError> {
    let mut stopped = false;
    again.serve_turn(transmit, |chain, memory, turn| {
        if !hub.can_hear_guest() {
            stopped = true;
            return Served::Stop;
        }
        hub.take(chain, memory, turn);
        Served::Done(0)
    })?;
    if hub.has_something() {
        let give = |chain, memory: &_, turn: &mut _| hub.give(chain, memory, turn);
        again.serve_turn(receive, give)?;
    }
    if stopped && hub.can_hear_guest() {
        again.ring();
    }
    Ok(())
}

/// Writes the event into a chain; 0 if there is no room.
fn write_event(chain: Chain, memory: &MemoryMap) -> u32 {
    let event = TRANSPORT_RESET.to_le_bytes();
    let written = chain.writer(memory).is_ok_and(|mut writer| {
        writer.available_bytes() >= event.len() && writer.write_all(&event).is_ok()
    });
    if written { 4 } else { 0 }
}

impl ActiveDevice for Vsock<Queues> {
    fn notify(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.announce_reset()?;
        self.exchange()
    }

    fn host_event(&mut self) -> Result<(), DeviceError> {
        self.announce_reset()?;
        hear_host(&mut self.hub)?;
        self.exchange()
    }

    fn pause(&mut self) {}

    fn queue_positions(&self) -> Vec<Option<Position>> {
        let queues = [&self.queues.receive, &self.queues.transmit, &self.queues.events];
        queues.map(|queue| Some(queue.position())).into()
    }

    fn reset(mut self: Box<Self>) -> Box<dyn VirtioDevice> {
        self.hub.clear();
        let Vsock { hub, again, .. } = *self;
        Box::new(Vsock { hub, again, driver_connected: false, owes_reset: false, queues: () })
    }
}

#[cfg(test)]
mod tests;
