//! A machine's time, which stands still while it is paused.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

/// The clock on which the deadlines of a machine's calls are measured: none runs out while the machine is paused.
/// Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Clock(Arc<watch::Sender<Reading>>);

#[derive(Clone, Copy, Debug)]
struct Reading {
    /// What had passed when it was last started or stopped.
    passed: Duration,
    /// Since when it runs, if it does.
    since: Option<Instant>,
}

impl Reading {
    fn now(self) -> Duration {
        self.passed + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    /// A clock that runs, from zero.
    #[must_use]
    pub fn new() -> Self {
        let reading = Reading { passed: Duration::ZERO, since: Some(Instant::now()) };
        Self(Arc::new(watch::Sender::new(reading)))
    }

    /// What has passed on it.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.0.borrow().now()
    }

    /// Stops it; nothing if it stands still.
    pub fn pause(&self) {
        self.set(false);
    }

    /// Lets it run on; nothing if it runs.
    pub fn resume(&self) {
        self.set(true);
    }

    fn set(&self, run: bool) {
        self.0.send_if_modified(|reading| {
            let changes = reading.since.is_some() != run;
            if changes {
                *reading = Reading { passed: reading.now(), since: run.then(Instant::now) };
            }
            changes
        });
    }

    /// Waits until so much has passed.
    pub async fn sleep(&self, time: Duration) {
        self.sleep_until(self.now().saturating_add(time)).await;
    }

    /// Waits until it shows `deadline`.
    pub async fn sleep_until(&self, deadline: Duration) {
        let mut changes = self.0.subscribe();
        loop {
            let reading = *changes.borrow_and_update();
            // Only a clock that runs gets anywhere; even a deadline that is over waits for that.
            let left = reading.since.map(|_| deadline.saturating_sub(reading.now()));
            match left {
                Some(Duration::ZERO) => return,
                Some(left) => tokio::select! {
                    () = sleep(left) => {}
                    // The sender lives in self.
                    _ = changes.changed() => {}
                },
                None => drop(changes.changed().await),
            }
        }
    }

    /// Waits for `answer` at most so long; None if it has not come by then.
    pub async fn timeout<T>(&self, limit: Duration, answer: impl Future<Output = T>) -> Option<T> {
        let deadline = self.now().saturating_add(limit);
        tokio::select! {
            biased;
            answer = answer => Some(answer),
            () = self.sleep_until(deadline) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn no_deadline_runs_out_while_it_stands_still() {
        let clock = Clock::new();
        let began = Instant::now();
        let waits = clock.timeout(10 * SECOND, pending::<()>());
        let pauses = async {
            for _ in 0..3 {
                sleep(2 * SECOND).await;
                clock.pause();
                clock.pause();
                sleep(60 * SECOND).await;
                clock.resume();
                clock.resume();
            }
        };
        let (answer, ()) = tokio::join!(waits, pauses);
        assert_eq!((answer, began.elapsed()), (None, 190 * SECOND));
        assert_eq!(clock.now(), 10 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_counts_whenever_it_comes() {
        let clock = Clock::new();
        clock.pause();
        let late = async {
            sleep(100 * SECOND).await;
            "here"
        };
        assert_eq!(clock.timeout(SECOND, late).await, Some("here"));
        assert_eq!(clock.timeout(Duration::ZERO, async { 1 }).await, Some(1));
        let never = clock.timeout(Duration::ZERO, pending::<()>());
        tokio::time::timeout(100 * SECOND, never).await.expect_err("it stands still");
    }

    #[tokio::test(start_paused = true)]
    async fn for_ever_is_no_overflow() {
        let clock = Clock::new();
        sleep(SECOND).await;
        assert_eq!(clock.timeout(Duration::MAX, async { 1 }).await, Some(1));
    }
}
