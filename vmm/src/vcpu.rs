//! The vCPU threads: run, dispatch exits, pause, stop.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::Bus;

/// What all vCPUs of a machine dispatch their exits to.
#[derive(Default)]
pub struct Buses {
    /// Port addresses.
    pub ports: Bus,
    /// Physical memory addresses without memory.
    pub mmio: Bus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    Stop,
}

struct Members {
    target: Target,
    /// Threads that are in their loop, by pthread id.
    threads: Vec<libc::pthread_t>,
    /// How many of them wait for the target to change.
    parked: usize,
}

/// All vCPUs of a machine; they run, pause and stop together.
pub struct Group {
    members: Mutex<Members>,
    changed: Condvar,
    /// Set whenever the target is not `Run`: what each vCPU looks at between two exits.
    interrupted: AtomicBool,
}

impl Default for Group {
    /// A group without members; the first ones start running as they join.
    fn default() -> Group {
        install_handler();
        Group {
            members: Mutex::new(Members { target: Target::Run, threads: Vec::new(), parked: 0 }),
            changed: Condvar::new(),
            interrupted: AtomicBool::new(false),
        }
    }
}

impl Group {
    /// Asks all vCPUs to end, without waiting; may be called on a vCPU's thread.
    pub fn request_stop(&self) {
        drop(self.set_target(Target::Stop));
    }

    /// Returns when no vCPU executes guest code any more.
    pub fn pause(&self) {
        let mut members = self.set_target(Target::Pause);
        while members.parked < members.threads.len() {
            members = self.changed.wait(members).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets paused vCPUs go on.
    pub fn resume(&self) {
        drop(self.set_target(Target::Run));
    }

    fn set_target(&self, target: Target) -> MutexGuard<'_, Members> {
        let mut members = self.members();
        if members.target != Target::Stop {
            members.target = target;
            self.interrupted.store(target != Target::Run, Ordering::SeqCst);
        }
        for &thread in &members.threads {
            // SAFETY: a thread is in the list only while it runs: it takes itself out, under the
            // lock held here, before it ends.
            unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
        }
        self.changed.notify_all();
        members
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self) {
        // SAFETY: has no preconditions.
        let this = unsafe { libc::pthread_self() };
        self.members().threads.push(this);
    }

    fn leave(&self) {
        // SAFETY: has no preconditions.
        let this = unsafe { libc::pthread_self() };
        self.members().threads.retain(|&thread| thread != this);
        self.changed.notify_all();
    }

    /// Waits out a pause; false if the vCPU has to end.
    fn park(&self) -> bool {
        let mut members = self.members();
        members.parked += 1;
        self.changed.notify_all();
        while members.target == Target::Pause {
            members = self.changed.wait(members).unwrap_or_else(PoisonError::into_inner);
        }
        members.parked -= 1;
        members.target == Target::Run
    }
}

/// One vCPU.
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    buses: Arc<Buses>,
    group: Arc<Group>,
}

impl Vcpu {
    /// Takes a vCPU whose registers are set.
    pub fn new(fd: VcpuFd, index: u8, buses: Arc<Buses>, group: Arc<Group>) -> Vcpu {
        Vcpu { fd, index, buses, group }
    }

    /// Its index.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Runs on the calling thread until the group stops.
    ///
    /// # Errors
    /// Why the vCPU cannot go on, as a sentence for people.
    pub fn run(&mut self) -> Result<(), String> {
        KVM_RUN.set(self.fd.get_kvm_run());
        self.group.join();
        let result = self.run_loop();
        self.group.leave();
        KVM_RUN.set(ptr::null_mut());
        result
    }

    fn run_loop(&mut self) -> Result<(), String> {
        loop {
            if self.group.interrupted.load(Ordering::SeqCst) {
                self.finish_exit();
                if !self.group.park() {
                    return Ok(());
                }
            }
            self.step()?;
        }
    }

    /// Lets KVM finish the instruction of the last exit, without going on to the next: until then
    /// the registers are those of its middle.
    fn finish_exit(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn step(&mut self) -> Result<(), String> {
        let reason = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                self.buses.ports.write(u64::from(port), data);
                return Ok(());
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.buses.ports.read(u64::from(port), data);
                return Ok(());
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.buses.mmio.write(address, data);
                return Ok(());
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.buses.mmio.read(address, data);
                return Ok(());
            }
            Ok(VcpuExit::Intr) => return Ok(()),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                self.fd.set_kvm_immediate_exit(0);
                return Ok(());
            }
            Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!("the processor refused to enter the guest: reason {reason:#x}, CPU {cpu}")
            }
            Ok(exit) => format!("unexpected exit {exit:?}"),
            Err(error) => format!("KVM_RUN: {}", io::Error::from(error)),
        };
        Err(format!("{reason}{}", self.where_it_stood()))
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills `internal`; it
        // is plain integers.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let meaning = match suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "cannot emulate an instruction",
            kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "cannot deliver an event",
            _ => "unknown",
        };
        format!("KVM internal error {suberror} ({meaning})")
    }

    fn where_it_stood(&self) -> String {
        self.fd.get_regs().map_or(String::new(), |regs| format!(" at {:#x}", regs.rip))
    }
}

thread_local! {
    /// The shared page of the vCPU that this thread runs, for the signal handler.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Makes the kick signal end KVM_RUN at once, also if it comes just before the call.
fn install_handler() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), on_kick) {
            tracing::error!(%error, "cannot install the handler that stops vCPUs");
        }
    });
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is set only while the vCPU whose mapping it points to runs on this
        // very thread, and the kernel reads this byte with the thread in KVM_RUN only.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
        fence(Ordering::SeqCst);
    }
}
