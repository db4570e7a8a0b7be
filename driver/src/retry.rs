//! Retries until a probe succeeds.

use std::time::Duration;

use crate::error::{Error, Result};
use firn_agent_client::Clock;

/// Time between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

/// Calls `probe` every second until it returns something; after `timeout` once more, with `true`. Time is that of
/// `clock`.
///
/// For conditions that no event announces.
///
/// # Errors
/// The probe's error, at once; [`Error::Assertion`] if the last call returns nothing either.
pub async fn retry<T, F>(
    clock: &Clock,
    mut probe: impl FnMut(bool) -> F,
    timeout: Duration,
) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let deadline = clock.now().saturating_add(timeout);
    while clock.now() < deadline {
        if let Some(answer) = probe(false).await? {
            return Ok(answer);
        }
        clock.sleep(PAUSE.min(deadline.saturating_sub(clock.now()))).await;
    }
    probe(true).await?.ok_or_else(|| timed_out(timeout))
}

/// The error of a wait that timed out.
pub(crate) fn timed_out(timeout: Duration) -> Error {
    let seconds = timeout.as_secs_f64();
    Error::Assertion(format!("action timed out after {seconds} seconds (timeout={seconds})"))
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn once_a_second_until_there_is_an_answer() {
        let clock = Clock::new();
        let calls = Cell::new(0);
        let probe = |last: bool| {
            assert!(!last);
            calls.set(calls.get() + 1);
            let answer = (calls.get() == 3).then_some("here");
            async move { Ok(answer) }
        };
        assert_eq!(
            retry(&clock, probe, Duration::from_secs(10)).await.expect("an answer in time"),
            "here"
        );
        assert_eq!(clock.now().as_secs(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_last_try_then_an_error() {
        let clock = Clock::new();
        let seen = RefCell::new(Vec::new());
        let probe = |last| {
            seen.borrow_mut().push(last);
            async { Ok(None::<()>) }
        };
        let error =
            retry(&clock, probe, Duration::from_millis(1500)).await.expect_err("never an answer");
        assert_eq!(error.to_string(), "action timed out after 1.5 seconds (timeout=1.5)");
        assert_eq!(*seen.borrow(), [false, false, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_try_counts() {
        let clock = Clock::new();
        let probe = |last: bool| async move { Ok(last.then_some(())) };
        retry(&clock, probe, Duration::from_secs(3)).await.expect("the last try succeeds");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_ends_it() {
        let clock = Clock::new();
        let calls = Cell::new(0);
        let probe = |_: bool| {
            calls.set(calls.get() + 1);
            async { Err::<Option<()>, _>(Error::Assertion("no".into())) }
        };
        let error =
            retry(&clock, probe, Duration::from_secs(3)).await.expect_err("the probe fails");
        assert_eq!((error.to_string().as_str(), calls.get()), ("no", 1));
    }
}
