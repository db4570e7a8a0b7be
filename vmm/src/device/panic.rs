//! Notices that the guest's kernel has panicked.
//!
//! A guest with a driver for QEMU's pvpanic device (docs/specs/pvpanic.rst; `pvpanic-mmio` in Linux) says so by a
//! write, and what it prints on its serial console only gives the reason. Without that driver, as early in the boot,
//! the text is all there is. It counts only if the kernel itself prints it: programs may print what they like.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;

/// The event "the kernel has panicked": the only one offered, so that a guest with a crash kernel goes on with that.
const PANICKED: u8 = 1;
/// What the kernel's `panic()` prints before its reason (kernel/panic.c).
const MARK: &[u8] = b"Kernel panic - not syncing: ";
/// The longest reason that is kept; the kernel's own buffer has 1,024 bytes.
const MAX_REASON: usize = 1024;

/// Looks for the reason of a panic in what a kernel prints.
enum Scan {
    /// So many bytes of the mark have come.
    Mark(usize),
    /// The mark has come; this is what followed.
    Reason(Vec<u8>),
}

impl Scan {
    /// The next byte; the reason once its line is complete.
    fn next(&mut self, byte: u8) -> Option<String> {
        match self {
            Scan::Mark(seen) if byte == MARK[*seen] => {
                *seen += 1;
                if *seen == MARK.len() {
                    *self = Scan::Reason(Vec::new());
                }
            }
            // The mark's first byte stands nowhere else in it, so no shorter match can be open.
            Scan::Mark(seen) => *seen = usize::from(byte == MARK[0]),
            Scan::Reason(reason) if byte == b'\n' || reason.len() == MAX_REASON => {
                let reason = String::from_utf8_lossy(reason).trim_end().to_owned();
                *self = Scan::Mark(0);
                return Some(reason);
            }
            Scan::Reason(reason) => reason.push(byte),
        }
        None
    }
}

struct Watch {
    scan: Scan,
    reason: Option<String>,
    saved: PanicState,
}

impl Default for Watch {
    fn default() -> Self {
        Self { scan: Scan::Mark(0), reason: None, saved: PanicState::default() }
    }
}

/// What [`PanicDevice::save`] keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PanicState {
    /// The guest has a driver: it has read which events there are.
    driver: bool,
    /// That driver has reported a panic.
    reported: bool,
}

/// The pvpanic device, which also follows what the kernel prints.
pub struct PanicDevice {
    watch: Mutex<Watch>,
    on_panic: Box<dyn Fn(Option<String>) + Send + Sync>,
}

impl PanicDevice {
    /// Calls `on_panic` on a vCPU's thread with the reason if that is known. A later call may add it.
    pub fn new(on_panic: impl Fn(Option<String>) + Send + Sync + 'static) -> Self {
        Self { watch: Mutex::default(), on_panic: Box::new(on_panic) }
    }

    /// Takes the next byte that the kernel prints on the serial console.
    pub fn printed(&self, byte: u8) {
        let mut watch = self.watch();
        let Some(reason) = watch.scan.next(byte) else { return };
        watch.reason = Some(reason.clone());
        let counts = watch.saved.reported || !watch.saved.driver;
        drop(watch);
        if counts {
            (self.on_panic)(Some(reason));
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        *self.watch() = Watch::default();
    }

    /// What the guest has done with the device.
    pub fn save(&self) -> PanicState {
        self.watch().saved
    }

    /// Takes back what [`PanicDevice::save`] gave.
    pub fn restore(&self, saved: PanicState) {
        *self.watch() = Watch { saved, ..Watch::default() };
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        // Each change is complete before anything can panic.
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for PanicDevice {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        self.watch().saved.driver = true;
        data.fill(PANICKED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_none_or(|events| events & PANICKED == 0) {
            return;
        }
        let mut watch = self.watch();
        watch.saved.reported = true;
        let reason = watch.reason.clone();
        drop(watch);
        (self.on_panic)(reason);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn device() -> (PanicDevice, Receiver<Option<String>>) {
        let (send, heard) = channel();
        (PanicDevice::new(move |reason| send.send(reason).unwrap()), heard)
    }

    fn print(device: &PanicDevice, text: &[u8]) {
        text.iter().for_each(|byte| device.printed(*byte));
    }

    fn reasons(text: &[u8]) -> Vec<String> {
        let (device, heard) = device();
        print(&device, text);
        heard.try_iter().flatten().collect()
    }

    #[test]
    fn without_a_driver_a_panic_is_reported_once_its_line_is_complete() {
        let line = b"[    1.0] Kernel panic - not syncing: sysrq triggered crash\r\nmore\n";
        assert_eq!(reasons(line), ["sysrq triggered crash"]);
        assert_eq!(reasons(b"Kernel panic - not syncing: half a line"), [""; 0]);
        assert_eq!(reasons(b"KKernel panic - not syncing: x\n"), ["x"]);
        assert_eq!(reasons(b"Kernel panic averted\nKernel Kernel pan\n"), [""; 0]);
    }

    #[test]
    fn a_reason_without_end_is_cut() {
        let mut text = MARK.to_vec();
        text.extend([b'a'; 5000]);
        assert_eq!(reasons(&text)[0].len(), MAX_REASON);
    }

    #[test]
    fn a_driver_decides_and_the_text_is_its_reason() {
        let (device, heard) = device();
        let mut events = [0];
        device.read(0, &mut events);
        assert_eq!(events, [PANICKED]);
        print(&device, b"Kernel panic - not syncing: another machine's\n");
        device.write(0, &[2]);
        device.write(0, &[]);
        assert_eq!(heard.try_iter().next(), None);
        print(&device, b"Kernel panic - not syncing: its own\n");
        device.write(0, &[PANICKED]);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [Some("its own".to_owned())]);

        // It has forgotten everything, and this time the driver is quicker than the console.
        device.reset();
        device.read(0, &mut events);
        device.restore(device.save());
        device.write(0, &[PANICKED]);
        print(&device, b"Kernel panic - not syncing: late\n");
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [None, Some("late".to_owned())]);
    }
}
