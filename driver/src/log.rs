//! The log of a test run: the script's steps and the guests' console output.
//!
//! It goes to the terminal in the format of nixpkgs' driver, so that people and tools that read its logs can read
//! these, and on request to files: as XML and as a JUnit report.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

mod junit;
mod terminal;
#[cfg(test)]
mod tests;
mod xml;

use junit::Junit;
use terminal::Terminal;
use xml::XmlLog;

/// The level of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// For debugging.
    Debug,
    /// Steps, and the guests' console output.
    #[default]
    Info,
    /// Something to look at, though the test goes on.
    Warning,
    /// An error.
    Error,
}

impl Level {
    /// The names of all levels, lowest first.
    pub const NAMES: [&str; 4] = ["debug", "info", "warning", "error"];
}

impl std::str::FromStr for Level {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "debug" => Ok(Self::Debug),
            "info" => Ok(Self::Info),
            "warning" => Ok(Self::Warning),
            "error" => Ok(Self::Error),
            _ => Err(format!("{name:?} is not a log level; allowed: {}", Self::NAMES.join(", "))),
        }
    }
}

/// Writes log lines; clones share their destinations.
#[derive(Clone)]
pub struct Logger {
    core: Arc<Core>,
    /// The machine that messages are about; it prefixes them.
    machine: Option<Arc<str>>,
}

struct Core {
    sinks: Mutex<Vec<Box<dyn Sink>>>,
    serial: AtomicBool,
}

/// An event.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// A message.
    Message {
        /// Its level.
        level: Level,
        /// The machine it is about.
        machine: Option<&'a str>,
        /// The text.
        text: &'a str,
    },
    /// A guest printed a line.
    Serial {
        /// The guest's machine.
        machine: &'a str,
        /// Without the line end.
        line: &'a str,
        /// Whether to show it on the terminal.
        shown: bool,
    },
    /// A step begins.
    Begin {
        /// The machine it is about.
        machine: Option<&'a str>,
        /// What the step does.
        text: &'a str,
        /// The subtest's name, if it is one.
        subtest: Option<&'a str>,
    },
    /// The run fails; the reason is logged elsewhere.
    Failure {
        /// The reason, in brief.
        why: &'a str,
    },
    /// A step has ended.
    End {
        /// The machine it was about.
        machine: Option<&'a str>,
        /// What the step did.
        text: &'a str,
        /// The subtest's name, if it was one.
        subtest: Option<&'a str>,
        /// Why a subtest failed.
        failure: Option<&'a str>,
        /// How long it took.
        took: Duration,
    },
}

/// A destination of the log.
pub trait Sink: Send {
    /// Takes events in order.
    fn take(&mut self, event: Event<'_>);

    /// Hides messages below a level, if this is for people.
    fn set_level(&mut self, _level: Level) {}

    /// Completes the output. Returns whether it takes more events.
    ///
    /// # Errors
    /// If events could not be written.
    fn finish(&mut self) -> io::Result<bool>;
}

/// A log within a log.
impl Sink for Logger {
    fn take(&mut self, event: Event<'_>) {
        let event = match event {
            Event::Serial { machine, line, shown } => {
                Event::Serial { machine, line, shown: shown && self.shows_serial() }
            }
            other => other,
        };
        self.emit(event);
    }

    fn set_level(&mut self, level: Level) {
        Self::set_level(self, level);
    }

    fn finish(&mut self) -> io::Result<bool> {
        Self::finish(self).map(|()| true)
    }
}

impl Default for Logger {
    fn default() -> Self {
        Self::stderr()
    }
}

impl Logger {
    /// Logs to stderr, in colours if that is a terminal (see `NO_COLOR` and `CLICOLOR_FORCE`).
    #[must_use]
    pub fn stderr() -> Self {
        Self::stderr_from(Level::Info)
    }

    /// Like [`Self::stderr`], from `level` up.
    #[must_use]
    pub fn stderr_from(level: Level) -> Self {
        let new = Self::nowhere();
        new.add_stderr(level);
        new
    }

    /// Writes to stderr too, like [`Self::stderr_from`].
    pub fn add_stderr(&self, level: Level) {
        let out = io::stderr();
        let colours = colours_wanted(&out);
        self.add_sink(Box::new(Terminal::new(Box::new(out), colours, level)));
    }

    /// Logs to any other writer.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>, colours: bool) -> Self {
        let new = Self::nowhere();
        new.add_sink(Box::new(Terminal::new(out, colours, Level::Info)));
        new
    }

    /// A log that writes nowhere until an output is added.
    #[must_use]
    pub fn nowhere() -> Self {
        let core = Core { sinks: Mutex::default(), serial: AtomicBool::new(true) };
        Self { core: Arc::new(core), machine: None }
    }

    /// Writes to another log too. Does nothing and returns false if that is this one.
    #[must_use]
    pub fn add_log(&self, other: &Self) -> bool {
        let new = !Arc::ptr_eq(&self.core, &other.core);
        if new {
            self.add_sink(Box::new(other.clone()));
        }
        new
    }

    /// Adds an output.
    pub fn add_sink(&self, sink: Box<dyn Sink>) {
        self.sinks().push(sink);
    }

    /// Writes the log to an XML file too.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn add_xml(&self, path: &Path) -> io::Result<()> {
        self.add_sink(Box::new(XmlLog::create(path)?));
        Ok(())
    }

    /// Writes a JUnit report too, with a test case for each subtest and one for the rest of the script.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn add_junit(&self, path: &Path) -> io::Result<()> {
        self.add_sink(Box::new(Junit::create(path)?));
        Ok(())
    }

    /// Completes the log's files. Later events go only to the terminal.
    ///
    /// # Errors
    /// The first error writing them.
    pub fn finish(&self) -> io::Result<()> {
        let mut done = Ok(());
        self.sinks().retain_mut(|sink| {
            sink.finish().unwrap_or_else(|error| {
                // The first error is the most telling.
                done = std::mem::replace(&mut done, Ok(())).and(Err(error));
                false
            })
        });
        done
    }

    /// Hides messages below `level` on the terminal.
    pub fn set_level(&self, level: Level) {
        for sink in self.sinks().iter_mut() {
            sink.set_level(level);
        }
    }

    /// The same log, with messages prefixed by the name of a machine, or of a fork of the run; of a fork's machine, by
    /// both.
    #[must_use]
    pub fn for_machine(&self, name: &str) -> Self {
        let machine = self.machine.as_ref().map_or(name.into(), |fork| format!("{fork}/{name}"));
        Self { core: Arc::clone(&self.core), machine: Some(machine.into()) }
    }

    /// What its messages are prefixed with.
    pub(crate) fn prefix(&self) -> Option<&str> {
        self.machine.as_deref()
    }

    /// Logs a message for debugging.
    pub fn debug(&self, message: impl Display) {
        self.message(Level::Debug, &message.to_string());
    }

    /// Logs a message.
    pub fn info(&self, message: impl Display) {
        self.message(Level::Info, &message.to_string());
    }

    /// Logs a warning.
    pub fn warning(&self, message: impl Display) {
        self.message(Level::Warning, &message.to_string());
    }

    /// Logs an error of the test, each line prefixed with `!!!`.
    pub fn error(&self, text: impl Display) {
        self.message(Level::Error, &text.to_string());
    }

    /// Records in the reports that the run fails. The caller reports it on the terminal.
    pub fn fail(&self, why: impl Display) {
        self.emit(Event::Failure { why: &why.to_string() });
    }

    /// Begins a step. When the returned value is dropped, the step ends and its duration is logged.
    #[must_use = "the step ends when this is dropped"]
    pub fn nested(&self, message: impl Display) -> Step {
        self.step(message.to_string(), None)
    }

    /// Begins a subtest: a step that is a test case of its own in reports.
    #[must_use = "the subtest ends when this is dropped"]
    pub fn subtest(&self, name: &str) -> Step {
        self.step(format!("subtest: {name}"), Some(name.to_owned()))
    }

    fn step(&self, message: String, subtest: Option<String>) -> Step {
        let machine = self.machine.as_deref();
        self.emit(Event::Begin { machine, text: &message, subtest: subtest.as_deref() });
        Step { logger: self.clone(), message, subtest, failure: None, began: Instant::now() }
    }

    /// Logs a line printed by a guest.
    pub fn serial(&self, machine: &str, line: &str) {
        let shown = self.shows_serial();
        self.emit(Event::Serial { machine, line: &printable(line), shown });
    }

    fn shows_serial(&self) -> bool {
        self.core.serial.load(Ordering::Relaxed)
    }

    /// Shows or hides the guests' output on the terminal. Files always have it.
    pub fn show_serial(&self, show: bool) {
        self.core.serial.store(show, Ordering::Relaxed);
    }

    fn message(&self, level: Level, text: &str) {
        self.emit(Event::Message { level, machine: self.machine.as_deref(), text });
    }

    fn emit(&self, event: Event<'_>) {
        for sink in self.sinks().iter_mut() {
            sink.take(event);
        }
    }

    fn sinks(&self) -> MutexGuard<'_, Vec<Box<dyn Sink>>> {
        self.core.sinks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running step.
pub struct Step {
    logger: Logger,
    message: String,
    subtest: Option<String>,
    failure: Option<String>,
    began: Instant,
}

impl Step {
    /// Marks the step as failed. For a subtest, the log and the report show it.
    pub fn fail(&mut self, why: &str) {
        if let Some(name) = &self.subtest {
            self.logger.error(format_args!("Test \"{name}\" failed with error: \"{why}\""));
        }
        self.failure = Some(why.to_owned());
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.logger.emit(Event::End {
            machine: self.logger.machine.as_deref(),
            text: &self.message,
            subtest: self.subtest.as_deref(),
            failure: self.failure.as_deref(),
            took: self.began.elapsed(),
        });
    }
}

/// The log line at the end of a step.
fn finished(text: &str, took: Duration) -> String {
    format!("(finished: {text}, in {:.2} seconds)", took.as_secs_f64())
}

/// Whether to colour output to `stream`: on a terminal or with `CLICOLOR_FORCE`, unless `NO_COLOR` is set.
pub fn colours_wanted(stream: &impl IsTerminal) -> bool {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let forced = set("CLICOLOR_FORCE").is_some_and(|value| value != "0");
    set("NO_COLOR").is_none() && (forced || stream.is_terminal())
}

/// Removes escape sequences and control characters other than tabs and line ends. They could move the cursor, change
/// the terminal's colours or title, or type into it. All output to a terminal that may contain a guest's text goes
/// through this.
#[must_use]
pub fn printable(text: &str) -> String {
    anstream::adapter::strip_str(text)
        .to_string()
        .chars()
        .filter(|c| !c.is_control() || matches!(c, '\t' | '\n'))
        .collect()
}
