//! Panics of a guest's kernel, as they are seen on its serial console: QEMU tells of them only where the guest has a
//! driver for that.

use memchr::memmem;

/// What a kernel prints before the reason.
const SAID: &[u8] = b"Kernel panic - not syncing: ";
/// A longer line is none of the kernel's.
const MAX_LINE: usize = 4 << 10;

/// Finds them in what is printed.
#[derive(Default)]
pub(super) struct PanicFinder {
    /// The line so far, unless it is too long.
    line: Vec<u8>,
}

impl PanicFinder {
    /// The reasons of panics on the lines that end in `bytes`.
    pub(super) fn find(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() <= MAX_LINE {
                self.line.extend(&part[..part.len().min(MAX_LINE)]);
            }
            if part.ends_with(b"\n") {
                found.extend(reason(&self.line));
                self.line.clear();
            }
        }
        found
    }
}

/// The reason on a line that a kernel has printed, with or without the time before it.
fn reason(line: &[u8]) -> Option<String> {
    let at = memmem::find(line, SAID)?;
    let before = line[..at].trim_ascii();
    let time = before.is_empty() || before.starts_with(b"[") && before.ends_with(b"]");
    let reason = String::from_utf8_lossy(&line[at + SAID.len()..]);
    time.then(|| reason.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_own_lines() {
        let mut finder = PanicFinder::default();
        assert!(finder.find(b"[    1.5] Kernel pan").is_empty());
        assert_eq!(finder.find(b"ic - not syncing: no init\r\n[  1.6]"), ["no init"]);
        assert_eq!(finder.find(b"\nKernel panic - not syncing: \xff\n"), ["\u{fffd}"]);
        for quiet in
            ["echo Kernel panic - not syncing: x\n", "Kernel panic\n", "[1] end Kernel panic"]
        {
            assert!(finder.find(quiet.as_bytes()).is_empty(), "{quiet}");
        }
        finder.find(b"\n");
        finder.find(&[b'a'; 10_000]);
        assert!(finder.line.len() <= 2 * MAX_LINE);
    }
}
