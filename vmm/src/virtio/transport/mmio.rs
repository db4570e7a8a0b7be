//! virtio-mmio (virtio 1.2, 4.2).

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use kvm_ioctls::{IoEventAddress, VmFd};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use vmm_sys_util::eventfd::EventFd;

use super::slot::{OnFailure, QueueConfig, Slot, SlotState, status};
use crate::bus::BusDevice;
use crate::event_loop::new_event;
use crate::interrupt::Pin;
use crate::memory::Memory;
use crate::virtio::{Interrupt, RestoreError, VirtioDevice};

/// "virt" (virtio 1.2, 4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout since virtio 1.0.
const VERSION: u32 = 2;
/// Whose device it is; the drivers do not care.
const VENDOR: u32 = u32::from_le_bytes(*b"firn");
/// Where the event subscriber counts host descriptors from; queues count from 0.
const HOST_EVENT: u32 = 0x1_0000;

/// The interrupt status register and the pin that says that it has changed.
struct Line {
    /// What is pending, but for what was acknowledged since.
    status: Mutex<u32>,
    /// Rung by KVM when the guest acknowledges queues alone, as it all but always does: an exit less for each interrupt.
    acknowledged: EventFd,
    generation: AtomicU32,
    pin: Arc<dyn Pin>,
}

impl Line {
    fn new(pin: Arc<dyn Pin>) -> io::Result<Line> {
        let (status, generation) = (Mutex::new(0), AtomicU32::new(0));
        Ok(Line { status, acknowledged: new_event()?, generation, pin })
    }

    /// What is pending.
    fn status(&self) -> MutexGuard<'_, u32> {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if *status & VIRTIO_MMIO_INT_VRING != 0 && self.acknowledged.read().is_ok() {
            *status &= !VIRTIO_MMIO_INT_VRING;
        }
        status
    }

    fn set(&self, pending: u32) {
        let mut status = self.status();
        // A driver may acknowledge what was not pending: that must not count later.
        drop(self.acknowledged.read());
        *status = pending;
    }

    fn raise(&self, cause: u32) {
        let mut status = self.status();
        // A driver acknowledges first and looks afterwards: one that has not acknowledged yet will see this, too.
        let is_new = *status & cause == 0;
        *status |= cause;
        drop(status);
        if is_new {
            self.pin.pulse();
        }
    }

    fn acknowledge(&self, causes: u32) {
        *self.status() &= !causes;
    }

    /// Interrupts again for what is pending.
    fn repeat(&self) {
        if *self.status() != 0 {
            self.pin.pulse();
        }
    }
}

impl Interrupt for Line {
    fn queue(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}

/// What the driver has selected, in addition to the slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Selectors {
    device_features: u32,
    driver_features: u32,
    queue: u32,
}

struct Registers {
    slot: Slot,
    selected: Selectors,
}

/// The state of a device behind virtio-mmio.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    slot: SlotState,
    selected: Selectors,
    interrupt_status: u32,
    generation: u32,
}

/// A device behind virtio-mmio registers.
pub struct MmioTransport {
    registers: Mutex<Registers>,
    line: Arc<Line>,
    /// Rung by KVM for each queue that is not served inline.
    kicks: Vec<Option<EventFd>>,
    host_fds: Vec<i32>,
}

impl MmioTransport {
    /// Puts `device` behind registers. It interrupts by `pin`.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        pin: Arc<dyn Pin>,
        on_failure: OnFailure,
    ) -> io::Result<MmioTransport> {
        let line = Arc::new(Line::new(pin)?);
        let inline = device.inline_queues();
        let kicks = (0..device.queue_sizes().len())
            .map(|index| match inline >> index & 1 {
                1 => Ok(None),
                _ => new_event().map(Some),
            })
            .collect::<io::Result<_>>()?;
        let host_fds = device.host_fds();
        let slot = Slot::new(device, memory, line.clone(), on_failure);
        let registers = Mutex::new(Registers { slot, selected: Selectors::default() });
        Ok(MmioTransport { registers, line, kicks, host_fds })
    }

    /// Connects at `address` what the guest tells the device without an exit to the monitor.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn connect(&self, vm: &VmFd, address: u32) -> Result<(), kvm_ioctls::Error> {
        let register = |offset| IoEventAddress::Mmio(u64::from(address + offset));
        let acknowledge = register(VIRTIO_MMIO_INTERRUPT_ACK);
        vm.register_ioevent(&self.line.acknowledged, &acknowledge, VIRTIO_MMIO_INT_VRING)?;
        let doorbell = register(VIRTIO_MMIO_QUEUE_NOTIFY);
        for (queue, kick) in (0_u32..).zip(&self.kicks) {
            if let Some(kick) = kick {
                vm.register_ioevent(kick, &doorbell, queue)?;
            }
        }
        Ok(())
    }

    /// What KVM rings in the guest's stead.
    #[cfg(test)]
    pub(super) fn acknowledged(&self) -> &EventFd {
        &self.line.acknowledged
    }

    /// The device's name.
    pub fn name(&self) -> String {
        self.registers().slot.config().name()
    }

    /// Stops the device and finishes what is in flight.
    pub fn pause(&self) {
        self.registers().slot.pause();
    }

    /// Goes on after a pause.
    pub fn resume(&self) {
        self.registers().slot.resume();
    }

    /// Interrupts again for what is pending: a guest may lose an edge, as Linux does while it takes a processor offline.
    pub fn remind(&self) {
        self.line.repeat();
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut registers = self.registers();
        registers.slot.reset();
        registers.selected = Selectors::default();
        self.line.set(0);
    }

    /// The state of a paused device.
    pub fn save(&self) -> MmioState {
        let registers = self.registers();
        MmioState {
            slot: registers.slot.save(),
            selected: registers.selected,
            interrupt_status: *self.line.status(),
            generation: self.line.generation.load(Ordering::SeqCst),
        }
    }

    /// Takes back a saved state; the device stays paused.
    ///
    /// # Errors
    /// The state is damaged or belongs to another device.
    pub fn restore(&self, state: &MmioState) -> Result<(), RestoreError> {
        let mut registers = self.registers();
        registers.slot.restore(&state.slot)?;
        registers.selected = state.selected;
        self.line.generation.store(state.generation, Ordering::SeqCst);
        self.line.set(state.interrupt_status);
        self.line.repeat();
        Ok(())
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        // A device that panicked has lost its queues; the registers are plain data.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => return MAGIC,
            VIRTIO_MMIO_VERSION => return VERSION,
            VIRTIO_MMIO_VENDOR_ID => return VENDOR,
            VIRTIO_MMIO_INTERRUPT_STATUS => return *self.line.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => return self.line.generation.load(Ordering::SeqCst),
            _ => {}
        }
        let registers = self.registers();
        let selected = registers.selected;
        let slot = &registers.slot;
        match offset {
            VIRTIO_MMIO_DEVICE_ID => slot.config().device_type(),
            VIRTIO_MMIO_DEVICE_FEATURES => match selected.device_features {
                0 => low(slot.features()),
                1 => low(slot.features() >> 32),
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => u32::from(slot.max_size(selected.queue)),
            VIRTIO_MMIO_QUEUE_READY => u32::from(slot.queue_ready(selected.queue)),
            VIRTIO_MMIO_STATUS => u32::from(slot.status()),
            // No device has shared memory; that is said by a length and a base of all ones.
            VIRTIO_MMIO_SHM_LEN_LOW..=VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        if offset == VIRTIO_MMIO_INTERRUPT_ACK {
            self.line.acknowledge(value);
            return;
        }
        let mut registers = self.registers();
        let Registers { slot, selected } = &mut *registers;
        match offset {
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let Ok(index) = usize::try_from(value) {
                    slot.notify(index);
                }
            }
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => selected.device_features = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => selected.driver_features = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                slot.set_driver_features(selected.driver_features, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => selected.queue = value,
            VIRTIO_MMIO_STATUS => {
                slot.set_status(value.to_le_bytes()[0]);
                if value == 0 {
                    self.line.set(0);
                } else if value & u32::from(status::DRIVER_OK) != 0 {
                    // An edge from before the driver listened would be lost.
                    self.line.repeat();
                }
            }
            _ => {
                if let Some(queue) = slot.queue_config(selected.queue) {
                    write_queue_register(queue, offset, value);
                }
            }
        }
    }
}

fn write_queue_register(queue: &mut QueueConfig, offset: u32, value: u32) {
    match offset {
        // A size past 16 bits is as wrong as 0, which activation refuses.
        VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
        VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 == 1,
        VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.driver, value),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.driver, value),
        VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.device, value),
        VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.device, value),
        _ => {}
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low(value: u64) -> u32 {
    value as u32
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            Some(offset) => self.registers().slot.config().read_config(offset, data),
            // Registers are read whole (virtio 1.2, 4.2.2.2).
            None => match <&mut [u8; 4]>::try_from(data) {
                Ok(data) => *data = self.read_register(low(offset)).to_le_bytes(),
                Err(_) => tracing::debug!(offset, "partial read of a virtio-mmio register"),
            },
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            Some(offset) => self.registers().slot.write_config(offset, data),
            None => match <[u8; 4]>::try_from(data) {
                Ok(data) => self.write_register(low(offset), u32::from_le_bytes(data)),
                Err(_) => tracing::debug!(offset, "partial write of a virtio-mmio register"),
            },
        }
    }
}

/// The event thread's side of a device: doorbells and host descriptors.
pub struct MmioEvents(pub Arc<MmioTransport>);

impl MutEventSubscriber for MmioEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let transport = &self.0;
        let kicks = (0_u32..).zip(&transport.kicks).filter_map(|(queue, kick)| {
            Some(Events::with_data(kick.as_ref()?, queue, EventSet::IN))
        });
        let both = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let host = transport.host_fds.iter().map(|&fd| Events::with_data_raw(fd, HOST_EVENT, both));
        for events in kicks.chain(host) {
            if let Err(error) = ops.add(events) {
                tracing::error!(?error, "cannot watch a device's descriptor");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let transport = &self.0;
        if events.data() == HOST_EVENT {
            transport.registers().slot.host_event();
            return;
        }
        let queue = usize::try_from(events.data()).unwrap_or(usize::MAX);
        if let Some(Some(kick)) = transport.kicks.get(queue) {
            // The count does not matter: one look at the queue serves all rings.
            let _ = kick.read();
            transport.registers().slot.notify(queue);
        }
    }
}
