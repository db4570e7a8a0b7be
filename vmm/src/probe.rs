//! Finds out whether KVM is usable. That it opens is not enough: some implementations interpret every instruction of
//! a guest's kernel in software.

use std::fs::OpenOptions;
use std::hint::black_box;
use std::io;
use std::path::Path;
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuFd};
use nix::time::{ClockId, clock_gettime};
use thiserror::Error;
use vm_memory::{GuestMemory, GuestMemoryRegion};

use crate::arch::{ArchError, probe};
use crate::error::chain;
use crate::memory;

/// Where KVM is found.
pub const KVM_PATH: &str = "/dev/kvm";

/// Rounds of the probe's loop, enough that entering and leaving the guest count
/// little.
const ROUNDS: u32 = 10_000;
/// How often it runs at most. An interpreter shows within 100 ms, a good KVM at the first undisturbed run.
const RUNS: usize = 8;
/// How many times slower than this program's own loop the guest's may be. With hardware it is as
/// fast, with emulated AMD-V a few times slower; interpreters take thousands of times as long.
const MAX_TIMES: u32 = 100;

/// Whether KVM is usable here, and why not.
#[derive(Clone, Debug, PartialEq)]
pub enum KvmStatus {
    /// There is no KVM.
    Absent,
    /// This user may not use it.
    NoPermission,
    /// It does not work.
    Broken {
        /// Why.
        reason: String,
    },
    /// It interprets the guest's kernel: too slow, and too incomplete to boot one.
    Interpreting {
        /// Measured instructions in a second of processor time, in ring 0.
        per_second: f64,
    },
    /// It works.
    Usable {
        /// Measured instructions in a second of processor time, in ring 0.
        per_second: f64,
    },
}

impl KvmStatus {
    /// Whether machines can run on it.
    pub fn usable(&self) -> bool {
        matches!(self, KvmStatus::Usable { .. })
    }
}

impl std::fmt::Display for KvmStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KvmStatus::Absent => write!(f, "{KVM_PATH} does not exist"),
            KvmStatus::NoPermission => {
                write!(f, "{KVM_PATH} may not be opened by this user (is it in the group kvm?)")
            }
            KvmStatus::Broken { reason } => write!(f, "{KVM_PATH} does not work: {reason}"),
            KvmStatus::Interpreting { per_second } => write!(
                f,
                "{KVM_PATH} interprets guest kernels at {:.1} million instructions a second",
                per_second / 1e6
            ),
            KvmStatus::Usable { per_second } => {
                write!(f, "{KVM_PATH} works, {:.0} million instructions a second", per_second / 1e6)
            }
        }
    }
}

/// Opens KVM and runs a tiny guest in ring 0; takes a few milliseconds.
pub fn kvm() -> KvmStatus {
    kvm_at(Path::new(KVM_PATH))
}

/// The same for another path, for tests.
pub fn kvm_at(path: &Path) -> KvmStatus {
    match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => KvmStatus::Absent,
            io::ErrorKind::PermissionDenied => KvmStatus::NoPermission,
            _ if error.raw_os_error() == Some(libc::ENXIO) => KvmStatus::Absent,
            _ if error.raw_os_error() == Some(libc::ENODEV) => KvmStatus::Absent,
            _ => KvmStatus::Broken { reason: error.to_string() },
        },
        Ok(_) => match measure(path) {
            Ok(measured) => measured.verdict(),
            Err(error) => KvmStatus::Broken { reason: chain(&error) },
        },
    }
}

#[derive(Debug, Error)]
enum ProbeError {
    #[error("{path} is not a path for KVM")]
    Path { path: String },
    #[error("{operation}")]
    Kvm { operation: &'static str, source: kvm_ioctls::Error },
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    #[error(transparent)]
    Processor(#[from] ArchError),
    #[error("the probe's guest ended with {0}")]
    Exit(String),
}

/// The processor time that the loop takes at best.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// In this program.
    here: Duration,
    /// In the guest.
    guest: Duration,
}

impl Measured {
    /// How fast the host is, or how busy, is the same for both.
    fn interprets(self) -> bool {
        self.guest > self.here * MAX_TIMES
    }

    fn verdict(self) -> KvmStatus {
        let per_second = f64::from(probe::INSTRUCTIONS * ROUNDS) / self.guest.as_secs_f64();
        match self.interprets() {
            true => KvmStatus::Interpreting { per_second },
            false => KvmStatus::Usable { per_second },
        }
    }
}

fn measure(path: &Path) -> Result<Measured, ProbeError> {
    let call = |operation| move |source| ProbeError::Kvm { operation, source };
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| ProbeError::Path { path: path.display().to_string() })?;
    let kvm = Kvm::new_with_path(name).map_err(call("open"))?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    let memory = memory::allocate(2)?;
    for region in memory.iter() {
        let slot = kvm_userspace_memory_region {
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: `memory` is declared before the vCPU and outlives every KVM_RUN below.
        unsafe { vm.set_user_memory_region(slot) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    let mut vcpu = probe::prepare(&vm, &memory)?;
    // The first entry pays for page faults that say nothing of the speed.
    run_loop(&mut vcpu, 1)?;
    let here = (0..RUNS).map(|_| run_here()).min().unwrap_or_default();
    let mut best = Measured { here, guest: run_loop(&mut vcpu, ROUNDS)? };
    for _ in 1..RUNS {
        if best.interprets() {
            best.guest = best.guest.min(run_loop(&mut vcpu, ROUNDS)?);
        }
    }
    tracing::debug!(?best, "the probe's loop");
    Ok(best)
}

/// Runs `rounds` rounds of the loop and returns the processor time they took.
fn run_loop(vcpu: &mut VcpuFd, rounds: u32) -> Result<Duration, ProbeError> {
    probe::set_rounds(vcpu, rounds)?;
    let started = processor_time();
    loop {
        match vcpu.run() {
            Ok(exit) if probe::is_end(&exit) => break,
            Ok(exit) => return Err(ProbeError::Exit(format!("{exit:?}"))),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(source) => return Err(ProbeError::Kvm { operation: "KVM_RUN", source }),
        }
    }
    Ok(processor_time().saturating_sub(started))
}

/// The same in this program.
fn run_here() -> Duration {
    let started = processor_time();
    let mut left = ROUNDS;
    while left != 0 {
        left = black_box(left - 1);
    }
    processor_time().saturating_sub(started)
}

/// What this thread has had of a processor. Other threads make it no longer, but what shares the
/// processor with a whole virtual machine does, so the shortest of several counts.
fn processor_time() -> Duration {
    // It fails for no clock of one's own.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interpreter_is_told_from_a_slow_host() {
        let ms = |ms: f64| Duration::from_secs_f64(ms / 1e3);
        for (here, guest, usable) in [
            // Hardware, the carrier, the carrier on a host that is ten times as slow.
            (0.01, 0.01, true),
            (0.04, 0.2, true),
            (0.4, 2.0, true),
            // 1.6 million instructions a second beside native ones, here and on a slow host.
            (0.01, 12.5, false),
            (0.1, 125.0, false),
        ] {
            let verdict = Measured { here: ms(here), guest: ms(guest) }.verdict();
            assert_eq!(verdict.usable(), usable, "{here} ms and {guest} ms: {verdict}");
        }
    }
}
