//! The log of a test run: what the script does, and what the guests print meanwhile.
//!
//! It goes to the terminal in the format of nixpkgs' driver, so that people and tools that read its logs can read
//! these, and to files if they are asked for: as XML, and as a JUnit report.

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

/// How important a message is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What helps to find out why.
    Debug,
    /// What happens, step by step, and what guests print.
    #[default]
    Info,
    /// What somebody should look at though the test goes on.
    Warning,
    /// What went wrong.
    Error,
}

impl Level {
    /// The names of all, from the least.
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
            _ => Err(format!("{name:?} is no log level; allowed: {}", Self::NAMES.join(", "))),
        }
    }
}

/// Writes log lines; clones write to the same places.
#[derive(Clone)]
pub struct Logger {
    core: Arc<Core>,
    /// Put before each message: the machine it is about.
    machine: Option<Arc<str>>,
}

struct Core {
    sinks: Mutex<Vec<Box<dyn Sink>>>,
    serial: AtomicBool,
}

/// Something that happened.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Somebody said something.
    Message {
        /// How important it is.
        level: Level,
        /// The machine it is about.
        machine: Option<&'a str>,
        /// What was said.
        text: &'a str,
    },
    /// A guest has printed a line.
    Serial {
        /// The guest's machine.
        machine: &'a str,
        /// Without its end.
        line: &'a str,
        /// Whether people want to see it now.
        shown: bool,
    },
    /// A step begins.
    Begin {
        /// The machine it is about.
        machine: Option<&'a str>,
        /// What is done.
        text: &'a str,
        /// The name of the subtest that it is.
        subtest: Option<&'a str>,
    },
    /// The run fails, and says why elsewhere.
    Failure {
        /// The reason, in short.
        why: &'a str,
    },
    /// A step has ended.
    End {
        /// The machine it was about.
        machine: Option<&'a str>,
        /// What was done.
        text: &'a str,
        /// The name of the subtest that it was.
        subtest: Option<&'a str>,
        /// Why a subtest failed.
        failure: Option<&'a str>,
        /// How long it took.
        took: Duration,
    },
}

/// Where a log goes.
pub trait Sink: Send {
    /// Takes what happened, in its order.
    fn take(&mut self, event: Event<'_>);

    /// Leaves out what is less important, where it is for people to read as it comes.
    fn set_level(&mut self, _level: Level) {}

    /// Completes what was written. Answers whether more may come.
    ///
    /// # Errors
    /// If what came could not be written.
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
    /// A log on stderr, in colours if that is a terminal (see `NO_COLOR` and `CLICOLOR_FORCE`).
    #[must_use]
    pub fn stderr() -> Self {
        Self::stderr_from(Level::Info)
    }

    /// As [`Self::stderr`], without what is less important than `level`.
    #[must_use]
    pub fn stderr_from(level: Level) -> Self {
        let new = Self::nowhere();
        new.add_stderr(level);
        new
    }

    /// Writes to stderr as well, as [`Self::stderr_from`].
    pub fn add_stderr(&self, level: Level) {
        let out = io::stderr();
        let colours = colours_wanted(&out);
        self.add_sink(Box::new(Terminal::new(Box::new(out), colours, level)));
    }

    /// A log on anything else.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>, colours: bool) -> Self {
        let new = Self::nowhere();
        new.add_sink(Box::new(Terminal::new(out, colours, Level::Info)));
        new
    }

    /// A log that goes nowhere, until something is added.
    #[must_use]
    pub fn nowhere() -> Self {
        let core = Core { sinks: Mutex::default(), serial: AtomicBool::new(true) };
        Self { core: Arc::new(core), machine: None }
    }

    /// Writes to another log as well. Answers false, and does nothing, if that is this one.
    #[must_use]
    pub fn add_log(&self, other: &Self) -> bool {
        let new = !Arc::ptr_eq(&self.core, &other.core);
        if new {
            self.add_sink(Box::new(other.clone()));
        }
        new
    }

    /// Writes to this as well, from now on.
    pub fn add_sink(&self, sink: Box<dyn Sink>) {
        self.sinks().push(sink);
    }

    /// Writes the log to an XML file as well.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn add_xml(&self, path: &Path) -> io::Result<()> {
        self.add_sink(Box::new(XmlLog::create(path)?));
        Ok(())
    }

    /// Writes a JUnit report as well: a test case for each subtest, and one for the rest of the script.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn add_junit(&self, path: &Path) -> io::Result<()> {
        self.add_sink(Box::new(Junit::create(path)?));
        Ok(())
    }

    /// Completes the files of the log. What comes later goes nowhere but to the terminal.
    ///
    /// # Errors
    /// The first error of writing them.
    pub fn finish(&self) -> io::Result<()> {
        let mut done = Ok(());
        self.sinks().retain_mut(|sink| {
            sink.finish().unwrap_or_else(|error| {
                // The first one tells the most.
                done = std::mem::replace(&mut done, Ok(())).and(Err(error));
                false
            })
        });
        done
    }

    /// Leaves out of the terminal what is less important than `level`.
    pub fn set_level(&self, level: Level) {
        for sink in self.sinks().iter_mut() {
            sink.set_level(level);
        }
    }

    /// The same log, with the machine's name before each message.
    #[must_use]
    pub fn for_machine(&self, name: &str) -> Self {
        Self { core: Arc::clone(&self.core), machine: Some(name.into()) }
    }

    /// Writes a message that helps to find out why.
    pub fn debug(&self, message: impl Display) {
        self.message(Level::Debug, &message.to_string());
    }

    /// Writes a message.
    pub fn info(&self, message: impl Display) {
        self.message(Level::Info, &message.to_string());
    }

    /// Writes a message that somebody should look at though the test goes on.
    pub fn warning(&self, message: impl Display) {
        self.message(Level::Warning, &message.to_string());
    }

    /// Writes an error of the test, each line behind `!!!`.
    pub fn error(&self, text: impl Display) {
        self.message(Level::Error, &text.to_string());
    }

    /// Notes for the reports that the run fails. The terminal does not have it: who calls this says it there.
    pub fn fail(&self, why: impl Display) {
        self.emit(Event::Failure { why: &why.to_string() });
    }

    /// Begins a step; it ends, and its duration is written, when the answer is dropped.
    #[must_use = "the step ends when this is dropped"]
    pub fn nested(&self, message: impl Display) -> Step {
        self.step(message.to_string(), None)
    }

    /// Begins a subtest: a step that is a test case of its own in a report.
    #[must_use = "the subtest ends when this is dropped"]
    pub fn subtest(&self, name: &str) -> Step {
        self.step(format!("subtest: {name}"), Some(name.to_owned()))
    }

    fn step(&self, message: String, subtest: Option<String>) -> Step {
        let machine = self.machine.as_deref();
        self.emit(Event::Begin { machine, text: &message, subtest: subtest.as_deref() });
        Step { logger: self.clone(), message, subtest, failure: None, began: Instant::now() }
    }

    /// Writes a line that a guest printed.
    pub fn serial(&self, machine: &str, line: &str) {
        let shown = self.shows_serial();
        self.emit(Event::Serial { machine, line: &printable(line), shown });
    }

    fn shows_serial(&self) -> bool {
        self.core.serial.load(Ordering::Relaxed)
    }

    /// Shows or hides what the guests print. Files have it always.
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
    /// Takes note that the step fails. Of a subtest the log and the report say so.
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

/// What the log says at the end of a step.
fn finished(text: &str, took: Duration) -> String {
    format!("(finished: {text}, in {:.2} seconds)", took.as_secs_f64())
}

/// Whether output to `stream` should be coloured: on a terminal, and where `CLICOLOR_FORCE` says so, but not
/// against `NO_COLOR`.
pub fn colours_wanted(stream: &impl IsTerminal) -> bool {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let forced = set("CLICOLOR_FORCE").is_some_and(|value| value != "0");
    set("NO_COLOR").is_none() && (forced || stream.is_terminal())
}

/// Text without escape sequences and control characters other than tabs and line ends: those could move the cursor,
/// change the colours or the title of the reader's terminal, or answer in its name. Wherever text of a guest may be in
/// what is written to a terminal, it goes through this.
#[must_use]
pub fn printable(text: &str) -> String {
    anstream::adapter::strip_str(text)
        .to_string()
        .chars()
        .filter(|c| !c.is_control() || matches!(c, '\t' | '\n'))
        .collect()
}
