//! When a boot has reached which stage. The monitor marks the first ones; a guest marks others by
//! writing their code to a port.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::bus::BusDevice;

/// Limit on marks, as a guest could go on writing them.
const MAX_MARKS: usize = 64;

/// Codes of stages. Those from 16 up are the guest's to define.
pub mod stage {
    /// The first vCPU is about to enter the guest for the first time.
    pub const RUN: u8 = 1;
    /// The kernel has used a device for the first time.
    pub const KERNEL: u8 = 2;
    /// The guest's first program runs.
    pub const INIT: u8 = 16;
    /// The guest is ready for commands.
    pub const READY: u8 = 17;
}

/// A stage that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Mark {
    /// Which, see [`stage`].
    pub code: u8,
    /// When, in nanoseconds of the host's monotonic clock.
    pub at_ns: u64,
}

/// The marks of a boot.
#[derive(Default)]
pub struct BootTimer(Mutex<Vec<Mark>>);

impl BootTimer {
    /// Marks that stage `code` is reached, if it was not before.
    pub fn mark(&self, code: u8) {
        let mut marks = self.lock();
        if marks.len() < MAX_MARKS && marks.iter().all(|mark| mark.code != code) {
            marks.push(Mark { code, at_ns: now_ns() });
        }
    }

    /// All stages reached so far, in order.
    pub fn marks(&self) -> Vec<Mark> {
        self.lock().clone()
    }

    /// Forgets all, for the next boot.
    pub fn restart(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Mark>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clock by which stages are marked: nanoseconds of the host's monotonic clock, which all processes share.
pub fn now_ns() -> u64 {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let since_boot = clock.map_or(std::time::Duration::ZERO, std::time::Duration::from);
    u64::try_from(since_boot.as_nanos()).unwrap_or(u64::MAX)
}

impl BusDevice for BootTimer {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(&code) = data.first() {
            self.mark(code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_is_marked_once_and_not_too_many() {
        let timer = BootTimer::default();
        timer.mark(stage::RUN);
        timer.write(0, &[stage::INIT]);
        timer.mark(stage::RUN);
        let marks = timer.marks();
        assert_eq!(marks.iter().map(|mark| mark.code).collect::<Vec<_>>(), [1, 16]);
        assert!(marks[0].at_ns <= marks[1].at_ns);
        (0..=u8::MAX).for_each(|code| timer.write(0, &[code]));
        assert_eq!(timer.marks().len(), MAX_MARKS);
        timer.restart();
        assert!(timer.marks().is_empty());
    }
}
