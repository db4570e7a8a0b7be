//! The outcome as a JUnit report.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use super::{Event, Level, Sink, finished};

/// What the parts of a script outside of subtests are called.
const MAIN: &str = "main";
/// Most bytes of a case's output; the end is what tells most, so the beginning goes.
const MAX_OUTPUT: usize = 1 << 20;

/// A test case.
struct Case {
    name: String,
    output: String,
    failure: Option<String>,
    took: Option<Duration>,
}

impl Case {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), output: String::new(), failure: None, took: None }
    }

    fn line(&mut self, machine: Option<&str>, text: &str) {
        if let Some(machine) = machine {
            self.output.extend([machine, ": "]);
        }
        self.output.extend([text, "\n"]);
        if self.output.len() > 2 * MAX_OUTPUT {
            let cut = self.output.len() - MAX_OUTPUT;
            let line = self.output.as_bytes()[cut..].iter().position(|byte| *byte == b'\n');
            // Behind a line end is always the beginning of a character.
            self.output.drain(..line.map_or(self.output.len(), |at| cut + at + 1));
        }
    }

    fn fail(&mut self, why: &str) {
        let failure = self.failure.get_or_insert_default();
        if !failure.is_empty() {
            failure.push('\n');
        }
        failure.push_str(why);
    }
}

pub(super) struct Junit {
    out: File,
    began: Instant,
    /// The first is [`MAIN`].
    cases: Vec<Case>,
    /// The subtests that run, the innermost last.
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

    /// Ends the innermost subtest of this name; threads may end theirs in any order.
    fn end_subtest(&mut self, name: &str, failure: Option<&str>, took: Duration) {
        let Some(place) = self.running.iter().rposition(|at| self.cases[*at].name == name) else {
            return;
        };
        let case = &mut self.cases[self.running.remove(place)];
        case.took = Some(took);
        if let Some(why) = failure {
            case.fail(why);
        }
    }

    fn report(&self) -> Report {
        let total = self.began.elapsed();
        let mut suite = TestSuite::new("NixOS integration test");
        suite.set_time(total);
        for case in &self.cases {
            let status = match &case.failure {
                None => TestCaseStatus::success(),
                Some(why) => {
                    let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                    status.set_message(why.lines().next().unwrap_or_default());
                    status.set_description(why.as_str());
                    status
                }
            };
            let mut written = TestCase::new(case.name.as_str(), status);
            // What still runs ends with the run.
            written.set_time(case.took.unwrap_or(total));
            written.set_system_out(case.output.as_str());
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
                let case = self.current();
                case.line(machine, text);
                case.fail(text);
            }
            Event::Message { machine, text, .. } => self.current().line(machine, text),
            Event::Serial { machine, line, .. } => {
                self.current().line(None, &format!("{machine} # {line}"));
            }
            Event::Begin { machine, text, subtest } => {
                if let Some(name) = subtest {
                    self.running.push(self.cases.len());
                    self.cases.push(Case::new(name));
                }
                self.current().line(machine, text);
            }
            Event::End { machine, text, subtest, failure, took } => {
                self.current().line(machine, &finished(text, took));
                if let Some(name) = subtest {
                    self.end_subtest(name, failure, took);
                }
            }
        }
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        let report = self.report();
        let mut out = BufWriter::new(&mut self.out);
        report.serialize(&mut out).map_err(io::Error::other)?;
        out.flush()
    }
}
