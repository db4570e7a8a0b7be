//! The device thread of a machine.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::thread;

/// A new event: reading one that has not come does not block, and no program that this process starts inherits it.
///
/// # Errors
/// The process has no file descriptors left.
#[expect(clippy::disallowed_methods, reason = "this is what others are to call")]
pub(crate) fn new_event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// What the loop serves.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// The loop before its thread runs.
pub struct EventLoop {
    manager: EventManager<Subscriber>,
    stop: Arc<StopSignal>,
}

struct StopSignal {
    event: EventFd,
    requested: AtomicBool,
}

struct StopSubscriber(Arc<StopSignal>);

impl MutEventSubscriber for StopSubscriber {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.0.requested.store(true, Ordering::SeqCst);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.0.event, EventSet::IN)) {
            tracing::error!(?error, "cannot watch the stop signal");
        }
    }
}

impl EventLoop {
    /// A loop that runs `subscribers`.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(subscribers: impl IntoIterator<Item = Subscriber>) -> io::Result<EventLoop> {
        let event = new_event()?;
        let stop = Arc::new(StopSignal { event, requested: AtomicBool::new(false) });
        let mut manager = EventManager::new()
            .map_err(|error| io::Error::other(format!("cannot make an epoll set: {error:?}")))?;
        manager.add_subscriber(Box::new(StopSubscriber(stop.clone())) as Subscriber);
        for subscriber in subscribers {
            manager.add_subscriber(subscriber);
        }
        Ok(EventLoop { manager, stop })
    }

    /// Starts the thread, under `name`.
    ///
    /// # Errors
    /// The process can have no more threads.
    pub fn spawn(mut self, name: String) -> io::Result<EventThread> {
        let stop = self.stop.clone();
        let thread = thread::spawn(name, move || {
            while !self.stop.requested.load(Ordering::SeqCst) {
                if let Err(error) = self.manager.run() {
                    tracing::error!(?error, "the device thread cannot wait for events");
                    return;
                }
            }
        })?;
        Ok(EventThread { thread: Some(thread), stop })
    }
}

/// The running thread; dropping it ends it.
pub struct EventThread {
    thread: Option<JoinHandle<()>>,
    stop: Arc<StopSignal>,
}

impl Drop for EventThread {
    fn drop(&mut self) {
        if let Err(error) = self.stop.event.write(1) {
            tracing::error!(%error, "cannot stop the device thread");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the device thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, BorrowedFd};

    use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

    use super::*;

    #[test]
    fn events_are_not_inherited_and_do_not_block() {
        let event = new_event().unwrap();
        // SAFETY: `event` owns the descriptor and outlives this.
        let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
        let status = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap());
        assert!(status.contains(OFlag::O_NONBLOCK));
    }
}
