//! Errors of processors.

use thiserror::Error;
use vm_memory::GuestMemoryError;

/// A processor cannot be set up, saved or restored.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArchError {
    /// KVM refused a call.
    #[error("KVM: {operation}")]
    Kvm {
        /// The call.
        operation: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory is too small for what the first vCPU is entered with.
    #[error("cannot write the tables of the first processor")]
    Memory(#[from] GuestMemoryError),
    /// KVM did not take one of the MSRs.
    #[error("KVM does not take MSR {0:#x}")]
    Msr(u32),
    /// More MSRs than fit into one call.
    #[error("{0} MSRs are too many for one call")]
    TooManyMsrs(usize),
    /// A saved state comes from a host whose clock ticks differently.
    #[error("this processor's time stamp counter has another frequency: {found} kHz, not {saved}")]
    TscFrequency {
        /// The frequency here, in kHz; 0 if unknown.
        found: u32,
        /// The frequency where the state was saved.
        saved: u32,
    },
}

/// For a call that KVM refused.
pub(super) fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> ArchError {
    move |source| ArchError::Kvm { operation, source }
}
