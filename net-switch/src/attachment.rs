//! Where a port keeps its receiver.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::lock;
use crate::port::Receiver;

/// Holds at most one receiver and counts the calls into it, so that no lock is held during a
/// call and yet a receiver can be taken out for certain.
///
/// Senders never wait here: not for each other, not for who attaches or detaches. Only those
/// two wait, for calls that have begun; so two cards that send to each other cannot deadlock.
#[derive(Default)]
pub struct Attachment {
    state: Mutex<State>,
    /// Signalled when `State::calls` gets to zero and somebody waits for it.
    idle: Condvar,
}

#[derive(Default)]
struct State {
    receiver: Option<Arc<dyn Receiver>>,
    /// Calls that are running, all into receivers of the present generation.
    calls: usize,
    /// Counts receivers put in; one goes in only while no call runs.
    generation: u64,
    /// Those who wait for the calls to end: hardly ever anybody, and to signal is a system call.
    waiting: usize,
}

/// A call that is running; counted until dropped, also by a panic.
struct Running<'a>(&'a Attachment);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.calls -= 1;
        if state.calls == 0 && state.waiting > 0 {
            self.0.idle.notify_all();
        }
    }
}

impl Attachment {
    /// Runs `call` on the receiver, if there is one.
    pub fn call<R>(&self, call: impl FnOnce(&dyn Receiver) -> R) -> Option<R> {
        // Bindings drop in reverse: the reference goes before the call is counted out, so it
        // is never the last one and no card's destructor runs on a sender's thread.
        let (_running, receiver) = {
            let mut state = lock(&self.state);
            let receiver = Arc::clone(state.receiver.as_ref()?);
            state.calls += 1;
            (Running(self), receiver)
        };
        Some(call(&*receiver))
    }

    /// Puts `receiver` in. Waits for running calls to the one before it.
    pub fn attach(&self, receiver: Arc<dyn Receiver>) {
        let mut before = Vec::new();
        let mut state = lock(&self.state);
        loop {
            // Again in each round: another thread's receiver could keep the slot busy for ever.
            before.extend(state.receiver.take());
            if state.calls == 0 {
                break;
            }
            state = self.wait(state);
        }
        state.receiver = Some(receiver);
        state.generation += 1;
        drop(state);
    }

    /// Takes the receiver out. Waits for running calls to it, also when it is another thread
    /// that has just taken it out.
    pub fn detach(&self) {
        let mut state = lock(&self.state);
        let before = state.receiver.take();
        let generation = state.generation;
        while state.calls != 0 && state.generation == generation {
            state = self.wait(state);
        }
        drop(state);
        drop(before);
    }

    /// Waits until the calls may have ended.
    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        let mut state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }
}
