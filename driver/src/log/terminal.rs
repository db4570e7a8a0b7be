//! The log for people.

use std::io::{self, Write};

use anstyle::{AnsiColor, Effects, Style};

use super::{Event, Level, Sink, finished, printable};

/// A step's name.
const STEP: Style = AnsiColor::Green.on_default().effects(Effects::BOLD);
/// A guest's output.
const SERIAL: Style = Style::new().effects(Effects::DIMMED);
/// Errors.
const ERROR: Style = AnsiColor::Red.on_default();
/// A warning.
const WARNING: Style = AnsiColor::Yellow.on_default();

pub(super) struct Terminal {
    out: Box<dyn Write + Send>,
    colours: bool,
    level: Level,
}

impl Terminal {
    pub(super) fn new(out: Box<dyn Write + Send>, colours: bool, level: Level) -> Self {
        Self { out, colours, level }
    }

    /// Writes each line in one call, so that lines of several processes do not mix.
    fn line(&mut self, machine: Option<&str>, style: Option<Style>, text: &str) {
        let prefix = machine.map_or_else(String::new, |name| format!("{name}: "));
        let text = printable(text);
        let line = match style.filter(|_| self.colours) {
            Some(style) => format!("{prefix}{style}{text}{style:#}\n"),
            None => format!("{prefix}{text}\n"),
        };
        // A log that nobody reads any more (a closed pipe) must not end the test.
        let _ = self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush());
    }
}

impl Sink for Terminal {
    fn take(&mut self, event: Event<'_>) {
        let level = match event {
            Event::Message { level, .. } => level,
            Event::Failure { .. } => return,
            Event::Serial { .. } | Event::Begin { .. } | Event::End { .. } => Level::Info,
        };
        if level < self.level {
            return;
        }
        match event {
            Event::Message { level: Level::Error, machine, text } => {
                for line in text.lines() {
                    self.line(machine, Some(ERROR), &format!("!!! {line}"));
                }
            }
            Event::Message { level: Level::Warning, machine, text } => {
                self.line(machine, Some(WARNING), &format!("warning: {text}"));
            }
            Event::Message { machine, text, .. } => self.line(machine, None, text),
            Event::Serial { machine, line, shown: true } => {
                self.line(None, Some(SERIAL), &format!("{machine} # {line}"));
            }
            Event::Serial { .. } | Event::Failure { .. } => {}
            Event::Begin { machine, text, .. } => self.line(machine, Some(STEP), text),
            Event::End { machine, text, took, .. } => {
                self.line(machine, None, &finished(text, took));
            }
        }
    }

    fn set_level(&mut self, level: Level) {
        self.level = level;
    }

    fn finish(&mut self) -> io::Result<bool> {
        // Errors are ignored, as for lines.
        let _ = self.out.flush();
        Ok(true)
    }
}
