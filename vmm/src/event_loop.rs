//! The device thread of a machine.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

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
    /// A loop that serves `subscribers`.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(subscribers: impl IntoIterator<Item = Subscriber>) -> io::Result<EventLoop> {
        let event = EventFd::new(EFD_NONBLOCK)?;
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
        let thread = Builder::new().name(name).spawn(move || {
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
