//! The devices at ports of the PC.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::{console, pci, power};
use crate::bus::{BusDevice, Overlap};
use crate::interrupt;
use crate::vcpu::Buses;

pub use power::Request;

/// The port that a guest writes the stages of its boot to.
const BOOT_TIMER: u64 = 0x608;
/// The port of the pvpanic device (QEMU's docs/specs/pvpanic.rst).
pub(super) const PANIC: u16 = 0x505;

/// Attaches the devices that every machine has. `on_request` runs on a vCPU's thread.
///
/// # Errors
/// Their ports are taken.
pub fn attach(
    buses: &mut Buses,
    boot_timer: Arc<dyn BusDevice>,
    panic: Arc<dyn BusDevice>,
    on_request: impl Fn(Request) + Send + Sync + 'static,
) -> Result<(), Overlap> {
    power::attach(&mut buses.ports, on_request)?;
    pci::attach(&mut buses.ports)?;
    buses.ports.claim(u64::from(PANIC), 1, panic)?;
    buses.ports.claim(BOOT_TIMER, 1, boot_timer)
}

/// Attaches the serial console.
///
/// # Errors
/// Its ports are taken.
pub fn attach_console(buses: &mut Buses, port: Arc<dyn BusDevice>) -> Result<(), Overlap> {
    buses.ports.claim(u64::from(console::PORT), u64::from(console::PORTS), port)
}

/// Connects `interrupt` to the serial console's line.
///
/// # Errors
/// KVM refuses.
pub fn connect_console(vm: &VmFd, interrupt: &EventFd) -> Result<(), kvm_ioctls::Error> {
    vm.register_irqfd(interrupt, console::GSI)
}

/// Presses the power button for a moment.
///
/// # Errors
/// KVM refuses.
pub fn press_power_button(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    interrupt::pulse(vm, power::BUTTON_GSI)
}
