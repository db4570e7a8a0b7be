//! The threads of a machine.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread that, when it is woken, waits until a processor is free or its turn comes, unless this process has
/// a policy of its own (SCHED_BATCH, sched(7)).
///
/// Where there are more threads than processors, the device thread would else take the processor from a guest that sends
/// frames at the first one, and the guest that gets them from both. Each time all that a guest has in the processor's
/// caches is lost.
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
