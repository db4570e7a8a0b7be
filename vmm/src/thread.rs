//! The threads of a machine.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread that takes no processor from another when it is woken: it waits until one is free or its turn comes
/// (SCHED_BATCH, sched(7)). A process that was given a policy keeps it.
///
/// Where there are more threads than processors, a guest that sends frames would otherwise lose its processor to the
/// device thread at the first of them, and both to the guest that gets them. Each time all that a guest has in the
/// processor's caches is lost.
///
/// # Errors
/// The process can have no more threads.
pub fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name).spawn(|| {
        wait_for_turns();
        run();
    })
}

fn wait_for_turns() {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: thread 0 is the caller, and the kernel only reads the parameter. To ask for this policy is never refused,
    // and would do no harm.
    unsafe {
        if libc::sched_getscheduler(0) == libc::SCHED_OTHER {
            libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameter);
        }
    }
}
