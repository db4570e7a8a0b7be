//! Saved machines, which can go on in another process.

use std::fs::File;
use std::sync::MutexGuard;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::{HostSide, Phase, Vm, VmError, build, host};
use crate::arch::state::{ProcessorState, power_on};
use crate::device::panic::PanicState;
use crate::device::serial::SerialPortState;
use crate::memory;
use crate::spec::{MachineSpec, ScreenSpec};
use crate::virtio::transport::mmio::MmioState;

/// Layout version of [`VmState`].
pub(super) const VERSION: u16 = 4;

/// A paused machine without its memory, as plain data for serde.
#[derive(Serialize, Deserialize)]
pub struct VmState {
    version: u16,
    /// The host's clock, in nanoseconds since 1970.
    saved_at: u64,
    processors: ProcessorState,
    serial: SerialPortState,
    panic: PanicState,
    /// The plain screen, whose pixels are behind the memory.
    screen: Option<ScreenSpec>,
    /// In the order of the devices.
    transports: Vec<MmioState>,
}

impl Vm {
    /// The state of a paused machine. Its memory, with the pixels of a plain screen, is written to `memory`, an empty
    /// file, in which pages that hold nothing become holes. The machine can go on or be dropped; its disks, as they
    /// are now, are part of the state.
    ///
    /// # Errors
    /// It is not paused, the file cannot be written, or KVM refuses.
    pub fn save(&self, memory: &File) -> Result<VmState, VmError> {
        let state = self.state()?;
        let memories = build::memories(&self.memory, self.frame_buffer.as_ref());
        memory::save(&memories, memory).map_err(host("cannot write guest memory"))?;
        Ok(state)
    }

    /// The state of a paused machine without its memory.
    pub(super) fn state(&self) -> Result<VmState, VmError> {
        if self.phase != Phase::Paused {
            let problem = "only a paused machine can be saved".to_owned();
            return Err(VmError::Spec { machine: self.spec.name.clone(), problem });
        }
        let processors = ProcessorState::save(&self.kvm, &self.vm, &self.vcpu_fds());
        Ok(VmState {
            version: VERSION,
            saved_at: now(),
            processors: processors.map_err(VmError::State)?,
            serial: self.serial.save(),
            panic: self.panic.save(),
            screen: self.spec.plain_screen().copied(),
            transports: self.transports.iter().map(|transport| transport.save()).collect(),
        })
    }

    /// Builds the machine of `spec` in the saved state; [`Vm::start`] lets it go on. Its clocks are as if it had run
    /// meanwhile.
    ///
    /// # Errors
    /// As for [`Vm::new`]; a state or memory that belongs to another machine or is damaged.
    pub fn restore(
        spec: &MachineSpec,
        host_side: HostSide,
        state: &VmState,
        memory: &File,
    ) -> Result<Vm, VmError> {
        build::check(spec)?;
        let guest_memory = memory::allocate(spec.memory.get())?;
        let frame_buffer = build::frame_buffer(spec)?;
        let memories = build::memories(&guest_memory, frame_buffer.as_ref());
        memory::load(&memories, memory).map_err(host("cannot read guest memory"))?;
        let mut vm = Vm::assemble(spec, host_side, guest_memory, frame_buffer, &[])?;
        vm.boots = false;
        vm.apply(state, now().saturating_sub(state.saved_at))?;
        Ok(vm)
    }

    /// Takes a state back, with clocks as if so many nanoseconds had passed since.
    pub(super) fn apply(&self, state: &VmState, passed: u64) -> Result<(), VmError> {
        if state.version != VERSION {
            return Err(self.not_restorable(&format!(
                "its state has version {}, this firn reads version {VERSION}",
                state.version
            )));
        }
        if state.processors.vcpus() != self.vcpus.len()
            || state.transports.len() != self.transports.len()
        {
            return Err(self.not_restorable("its state has other vCPUs or devices than its spec"));
        }
        if state.screen.as_ref() != self.spec.plain_screen() {
            return Err(self.not_restorable("its state has another screen than its spec"));
        }
        // Before the devices: they may raise interrupts.
        let restored = state.processors.restore(&self.vm, &self.vcpu_fds(), passed);
        restored.map_err(VmError::State)?;
        for vcpu in &self.vcpus {
            vcpu.tell_of_pause();
        }
        self.serial.restore(&state.serial);
        self.panic.restore(state.panic);
        for (transport, state) in self.transports.iter().zip(&state.transports) {
            transport.restore(state).map_err(|source| VmError::SavedDevice {
                machine: self.spec.name.clone(),
                device: transport.name(),
                source,
            })?;
        }
        Ok(())
    }

    /// Puts the processors into the state after power-on.
    pub(super) fn power_on_state(&self) -> Result<(), VmError> {
        power_on(&self.kvm, &self.vm, &self.vcpu_fds()).map_err(VmError::State)
    }

    /// The KVM file descriptors of all vCPUs, none of which may run.
    fn vcpu_fds(&self) -> Vec<MutexGuard<'_, VcpuFd>> {
        self.vcpus.iter().map(|vcpu| vcpu.fd()).collect()
    }

    fn not_restorable(&self, problem: &str) -> VmError {
        VmError::Saved { machine: self.spec.name.clone(), problem: problem.to_owned() }
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
