//! The threads that do a disk's requests.
//!
//! The ringing thread only takes chains off the queues and wakes a worker for each; a worker that
//! has finished one looks for the next itself, so a burst costs few wake-ups. Reading, writing and
//! syncing block a worker, not a vCPU. Workers are started when there is nobody to take a chain:
//! a disk that is not used has none.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::DeviceError;
use crate::virtio::queue::{Chain, Position, QueueError, VirtQueue};

/// Most requests of a disk that are done at the same time.
pub(super) const MAX_WORKERS: usize = 4;

/// Most chains taken off the queues ahead of the workers: what an honest driver can have under
/// way. One that offers chains it has not got back would fill memory; the rest waits in the ring.
const MAX_BACKLOG: usize = 1024;

/// Does a request and says how many bytes of its chain are written.
pub(super) type Serve = dyn Fn(&Chain) -> Result<u32, DeviceError> + Send + Sync;

/// A request that has been taken off its queue.
struct Job {
    queue: usize,
    chain: Chain,
}

struct State {
    queues: Vec<Option<VirtQueue>>,
    /// The queue to look at first, so that none waits for ever.
    next_queue: usize,
    /// Taken off the queues, not yet with a worker.
    backlog: VecDeque<Job>,
    /// With a worker.
    in_flight: usize,
    /// Workers waiting for work.
    idle: usize,
    /// Nothing more is taken off the queues.
    held: bool,
    /// Workers end.
    stop: bool,
    /// Why the device stopped; the event thread takes it.
    failure: Option<DeviceError>,
    /// Set with `failure`, and stays: nothing touches the queues again.
    failed: bool,
}

struct Shared {
    serve: Box<Serve>,
    /// Wakes the event thread for [`State::failure`].
    alarm: Arc<EventFd>,
    state: Mutex<State>,
    work: Condvar,
    drained: Condvar,
}

/// The queues of an active disk and its workers. Dropping it ends them.
pub(super) struct Pool {
    name: String,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Takes the queues; they are looked at from the first [`Pool::run`] on.
    pub(super) fn new(
        name: String,
        serve: Box<Serve>,
        alarm: Arc<EventFd>,
        queues: Vec<Option<VirtQueue>>,
    ) -> Pool {
        let state = State {
            queues,
            next_queue: 0,
            backlog: VecDeque::new(),
            in_flight: 0,
            idle: 0,
            held: true,
            stop: false,
            failure: None,
            failed: false,
        };
        let (work, drained) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { serve, alarm, state: Mutex::new(state), work, drained });
        Pool { name, shared, workers: Vec::new() }
    }

    /// Serves what is in the queues and whatever comes, until [`Pool::drain`].
    ///
    /// # Errors
    /// What went wrong, here or on a worker since the last call.
    pub(super) fn run(&mut self) -> Result<(), DeviceError> {
        let mut state = self.shared.lock();
        state.held = false;
        self.shared.fill(&mut state);
        if let Some(failure) = state.failure.take() {
            return Err(failure);
        }
        let jobs = state.backlog.len();
        for _ in 0..jobs.min(state.idle) {
            self.shared.work.notify_one();
        }
        let missing = jobs.saturating_sub(state.idle);
        drop(state);
        for _ in 0..missing.min(MAX_WORKERS - self.workers.len()) {
            match self.hire() {
                Ok(worker) => self.workers.push(worker),
                // With one worker the disk is slow, without any it is dead.
                Err(error) if !self.workers.is_empty() => {
                    tracing::warn!(disk = self.name, %error, "no more threads for the disk");
                    break;
                }
                Err(source) => {
                    self.shared.lock().fail(None);
                    let operation = "start a thread for a disk";
                    return Err(DeviceError::Host { operation, source });
                }
            }
        }
        Ok(())
    }

    fn hire(&self) -> io::Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        thread::Builder::new().name(self.name.clone()).spawn(move || shared.worker())
    }

    /// Finishes what has been taken off the queues and takes no more until [`Pool::run`].
    pub(super) fn drain(&self) {
        let mut state = self.shared.lock();
        state.held = true;
        while !state.is_idle() {
            state = wait(&self.shared.drained, state);
        }
    }

    /// How far the queues have come.
    pub(super) fn positions(&self) -> Vec<Option<Position>> {
        let state = self.shared.lock();
        state.queues.iter().map(|queue| queue.as_ref().map(VirtQueue::position)).collect()
    }
}

impl Drop for Pool {
    /// Ends the workers once they have finished the requests they are at.
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of requests and has none of its own.
            drop(worker.join());
        }
    }
}

fn wait<'a>(condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition.wait(state).unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn is_idle(&self) -> bool {
        self.in_flight == 0 && self.backlog.is_empty()
    }

    /// Stops the device. The transport takes the queues away, so nothing is given back.
    fn fail(&mut self, failure: Option<DeviceError>) {
        self.backlog.clear();
        self.failed = true;
        self.failure = failure;
    }

    /// Takes one chain off the queues, from each in turn.
    fn take(&mut self) -> Result<Option<Job>, DeviceError> {
        let count = self.queues.len();
        for step in 0..count {
            let index = (self.next_queue + step) % count;
            let Some(queue) = &mut self.queues[index] else { continue };
            if let Some(chain) = queue.pop().map_err(|error| error.in_queue(index))? {
                self.next_queue = index + 1;
                return Ok(Some(Job { queue: index, chain }));
            }
        }
        Ok(None)
    }

    fn complete(&mut self, job: &Job, written: u32) -> Result<(), QueueError> {
        match &mut self.queues[job.queue] {
            Some(queue) => queue.complete(job.chain.head_index(), written),
            None => Ok(()),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all available chains off the queues.
    fn fill(&self, state: &mut State) {
        while !state.failed && state.backlog.len() < MAX_BACKLOG {
            match state.take() {
                Ok(Some(job)) => state.backlog.push_back(job),
                Ok(None) => break,
                Err(failure) => self.fail(state, failure),
            }
        }
    }

    fn fail(&self, state: &mut State, failure: DeviceError) {
        if !state.failed {
            state.fail(Some(failure));
            // It can only fail when its counter is at its end: then the alarm is ringing.
            drop(self.alarm.write(1));
        }
    }

    fn worker(&self) {
        let mut state = self.lock();
        while let Some((locked, job)) = self.next_job(state) {
            drop(locked);
            let served = catch_unwind(AssertUnwindSafe(|| (self.serve)(&job.chain)));
            state = self.lock();
            state.in_flight -= 1;
            if state.failed {
                continue;
            }
            let panicked = DeviceError::Request("the disk panicked on a request");
            match served.unwrap_or(Err(panicked)) {
                Ok(written) => {
                    if let Err(error) = state.complete(&job, written) {
                        self.fail(&mut state, error.in_queue(job.queue));
                    }
                }
                Err(failure) => self.fail(&mut state, failure),
            }
        }
    }

    /// Waits for a request; `None` is the end of the worker.
    fn next_job<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
    ) -> Option<(MutexGuard<'a, State>, Job)> {
        loop {
            if state.stop {
                return None;
            }
            if state.backlog.is_empty() && !state.held {
                self.fill(&mut state);
            }
            if let Some(job) = state.backlog.pop_front() {
                state.in_flight += 1;
                if !state.backlog.is_empty() && state.idle > 0 {
                    self.work.notify_one();
                }
                return Some((state, job));
            }
            if state.is_idle() {
                self.drained.notify_all();
            }
            state.idle += 1;
            state = wait(&self.work, state);
            state.idle -= 1;
        }
    }
}
