//! Machines and vCPUs as they are after power-on.

use kvm_bindings::{
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, kvm_irqchip,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::cpuid::{self, Place};
use super::error::kvm;
use super::{ArchError, entry, layout};

/// A virtual machine without memory or vCPUs.
pub(crate) fn create_vm(kvm_fd: &Kvm) -> Result<VmFd, ArchError> {
    let vm = kvm_fd.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    vm.set_tss_address(layout::KVM_TSS_START).map_err(kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
    mask_pics(&vm)?;
    Ok(vm)
}

/// Masks all inputs of the PICs, as firmware would that hands a PC over without them. KVM begins with all open, and a
/// guest that is told that there are none never touches them: a line that is raised before it has set its local APIC up
/// would become an exception, whose vector the number of the line is.
fn mask_pics(vm: &VmFd) -> Result<(), ArchError> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
        chip.chip.pic.imr = u8::MAX;
        vm.set_irqchip(&chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
    }
    Ok(())
}

/// Makes the vCPUs as they are after power-on.
pub(crate) fn create_vcpus(kvm_fd: &Kvm, vm: &VmFd, cores: u8) -> Result<Vec<VcpuFd>, ArchError> {
    let supported = kvm_fd
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_deadline = kvm_fd.check_extension(Cap::TscDeadlineTimer);
    let mut vcpus = Vec::new();
    for index in 0..cores {
        let fd = vm.create_vcpu(u64::from(index)).map_err(kvm("KVM_CREATE_VCPU"))?;
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let place = Place { vcpu: index, cores, tsc_khz, tsc_deadline };
        let cpuid = cpuid::adapt(&supported, place);
        fd.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        entry::set_msrs(&fd)?;
        vcpus.push(fd);
    }
    Ok(vcpus)
}

/// How many bits physical addresses have in guests.
pub(crate) fn address_bits(kvm_fd: &Kvm) -> Result<u8, ArchError> {
    let supported = kvm_fd
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(cpuid::address_bits(&supported))
}

/// The interrupt flag of RFLAGS.
const INTERRUPTS_ON: u64 = 1 << 9;

/// Why a vCPU has shut down, as KVM says without more (`VcpuExit::Shutdown`).
pub(crate) const SHUTDOWN: &str = "triple fault";

/// Whether a vCPU can execute nothing any more: it is halted with interrupts off, or was never
/// started. (A non-maskable interrupt would wake it, but nothing here sends one.)
pub(crate) fn is_dead(fd: &VcpuFd) -> bool {
    match fd.get_mp_state().map(|state| state.mp_state) {
        Ok(kvm_bindings::KVM_MP_STATE_HALTED) => {
            fd.get_regs().is_ok_and(|regs| regs.rflags & INTERRUPTS_ON == 0)
        }
        Ok(kvm_bindings::KVM_MP_STATE_UNINITIALIZED) => true,
        _ => false,
    }
}

/// The address of its next instruction, if KVM says.
pub(crate) fn instruction(fd: &VcpuFd) -> Option<u64> {
    fd.get_regs().ok().map(|regs| regs.rip)
}

/// Lets the guest know that it has stood still, so that its watchdogs do not take that for a
/// lockup.
pub(crate) fn tell_of_pause(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    // Fails for a guest that does not use kvm-clock.
    fd.kvmclock_ctrl()
}
