//! The guest by whose speed KVM is judged: a loop of two instructions.

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::error::kvm;
use super::{ArchError, entry, layout};
use crate::memory::MemoryMap;

/// Address of its code, above the tables of the entry.
const CODE: u64 = 0x1_0000;
/// Instructions of a round.
pub const INSTRUCTIONS: u32 = 2;

/// Puts the guest into `memory`, which is `vm`'s, and makes its vCPU.
///
/// # Errors
/// KVM refuses, or memory is too small.
pub fn prepare(vm: &VmFd, memory: &MemoryMap) -> Result<VcpuFd, ArchError> {
    let _ = vm.set_tss_address(layout::KVM_TSS_START);
    // start: mov ecx, ebx; again: dec ecx; jnz again; out 0x80, al; jmp start
    let code = [0x89, 0xd9, 0xff, 0xc9, 0x75, 0xfc, 0xe6, 0x80, 0xeb, 0xf6];
    memory.write_slice(&code, GuestAddress(CODE))?;
    entry::write_tables(memory)?;
    let vcpu = vm.create_vcpu(0).map_err(kvm("KVM_CREATE_VCPU"))?;
    entry::set_registers(&vcpu, CODE)?;
    Ok(vcpu)
}

/// Sets how many rounds the next run of the guest takes.
///
/// # Errors
/// KVM refuses.
pub fn set_rounds(vcpu: &VcpuFd, rounds: u32) -> Result<(), ArchError> {
    let mut regs = vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?;
    regs.rbx = u64::from(rounds);
    vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))
}

/// Whether the guest ends its rounds with this exit.
pub fn is_end(exit: &VcpuExit<'_>) -> bool {
    matches!(exit, VcpuExit::IoOut(..))
}
