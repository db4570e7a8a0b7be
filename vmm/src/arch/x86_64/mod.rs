//! x86-64: CPUID, registers at the entry of a 64-bit Linux kernel, MSRs.

pub mod cpuid;
pub mod entry;
pub mod state;
