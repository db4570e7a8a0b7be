//! Tells firn's monitor how far the boot has come, if the kernel's command line asks for that.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

/// The word on the command line.
const ARGUMENT: &str = "firn.boot_timer";
/// The port of the monitor's boot timer (`vmm/src/device/boot_timer.rs`, as the codes).
const PORT: u64 = 0x608;

/// A stage's code.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub enum Stage {
    /// Process 1 runs.
    Init = 16,
    /// The host is told that the agent is ready.
    Ready = 17,
}

/// Marks that a stage is reached. It is nobody's loss if that cannot be done.
pub fn mark(stage: Stage) {
    let asked = fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_whitespace().any(|word| word == ARGUMENT));
    if asked && let Ok(ports) = OpenOptions::new().write(true).open("/dev/port") {
        let _ = ports.write_at(&[stage as u8], PORT);
    }
}
