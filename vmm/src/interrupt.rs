//! Interrupt lines: edge-triggered. A guest need not tell the I/O APIC when it has handled an edge, which without help
//! from the processor (APICv, AVIC) are two exits less for each interrupt than with levels: one to look up how the line
//! is triggered, one for the end of interrupt.
//!
//! The ioctl is cheaper than an eventfd, from which KVM raises the pin on a kernel thread that has to be woken first.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;

/// A device's end of an interrupt line.
pub trait Pin: Send + Sync {
    /// Interrupts. If the guest has not begun to handle the last edge of the line, this one is part of it.
    fn pulse(&self);
}

/// A line that devices share.
pub struct SharedLine {
    vm: Arc<VmFd>,
    number: u32,
    /// Held during a pulse: KVM takes what another device does meanwhile for part of it.
    pulsing: Mutex<()>,
}

impl SharedLine {
    /// The line of this number of `vm`, low.
    pub fn new(vm: Arc<VmFd>, number: u32) -> SharedLine {
        SharedLine { vm, number, pulsing: Mutex::new(()) }
    }

    /// Its number, as KVM counts.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl Pin for SharedLine {
    fn pulse(&self) {
        let _pulsing = self.pulsing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = pulse(&self.vm, self.number) {
            tracing::error!(%error, line = self.number, "KVM_IRQ_LINE");
        }
    }
}

/// Raises a line of `vm` for a moment.
///
/// # Errors
/// KVM refuses.
pub(crate) fn pulse(vm: &VmFd, number: u32) -> Result<(), kvm_ioctls::Error> {
    [true, false].into_iter().try_for_each(|level| vm.set_irq_line(number, level))
}
