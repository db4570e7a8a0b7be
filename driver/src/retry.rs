//! Tries until it works.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::error::{Error, Result};

/// Time between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// Calls `probe` each second until it answers true; after `timeout` a last time, with `true`.
///
/// For what no event announces: only the probe knows what it looks at.
///
/// # Errors
/// The probe's error, at once; [`Error::Assertion`] if the last call answers false too.
pub async fn retry(mut probe: impl AsyncFnMut(bool) -> Result<bool>, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    while Instant::now() < deadline {
        if probe(false).await? {
            return Ok(());
        }
        sleep(PAUSE.min(deadline.saturating_duration_since(Instant::now()))).await;
    }
    if probe(true).await? { Ok(()) } else { Err(timed_out(timeout)) }
}

/// The error of a wait whose time is over.
pub(crate) fn timed_out(timeout: Duration) -> Error {
    let seconds = timeout.as_secs_f64();
    Error::Assertion(format!("action timed out after {seconds} seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn once_a_second_until_true() {
        let began = Instant::now();
        let mut calls = 0;
        let probe = async |last: bool| {
            assert!(!last);
            calls += 1;
            Ok(calls == 3)
        };
        retry(probe, Duration::from_secs(10)).await.expect("true in time");
        assert_eq!(began.elapsed().as_secs(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_last_try_then_an_error() {
        let mut seen = Vec::new();
        let probe = async |last: bool| {
            seen.push(last);
            Ok(false)
        };
        let error = retry(probe, Duration::from_millis(1500)).await.expect_err("never true");
        assert_eq!(error.to_string(), "action timed out after 1.5 seconds");
        assert_eq!(seen, [false, false, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_try_counts() {
        retry(async |last: bool| Ok(last), Duration::from_secs(3)).await.expect("the last try succeeds");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_ends_it() {
        let mut calls = 0;
        let probe = async |_: bool| {
            calls += 1;
            Err(Error::Assertion("no".into()))
        };
        let error = retry(probe, Duration::from_secs(3)).await.expect_err("the probe fails");
        assert_eq!((error.to_string().as_str(), calls), ("no", 1));
    }
}
