//! Waits for the Rust API's futures, without the GIL, and ready for signals.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use tokio::io::AsyncReadExt;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::time::sleep;

use super::errors::exception;
use super::listen::deliver;
use firn::error::Result;

/// Changes when Python has caught a signal and not yet run its handler.
static SIGNALS: OnceLock<watch::Sender<()>> = OnceLock::new();
/// Set when the process is about to end: waits must not return.
static ENDING: AtomicBool = AtomicBool::new(false);
/// Called before each wait and about once a second during it: checks polling conditions.
static HOOK: Mutex<Option<Py<PyAny>>> = Mutex::new(None);
/// How often the hook is called during a wait. No event says when a condition has to be checked.
const HOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The runtime of all async work in this process.
pub(super) fn runtime() -> PyResult<&'static Runtime> {
    static RUNTIME: OnceLock<io::Result<Runtime>> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| {
        // The machines have threads of their own; what is left to do is little.
        Builder::new_multi_thread().worker_threads(2).thread_name("firn").enable_all().build()
    });
    runtime.as_ref().map_err(|e| PyOSError::new_err(format!("cannot start threads: {e}")))
}

/// Waits for `future`. Meanwhile runs signal handlers and the hook; if one raises, the future is dropped.
pub(super) fn wait<T: Send>(
    py: Python<'_>,
    future: impl Future<Output = Result<T>> + Send,
) -> PyResult<T> {
    let runtime = runtime()?;
    let mut future = pin!(future);
    let mut signals = SIGNALS.get_or_init(watch::Sender::default).subscribe();
    loop {
        py.check_signals()?;
        let hooked = call_hook(py)? | deliver(py)?;
        let done = py.detach(|| {
            let done = runtime.block_on(async {
                tokio::select! {
                    biased;
                    done = &mut future => Some(done),
                    _ = signals.changed() => None,
                    () = sleep(HOOK_INTERVAL), if hooked => None,
                }
            });
            while ENDING.load(Ordering::Acquire) {
                std::thread::park();
            }
            done
        });
        if let Some(done) = done {
            deliver(py)?;
            return done.map_err(|error| exception(py, &error));
        }
    }
}

/// Calls the hook; returns whether there is one.
fn call_hook(py: Python<'_>) -> PyResult<bool> {
    // Not held during the call, which may wait in its turn.
    let hook = {
        let hook = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
        hook.as_ref().map(|hook| hook.clone_ref(py))
    };
    match hook {
        Some(hook) => hook.call0(py).map(|_| true),
        None => Ok(false),
    }
}

/// Sets the hook that every wait calls when it begins and about once a second. If the hook raises, the wait ends.
#[pyfunction]
pub(super) fn set_wait_hook(hook: Option<Py<PyAny>>) {
    let mut held = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    let before = std::mem::replace(&mut *held, hook);
    drop(held);
    drop(before);
}

/// Calls the hook of [`set_wait_hook`], for waits written in Python.
#[pyfunction]
pub(super) fn check_wait_hook(py: Python<'_>) -> PyResult<()> {
    call_hook(py).map(drop)
}

/// Waits for `future`, which must be quick, ignoring signals.
pub(super) fn wait_through_signals<T: Send>(
    py: Python<'_>,
    future: impl Future<Output = T> + Send,
) -> PyResult<T> {
    let runtime = runtime()?;
    Ok(py.detach(|| runtime.block_on(future)))
}

/// From now on no wait returns.
pub(super) fn hold_waiters() {
    ENDING.store(true, Ordering::Release);
}

/// Lets Python's signal handling interrupt waits; call it again if the wake-up descriptor was replaced since.
/// Does nothing outside the main thread, where Python runs no handlers.
#[pyfunction]
pub(super) fn interrupt_waits_by_signals(py: Python<'_>) -> PyResult<()> {
    static PYTHONS: OnceLock<UnixStream> = OnceLock::new();
    let pythons = match PYTHONS.get() {
        Some(pythons) => pythons,
        None => {
            let (ours, pythons) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            pythons.set_nonblocking(true)?;
            runtime()?.spawn(announce_signals(ours));
            // Python writes a byte for each signal as long as the process lives.
            PYTHONS.get_or_init(|| pythons)
        }
    };
    let set = py.import("signal")?.getattr("set_wakeup_fd")?;
    match set.call1((pythons.as_raw_fd(),)) {
        Err(error) if error.is_instance_of::<PyValueError>(py) => Ok(()),
        other => other.map(drop),
    }
}

/// Wakes all waits whenever Python writes a byte.
async fn announce_signals(ours: UnixStream) {
    let signals = SIGNALS.get_or_init(watch::Sender::default);
    let mut bytes = [0; 64];
    let Ok(mut ours) = tokio::net::UnixStream::from_std(ours) else { return };
    loop {
        match ours.read(&mut bytes).await {
            Ok(1..) => {
                signals.send_replace(());
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return,
        }
    }
}
