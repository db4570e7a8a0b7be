//! A device and its negotiation with the guest's driver, whatever the registers look like.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::memory::Memory;
use crate::virtio::queue::{Position, QueueError, VirtQueue};
use crate::virtio::{
    Activation, ActiveDevice, DeviceConfig, DeviceError, Interrupt, RestoreError, SavedState,
    VirtioDevice,
};

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The driver is ready: the device runs.
    pub const DRIVER_OK: u8 = 4;
    /// The driver has accepted the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device is broken until it is reset.
    pub const NEEDS_RESET: u8 = 64;
}

/// What the transport adds to each device's own features.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A queue as the driver has set it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueConfig {
    /// The number of descriptors.
    pub size: u16,
    /// Enabled.
    pub ready: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub driver: u64,
    /// Address of the used ring.
    pub device: u64,
}

/// Everything about a device and its negotiation that a restore needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    /// [`DeviceConfig::device_type`] and [`DeviceConfig::identity`] of the device whose state it is.
    device_type: u32,
    identity: String,
    status: u8,
    driver_features: u64,
    queues: Vec<QueueConfig>,
    positions: Vec<Option<Position>>,
    device: SavedState,
}

/// Called with a device's name and the reason when it fails.
pub type OnFailure = Arc<dyn Fn(&str, &DeviceError) + Send + Sync>;

enum Device {
    Inactive(Box<dyn VirtioDevice>),
    Active(Box<dyn ActiveDevice>),
    /// Only while ownership moves from one state to the other.
    Moving,
}

/// A device and its negotiation with the guest's driver.
pub struct Slot {
    device: Device,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    on_failure: OnFailure,
    status: u8,
    driver_features: u64,
    queues: Vec<QueueConfig>,
    max_sizes: Vec<u16>,
    paused: bool,
}

impl Slot {
    /// Puts `device` in, freshly reset.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: Arc<dyn Interrupt>,
        on_failure: OnFailure,
    ) -> Slot {
        let max_sizes = device.queue_sizes();
        let mut slot = Slot {
            device: Device::Inactive(device),
            memory,
            interrupt,
            on_failure,
            status: 0,
            driver_features: 0,
            queues: Vec::new(),
            max_sizes,
            paused: false,
        };
        slot.clear();
        slot
    }

    /// What the device says of itself.
    pub fn config(&self) -> &dyn DeviceConfig {
        match &self.device {
            Device::Inactive(device) => device.as_ref(),
            Device::Active(device) => device.as_ref(),
            Device::Moving => unreachable!("a device moves within one call"),
        }
    }

    /// Writes the device's configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        match &mut self.device {
            Device::Inactive(device) => device.write_config(offset, data),
            Device::Active(device) => device.write_config(offset, data),
            Device::Moving => {}
        }
    }

    /// All features that the driver may choose from.
    pub fn features(&self) -> u64 {
        self.config().features() | TRANSPORT_FEATURES
    }

    /// The 32 feature bits that the driver chose from page `page` (0 or 1) of them.
    pub fn set_driver_features(&mut self, page: u32, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let shift = match page {
            0 => 0,
            1 => 32,
            _ => return,
        };
        let kept = self.driver_features & !(u64::from(u32::MAX) << shift);
        self.driver_features = kept | u64::from(value) << shift;
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The driver writes the device status; 0 resets the device.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        // Bits are set one by one and taken back only by a reset; the device's own bit is its own.
        let new = value & !self.status & !status::NEEDS_RESET;
        self.status |= new;
        if new & status::FEATURES_OK != 0 && !self.features_acceptable() {
            self.status &= !status::FEATURES_OK;
        }
        let ready = status::FEATURES_OK | status::DRIVER_OK;
        if new & status::DRIVER_OK != 0 && self.status & ready == ready {
            self.activate(&[]);
        }
    }

    /// The largest size that queue `index` can have; 0 if there is no such queue.
    pub fn max_size(&self, index: u32) -> u16 {
        usize::try_from(index).ok().and_then(|i| self.max_sizes.get(i)).copied().unwrap_or(0)
    }

    /// Queue `index` for the driver to set up; `None` if there is none or the device runs.
    pub fn queue_config(&mut self, index: u32) -> Option<&mut QueueConfig> {
        if self.status & status::DRIVER_OK != 0 {
            return None;
        }
        self.queues.get_mut(usize::try_from(index).ok()?)
    }

    /// Whether queue `index` is enabled.
    pub fn queue_ready(&self, index: u32) -> bool {
        usize::try_from(index).is_ok_and(|i| self.queues.get(i).is_some_and(|q| q.ready))
    }

    /// The guest rang queue `index`. Ringing a queue that does not exist does nothing.
    pub fn notify(&mut self, index: usize) {
        if !self.paused && self.queues.get(index).is_some_and(|queue| queue.ready) {
            self.run(|device| device.notify(index));
        }
    }

    /// A descriptor of the device's host side is ready.
    pub fn host_event(&mut self) {
        if !self.paused {
            self.run(ActiveDevice::host_event);
        }
    }

    /// Stops the device and finishes what is in flight.
    pub fn pause(&mut self) {
        if let Device::Active(device) = &mut self.device {
            device.pause();
        }
        self.paused = true;
    }

    /// Goes on, with everything that came up since the pause.
    pub fn resume(&mut self) {
        self.paused = false;
        for index in 0..self.queues.len() {
            self.notify(index);
        }
        self.host_event();
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.device = match std::mem::replace(&mut self.device, Device::Moving) {
            Device::Active(device) => Device::Inactive(device.reset()),
            other => other,
        };
        self.clear();
    }

    /// The state of negotiation and device; to be asked only when paused.
    pub fn save(&self) -> SlotState {
        let positions = match &self.device {
            Device::Active(device) => device.queue_positions(),
            _ => Vec::new(),
        };
        SlotState {
            device_type: self.config().device_type(),
            identity: self.config().identity(),
            status: self.status,
            driver_features: self.driver_features,
            queues: self.queues.clone(),
            positions,
            device: self.config().save(),
        }
    }

    /// Takes back what [`Slot::save`] gave, into a fresh slot; a device that ran then is paused
    /// until [`Slot::resume`].
    ///
    /// # Errors
    /// The state is damaged or belongs to another device.
    pub fn restore(&mut self, state: &SlotState) -> Result<(), RestoreError> {
        self.reset();
        let own = (self.config().device_type(), self.config().identity());
        if own != (state.device_type, state.identity.clone()) {
            let name = |(kind, identity): (u32, String)| format!("virtio type {kind} {identity:?}");
            let (found, expected) = (name((state.device_type, state.identity.clone())), name(own));
            return Err(RestoreError::OtherDevice { found, expected });
        }
        if state.queues.len() != self.queues.len() {
            return Err(RestoreError::Decode(postcard::Error::DeserializeBadEncoding));
        }
        if let Device::Inactive(device) = &mut self.device {
            device.restore(&state.device)?;
        }
        self.driver_features = state.driver_features;
        self.queues.clone_from(&state.queues);
        self.paused = true;
        self.status = state.status;
        if state.status & status::DRIVER_OK != 0 && state.status & status::NEEDS_RESET == 0 {
            self.activate(&state.positions);
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.queues =
            self.max_sizes.iter().map(|&size| QueueConfig { size, ..Default::default() }).collect();
    }

    /// virtio 1.2, 3.1.1 step 5 and 6.2: only what was offered, and nothing without VERSION_1.
    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self, positions: &[Option<Position>]) {
        let queues = match self.build_queues(positions) {
            Ok(queues) => queues,
            Err(error) => return self.fail(&error),
        };
        let activation = Activation {
            memory: Arc::clone(&self.memory),
            queues,
            features: self.driver_features,
            interrupt: Arc::clone(&self.interrupt),
        };
        match std::mem::replace(&mut self.device, Device::Moving) {
            Device::Inactive(device) => match device.activate(activation) {
                Ok(device) => {
                    self.device = Device::Active(device);
                    self.host_event();
                }
                Err((device, error)) => {
                    self.device = Device::Inactive(device);
                    self.fail(&error);
                }
            },
            other => self.device = other,
        }
    }

    fn build_queues(
        &self,
        positions: &[Option<Position>],
    ) -> Result<Vec<Option<VirtQueue>>, DeviceError> {
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, config) in self.queues.iter().enumerate() {
            if !config.ready {
                queues.push(None);
                continue;
            }
            let position = positions.get(index).copied().flatten().unwrap_or_default();
            let queue = self
                .build_queue(index, config, position)
                .map_err(|source| DeviceError::Queue { index, source })?;
            queues.push(Some(queue));
        }
        Ok(queues)
    }

    fn build_queue(
        &self,
        index: usize,
        config: &QueueConfig,
        position: Position,
    ) -> Result<VirtQueue, QueueError> {
        let mut queue = Queue::new(self.max_sizes[index])?;
        queue.try_set_size(config.size)?;
        queue.try_set_desc_table_address(GuestAddress(config.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(config.driver))?;
        queue.try_set_used_ring_address(GuestAddress(config.device))?;
        queue.set_event_idx(self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_next_avail(position.next_avail);
        queue.set_next_used(position.next_used);
        queue.set_ready(true);
        let index = u16::try_from(index).map_err(|_| QueueError::NotReady)?;
        VirtQueue::new(index, queue, Arc::clone(&self.memory), Arc::clone(&self.interrupt))
    }

    fn run(
        &mut self,
        step: impl FnOnce(&mut (dyn ActiveDevice + 'static)) -> Result<(), DeviceError>,
    ) {
        if let Device::Active(device) = &mut self.device
            && let Err(error) = step(device.as_mut())
        {
            self.fail(&error);
        }
    }

    /// virtio 1.2, 2.1.2: the device stops and asks to be reset.
    fn fail(&mut self, error: &DeviceError) {
        (self.on_failure)(&self.config().name(), error);
        self.device = match std::mem::replace(&mut self.device, Device::Moving) {
            Device::Active(device) => Device::Inactive(device.reset()),
            other => other,
        };
        self.status |= status::NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt.config();
        }
    }
}
