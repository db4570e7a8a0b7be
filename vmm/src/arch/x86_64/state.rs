//! Everything KVM knows of vCPUs, their clocks and the interrupt controllers, as plain data.

use std::ops::Deref;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, Msrs,
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::cpuid::HYPERVISOR_TIMING;
use super::error::kvm;
use super::{ArchError, vcpu};

/// `IA32_TIME_STAMP_COUNTER` and `IA32_TSC_ADJUST` (Intel SDM 4, table 2-2).
const MSR_TSC: u32 = 0x10;
const MSR_TSC_ADJUST: u32 = 0x3b;
/// `IA32_TSC_DEADLINE`: KVM takes it only once the local APIC's timer has that mode and the TSC is
/// right.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// How far the frequency of a host's TSC may be from the saved one, in millionths: Linux measures it at each start of a
/// host, and KVM itself takes so much for the same (`tsc_tolerance_ppm` in arch/x86/kvm/x86.c).
const TSC_TOLERANCE_PPM: u64 = 250;
/// Most MSRs that KVM handles in one call (`MAX_IO_MSRS` in arch/x86/kvm/x86.c).
const MAX_MSRS: usize = 256;

/// A machine's processors while none of them runs.
#[derive(Serialize, Deserialize)]
pub struct ProcessorState {
    /// kvm-clock, in nanoseconds.
    clock: u64,
    tsc_khz: u32,
    irqchip: IrqchipState,
    vcpus: Vec<VcpuState>,
}

impl ProcessorState {
    /// Reads the state of all vCPUs of `vm`.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn save(
        kvm_fd: &Kvm,
        vm: &VmFd,
        vcpus: &[impl Deref<Target = VcpuFd>],
    ) -> Result<Self, ArchError> {
        let msrs = msr_indices(kvm_fd)?;
        Ok(Self {
            clock: vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?.clock,
            tsc_khz: tsc_khz(vcpus),
            vcpus: vcpus
                .iter()
                .map(|vcpu| VcpuState::save(vcpu, &msrs))
                .collect::<Result<_, _>>()?,
            irqchip: IrqchipState::save(vm)?,
        })
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Gives this state to as many vCPUs, of `vm`, whose clocks go on as if `passed_ns` nanoseconds had passed since.
    ///
    /// # Errors
    /// KVM refuses, or the host's clock has another frequency.
    pub fn restore(
        &self,
        vm: &VmFd,
        vcpus: &[impl Deref<Target = VcpuFd>],
        passed_ns: u64,
    ) -> Result<(), ArchError> {
        let khz = tsc_khz(vcpus);
        let off = u64::from(self.tsc_khz.abs_diff(khz)) * 1_000_000;
        if off > u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM {
            return Err(ArchError::TscFrequency { found: khz, saved: self.tsc_khz });
        }
        let clock =
            kvm_clock_data { clock: self.clock.saturating_add(passed_ns), ..Default::default() };
        vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))?;
        let ticks = u128::from(passed_ns) * u128::from(khz) / 1_000_000;
        self.apply(vm, vcpus, Tsc::Advance(u64::try_from(ticks).unwrap_or(u64::MAX)))
    }

    fn apply(
        &self,
        vm: &VmFd,
        vcpus: &[impl Deref<Target = VcpuFd>],
        tsc: Tsc,
    ) -> Result<(), ArchError> {
        // In this order, see `IrqchipState::restore`.
        self.irqchip.restore(vm)?;
        vcpus.iter().zip(&self.vcpus).try_for_each(|(vcpu, state)| state.restore(vcpu, tsc))
    }
}

/// What a saved state needs of the host's processor and KVM, as bytes that mean nothing but whether two hosts are alike.
///
/// # Errors
/// KVM does not say.
pub fn fingerprint(kvm_fd: &Kvm) -> Result<Vec<u8>, ArchError> {
    let vm = vcpu::create_vm(kvm_fd)?;
    let vcpus = vcpu::create_vcpus(kvm_fd, &vm, 1)?;
    let vcpus: Vec<_> = vcpus.iter().collect();
    let mut bytes = Vec::new();
    // What the guest sees, and not what KVM has, which says on which processor this thread runs.
    for vcpu in &vcpus {
        let leaves = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_CPUID2"))?;
        // The TSC's frequency is measured anew at each start of the host; `restore` looks at it.
        let leaves = leaves.as_slice().iter().filter(|leaf| leaf.function != HYPERVISOR_TIMING);
        for leaf in leaves {
            let words =
                [leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
            bytes.extend(words.into_iter().flat_map(u32::to_le_bytes));
        }
    }
    let mut msrs = msr_indices(kvm_fd)?;
    msrs.sort_unstable();
    bytes.extend(msrs.into_iter().flat_map(u32::to_le_bytes));
    Ok(bytes)
}

/// Puts vCPUs and interrupt controllers into their state after power-on, read from fresh ones because KVM has no
/// reset. Their clocks run on.
///
/// # Errors
/// KVM refuses.
pub fn power_on(
    kvm_fd: &Kvm,
    vm: &VmFd,
    vcpus: &[impl Deref<Target = VcpuFd>],
) -> Result<(), ArchError> {
    let fresh = vcpu::create_vm(kvm_fd)?;
    let cores = u8::try_from(vcpus.len()).unwrap_or(u8::MAX);
    let fresh_vcpus = vcpu::create_vcpus(kvm_fd, &fresh, cores)?;
    let fresh_vcpus: Vec<_> = fresh_vcpus.iter().collect();
    ProcessorState::save(kvm_fd, &fresh, &fresh_vcpus)?.apply(vm, vcpus, Tsc::Keep)
}

/// In kHz; 0 if unknown.
fn tsc_khz(vcpus: &[impl Deref<Target = VcpuFd>]) -> u32 {
    vcpus.first().map_or(0, |vcpu| vcpu.get_tsc_khz().unwrap_or(0))
}

/// One vCPU.
#[derive(Serialize, Deserialize)]
struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// What becomes of a vCPU's time stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tsc {
    /// Keeps running; the saved value is ignored.
    Keep,
    /// The saved value plus this many ticks.
    Advance(u64),
}

/// The MSRs that are part of a vCPU's state, as this host's KVM lists them.
///
/// # Errors
/// KVM does not say.
fn msr_indices(kvm_fd: &Kvm) -> Result<Vec<u32>, ArchError> {
    let list = kvm_fd.get_msr_index_list().map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run.
    ///
    /// # Errors
    /// KVM refuses.
    fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, ArchError> {
        // The first, because it may change the others: it takes in INIT and SIPI that wait.
        let mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        Ok(VcpuState {
            mp_state,
            regs: vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
            debug_regs: vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?,
            msrs: read_msrs(vcpu, msrs)?,
            events: vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Gives this state to a vCPU that does not run and has the same CPUID.
    ///
    /// # Errors
    /// KVM refuses.
    fn restore(&self, vcpu: &VcpuFd, tsc: Tsc) -> Result<(), ArchError> {
        vcpu.set_mp_state(self.mp_state).map_err(kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        // SAFETY: larger states need features that a process has to ask for, which this one never
        // does; the structure holds all others.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
        // Processors without XSAVE have none, and KVM takes none there.
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs).map_err(kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        self.write_msrs(vcpu, tsc)?;
        vcpu.set_vcpu_events(&self.events).map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }

    fn write_msrs(&self, vcpu: &VcpuFd, tsc: Tsc) -> Result<(), ArchError> {
        let value = |&(index, value): &(u32, u64)| match (index, tsc) {
            (MSR_TSC | MSR_TSC_ADJUST, Tsc::Keep) => None,
            (MSR_TSC, Tsc::Advance(ticks)) => Some((index, value.wrapping_add(ticks))),
            _ => Some((index, value)),
        };
        let (last, mut entries): (Vec<_>, Vec<_>) =
            self.msrs.iter().filter_map(value).partition(|msr| msr.0 == MSR_TSC_DEADLINE);
        entries.extend(last);
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let entries = rest[..rest.len().min(MAX_MSRS)].iter();
            let entries: Vec<_> = entries.map(|&(index, data)| msr(index, data)).collect();
            let taken = vcpu.set_msrs(&msr_list(&entries)?).map_err(kvm("KVM_SET_MSRS"))?;
            rest = &rest[taken.min(entries.len())..];
            if taken < entries.len() {
                // KVM lists some that this processor can read but not write; none of them holds
                // what a guest has put there.
                tracing::debug!("KVM does not take MSR {:#x}", entries[taken].index);
                rest = &rest[1..];
            }
        }
        Ok(())
    }
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, ArchError> {
    Msrs::from_entries(entries).map_err(|_| ArchError::TooManyMsrs(entries.len()))
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, ArchError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let count = rest.len().min(MAX_MSRS);
        let entries: Vec<_> = rest[..count].iter().map(|&index| msr(index, 0)).collect();
        let mut list = msr_list(&entries)?;
        let read = vcpu.get_msrs(&mut list).map_err(kvm("KVM_GET_MSRS"))?.min(count);
        values.extend(list.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
        // KVM stops at one that this guest does not have.
        rest = &rest[if read < count { read + 1 } else { read }..];
    }
    Ok(values)
}

/// The interrupt controllers that vCPUs share: both PICs and the IOAPIC.
#[derive(Clone, Serialize, Deserialize)]
struct IrqchipState(Vec<kvm_irqchip>);

impl IrqchipState {
    /// Reads the state while no vCPU runs.
    ///
    /// # Errors
    /// KVM refuses.
    fn save(vm: &VmFd) -> Result<IrqchipState, ArchError> {
        // The order in which they are restored: with an interrupt pending in the slave of before,
        // the master would be given one that nobody raises.
        let chips = [KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_IOAPIC];
        let read = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP")).map(|()| chip)
        };
        chips.into_iter().map(read).collect::<Result<_, _>>().map(IrqchipState)
    }

    /// Gives it back; before the vCPUs' own state, which has the interrupts that are on their way.
    ///
    /// # Errors
    /// KVM refuses.
    fn restore(&self, vm: &VmFd) -> Result<(), ArchError> {
        self.0.iter().try_for_each(|chip| vm.set_irqchip(chip)).map_err(kvm("KVM_SET_IRQCHIP"))
    }
}
