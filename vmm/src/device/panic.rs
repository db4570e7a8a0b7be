//! Notices a kernel panic in what the guest prints on its serial console.

use std::io::{self, Write};

/// What the kernel's `panic()` prints before its reason (kernel/panic.c).
const MARK: &[u8] = b"Kernel panic - not syncing: ";
/// The longest reason that is kept; the kernel's own buffer has 1,024 bytes.
const MAX_REASON: usize = 1024;

enum Progress {
    /// So many bytes of the mark have come.
    Mark(usize),
    /// The mark has come; this is what followed.
    Reason(Vec<u8>),
}

/// Passes output on and calls back with the reason of a panic as soon as its line is complete.
pub struct PanicWatch<F> {
    output: Box<dyn Write + Send>,
    progress: Progress,
    on_panic: F,
}

impl<F: FnMut(String)> PanicWatch<F> {
    /// Watches what is written to `output`.
    pub fn new(output: Box<dyn Write + Send>, on_panic: F) -> PanicWatch<F> {
        PanicWatch { output, progress: Progress::Mark(0), on_panic }
    }

    fn look_at(&mut self, byte: u8) {
        match &mut self.progress {
            Progress::Mark(seen) if byte == MARK[*seen] => {
                *seen += 1;
                if *seen == MARK.len() {
                    self.progress = Progress::Reason(Vec::new());
                }
            }
            // The mark's first byte stands nowhere else in it, so no shorter match can be open.
            Progress::Mark(seen) => *seen = usize::from(byte == MARK[0]),
            Progress::Reason(reason) if byte == b'\n' || reason.len() == MAX_REASON => {
                let reason = String::from_utf8_lossy(reason).trim_end().to_owned();
                self.progress = Progress::Mark(0);
                (self.on_panic)(reason);
            }
            Progress::Reason(reason) => reason.push(byte),
        }
    }
}

impl<F: FnMut(String)> Write for PanicWatch<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // The output first: whoever hears of the panic finds its line already there.
        self.output.write_all(bytes)?;
        for &byte in bytes {
            self.look_at(byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reasons(text: &[u8]) -> Vec<String> {
        let mut reasons = Vec::new();
        let mut watch = PanicWatch::new(Box::new(io::sink()), |reason| reasons.push(reason));
        for byte in text {
            watch.write_all(&[*byte]).unwrap();
        }
        drop(watch);
        reasons
    }

    #[test]
    fn a_panic_is_reported_once_its_line_is_complete() {
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
}
