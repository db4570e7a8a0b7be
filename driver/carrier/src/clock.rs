//! Checks that a carrier's clock runs at the speed of the host's.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use firn_agent_client::{AgentClient, AgentError};

/// How often the agent reports its guest's time.
const BEAT: Duration = Duration::from_millis(50);
/// The minimum time for which the clocks are compared.
const LEAST: Duration = Duration::from_millis(300);
/// How far apart they may be then, relative to the time that has passed. A wrong clock is off by a factor of ten; a
/// right one may be read late.
const TOLERANCE: f64 = 0.1;
/// How long the clocks may take to agree on a busy host.
const LIMIT: Duration = Duration::from_secs(15);

/// Compares the clocks until they agree. Returns what is wrong if they do not.
pub(super) async fn fault(client: &AgentClient) -> Result<Option<String>, AgentError> {
    let mut beats = client.heartbeat(BEAT);
    let mut clocks = Clocks::default();
    let compare = async {
        // The sender lives as long as the client.
        while beats.changed().await.is_ok() {
            let uptime = *beats.borrow_and_update();
            if uptime.is_some_and(|uptime| clocks.agree(uptime, Instant::now())) {
                return;
            }
        }
    };
    let compared = tokio::select! {
        compared = timeout(LIMIT, compare) => compared,
        lost = client.lost() => return Err(lost.into()),
    };
    drop(client.heartbeat(Duration::ZERO));
    Ok(compared.is_err().then(|| match clocks.speed {
        Some(speed) => format!("its clock runs at {speed:.2} times the host's"),
        None => format!("its clock has stopped: no timer in {} seconds", LIMIT.as_secs()),
    }))
}

/// The guest's time and the host's.
#[derive(Default)]
struct Clocks {
    first: Option<(Duration, Instant)>,
    /// The speed of the guest's clock relative to the host's.
    speed: Option<f64>,
}

impl Clocks {
    /// Whether they have agreed so far.
    fn agree(&mut self, guest: Duration, host: Instant) -> bool {
        let (from, began) = *self.first.get_or_insert((guest, host));
        let passed = host - began;
        if passed < LEAST {
            return false;
        }
        let speed = guest.saturating_sub(from).as_secs_f64() / passed.as_secs_f64();
        self.speed = Some(speed);
        (speed - 1.0).abs() < TOLERANCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_clock_never_agrees() {
        let (ms, began) = (Duration::from_millis, Instant::now());
        for (speed, right) in [(1, true), (2, false), (12, false)] {
            let mut clocks = Clocks::default();
            // The first is read late.
            assert!(!clocks.agree(ms(0), began + ms(80)));
            let agreed = (1..100_u32).any(|n| clocks.agree(ms(50) * n * speed, began + ms(50) * n));
            assert_eq!(agreed, right, "{speed} times");
        }
    }
}
