//! The log of a test run: what the script does, and what the guests print meanwhile.
//!
//! The format is that of nixpkgs' driver, so that people and tools that read its logs can read these.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anstyle::{AnsiColor, Effects, Style};

#[cfg(test)]
mod tests;

/// A step's name.
const STEP: Style = AnsiColor::Green.on_default().effects(Effects::BOLD);
/// What a guest prints.
const SERIAL: Style = Style::new().effects(Effects::DIMMED);
/// What went wrong.
const ERROR: Style = AnsiColor::Red.on_default();
/// What may go wrong.
const WARNING: Style = AnsiColor::Yellow.on_default();

/// Writes log lines; clones write to the same place.
#[derive(Clone)]
pub struct Logger {
    sink: Arc<Sink>,
    /// Put before each message: the machine it is about.
    machine: Option<Arc<str>>,
}

struct Sink {
    out: Mutex<Box<dyn Write + Send>>,
    colours: bool,
    serial: AtomicBool,
}

impl Default for Logger {
    fn default() -> Self {
        Self::stderr()
    }
}

impl Logger {
    /// A log on stderr, in colours if that is a terminal (see `NO_COLOR` and `CLICOLOR_FORCE`).
    #[must_use]
    pub fn stderr() -> Self {
        Self::new(Box::new(io::stderr()), colours_wanted(&io::stderr()))
    }

    /// A log on anything else.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>, colours: bool) -> Self {
        Self {
            sink: Arc::new(Sink { out: Mutex::new(out), colours, serial: AtomicBool::new(true) }),
            machine: None,
        }
    }

    /// The same log, with the machine's name before each message.
    #[must_use]
    pub fn for_machine(&self, name: &str) -> Self {
        Self { sink: Arc::clone(&self.sink), machine: Some(name.into()) }
    }

    /// Writes a message.
    pub fn info(&self, message: impl Display) {
        self.line(None, &message.to_string());
    }

    /// Writes a message that somebody should look at though the test goes on.
    pub fn warning(&self, message: impl Display) {
        self.line(Some(WARNING), &format!("warning: {message}"));
    }

    /// Writes an error of the test, each line behind `!!!`.
    pub fn error(&self, text: impl Display) {
        let mut out = self.lock();
        for line in text.to_string().lines() {
            let line = format!("!!! {line}");
            self.sink.write(&mut out, &self.prefix(), Some(ERROR), &line);
        }
    }

    /// Begins a step; it ends, and its duration is written, when the answer is dropped.
    #[must_use = "the step ends when this is dropped"]
    pub fn nested(&self, message: impl Display) -> Step {
        let message = message.to_string();
        self.line(Some(STEP), &message);
        Step { logger: self.clone(), message, began: Instant::now() }
    }

    /// Writes a line that a guest printed.
    pub fn serial(&self, machine: &str, line: &str) {
        if self.sink.serial.load(Ordering::Relaxed) {
            let text = format!("{machine} # {}", printable(line));
            self.sink.write(&mut self.lock(), "", Some(SERIAL), &text);
        }
    }

    /// Shows or hides what the guests print.
    pub fn show_serial(&self, show: bool) {
        self.sink.serial.store(show, Ordering::Relaxed);
    }

    fn prefix(&self) -> String {
        self.machine.as_ref().map_or_else(String::new, |name| format!("{name}: "))
    }

    fn line(&self, style: Option<Style>, text: &str) {
        self.sink.write(&mut self.lock(), &self.prefix(), style, text);
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn Write + Send>> {
        self.sink.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sink {
    /// One write for a line, so that lines of several processes do not mix.
    fn write(
        &self,
        out: &mut MutexGuard<'_, Box<dyn Write + Send>>,
        prefix: &str,
        style: Option<Style>,
        text: &str,
    ) {
        let line = match style.filter(|_| self.colours) {
            Some(style) => format!("{prefix}{style}{text}{style:#}\n"),
            None => format!("{prefix}{text}\n"),
        };
        // A log that nobody can read any more (a closed pipe) must not end the test.
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    }
}

/// A running step.
pub struct Step {
    logger: Logger,
    message: String,
    began: Instant,
}

impl Drop for Step {
    fn drop(&mut self) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.logger.info(format_args!("(finished: {}, in {seconds:.2} seconds)", self.message));
    }
}

/// Whether output to `stream` should be coloured: on a terminal, and where `CLICOLOR_FORCE` says so, but not
/// against `NO_COLOR`.
pub(crate) fn colours_wanted(stream: &impl IsTerminal) -> bool {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let forced = set("CLICOLOR_FORCE").is_some_and(|value| value != "0");
    set("NO_COLOR").is_none() && (forced || stream.is_terminal())
}

/// A guest's line without escape sequences and control characters, which could move the cursor, change
/// the colours or the title of the reader's terminal.
pub(crate) fn printable(line: &str) -> String {
    anstream::adapter::strip_str(line)
        .to_string()
        .chars()
        .filter(|c| !c.is_control() || *c == '\t')
        .collect()
}
