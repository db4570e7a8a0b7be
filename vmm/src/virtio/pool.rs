//! Threads for devices whose requests block.
//!
//! The ringing thread only takes chains off the queues and wakes a worker for each; a worker that has finished one
//! looks for the next itself, so a burst costs few wake-ups. What takes long blocks a worker, not a vCPU. A device
//! may have its quick requests served by the ringing thread ([`Server::serve_quickly`]). A worker is started when no idle
//! one can take a chain, so an unused device has none.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::queue::{Chain, Position, QueueError, VirtQueue};
use super::{ActiveDevice, DeviceConfig, DeviceError, SavedState, VirtioDevice};
use crate::thread;

/// Most workers of a device: enough that a slow `fsync` or cold read does not hold up the rest.
pub(super) const MAX_WORKERS: usize = 4;

/// Most chains taken off the queues ahead of the workers: no less than an honest driver can have
/// under way. One that offers chains it has not got back would fill memory; the rest waits in the
/// ring.
const MAX_BACKLOG: usize = 2048;

/// Most requests served on the ringing thread before the workers get the rest, so that a guest
/// that adds requests as fast as they are served cannot keep the thread for ever.
const QUICK_TURN: usize = 64;

/// What a device does with its requests.
pub(super) trait Server: Send + Sync {
    /// Does a request and says how many bytes of its chain are written. May block. A panic is
    /// caught and counts as an error.
    ///
    /// # Errors
    /// What costs the guest the device.
    fn serve(&self, chain: &Chain) -> Result<u32, DeviceError>;

    /// The same if the request can be done on any thread, and so quickly that waking a worker is not worth it; otherwise
    /// it is left to a worker.
    ///
    /// # Errors
    /// As [`Self::serve`].
    fn serve_quickly(&self, _chain: &Chain) -> Result<Option<u32>, DeviceError> {
        Ok(None)
    }

    /// Called on each worker before its first request.
    ///
    /// # Errors
    /// What costs the guest the device.
    fn prepare_thread(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Whether the chain of a failed request goes back, with nothing written into it. Not where
    /// the driver could take that for success: then it is the device's reset that frees the chain.
    fn gives_back_failed(&self) -> bool {
        false
    }
}

/// A device whose requests a [`Pool`] does.
pub(super) trait Pooled: VirtioDevice + Sized + 'static {
    /// What its pool rings; one of its [`DeviceConfig::host_fds`].
    fn alarm(&self) -> &EventFd;

    /// Called when a pause has finished what was in flight.
    fn paused(&mut self) {}

    /// Called when the queues have been taken away.
    fn ended(&mut self);
}

/// A [`Pooled`] device with queues.
pub(super) struct Active<D> {
    // First, so that the workers have ended before what they use goes.
    pool: Pool,
    device: D,
}

impl<D: Pooled> Active<D> {
    /// Moves the queues in; `server` does the requests.
    pub(super) fn new(
        device: D,
        server: Box<dyn Server>,
        alarm: Arc<EventFd>,
        queues: Vec<Option<VirtQueue>>,
    ) -> Active<D> {
        Active { pool: Pool::new(device.name(), server, alarm, queues), device }
    }
}

impl<D: Pooled> DeviceConfig for Active<D> {
    fn device_type(&self) -> u32 {
        self.device.device_type()
    }

    fn name(&self) -> String {
        self.device.name()
    }

    fn identity(&self) -> String {
        self.device.identity()
    }

    fn features(&self) -> u64 {
        self.device.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.device.queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    fn host_fds(&self) -> Vec<RawFd> {
        self.device.host_fds()
    }

    fn inline_queues(&self) -> u64 {
        self.device.inline_queues()
    }

    fn save(&self) -> SavedState {
        self.device.save()
    }
}

impl<D: Pooled> ActiveDevice for Active<D> {
    fn notify(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.pool.run()
    }

    fn host_event(&mut self) -> Result<(), DeviceError> {
        // Empty when this is not the alarm but the start or a resume.
        drop(self.device.alarm().read());
        self.pool.run()
    }

    fn pause(&mut self) {
        self.pool.drain();
        self.device.paused();
    }

    fn queue_positions(&self) -> Vec<Option<Position>> {
        self.pool.positions()
    }

    fn reset(self: Box<Self>) -> Box<dyn VirtioDevice> {
        let Active { pool, mut device } = *self;
        pool.drain();
        drop(pool);
        device.ended();
        Box::new(device)
    }
}

/// A request that has been taken off its queue.
struct Job {
    queue: usize,
    chain: Chain,
}

struct State {
    queues: Vec<Option<VirtQueue>>,
    /// The queue to check first, so that none starves.
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
    server: Box<dyn Server>,
    /// Wakes the event thread for [`State::failure`].
    alarm: Arc<EventFd>,
    state: Mutex<State>,
    work: Condvar,
    drained: Condvar,
}

/// The queues of an active device and its workers. Dropping it ends them.
pub(super) struct Pool {
    name: String,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Takes the queues; they are served from the first [`Pool::run`] on. The workers get the device's `name`; a
    /// failure signals `alarm`, after which [`Pool::run`] must be called.
    pub(super) fn new(
        name: String,
        server: Box<dyn Server>,
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
        let shared = Arc::new(Shared { server, alarm, state: Mutex::new(state), work, drained });
        Pool { name, shared, workers: Vec::new() }
    }

    /// Serves what is in the queues and whatever comes, until [`Pool::drain`].
    ///
    /// # Errors
    /// What went wrong, here or on a worker since the last call.
    pub(super) fn run(&mut self) -> Result<(), DeviceError> {
        let mut state = self.shared.lock();
        state.held = false;
        for _ in 0..QUICK_TURN {
            match self.shared.take(&mut state) {
                Some(job) => {
                    let done;
                    (state, done) =
                        self.shared.serve(state, &job, |server, chain| server.serve_quickly(chain));
                    if !done {
                        state.backlog.push_back(job);
                    }
                }
                None => break,
            }
        }
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
                // With one worker the device is slow, without any it is dead.
                Err(error) if !self.workers.is_empty() => {
                    tracing::warn!(device = self.name, %error, "no more threads for the device");
                    break;
                }
                Err(source) => {
                    self.shared.lock().fail(None);
                    let operation = "start a thread for the device";
                    return Err(DeviceError::Host { operation, source });
                }
            }
        }
        Ok(())
    }

    fn hire(&self) -> io::Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        thread::spawn(self.name.clone(), move || shared.worker())
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

    /// Takes one chain off the queues, from each in turn: so a queue for urgent requests is never
    /// behind more than one chain of each other queue, and a full one holds up none.
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

    fn take(&self, state: &mut State) -> Option<Job> {
        if state.failed || state.backlog.len() >= MAX_BACKLOG {
            return None;
        }
        state.take().unwrap_or_else(|failure| {
            self.fail(state, failure);
            None
        })
    }

    /// Takes all available chains off the queues.
    fn fill(&self, state: &mut State) {
        while let Some(job) = self.take(state) {
            state.backlog.push_back(job);
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
        if let Err(failure) = self.server.prepare_thread() {
            self.fail(&mut self.lock(), failure);
            self.drained.notify_all();
            return;
        }
        let mut state = self.lock();
        while let Some((locked, job)) = self.next_job(state) {
            (state, _) = self.serve(locked, &job, |server, chain| server.serve(chain).map(Some));
        }
    }

    /// Serves a request with the lock released and gives its chain back. False if the server has left it undone.
    fn serve<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        job: &Job,
        serve: impl FnOnce(&dyn Server, &Chain) -> Result<Option<u32>, DeviceError>,
    ) -> (MutexGuard<'a, State>, bool) {
        state.in_flight += 1;
        drop(state);
        let served = catch_unwind(AssertUnwindSafe(|| serve(&*self.server, &job.chain)));
        state = self.lock();
        state.in_flight -= 1;
        if state.failed {
            return (state, true);
        }
        let panicked = DeviceError::Request("the device panicked on a request");
        let (written, failure) = match served.unwrap_or(Err(panicked)) {
            Ok(None) => return (state, false),
            Ok(written) => (written, None),
            Err(failure) => (self.server.gives_back_failed().then_some(0), Some(failure)),
        };
        let completed = written.map_or(Ok(()), |written| state.complete(job, written));
        if let Err(error) = completed {
            self.fail(&mut state, error.in_queue(job.queue));
        } else if let Some(failure) = failure {
            self.fail(&mut state, failure);
        }
        (state, true)
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
