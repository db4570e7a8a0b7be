//! Loggers that scripts have written in Python.
//!
//! Whoever logs may hold locks, and does not hold Python's: so what has happened is kept, and handed over by a thread
//! of Python's when it logs itself, and before, while and after it waits.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;

use firn::log::{Event, Level, Sink};

/// Most events to keep, as guests may print while nobody waits. The oldest are dropped.
const MAX_KEPT: usize = 100_000;

/// All loggers, with the events not yet delivered to them.
static LISTENERS: Mutex<Vec<(Queue, Py<PyAny>)>> = Mutex::new(Vec::new());

type Queue = Arc<Mutex<VecDeque<Pending>>>;

/// An event: its kind, which is a method of loggers or `end`.
struct Pending {
    kind: &'static str,
    text: String,
    machine: Option<String>,
}

impl Pending {
    fn of(event: Event<'_>) -> Option<Self> {
        let (kind, text, machine) = match event {
            Event::Message { level, machine, text } => {
                let kind = match level {
                    Level::Debug => "debug",
                    Level::Info => "info",
                    Level::Warning => "warning",
                    Level::Error => "log_test_error",
                };
                (kind, text, machine)
            }
            Event::Serial { machine, line, shown: true } => ("log_serial", line, Some(machine)),
            Event::Serial { .. } | Event::Failure { .. } => return None,
            Event::Begin { subtest: Some(name), machine, .. } => ("subtest", name, machine),
            Event::Begin { text, machine, .. } => ("nested", text, machine),
            Event::End { subtest: Some(name), machine, .. } => ("end", name, machine),
            Event::End { text, machine, .. } => ("end", text, machine),
        };
        Some(Self { kind, text: text.to_owned(), machine: machine.map(str::to_owned) })
    }
}

struct Listener(Queue);

impl Sink for Listener {
    fn take(&mut self, event: Event<'_>) {
        if let Some(heard) = Pending::of(event) {
            let mut queue = lock(&self.0);
            if queue.len() >= MAX_KEPT {
                queue.pop_front();
            }
            queue.push_back(heard);
        }
    }

    fn finish(&mut self) -> io::Result<bool> {
        Ok(true)
    }
}

/// An output that passes events to `logger`, which is called with kind, text, and the machine's name or None.
pub(super) fn listener(logger: Py<PyAny>) -> Box<dyn Sink> {
    let queue = Queue::default();
    lock(&LISTENERS).push((Arc::clone(&queue), logger));
    Box::new(Listener(queue))
}

/// Delivers the events since the last call; returns whether anyone listens.
pub(super) fn deliver(py: Python<'_>) -> PyResult<bool> {
    let listeners: Vec<_> = lock(&LISTENERS)
        .iter()
        .map(|(queue, logger)| (Arc::clone(queue), logger.clone_ref(py)))
        .collect();
    for (queue, logger) in &listeners {
        // No lock is held during the call, which may log in its turn.
        while let Some(Pending { kind, text, machine }) = pop(queue) {
            logger.call1(py, (kind, text, machine))?;
        }
    }
    Ok(!listeners.is_empty())
}

fn pop(queue: &Queue) -> Option<Pending> {
    lock(queue).pop_front()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
