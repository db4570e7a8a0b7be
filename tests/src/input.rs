//! What a guest hears of its keyboard and its tablet.

use std::time::{Duration, Instant};

use crate::PATIENCE;

/// Keys that ask logind to have the system go down or to sleep, by Linux's numbers.
pub const POWER_KEYS: [u16; 3] = [116, 142, 205];

/// Kind, code and value of an event, as Linux numbers them.
pub type Event = (u16, u16, i32);

/// The end of a report.
pub const END: Event = (0, 0, 0);

/// What is heard of a key or a button that goes down and up.
#[must_use]
pub const fn press(code: u16) -> [Event; 4] {
    [(1, code, 1), END, (1, code, 0), END]
}

/// A script that writes what the guest hears of its `device` from now on to a file.
#[must_use]
pub fn listen(device: &str) -> String {
    format!(
        "for d in /sys/class/input/event*; do \
         [ \"$(cat $d/device/name)\" = 'firn {device}' ] && event=/dev/input/${{d##*/}}; done; \
         rm -f /run/{device}; exec 3<$event; \
         setsid dd bs=24 <&3 >/run/{device} 2>/dev/null &"
    )
}

/// Waits until the guest has heard `count` events of `device`, which are given without the repetitions of a
/// held key and the keyboard's lamps, of which the guest tells itself. `run` runs a script in it.
pub async fn heard(device: &str, count: usize, run: impl AsyncFn(&str) -> String) -> Vec<Event> {
    let script = format!("od -An -v -t u2 -w24 /run/{device}");
    let event = |line: &str| {
        let number = |word: &str| word.parse().expect("od prints numbers");
        let words: Vec<u16> = line.split_whitespace().map(number).collect();
        let value = u32::from(words[10]) | u32::from(words[11]) << 16;
        (words[8], words[9], value.cast_signed())
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = run(&script).await;
        let events = text.lines().map(event);
        let events: Vec<_> =
            events.filter(|event| !matches!(event, (1, _, 2) | (0, 0, 1) | (17, ..))).collect();
        if events.len() >= count {
            return events;
        }
        assert!(Instant::now() < deadline, "{events:?}, not {count}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
