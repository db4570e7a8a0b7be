//! Finds out whether KVM can be used: that it opens says little, because there are software
//! versions of it that interpret every instruction of a guest's kernel.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::time::Instant;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use crate::arch::x86_64::entry;
use crate::memory;

/// Where KVM is found.
pub const KVM_PATH: &str = "/dev/kvm";

/// Rounds of the probe's two-instruction loop: some that tell an interpreter within 40 ms, and
/// enough that entering and leaving the guest do not count.
const SHORT: u32 = 10_000;
const SHORT_RUNS: usize = 3;
const LONG: u32 = 2_000_000;
/// Below this a kernel takes minutes to boot; hardware and emulated AMD-V are far above,
/// interpreters (1.6 million a second were measured) far below.
const MIN_PER_SECOND: f64 = 20e6;

/// Where the probe's code lies; below are the tables of the entry.
const CODE: u64 = 0x1_0000;

/// What KVM is good for here.
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
        /// Measured instructions a second, in ring 0.
        per_second: f64,
    },
    /// It works.
    Usable {
        /// Measured instructions a second, in ring 0.
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
            Ok(per_second) if per_second < MIN_PER_SECOND => KvmStatus::Interpreting { per_second },
            Ok(per_second) => KvmStatus::Usable { per_second },
            Err(error) => KvmStatus::Broken { reason: error.to_string() },
        },
    }
}

#[derive(Debug, Error)]
enum ProbeError {
    #[error("{path} is not a path for KVM")]
    Path { path: String },
    #[error("{operation}: {source}")]
    Kvm { operation: &'static str, source: kvm_ioctls::Error },
    #[error("memory: {0}")]
    Memory(#[from] memory::MemoryError),
    #[error("memory: {0}")]
    Access(#[from] vm_memory::GuestMemoryError),
    #[error("registers: {0}")]
    Entry(#[from] entry::EntryError),
    #[error("the probe's guest ended with {0}")]
    Exit(String),
}

fn measure(path: &Path) -> Result<f64, ProbeError> {
    let call = |operation| move |source| ProbeError::Kvm { operation, source };
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| ProbeError::Path { path: path.display().to_string() })?;
    let kvm = Kvm::new_with_path(name).map_err(call("open"))?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    let _ = vm.set_tss_address(memory::KVM_TSS_START);
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
    // start: mov ecx, ebx; again: dec ecx; jnz again; out 0x80, al; jmp start
    let code = [0x89, 0xd9, 0xff, 0xc9, 0x75, 0xfc, 0xe6, 0x80, 0xeb, 0xf6];
    memory.write_slice(&code, GuestAddress(CODE))?;
    entry::write_tables(&memory)?;
    let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    entry::set_registers(&vcpu, CODE, 0)?;

    // The first entry pays for page faults that say nothing of the speed.
    run_loop(&mut vcpu, 1)?;
    let mut best = 0.0;
    for _ in 0..SHORT_RUNS {
        best = run_loop(&mut vcpu, SHORT)?.max(best);
        if best > MIN_PER_SECOND {
            return run_loop(&mut vcpu, LONG);
        }
    }
    Ok(best)
}

/// Runs so many rounds of the loop and gives the instructions a second.
fn run_loop(vcpu: &mut VcpuFd, rounds: u32) -> Result<f64, ProbeError> {
    let call = |operation| move |source| ProbeError::Kvm { operation, source };
    let mut regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
    regs.rbx = u64::from(rounds);
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    let started = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => break,
            Ok(exit) => return Err(ProbeError::Exit(format!("{exit:?}"))),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(source) => return Err(ProbeError::Kvm { operation: "KVM_RUN", source }),
        }
    }
    Ok(2.0 * f64::from(rounds) / started.elapsed().as_secs_f64())
}
