//! Interrupt lines: level-triggered pins of the IOAPIC that devices share.
//!
//! KVM's IOAPIC has 24 pins, and a machine may have three dozen devices. Two other ways were
//! weighed: PCI with MSI-X makes the kernel walk a bus and program tables at each boot, and an
//! IOAPIC of our own with more pins makes each of the kernel's thousand accesses to it an exit.
//! Shared lines cost nothing at boot; later an interrupt costs one more read of a status register
//! for each device that shares its line, which is two where there are all of 37.
//!
//! A line is high while one of its devices has a cause pending. Edges would not do: KVM drops one
//! that comes while the pulse of another device has not ended. And the ioctl is cheaper than an
//! eventfd, from which KVM raises the pin on a kernel thread that has to be woken first.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;

/// One device's end of an interrupt line.
pub trait Pin: Send + Sync {
    /// Makes the pin what `level` says. Calls for a line come one after the other, and each looks
    /// anew: so the last one leaves it right, however they race with what `level` looks at.
    fn follow(&self, level: &dyn Fn() -> bool);
}

/// A line that up to 64 devices share.
pub struct SharedLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// A bit for each device that wants it high.
    high: Mutex<u64>,
}

impl SharedLine {
    /// The line at IOAPIC pin `gsi` of `vm`, low.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Arc<SharedLine> {
        Arc::new(SharedLine { vm, gsi, high: Mutex::new(0) })
    }

    /// The number of its IOAPIC pin.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// The end of device `index`, below 64.
    pub fn pin(self: &Arc<SharedLine>, index: u8) -> Arc<dyn Pin> {
        Arc::new(SharedPin { line: Arc::clone(self), bit: 1 << (index % 64) })
    }
}

struct SharedPin {
    line: Arc<SharedLine>,
    bit: u64,
}

impl Pin for SharedPin {
    fn follow(&self, level: &dyn Fn() -> bool) {
        let mut high = self.line.high.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *high != 0;
        *high = if level() { *high | self.bit } else { *high & !self.bit };
        let after = *high != 0;
        if before != after
            && let Err(error) = self.line.vm.set_irq_line(self.line.gsi, after)
        {
            tracing::error!(%error, gsi = self.line.gsi, "KVM_IRQ_LINE");
        }
    }
}
