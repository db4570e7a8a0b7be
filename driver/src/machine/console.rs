//! The output of the guest's serial console.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use crate::error::{Result, Tail};
use crate::log::{Logger, printable};
use crate::retry::timed_out;
use firn_agent_client::Clock;

#[cfg(test)]
mod tests;

/// Most bytes kept of a console; older lines are dropped.
const MAX_KEPT: usize = 32 << 20;
/// How many more bytes may gather before the oldest are dropped.
const SLACK: usize = 8 << 20;
/// A longer line is shown in pieces.
const MAX_LINE: usize = 8 << 10;
/// Lines of the console that an error quotes: a kernel's panic takes about 40.
const TAIL_LINES: usize = 50;
/// How long an unfinished line may grow before it is searched. Guests print single bytes, and no event says that a
/// prompt without a line end is complete.
const GATHER: Duration = Duration::from_millis(20);

/// The console's output since the machine was made, and who has read how far.
pub(super) struct Console {
    clock: Clock,
    buffer: Mutex<Buffer>,
    /// Changes when a line begins and when it is complete.
    grown: watch::Sender<()>,
    tap: Mutex<Option<Arc<Tap>>>,
}

/// Most bytes that wait at a tap; output beyond that is lost to it.
const MAX_TAPPED: usize = 1 << 20;

/// The console's output byte by byte, as the guest prints it.
#[derive(Default)]
pub struct Tap {
    bytes: Mutex<Vec<u8>>,
    more: Notify,
}

impl Tap {
    /// Waits for output.
    pub async fn next(&self) -> Vec<u8> {
        loop {
            let bytes = std::mem::take(&mut *self.lock());
            if !bytes.is_empty() {
                return bytes;
            }
            self.more.notified().await;
        }
    }

    fn push(&self, bytes: &[u8]) {
        let mut waiting = self.lock();
        let room = MAX_TAPPED.saturating_sub(waiting.len());
        waiting.extend_from_slice(&bytes[..bytes.len().min(room)]);
        drop(waiting);
        self.more.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far a console was at some time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    start: u64,
    consumed: u64,
    end: u64,
}

/// Positions count all bytes ever printed.
struct Buffer {
    bytes: Vec<u8>,
    /// Position of the first kept byte.
    base: u64,
    /// Where the output of the machine's latest start begins.
    start: u64,
    /// How far calls of `wait_for_text` have consumed the output.
    consumed: u64,
    /// Whether waiters have been notified that a line has begun.
    announced: bool,
}

impl Console {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            buffer: Mutex::new(Buffer {
                bytes: Vec::new(),
                base: 0,
                start: 0,
                consumed: 0,
                announced: false,
            }),
            grown: watch::Sender::new(()),
            tap: Mutex::default(),
        }
    }

    /// Sends further output to this tap too, and to no other.
    pub(super) fn tap(&self) -> Arc<Tap> {
        let tap = Arc::new(Tap::default());
        *self.tap.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&tap));
        tap
    }

    /// Marks the beginning of a new start.
    pub(super) fn restart(&self) {
        let mut buffer = self.lock();
        buffer.start = buffer.end();
        buffer.consumed = buffer.start;
    }

    /// Makes it begin with what was printed before this run.
    pub(super) fn begin_with(&self, text: &str) {
        self.restart();
        self.push(text.as_bytes());
    }

    /// How far it is.
    pub(super) fn mark(&self) -> Mark {
        let buffer = self.lock();
        Mark { start: buffer.start, consumed: buffer.consumed, end: buffer.end() }
    }

    /// Makes it what it was, as if nothing had been printed or consumed since.
    pub(super) fn go_back(&self, to: &Mark) {
        let mut buffer = self.lock();
        let kept = usize::try_from(to.end.saturating_sub(buffer.base)).unwrap_or(usize::MAX);
        buffer.bytes.truncate(kept);
        buffer.base = buffer.base.min(to.end);
        (buffer.start, buffer.consumed) = (to.start, to.consumed);
        buffer.announced = false;
    }

    /// Where what is to be shown begins: at the start, or with what is yet to come.
    pub(super) fn position(&self, from_start: bool) -> u64 {
        let buffer = self.lock();
        if from_start { buffer.start } else { buffer.end() }
    }

    /// Everything kept since the start.
    pub(super) fn text(&self) -> String {
        let buffer = self.lock();
        String::from_utf8_lossy(buffer.since(buffer.start)).into_owned()
    }

    /// The last lines since the start, without control characters.
    pub(super) fn tail(&self) -> Tail {
        let buffer = self.lock();
        let bytes = buffer.since(buffer.start);
        // Lines can be long: at most a screenful.
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_LINES * 200)..];
        let text = String::from_utf8_lossy(bytes);
        let mut lines: Vec<String> = text
            .lines()
            .rev()
            .map(printable)
            .filter(|l| !l.trim().is_empty())
            .take(TAIL_LINES)
            .collect();
        lines.reverse();
        Tail(lines)
    }

    /// Waits until `find` finds a match in the output that no earlier call has consumed; it returns where in the text
    /// the match ends. Consumes the text up to the end of the match's last line. As upstream's driver does, it also
    /// searches the lines joined without their ends.
    ///
    /// # Errors
    /// If the timeout runs out, and errors of `find`.
    pub(super) async fn wait_for_text(
        &self,
        mut find: impl FnMut(&str) -> Result<Option<usize>>,
        timeout: Option<Duration>,
    ) -> Result<()> {
        let search = self.search(&mut find);
        match timeout {
            None => search.await,
            Some(limit) => {
                let found = self.clock.timeout(limit, search).await;
                found.unwrap_or_else(|| Err(timed_out(limit)))
            }
        }
    }

    /// The same without a timeout.
    async fn search(&self, find: &mut impl FnMut(&str) -> Result<Option<usize>>) -> Result<()> {
        let mut grown = self.grown.subscribe();
        loop {
            grown.mark_unchanged();
            let (from, bytes) = self.unconsumed();
            let text = String::from_utf8_lossy(&bytes);
            let found = match find(&text)? {
                Some(end) => Some(end),
                None => {
                    let joined = Joined::new(&text);
                    find(&joined.text)?.map(|end| joined.position(end))
                }
            };
            if let Some(end) = found {
                let end = byte_position(&bytes, end);
                self.consume(from + to_u64(line_end(&bytes, end)));
                return Ok(());
            }
            let partial = !bytes.is_empty() && !bytes.ends_with(b"\n");
            drop(text);
            drop(bytes);
            if partial {
                sleep(GATHER).await;
            }
            // The sender lives in self.
            let _ = grown.changed().await;
        }
    }

    /// Consumes and returns the next line, without its end.
    ///
    /// # Errors
    /// If none comes within `timeout`.
    pub(super) async fn next_line(&self, timeout: Duration) -> Result<String> {
        let mut line = String::new();
        let find = |text: &str| {
            Ok(text.split_once('\n').map(|(first, _)| {
                first.trim_end().clone_into(&mut line);
                first.len() + 1
            }))
        };
        self.wait_for_text(find, Some(timeout)).await?;
        Ok(line)
    }

    /// The number of complete lines not consumed yet.
    pub(super) fn lines_left(&self) -> usize {
        self.unconsumed().1.iter().filter(|byte| **byte == b'\n').count()
    }

    /// Writes the lines from a position on to the log as they come, until `finished` changes; then what is left.
    pub(super) async fn show(
        &self,
        machine: &str,
        log: &Logger,
        mut shown: u64,
        mut finished: watch::Receiver<bool>,
    ) {
        let mut grown = self.grown.subscribe();
        loop {
            grown.mark_unchanged();
            let last = *finished.borrow_and_update();
            self.show_lines(machine, log, &mut shown, last);
            if last {
                return;
            }
            tokio::select! {
                _ = grown.changed() => {}
                gone = finished.changed() => if gone.is_err() { return },
            }
        }
    }

    fn show_lines(&self, machine: &str, log: &Logger, shown: &mut u64, partial_too: bool) {
        loop {
            // The log may block (a slow terminal), and the guest must not wait for it: copy, then write.
            let (bytes, lost) = {
                let buffer = self.lock();
                let lost = buffer.base.saturating_sub(*shown);
                let bytes = buffer.since(*shown);
                (bytes[..bytes.len().min(64 << 10)].to_vec(), lost)
            };
            if lost > 0 {
                log.serial(machine, &format!("[{lost} bytes came too fast to be shown]"));
                *shown += lost;
            }
            let mut rest = bytes.as_slice();
            while let Some(length) = next_line(rest, partial_too) {
                let line = String::from_utf8_lossy(&rest[..length]);
                log.serial(machine, line.trim_end());
                rest = &rest[length..];
            }
            let done = bytes.len() - rest.len();
            if done == 0 {
                return;
            }
            *shown += to_u64(done);
        }
    }

    fn unconsumed(&self) -> (u64, Vec<u8>) {
        let mut buffer = self.lock();
        buffer.announced = false;
        let from = buffer.consumed.max(buffer.base);
        (from, buffer.since(from).to_vec())
    }

    fn consume(&self, position: u64) {
        let mut buffer = self.lock();
        buffer.consumed = buffer.consumed.max(position);
    }

    fn push(&self, bytes: &[u8]) {
        if let Some(tap) = &*self.tap.lock().unwrap_or_else(PoisonError::into_inner) {
            tap.push(bytes);
        }
        let mut buffer = self.lock();
        // As upstream's driver does: line ends are those of a terminal.
        buffer.bytes.extend(bytes.iter().filter(|b| **b != b'\r'));
        if buffer.bytes.len() > MAX_KEPT + SLACK {
            let surplus = buffer.bytes.len() - MAX_KEPT;
            buffer.bytes.drain(..surplus);
            buffer.base += to_u64(surplus);
        }
        let news = bytes.contains(&b'\n') || !buffer.announced;
        buffer.announced = true;
        drop(buffer);
        if news {
            self.grown.send_replace(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    fn end(&self) -> u64 {
        self.base + to_u64(self.bytes.len())
    }

    fn since(&self, position: u64) -> &[u8] {
        let skip = usize::try_from(position.saturating_sub(self.base)).unwrap_or(usize::MAX);
        self.bytes.get(skip..).unwrap_or_default()
    }
}

/// The guest's end of the console.
pub(super) struct ConsoleWriter(pub(super) Arc<Console>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The lines of a text joined without their ends.
struct Joined {
    text: String,
    /// Where each line begins in either text.
    begins: Vec<(usize, usize)>,
}

impl Joined {
    fn new(whole: &str) -> Self {
        let (mut text, mut begins, mut at) = (String::with_capacity(whole.len()), Vec::new(), 0);
        for line in whole.split_inclusive('\n') {
            begins.push((text.len(), at));
            text.push_str(line.trim_end());
            at += line.len();
        }
        Self { text, begins }
    }

    /// Maps `end` in this text to the whole text.
    fn position(&self, end: usize) -> usize {
        // The first line that reaches that far: the end of one is the beginning of the next.
        let line = self.begins.partition_point(|(here, _)| *here < end).saturating_sub(1);
        self.begins.get(line).map_or(end, |(here, there)| there + (end - here))
    }
}

/// The length of the next line with its end, or of an unfinished line if it is too long or the last.
fn next_line(bytes: &[u8], partial_too: bool) -> Option<usize> {
    let end = bytes.iter().take(MAX_LINE).position(|b| *b == b'\n').map(|at| at + 1);
    end.or_else(|| (bytes.len() >= MAX_LINE).then_some(MAX_LINE))
        .or_else(|| (partial_too && !bytes.is_empty()).then_some(bytes.len()))
}

/// The byte of `bytes` at which byte `end` of their lossy text lies.
fn byte_position(bytes: &[u8], end: usize) -> usize {
    let (mut text, mut raw) = (0, 0);
    for chunk in bytes.utf8_chunks() {
        let valid = chunk.valid().len();
        if end <= text + valid {
            return raw + (end - text);
        }
        text += valid;
        raw += valid + chunk.invalid().len();
        if !chunk.invalid().is_empty() {
            text += char::REPLACEMENT_CHARACTER.len_utf8();
        }
    }
    bytes.len()
}

/// The end of the line in which `position` lies; a position behind a line end belongs to that line.
fn line_end(bytes: &[u8], position: usize) -> usize {
    if position > 0 && bytes.get(position - 1) == Some(&b'\n') {
        return position;
    }
    let rest = bytes.get(position..).unwrap_or_default();
    rest.iter().position(|b| *b == b'\n').map_or(position, |at| position + at + 1)
}

fn to_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
