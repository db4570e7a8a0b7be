//! Interrupt lines: level-triggered, so that devices can share them.
//!
//! A line is high while one of its devices has a cause pending. Edges would not do: KVM drops one
//! that comes while the pulse of another device has not ended. And the ioctl is cheaper than an
//! eventfd, from which KVM raises the pin on a kernel thread that has to be woken first.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::VmFd;

/// One device's end of an interrupt line.
pub trait Pin: Send + Sync {
    /// Sets the pin to what `level` returns. Calls for one line are serialized and each asks `level` again, so the
    /// last call leaves the pin right even if they race with a change of the level.
    fn follow(&self, level: &dyn Fn() -> bool);
}

/// A line that up to 64 devices share.
pub struct SharedLine {
    vm: Arc<VmFd>,
    number: u32,
    /// A bit for each device that wants it high.
    high: Mutex<u64>,
}

impl SharedLine {
    /// The line of this number of `vm`, low.
    pub fn new(vm: Arc<VmFd>, number: u32) -> Arc<SharedLine> {
        Arc::new(SharedLine { vm, number, high: Mutex::new(0) })
    }

    /// Its number, as KVM counts.
    pub fn number(&self) -> u32 {
        self.number
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
            && let Err(error) = self.line.vm.set_irq_line(self.line.number, after)
        {
            tracing::error!(%error, line = self.line.number, "KVM_IRQ_LINE");
        }
    }
}
