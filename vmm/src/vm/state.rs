//! What a machine is at one moment, to go on from there in another process.

use std::fs::File;
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};

use super::{HostSide, Phase, Vm, VmError, build, host, kvm};
use crate::arch::state::{IrqchipState, Tsc, VcpuState, msr_indices};
use crate::arch::vcpu;
use crate::device::panic::PanicState;
use crate::device::serial::SerialPortState;
use crate::memory;
use crate::spec::MachineSpec;
use crate::virtio::transport::mmio::MmioState;

/// Layout version of [`VmState`].
const VERSION: u16 = 3;

/// Everything but memory that a machine is made of when it is paused: plain data, for serde.
#[derive(Serialize, Deserialize)]
pub struct VmState {
    version: u16,
    /// The host's clock, in nanoseconds since 1970.
    saved_at: u64,
    /// kvm-clock, in nanoseconds.
    clock: u64,
    tsc_khz: u32,
    irqchip: IrqchipState,
    vcpus: Vec<VcpuState>,
    serial: SerialPortState,
    panic: PanicState,
    /// In the order of the devices.
    transports: Vec<MmioState>,
}

impl Vm {
    /// The state of a paused machine. Its memory is written to `memory`, an empty file, in which
    /// pages that hold nothing become holes. The machine can go on, or be dropped; disks belong to
    /// the state as they are then.
    ///
    /// # Errors
    /// It is not paused, the file cannot be written, or KVM refuses.
    pub fn save(&self, memory: &File) -> Result<VmState, VmError> {
        if self.phase != Phase::Paused {
            return Err(self.misfit("only a paused machine can be saved"));
        }
        let msrs = msr_indices(&self.kvm)?;
        let vcpus = self.vcpus.iter().map(|vcpu| VcpuState::save(&vcpu.fd(), &msrs));
        let state = VmState {
            version: VERSION,
            saved_at: now(),
            clock: self.vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?.clock,
            tsc_khz: self.tsc_khz(),
            vcpus: vcpus.collect::<Result<_, _>>()?,
            irqchip: IrqchipState::save(&self.vm)?,
            serial: self.serial.save(),
            panic: self.panic.save(),
            transports: self.transports.iter().map(|transport| transport.save()).collect(),
        };
        memory::save(&self.memory, memory).map_err(host("cannot write guest memory"))?;
        Ok(state)
    }

    /// Builds the machine of `spec` and puts it where [`Vm::save`] found it; [`Vm::start`] lets it
    /// go on. Its clocks are as if it had run meanwhile.
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
        memory::load(&guest_memory, memory).map_err(host("cannot read guest memory"))?;
        let vm = Vm::assemble(spec, host_side, guest_memory)?;
        vm.apply(state)?;
        Ok(vm)
    }

    fn apply(&self, state: &VmState) -> Result<(), VmError> {
        if state.version != VERSION {
            return Err(self.misfit(&format!(
                "its state has version {}, this firn reads version {VERSION}",
                state.version
            )));
        }
        if state.vcpus.len() != self.vcpus.len() || state.transports.len() != self.transports.len()
        {
            return Err(self.misfit("its state has other vCPUs or devices than its spec"));
        }
        let khz = self.tsc_khz();
        if state.tsc_khz != khz {
            return Err(self.misfit("this processor's time stamp counter has another frequency"));
        }
        let passed = now().saturating_sub(state.saved_at);
        let clock =
            kvm_clock_data { clock: state.clock.saturating_add(passed), ..Default::default() };
        self.vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))?;
        let ticks = u128::from(passed) * u128::from(khz) / 1_000_000;
        let ticks = Tsc::Advance(u64::try_from(ticks).unwrap_or(u64::MAX));
        // In this order, see `IrqchipState::restore`; devices may raise interrupts.
        state.irqchip.restore(&self.vm)?;
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            state.restore(&vcpu.fd(), ticks)?;
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

    /// Puts vCPUs and interrupt controllers into the state after power-on, which KVM tells only of
    /// new ones.
    pub(super) fn power_on_state(&self) -> Result<(), VmError> {
        let msrs = msr_indices(&self.kvm)?;
        let fresh = vcpu::create_vm(&self.kvm)?;
        let fds = vcpu::create_vcpus(&self.kvm, &fresh, self.spec.cores.get())?;
        IrqchipState::save(&fresh)?.restore(&self.vm)?;
        for (vcpu, fd) in self.vcpus.iter().zip(&fds) {
            VcpuState::save(fd, &msrs)?.restore(&vcpu.fd(), Tsc::Keep)?;
        }
        Ok(())
    }

    /// In kHz; 0 if unknown.
    fn tsc_khz(&self) -> u32 {
        self.vcpus.first().map_or(0, |vcpu| vcpu.fd().get_tsc_khz().unwrap_or(0))
    }

    fn misfit(&self, problem: &str) -> VmError {
        VmError::Saved { machine: self.spec.name.clone(), problem: problem.to_owned() }
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
