//! The results as a JUnit report.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use super::{Event, Level, Sink, finished};

/// The name of the script's parts outside subtests.
const MAIN: &str = "main";
/// Upstream's message for each failed case; the reason is in the case's error output.
const FAILED: &str = "test case failed";
/// Most bytes kept of a case's output. The end is the most telling, so the beginning is dropped.
const MAX_OUTPUT: usize = 1 << 20;

/// A test case: all subtests with the same name.
struct Case {
    name: String,
    output: Output,
    errors: Output,
    failed: bool,
    took: Option<Duration>,
}

impl Case {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            output: Output::default(),
            errors: Output::default(),
            failed: false,
            took: None,
        }
    }

    fn fail(&mut self, machine: Option<&str>, why: &str) {
        self.failed = true;
        self.errors.line(machine, why);
    }
}

/// The latest lines.
#[derive(Default)]
struct Output {
    text: String,
    /// How many earlier bytes were dropped.
    cut: usize,
}

impl Output {
    fn line(&mut self, machine: Option<&str>, text: &str) {
        if let Some(machine) = machine {
            self.text.extend([machine, ": "]);
        }
        self.text.extend([text, "\n"]);
        if self.text.len() > 2 * MAX_OUTPUT {
            let cut = self.text.len() - MAX_OUTPUT;
            let line = self.text.as_bytes()[cut..].iter().position(|byte| *byte == b'\n');
            // A character always begins after a line end.
            let cut = line.map_or(self.text.len(), |at| cut + at + 1);
            self.text.drain(..cut);
            self.cut += cut;
        }
    }

    fn written(&self) -> Option<Cow<'_, str>> {
        match (self.text.as_str(), self.cut) {
            ("", 0) => None,
            (text, 0) => Some(text.into()),
            (text, cut) => Some(format!("({cut} bytes before this are left out)\n{text}").into()),
        }
    }
}

pub(super) struct Junit {
    out: File,
    began: Instant,
    /// The first is [`MAIN`].
    cases: Vec<Case>,
    /// The running subtests, innermost last.
    running: Vec<usize>,
}

impl Junit {
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self {
            out: File::create(path)?,
            began: Instant::now(),
            cases: vec![Case::new(MAIN)],
            running: Vec::new(),
        })
    }

    fn current(&mut self) -> &mut Case {
        let at = self.running.last().copied().unwrap_or(0);
        &mut self.cases[at]
    }

    fn begin_subtest(&mut self, name: &str) {
        let known = self.cases.iter().position(|case| case.name == name);
        self.running.push(known.unwrap_or_else(|| {
            self.cases.push(Case::new(name));
            self.cases.len() - 1
        }));
    }

    /// Ends the innermost subtest of this name; threads may end theirs in any order.
    fn end_subtest(&mut self, name: &str, failed: bool, took: Duration) {
        let Some(place) = self.running.iter().rposition(|at| self.cases[*at].name == name) else {
            return;
        };
        let case = &mut self.cases[self.running.remove(place)];
        case.took = Some(case.took.unwrap_or_default() + took);
        // The log has the reason already.
        case.failed |= failed;
    }

    fn report(&self) -> Report {
        let total = self.began.elapsed();
        let mut suite = TestSuite::new("NixOS integration test");
        suite.set_time(total);
        for case in &self.cases {
            let mut status = TestCaseStatus::success();
            if case.failed {
                status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                status.set_type("failure").set_message(FAILED);
            }
            let mut written = TestCase::new(case.name.as_str(), status);
            // Steps that still run end with the run.
            written.set_time(case.took.unwrap_or(total));
            written.system_out = case.output.written().as_deref().map(Into::into);
            written.system_err = case.errors.written().as_deref().map(Into::into);
            suite.add_test_case(written);
        }
        let mut report = Report::new("NixOS integration test");
        report.set_time(total);
        report.add_test_suite(suite);
        report
    }
}

impl Sink for Junit {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Message { level: Level::Error, machine, text } => {
                self.current().fail(machine, text);
            }
            Event::Message { level: Level::Warning, machine, text } => {
                self.current().output.line(machine, &format!("warning: {text}"));
            }
            Event::Message { machine, text, .. } => self.current().output.line(machine, text),
            Event::Failure { why } => self.current().fail(None, why),
            Event::Serial { machine, line, .. } => {
                self.current().output.line(None, &format!("{machine} # {line}"));
            }
            Event::Begin { machine, text, subtest } => {
                if let Some(name) = subtest {
                    self.begin_subtest(name);
                }
                self.current().output.line(machine, text);
            }
            Event::End { machine, text, subtest, failure, took } => {
                self.current().output.line(machine, &finished(text, took));
                if let Some(name) = subtest {
                    self.end_subtest(name, failure.is_some(), took);
                }
            }
        }
    }

    fn finish(&mut self) -> io::Result<bool> {
        let report = self.report();
        let mut out = BufWriter::new(&mut self.out);
        report.serialize(&mut out).map_err(io::Error::other)?;
        out.flush().map(|()| false)
    }
}
