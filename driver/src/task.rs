//! Work that goes on beside its caller.

use std::future::pending;
use std::panic::resume_unwind;

use tokio::task::{JoinHandle, spawn_blocking};

/// Runs what blocks; a panic in it goes on here.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    end_of(spawn_blocking(work)).await
}

/// Runs a future to its end even if the caller is cancelled; a panic in it is propagated.
pub async fn to_its_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    end_of(tokio::spawn(work)).await
}

async fn end_of<T>(task: JoinHandle<T>) -> T {
    match task.await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            // Nobody aborts these: the runtime ends.
            Err(_) => pending().await,
        },
    }
}
