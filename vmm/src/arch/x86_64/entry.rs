//! The state in which a 64-bit Linux kernel wants to be entered (boot.rst, "64-bit Boot
//! Protocol"): long mode, paging with the first GiB mapped to itself, flat segments.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::error::kvm;
use super::layout::RESET_VECTOR;
use super::params::ZERO_PAGE;
use super::{ArchError, power};
use crate::memory::MemoryMap;

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;

/// Selectors that the boot protocol asks for: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Present and writable (Intel SDM 3, 4.5.4); with `LARGE`, a page of 2 MiB.
const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 1 << 1;

/// `IA32_MISC_ENABLE`, with fast string operations (Intel SDM 4, table 2-2).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: MTRRs on, all memory write-back unless something says otherwise.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Writes the page tables and the descriptor table that the first vCPU is entered with.
///
/// # Errors
/// Memory is too small.
pub fn write_tables(memory: &MemoryMap) -> Result<(), GuestMemoryError> {
    let link = PAGE_PRESENT | PAGE_WRITABLE;
    memory.write_obj(PDPT | link, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | link, GuestAddress(PDPT))?;
    let mut directory = [0_u8; 4096];
    for (index, entry) in (0_u64..).zip(directory.chunks_exact_mut(8)) {
        entry.copy_from_slice(&(index << 21 | link | PAGE_LARGE).to_le_bytes());
    }
    memory.write_slice(&directory, GuestAddress(PAGE_DIRECTORY))?;
    let descriptors = [0, 0, descriptor(&code()), descriptor(&data()), descriptor(&task())];
    for (address, descriptor) in (GDT..).step_by(8).zip(descriptors) {
        memory.write_obj(descriptor, GuestAddress(address))?;
    }
    Ok(())
}

/// Writes what a processor finds after a reset in place of a BIOS: real-mode code that asks for
/// the machine's reset. A kernel without EFI that has seen hardware-reduced ACPI restarts by
/// jumping there (`native_machine_emergency_restart` in arch/x86/kernel/reboot.c).
///
/// # Errors
/// Memory is too small.
pub fn write_reset_vector(memory: &MemoryMap) -> Result<(), GuestMemoryError> {
    let [low, high] = power::RESET.to_le_bytes();
    // mov dx, RESET; mov al, RESET_VALUE; out dx, al; wait: hlt; jmp wait
    let code = [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
    memory.write_slice(&code, GuestAddress(RESET_VECTOR))
}

/// Sets the registers of the first vCPU: it starts at `ip`, with RSI pointing at the zero page. The
/// others wait for the first one to start them.
///
/// # Errors
/// KVM refuses.
pub fn set_registers(vcpu: &VcpuFd, ip: u64) -> Result<(), ArchError> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    sregs.gdt = kvm_dtable { base: GDT, limit: 5 * 8 - 1, ..Default::default() };
    sregs.cs = code();
    let data = data();
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task();
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: ip, rsi: ZERO_PAGE, rflags: RFLAGS, ..Default::default() };
    vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))
}

/// Sets the MSRs that firmware would have set, on every vCPU.
///
/// # Errors
/// KVM refuses.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), ArchError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ];
    for entry in entries {
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| ArchError::Msr(entry.index))?;
        if vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))? != 1 {
            return Err(ArchError::Msr(entry.index));
        }
    }
    Ok(())
}

/// A flat 64-bit code segment.
fn code() -> kvm_segment {
    kvm_segment { selector: CODE_SELECTOR, type_: 0xb, l: 1, ..flat() }
}

/// A flat data segment.
fn data() -> kvm_segment {
    kvm_segment { selector: DATA_SELECTOR, type_: 0x3, db: 1, ..flat() }
}

/// A task segment, which VMX wants although nothing uses it.
fn task() -> kvm_segment {
    kvm_segment { selector: TASK_SELECTOR, type_: 0xb, s: 0, ..flat() }
}

fn flat() -> kvm_segment {
    kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() }
}

/// The segment as a descriptor in memory (Intel SDM 3, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit >> 12);
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff | access << 40 | (limit >> 16) << 48 | flags << 52
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(descriptor(&code()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
    }
}
