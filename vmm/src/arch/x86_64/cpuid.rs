//! The CPUID leaves a guest sees: what KVM supports, with the vCPU's own place in the topology
//! and with every frequency given, so that the kernel calibrates nothing.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaves of KVM itself; `arch/x86/include/uapi/asm/kvm_para.h`.
const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// TSC and APIC bus frequency in kHz, the hypervisors' common timing leaf.
pub(super) const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// KVM's APIC bus runs at 1 GHz (`APIC_BUS_CYCLE_NS` in arch/x86/kvm/lapic.h).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// CPUID.1 ECX: the TSC deadline timer and "runs under a hypervisor".
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// CPUID.1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// CPUID.0BH ECX: what a level of the topology is.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// The place of one vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its index, which is its APIC id.
    pub vcpu: u8,
    /// How many there are: cores of one package, one thread each.
    pub cores: u8,
    /// The TSC's frequency in kHz; 0 if unknown.
    pub tsc_khz: u32,
    /// Whether KVM has the TSC deadline timer; it does not report that with its leaves.
    pub tsc_deadline: bool,
}

/// Turns the leaves that KVM supports into those of one vCPU.
pub fn adapt(supported: &CpuId, place: Place) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adapt_entry(entry, place);
    }
    let has_timing = cpuid.as_slice().iter().any(|entry| entry.function == HYPERVISOR_TIMING);
    if place.tsc_khz != 0 && !has_timing {
        let timing = kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING,
            eax: place.tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        };
        if cpuid.push(timing).is_err() {
            tracing::debug!("no room for the timing leaf; guests have kvm-clock as well");
        }
    }
    cpuid
}

/// How many bits physical addresses have (CPUID.80000008H EAX, Intel SDM 2A); without that leaf, 36.
pub fn address_bits(supported: &CpuId) -> u8 {
    let sizes = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    sizes.map_or(36, |entry| entry.eax.to_le_bytes()[0])
}

fn adapt_entry(entry: &mut kvm_cpuid_entry2, place: Place) {
    let id = u32::from(place.vcpu);
    let cores = u32::from(place.cores);
    // Bits that a core's number needs in an APIC id.
    let core_bits = cores.next_power_of_two().trailing_zeros();
    match entry.function {
        // Features: initial APIC id, logical processors (Intel SDM 2A, CPUID).
        0x1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | cores << 16;
            entry.ecx |= HYPERVISOR;
            if place.tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            entry.edx = if cores > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Intel's caches: level 3 is shared by all cores, the others by none.
        0x4 if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << core_bits) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << core_bits) - 1) << 26;
        }
        // Performance counters: not virtualised, so that the kernel does not probe them.
        0xa | 0x8000_0022 => clear(entry),
        // Topology by x2APIC id.
        0xb | 0x1f => {
            let (shift, count, level) = match entry.index {
                0 => (0, 1, LEVEL_SMT),
                1 => (core_bits, cores, LEVEL_CORE),
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = count;
            entry.ecx = level | entry.index & 0xff;
            entry.edx = id;
        }
        // AMD: the number of cores and the bits of their ids (APM 3, E.4.7).
        0x8000_0008 => entry.ecx = core_bits << 12 | (cores - 1),
        // AMD: caches, as in leaf 4 (APM 3, E.4.15).
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { cores - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        // AMD: extended APIC id, one thread a core, node 0 (APM 3, E.4.16).
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        HYPERVISOR_BASE => entry.eax = entry.eax.max(HYPERVISOR_TIMING),
        _ => {}
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .expect("leaf")
    }

    #[test]
    fn each_vcpu_sees_its_own_place_and_the_given_frequencies() {
        let function = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
        let supported = CpuId::from_entries(&[
            function(0x1, 0),
            function(0xb, 0),
            function(0xb, 1),
            function(0x4000_0000, 0),
            function(0x8000_0008, 0),
        ])
        .unwrap();
        let place = Place { vcpu: 2, cores: 3, tsc_khz: 2_500_000, tsc_deadline: true };
        let cpuid = adapt(&supported, place);
        let features = leaf(&cpuid, 1, 0);
        assert_eq!(features.ebx >> 24, 2);
        assert_eq!(features.ebx >> 16 & 0xff, 3);
        assert_ne!(features.ecx & TSC_DEADLINE, 0);
        assert_eq!(leaf(&cpuid, 0xb, 0).ebx, 1);
        let cores = leaf(&cpuid, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, 2));
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, 2 << 12 | 2);
        let timing = leaf(&cpuid, HYPERVISOR_TIMING, 0);
        assert_eq!((timing.eax, timing.ebx), (2_500_000, 1_000_000));
        assert_eq!(leaf(&cpuid, HYPERVISOR_BASE, 0).eax, HYPERVISOR_TIMING);
    }
}
