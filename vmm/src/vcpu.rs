//! The vCPU threads: run, dispatch exits, pause, stop.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};
use vmm_sys_util::timerfd::TimerFd;

use crate::arch;
use crate::bus::Bus;
use crate::device::boot_timer::{BootTimer, stage};
use crate::memory::window::Window;

/// What all vCPUs of a machine dispatch their exits to.
#[derive(Default)]
pub struct Buses {
    /// Port addresses, for processors that have them.
    pub ports: Bus,
    /// Physical memory addresses without memory.
    pub mmio: Bus,
    /// Images that the guest reads.
    pub windows: Vec<Arc<Window>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    Stop,
}

/// A check of all vCPUs: can any of them ever execute anything again?
struct Check {
    round: u64,
    /// How many have not reported yet.
    waiting: usize,
    dead: usize,
}

/// How a vCPU's run ended, if nothing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The group was stopped.
    Stopped,
    /// It is the one that found that all vCPUs are halted for good.
    Halted,
}

struct Members {
    target: Target,
    check: Option<Check>,
    rounds: u64,
    /// Threads that are in their loop, by pthread id.
    threads: Vec<libc::pthread_t>,
    /// How many of them wait for the target to change.
    parked: usize,
}

/// All vCPUs of a machine; they run, pause and stop together.
pub struct Group {
    members: Mutex<Members>,
    changed: Condvar,
    /// Set whenever the target is not `Run`, and during a check; each vCPU reads it between two exits.
    interrupted: AtomicBool,
}

impl Default for Group {
    /// A group without members; the first ones start running as they join.
    fn default() -> Group {
        install_handler();
        Group {
            members: Mutex::new(Members {
                target: Target::Run,
                check: None,
                rounds: 0,
                threads: Vec::new(),
                parked: 0,
            }),
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

    /// Lets vCPUs join and run again after a stop; to be called when all threads have ended.
    pub fn rearm(&self) {
        let mut members = self.members();
        members.target = Target::Run;
        self.interrupted.store(false, Ordering::SeqCst);
    }

    /// Lets paused vCPUs go on.
    pub fn resume(&self) {
        drop(self.set_target(Target::Run));
    }

    fn set_target(&self, target: Target) -> MutexGuard<'_, Members> {
        let mut members = self.members();
        if members.target != Target::Stop {
            members.target = target;
            let interrupted = target != Target::Run || members.check.is_some();
            self.interrupted.store(interrupted, Ordering::SeqCst);
        }
        self.kick(&members);
        members
    }

    fn kick(&self, members: &Members) {
        for &thread in &members.threads {
            // SAFETY: a thread is in the list only while it runs: it takes itself out, under the
            // lock held here, before it ends.
            unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
        }
        self.changed.notify_all();
    }

    /// Has all vCPUs report whether they are halted for good. KVM has no event for that: with its own interrupt
    /// controller a halted vCPU stays in KVM_RUN.
    pub fn check(&self) {
        let mut members = self.members();
        if members.target != Target::Run || members.check.is_some() || members.threads.is_empty() {
            return;
        }
        members.rounds += 1;
        let (round, waiting) = (members.rounds, members.threads.len());
        members.check = Some(Check { round, waiting, dead: 0 });
        self.interrupted.store(true, Ordering::SeqCst);
        self.kick(&members);
    }

    /// The current check, if it is later than `last`.
    fn check_after(&self, last: u64) -> Option<u64> {
        self.members().check.as_ref().map(|check| check.round).filter(|&round| round > last)
    }

    /// Reports one vCPU; true if it is the last one and all are dead.
    fn report(&self, round: u64, dead: bool) -> bool {
        let mut members = self.members();
        let Some(check) = members.check.as_mut().filter(|check| check.round == round) else {
            return false;
        };
        check.waiting = check.waiting.saturating_sub(1);
        check.dead += usize::from(dead);
        if check.waiting > 0 {
            return false;
        }
        let all_dead = check.dead == members.threads.len();
        self.end_check(&mut members);
        all_dead
    }

    fn end_check(&self, members: &mut Members) {
        members.check = None;
        self.interrupted.store(members.target != Target::Run, Ordering::SeqCst);
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the calling thread a member for as long as it keeps what this gives.
    fn join(&self) -> Membership<'_> {
        // SAFETY: has no preconditions.
        let this = unsafe { libc::pthread_self() };
        let mut members = self.members();
        members.threads.push(this);
        // It would lack this one's answer.
        self.end_check(&mut members);
        Membership(self)
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

/// That the thread is in a group. It ends also when the thread panics: who waits for all members
/// would wait for it for ever, and a kick would go to a thread that is gone.
struct Membership<'a>(&'a Group);

impl Drop for Membership<'_> {
    fn drop(&mut self) {
        let Membership(group) = self;
        // SAFETY: has no preconditions.
        let this = unsafe { libc::pthread_self() };
        let mut members = group.members();
        members.threads.retain(|&thread| thread != this);
        group.end_check(&mut members);
        drop(members);
        group.changed.notify_all();
    }
}

/// Looks after a machine periodically, for what there is no event for: a guest that halts, see [`Group::check`], and
/// whatever `also` does.
pub struct Watch<F> {
    timer: TimerFd,
    group: Arc<Group>,
    also: F,
}

/// How often vCPUs are checked: it costs each of them an exit.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

impl<F: FnMut() + Send> Watch<F> {
    /// A watch on the vCPUs of `group`.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(group: Arc<Group>, also: F) -> io::Result<Watch<F>> {
        let mut timer = TimerFd::new()?;
        timer.reset(CHECK_INTERVAL, Some(CHECK_INTERVAL))?;
        Ok(Watch { timer, group, also })
    }
}

impl<F: FnMut() + Send> MutEventSubscriber for Watch<F> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.timer, EventSet::IN)) {
            tracing::error!(?error, "cannot watch a timer");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // How many times it has run out does not matter.
        let _ = self.timer.wait();
        self.group.check();
        (self.also)();
    }
}

/// One vCPU.
pub struct Vcpu {
    /// Locked by the vCPU's thread but while it is parked.
    fd: Mutex<VcpuFd>,
    index: u8,
    buses: Arc<Buses>,
    group: Arc<Group>,
    timer: Arc<BootTimer>,
}

impl Vcpu {
    /// vCPU number `index`.
    pub fn new(
        fd: VcpuFd,
        index: u8,
        buses: Arc<Buses>,
        group: Arc<Group>,
        timer: Arc<BootTimer>,
    ) -> Vcpu {
        Vcpu { fd: Mutex::new(fd), index, buses, group, timer }
    }

    /// Its index.
    pub fn index(&self) -> u8 {
        self.index
    }

    /// Its KVM file descriptor. Waits until it is parked or its thread has ended.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the guest that it was paused, so that its watchdogs do not report a lockup.
    pub fn tell_of_pause(&self) {
        if let Err(error) = arch::vcpu::tell_of_pause(&self.fd()) {
            tracing::debug!(vcpu = self.index, %error, "the guest does not hear of the pause");
        }
    }

    /// Runs on the calling thread until the group stops.
    ///
    /// # Errors
    /// Why the vCPU cannot go on, for a message.
    pub fn run(&self) -> Result<Ending, String> {
        KVM_RUN.set(self.fd().get_kvm_run());
        let member = self.group.join();
        // A panic is the monitor's fault, but the machine's end: it must not go on with one vCPU
        // less, and who waits for it has to hear of it.
        let result = catch_unwind(AssertUnwindSafe(|| self.run_loop()))
            .unwrap_or_else(|panic| Err(format!("the monitor panicked: {}", words(&*panic))));
        drop(member);
        KVM_RUN.set(ptr::null_mut());
        result
    }

    fn run_loop(&self) -> Result<Ending, String> {
        let mut fd = self.fd();
        let mut last_check = 0;
        self.timer.mark(stage::RUN);
        let mut first_exit = true;
        loop {
            if self.group.interrupted.load(Ordering::SeqCst) {
                finish_exit(&mut fd);
                if let Some(round) = self.group.check_after(last_check) {
                    last_check = round;
                    if self.group.report(round, arch::vcpu::is_dead(&fd)) {
                        return Ok(Ending::Halted);
                    }
                }
                drop(fd);
                if !self.group.park() {
                    return Ok(Ending::Stopped);
                }
                fd = self.fd();
            }
            self.step(&mut fd)?;
            if std::mem::take(&mut first_exit) {
                self.timer.mark(stage::KERNEL);
            }
        }
    }

    fn step(&self, fd: &mut VcpuFd) -> Result<(), String> {
        let reason = match fd.run() {
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
                fd.set_kvm_immediate_exit(0);
                return Ok(());
            }
            Ok(VcpuExit::Shutdown) => arch::vcpu::SHUTDOWN.to_owned(),
            Ok(VcpuExit::InternalError) => internal_error(fd),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!("the processor refused to enter the guest: reason {reason:#x}, CPU {cpu}")
            }
            Ok(VcpuExit::MemoryFault { .. }) => self
                .changed_file()
                .unwrap_or_else(|| "the host cannot provide a page of its memory".to_owned()),
            Ok(exit) => format!("unexpected exit {exit:?}"),
            Err(error) => self
                .changed_file()
                .filter(|_| error.errno() == libc::EFAULT)
                .unwrap_or_else(|| format!("KVM_RUN: {}", io::Error::from(error))),
        };
        let place = arch::vcpu::instruction(fd)
            .map_or(String::new(), |address| format!(" at {address:#x}"));
        Err(format!("{reason}{place}"))
    }
}

impl Vcpu {
    /// Says which file of an image is not any more what it was. What the host cannot read of a file that was cut short,
    /// KVM cannot give to the guest.
    fn changed_file(&self) -> Option<String> {
        let path = self.buses.windows.iter().find_map(|window| window.image.changed_file())?;
        Some(format!(
            "{} has changed, which the guest has in its memory (`image = true`)",
            path.display()
        ))
    }
}

/// What a panic said.
fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it did not say why")
}

/// Lets KVM finish the instruction of the last exit, without going on to the next: until then the
/// registers are those of its middle.
fn finish_exit(fd: &mut VcpuFd) {
    fd.set_kvm_immediate_exit(1);
    let _ = fd.run();
    fd.set_kvm_immediate_exit(0);
}

fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills `internal`; it is
    // plain integers.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let meaning = match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "cannot emulate an instruction",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "simultaneous exceptions",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "cannot deliver an event",
        _ => "unknown",
    };
    format!("KVM internal error {suberror} ({meaning})")
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn a_pause_does_not_wait_for_a_thread_that_panicked() {
        let group = Arc::new(Group::default());
        let panicking = thread::spawn({
            let group = group.clone();
            move || {
                let _member = group.join();
                panic!("on purpose");
            }
        });
        panicking.join().unwrap_err();
        let (tell, paused) = channel();
        thread::spawn(move || {
            group.pause();
            // Nobody is to be kicked.
            group.resume();
            group.request_stop();
            tell.send(())
        });
        paused.recv_timeout(Duration::from_secs(30)).expect("the pause ends");
    }

    #[test]
    fn a_panic_is_quoted() {
        let quoted = |panic: Box<dyn Any + Send>| words(&*panic).to_owned();
        assert_eq!(quoted(Box::new("a text")), "a text");
        assert_eq!(quoted(Box::new("a String".to_owned())), "a String");
        assert_eq!(quoted(Box::new(5)), "it did not say why");
    }
}
