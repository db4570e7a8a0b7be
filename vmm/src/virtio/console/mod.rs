//! The console device with several ports (virtio 1.2, 5.3).
//!
//! Each port is a stream of bytes to the other end of a Unix socket, which the builder of the device holds. A port
//! without a name is a console (`/dev/hvcN`), one with a name is `/dev/virtio-ports/NAME`.
//!
//! * What the host sends waits in the socket until the guest has opened the port and given
//!   buffers; nothing is lost.
//! * What the guest sends waits in its queue until the socket has room. For a console this stops a vCPU: Linux's
//!   driver spins with interrupts off until the buffer is back (`drivers/char/virtio_console.c`, `__send_to_port`).
//!   So the holder of a console's socket must read it. For the same reason these queues are served inside the exit
//!   that rings them.
//! * Input that waits when a state is restored is dropped.
//! * When the host's end is closed, the guest is notified (PORT_OPEN 0) and what it sends is dropped.
//! * When the guest closes a port, the host's end is not notified: a socket cannot do that and stay open. Input that
//!   the guest had not read by then is lost with its reader (Linux discards it), later input waits for the next. So a
//!   protocol over a port begins with a handshake, in which either side may find bytes that were meant for an earlier
//!   peer.

mod control;
mod port;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::{Le16, Le32};

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::queue::{Position, Served, VirtQueue};
use super::turn::Again;
use super::{Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError};
use super::{SavedState, VirtioDevice};
use crate::spec::ConsolePortSpec;
use control::Message;
use port::{Port, PortState};

/// VIRTIO_CONSOLE_F_MULTIPORT (5.3.3): control queues, and more ports than one.
const F_MULTIPORT: u64 = 1 << 1;
const QUEUE_SIZE: u16 = 128;
/// The receive queue of the control messages (5.3.2).
const CONTROL_RX: usize = 2;
/// The transmit queue of the control messages (5.3.2).
const CONTROL_TX: usize = 3;
/// Layout of the saved state: a list of [`PortState`].
const STATE_VERSION: u16 = 1;

/// Most ports of one console: [`DeviceConfig::inline_queues`] has a bit for each queue, and the
/// control messages take two.
pub const MAX_PORTS: usize = 31;
/// Longest name of a port, in bytes: it becomes a file name in the guest.
pub const MAX_NAME: usize = 255;

/// Why a console could not be built.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// None, or more than [`MAX_PORTS`].
    #[error("a console has 1 to {MAX_PORTS} ports, not {0}")]
    PortCount(usize),
    /// A name that cannot be a file name in the guest.
    #[error(
        "port name {0:?} is empty, longer than {MAX_NAME} bytes, or has a slash or control character"
    )]
    Name(String),
    /// A port has no other end.
    #[error("nothing is connected to port {0:?}")]
    NotConnected(Option<String>, #[source] io::Error),
    /// The host refused a descriptor.
    #[error("cannot open the descriptors of a console")]
    Host(#[source] io::Error),
}

config_space! {
    /// 5.3.4; what would follow belongs to a feature that is not offered, as do the columns and rows.
    struct Config {
        cols: Le16,
        rows: Le16,
        max_nr_ports: Le32,
    }
}

/// A console: without queues as `Console`, with them as `Console<Queues>`.
pub struct Console<Q = ()> {
    ports: Vec<Port>,
    again: Again,
    queues: Q,
}

/// The queues of an active console.
pub struct Queues {
    ports: Vec<PortQueues>,
    /// Only with MULTIPORT; without it there is one port, and it is always open.
    control: Option<ControlQueues>,
}

struct PortQueues {
    rx: VirtQueue,
    tx: VirtQueue,
}

struct ControlQueues {
    rx: VirtQueue,
    tx: VirtQueue,
}

/// What a queue is for.
enum Role {
    Receive(usize),
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

impl Role {
    /// Ports have their queues in pairs, with the control queues after port 0's (5.3.2).
    fn of(index: usize) -> Role {
        let port = if index < CONTROL_RX { 0 } else { (index / 2).saturating_sub(1) };
        match index {
            CONTROL_RX => Role::ControlReceive,
            CONTROL_TX => Role::ControlTransmit,
            _ if index.is_multiple_of(2) => Role::Receive(port),
            _ => Role::Transmit(port),
        }
    }
}

/// The receive queue of a port; its transmit queue is the next.
const fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 * port + 2 }
}

impl DeviceSpec for Vec<ConsolePortSpec> {
    fn check(&self) -> Result<(), BuildError> {
        Ok(check(self)?)
    }

    fn build(&self, host: &mut Host<'_>) -> Result<Built, BuildError> {
        let connected = self.iter().map(|port| match host.connect.console_port(port) {
            Ok(end) => Ok((port.clone(), end)),
            Err(error) => Err(ConsoleError::NotConnected(port.name.clone(), error)),
        });
        let console = Console::new(connected.collect::<Result<_, _>>()?)?;
        Ok((Box::new(console), Handle::None))
    }
}

/// Whether a console can have these ports.
fn check<'a>(
    ports: impl IntoIterator<Item = &'a ConsolePortSpec, IntoIter: ExactSizeIterator>,
) -> Result<(), ConsoleError> {
    let ports = ports.into_iter();
    if ports.len() == 0 || ports.len() > MAX_PORTS {
        return Err(ConsoleError::PortCount(ports.len()));
    }
    let bad = |c: char| c == '/' || c.is_control();
    let wrong = |name: &&String| name.is_empty() || name.len() > MAX_NAME || name.contains(bad);
    match ports.filter_map(|port| port.name.as_ref()).find(wrong) {
        Some(name) => Err(ConsoleError::Name(name.clone())),
        None => Ok(()),
    }
}

impl Console {
    /// Builds a console of these ports, each joined to the other end of its socket.
    ///
    /// The process must ignore SIGPIPE, as programs in Rust and Python do.
    ///
    /// # Errors
    /// What is wrong with the ports, or the host is out of descriptors.
    pub fn new(ports: Vec<(ConsolePortSpec, UnixStream)>) -> Result<Console, ConsoleError> {
        check(ports.iter().map(|(port, _)| port))?;
        let ports = ports
            .into_iter()
            .map(|(spec, end)| Port::new(spec.name, end).map_err(ConsoleError::Host))
            .collect::<Result<_, _>>()?;
        let again = Again::new().map_err(ConsoleError::Host)?;
        Ok(Console { ports, again, queues: () })
    }

    /// Takes the queues out of `activation`.
    fn take_queues(&self, activation: &mut Activation) -> Result<Queues, DeviceError> {
        let multiport = activation.features & F_MULTIPORT != 0;
        let count = if multiport { self.ports.len() } else { 1 };
        let ports = (0..count)
            .map(|port| {
                let rx = activation.take_queue(receive_queue(port))?;
                let tx = activation.take_queue(receive_queue(port) + 1)?;
                Ok(PortQueues { rx, tx })
            })
            .collect::<Result<_, DeviceError>>()?;
        let control = multiport
            .then(|| {
                let rx = activation.take_queue(CONTROL_RX)?;
                let tx = activation.take_queue(CONTROL_TX)?;
                Ok::<_, DeviceError>(ControlQueues { rx, tx })
            })
            .transpose()?;
        Ok(Queues { ports, control })
    }
}

impl<Q: Send> DeviceConfig for Console<Q> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }
    fn name(&self) -> String {
        "console".into()
    }
    fn features(&self) -> u64 {
        F_MULTIPORT
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 * (self.ports.len() + 1)]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let max_nr_ports = u32::try_from(self.ports.len()).unwrap_or(u32::MAX).into();
        let config = Config { cols: 0.into(), rows: 0.into(), max_nr_ports };
        read_config_space(&config, offset, data);
    }
    fn host_fds(&self) -> Vec<RawFd> {
        let sockets = self.ports.iter().map(|port| port.socket().as_raw_fd());
        sockets.chain([self.again.as_raw_fd()]).collect()
    }
    fn inline_queues(&self) -> u64 {
        let consoles = (0..).zip(&self.ports).filter(|(_, port)| port.name.is_none());
        consoles
            .map(|(port, _)| 1 << (receive_queue(port) + 1))
            .fold(1 << CONTROL_TX, |bits, bit: u64| bits | bit)
    }
    fn save(&self) -> SavedState {
        let ports: Vec<PortState> = self.ports.iter().map(|port| port.state).collect();
        SavedState::encode(STATE_VERSION, &ports)
    }
}

impl VirtioDevice for Console {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let states: Vec<PortState> = state.decode(STATE_VERSION)?;
        if states.len() != self.ports.len() {
            let ports = |count| format!("console with {count} ports");
            let (found, expected) = (ports(states.len()), ports(self.ports.len()));
            return Err(RestoreError::OtherDevice { found, expected });
        }
        for (port, state) in self.ports.iter_mut().zip(states) {
            port.state = state;
            port.forget_input();
        }
        Ok(())
    }

    fn activate(
        mut self: Box<Self>,
        mut activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        let queues = match self.take_queues(&mut activation) {
            Ok(queues) => queues,
            Err(error) => return Err((self, error)),
        };
        if queues.control.is_none() {
            // Nobody will say that the only port is open.
            self.ports[0].state.guest_open = true;
        }
        Ok(Box::new(Console { ports: self.ports, again: self.again, queues }))
    }
}

impl Console<Queues> {
    /// Moves what the guest sends through port `index`.
    fn transmit(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some((port, queues)) = self.ports.get_mut(index).zip(self.queues.ports.get_mut(index))
        else {
            return Ok(());
        };
        self.again
            .serve_turn(&mut queues.tx, |chain, memory, turn| port.transmit(chain, memory, turn))
    }

    /// Moves what the host sends through port `index`.
    fn receive(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some((port, queues)) = self.ports.get_mut(index).zip(self.queues.ports.get_mut(index))
        else {
            return Ok(());
        };
        if !port.wants_input() {
            return Ok(());
        }
        self.again
            .serve_turn(&mut queues.rx, |chain, memory, turn| port.receive(chain, memory, turn))
    }

    fn receive_all(&mut self) -> Result<(), DeviceError> {
        (0..self.ports.len()).try_for_each(|port| self.receive(port))
    }

    /// Does what the guest's control messages ask for.
    fn obey(&mut self) -> Result<(), DeviceError> {
        let Some(control) = &mut self.queues.control else {
            return Ok(());
        };
        let ports = &mut self.ports;
        self.again.serve_turn(&mut control.tx, |chain, memory, _| {
            if let Some(message) = Message::read(chain, memory) {
                control::obey(message, ports);
            }
            Served::Done(0)
        })
    }

    /// Sends pending messages to the guest while it has buffers.
    fn answer(&mut self) -> Result<(), DeviceError> {
        let Some(control) = &mut self.queues.control else {
            return Ok(());
        };
        let ports = &mut self.ports;
        self.again
            .serve_turn(&mut control.rx, |chain, memory, _| control::answer(chain, memory, ports))
    }
}

impl ActiveDevice for Console<Queues> {
    fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        match Role::of(index) {
            Role::Receive(port) => self.receive(port)?,
            Role::Transmit(port) => self.transmit(port)?,
            Role::ControlReceive => {}
            Role::ControlTransmit => {
                self.obey()?;
                // A port may just have been opened.
                self.receive_all()?;
            }
        }
        // Any of these may have found the host's end closed.
        self.answer()
    }

    fn host_event(&mut self) -> Result<(), DeviceError> {
        self.obey()?;
        (0..self.ports.len()).try_for_each(|port| self.transmit(port))?;
        self.receive_all()?;
        self.answer()
    }

    fn pause(&mut self) {}

    fn queue_positions(&self) -> Vec<Option<Position>> {
        let mut positions = vec![None; 2 * (self.ports.len() + 1)];
        let control = self.queues.control.iter().flat_map(|queues| [&queues.rx, &queues.tx]);
        let ports = self.queues.ports.iter().flat_map(|queues| [&queues.rx, &queues.tx]);
        for queue in control.chain(ports) {
            positions[queue.index()] = Some(queue.position());
        }
        positions
    }

    fn reset(mut self: Box<Self>) -> Box<dyn VirtioDevice> {
        for port in &mut self.ports {
            port.state = PortState::default();
        }
        Box::new(Console { ports: self.ports, again: self.again, queues: () })
    }
}

#[cfg(test)]
mod tests;
