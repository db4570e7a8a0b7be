//! Virtio devices (virtio 1.2), free of their transport.
//!
//! A device is in one of two types. A [`VirtioDevice`] is inactive: it has its configuration and
//! its ends on the host's side, but no queues. [`VirtioDevice::activate`] consumes it, moves the
//! queues in and gives an [`ActiveDevice`]; [`ActiveDevice::reset`] goes the other way. So no
//! device has to ask whether its queues are there.
//!
//! ```text
//!              activate(queues)
//! VirtioDevice ----------------> ActiveDevice --+ notify(queue)      the guest rang
//!              <----------------                | host_event()       a host descriptor is ready
//!                   reset()                     +-
//! ```
//!
//! A device gets memory, queues and an interrupt handle and knows neither KVM nor registers.

pub mod balloon;
pub mod blk;
pub mod build;
mod config_space;
pub mod console;
mod file;
pub mod fs;
pub mod gpu;
pub mod input;
pub mod net;
pub mod pmem;
mod pool;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
mod transfer;
pub mod transport;
mod turn;
mod vhost_user;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::memory::Memory;
use queue::{QueueError, VirtQueue};

/// Why a device stopped. It costs the guest this device (`DEVICE_NEEDS_RESET`), never the host.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The guest broke the rules of the queue itself.
    #[error("virtqueue {index}")]
    Queue {
        /// Which queue.
        index: usize,
        /// What it did.
        #[source]
        source: QueueError,
    },
    /// The guest broke the rules of the device.
    #[error("bad request: {0}")]
    Request(&'static str),
    /// The host refused something that the device cannot go on without.
    #[error("{operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A device's own state as plain bytes, with the version of their layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Layout version, counted by each device from 1.
    pub version: u16,
    /// postcard-encoded state.
    pub data: Vec<u8>,
}

/// Why a saved state could not be taken back.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// It comes from another version of firn.
    #[error("state version {found}, this firn reads version {expected}")]
    Version {
        /// The version found.
        found: u16,
        /// The version this code writes.
        expected: u16,
    },
    /// It is that of another device.
    #[error("the state is that of another device: {found}, not {expected}")]
    OtherDevice {
        /// Whose state it is.
        found: String,
        /// Which device was to take it.
        expected: String,
    },
    /// The device has not what it had.
    #[error("its directory holds something else than when this was saved")]
    OtherContents,
    /// It is damaged.
    #[error("state cannot be decoded")]
    Decode(#[from] postcard::Error),
}

impl SavedState {
    /// Encodes `state` as layout `version`.
    ///
    /// # Panics
    /// Never for plain data: postcard fails only on types it cannot express.
    pub fn encode<T: Serialize>(version: u16, state: &T) -> SavedState {
        let data = postcard::to_stdvec(state).expect("plain data encodes");
        SavedState { version, data }
    }

    /// Decodes layout `version`.
    ///
    /// # Errors
    /// Another version, or damaged bytes.
    pub fn decode<'a, T: Deserialize<'a>>(&'a self, version: u16) -> Result<T, RestoreError> {
        if self.version != version {
            return Err(RestoreError::Version { found: self.version, expected: version });
        }
        Ok(postcard::from_bytes(&self.data)?)
    }
}

/// How a device calls the guest. The transport implements it.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue(&self, index: u16);
    /// The configuration space has changed.
    fn config(&self);
}

/// What a device gets when the guest's driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// One queue for each entry of [`VirtioDevice::queue_sizes`]; `None` where the driver left a
    /// queue disabled.
    pub queues: Vec<Option<VirtQueue>>,
    /// The feature bits both sides agreed on.
    pub features: u64,
    /// To announce configuration changes; each queue announces its own buffers.
    pub interrupt: Arc<dyn Interrupt>,
}

impl Activation {
    /// Takes queue `index`, which the device cannot do without.
    ///
    /// # Errors
    /// The driver has left it disabled.
    pub fn take_queue(&mut self, index: usize) -> Result<VirtQueue, DeviceError> {
        self.queues
            .get_mut(index)
            .and_then(Option::take)
            .ok_or(DeviceError::Queue { index, source: QueueError::NotReady })
    }
}

/// What every device can say, with or without queues.
pub trait DeviceConfig: Send {
    /// The device's number (virtio 1.2, chapter 5).
    fn device_type(&self) -> u32;
    /// For log lines and errors: `net`, `fs nix-store`.
    fn name(&self) -> String;
    /// What distinguishes it from the machine's other devices of its type, as the guest sees it: saved state fits any
    /// device of the same type and identity.
    fn identity(&self) -> String {
        String::new()
    }
    /// The feature bits below 24 and above 40 that the device offers; the transport adds the rest.
    fn features(&self) -> u64;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Reads the configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the configuration space; most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Host descriptors to watch for as long as the device lives, edge-triggered, for reading and
    /// writing; each edge becomes [`ActiveDevice::host_event`].
    fn host_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
    /// A bit for each queue that is served on the vCPU's own thread, inside the exit that rang it: where that takes no
    /// longer than to wake the event thread, or the guest's driver spins until the buffer is back.
    fn inline_queues(&self) -> u64 {
        0
    }
    /// The device's own state; the queues' positions are saved by the transport.
    fn save(&self) -> SavedState;
}

/// A device without queues.
pub trait VirtioDevice: DeviceConfig {
    /// Takes back what [`DeviceConfig::save`] gave; the state of an active device is restored
    /// here too, before it is activated again.
    ///
    /// # Errors
    /// The state is damaged or of another version.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError>;
    /// Moves the queues in.
    ///
    /// # Errors
    /// What is missing; the device comes back inactive.
    fn activate(
        self: Box<Self>,
        activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)>;
}

/// A device with queues. All calls come with the transport's lock held, one at a time.
pub trait ActiveDevice: DeviceConfig {
    /// The guest rang queue `index`.
    ///
    /// # Errors
    /// The guest broke the rules; the transport then takes the device away from it.
    fn notify(&mut self, index: usize) -> Result<(), DeviceError>;
    /// One of [`DeviceConfig::host_fds`] became ready, or the device was just activated or resumed.
    ///
    /// # Errors
    /// As for [`ActiveDevice::notify`].
    fn host_event(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    /// Finishes what is in flight. From its return to the next `notify` or `host_event` the device
    /// touches neither memory nor queues. A device whose work arrives on other threads stops
    /// taking it.
    fn pause(&mut self);
    /// The queues' positions, for saving; only asked of a paused device. `None` for a queue that
    /// the driver left disabled.
    fn queue_positions(&self) -> Vec<Option<queue::Position>>;
    /// Drains what is in flight, drops the queues and gives the device back without them.
    fn reset(self: Box<Self>) -> Box<dyn VirtioDevice>;
}
