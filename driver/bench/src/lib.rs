//! Measures what machines cost, of firn and of other monitors, by turns: boots as whole processes, from exec to exit, and
//! what programs do that print their own [`Sample`].
//!
//! In a carrier whose clock counts instructions, figures are instructions and repeatable to half a per cent;
//! elsewhere they are nanoseconds.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn::error::chain;
use thiserror::Error;

pub mod boot;
pub mod chart;
pub mod compare;
pub mod guest;
pub mod monitor;
mod process;
pub mod report;
pub mod results;

pub use boot::{Stage, Stages};
pub use guest::Guest;
pub use monitor::OtherMonitor;
pub use process::print_sample;

/// A boot that takes longer counts as hung.
pub const LIMIT: Duration = Duration::from_secs(120);
/// The same where instructions are the clock, which are a hundred times as slow; a boot has one to ten such seconds,
/// and as many more while a busy host makes it wait for its files.
pub const LIMIT_COUNTED: Duration = Duration::from_secs(90);

/// The figures of one run, by the names of their columns.
pub type Sample = Vec<(String, u64)>;

/// A way to do what is measured.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its name in the report.
    pub name: String,
    /// How many machines the command boots at once; if more than one, copies of the previous subject's.
    pub machines: u8,
    /// Whether it is none of firn's.
    pub reference: bool,
    /// How to run it once.
    pub run: Run,
}

/// How to run a subject once.
#[derive(Clone, Debug)]
pub enum Run {
    /// It boots, and is measured from outside.
    Boot(monitor::Boot),
    /// It calls [`print_sample`] in the end.
    Sample(Vec<OsString>),
}

/// All measurements of a subject.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Its name in the report.
    pub name: String,
    /// The number of machines; see [`Subject`].
    pub machines: u8,
    /// Whether it is none of firn's.
    pub reference: bool,
    /// Its runs.
    pub samples: Vec<Sample>,
    /// Why it was abandoned, if it was.
    pub failure: Option<String>,
}

/// Why nothing can be measured.
#[derive(Debug, Error)]
pub enum BenchError {
    /// A file cannot be used.
    #[error("cannot {action} {path}")]
    File {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A process cannot be started or watched.
    #[error("{name}: cannot run {program}")]
    Process {
        /// The name of the subject.
        name: String,
        /// The program.
        program: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A monitor has no such device, or firn does not know how to ask for it.
    #[error("{monitor} cannot be given {what}")]
    Unsupported {
        /// The monitor.
        monitor: &'static str,
        /// The device.
        what: &'static str,
    },
    /// A run failed.
    #[error("{name}: {how}{}", if .output.is_empty() { String::new() } else { format!(":\n{output}") })]
    Failed {
        /// The name of the subject.
        name: String,
        /// How the process ended.
        how: String,
        /// The end of its output.
        output: String,
    },
}

impl BenchError {
    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}

/// Runs each subject `runs` times, in turns, so that changes on the host affect all alike. Calls `progress` before
/// each run. A subject that fails or exceeds `limit` is abandoned; the others go on.
pub fn measure(
    subjects: &[Subject],
    runs: usize,
    limit: Duration,
    mut progress: impl FnMut(&str),
) -> Vec<Measured> {
    let of = |subject: &Subject| Measured {
        name: subject.name.clone(),
        machines: subject.machines,
        reference: subject.reference,
        samples: Vec::new(),
        failure: None,
    };
    let mut all: Vec<_> = subjects.iter().map(of).collect();
    for run in 1..=runs {
        for (subject, measured) in subjects.iter().zip(&mut all) {
            if measured.failure.is_some() {
                continue;
            }
            progress(&format!("{}: run {run} of {runs}", subject.name));
            match once(subject, run == 1, limit) {
                Ok(sample) => measured.samples.push(sample),
                Err(error) => measured.failure = Some(chain(&error)),
            }
        }
    }
    all
}

fn once(subject: &Subject, first: bool, limit: Duration) -> Result<Sample, BenchError> {
    match &subject.run {
        Run::Boot(boot) => {
            // It does not change, and a boot of its own is needed.
            let memory = match first {
                true => process::memory(&subject.name, boot, limit)?,
                false => None,
            };
            let mut sample = process::time(&subject.name, boot, limit)?;
            let memory = memory.into_iter().flatten();
            sample.extend(boot::MEMORY.into_iter().map(str::to_owned).zip(memory));
            Ok(sample)
        }
        Run::Sample(command) => process::sample(&subject.name, command, limit),
    }
}

/// Copies files to a directory, so that no boot pays for a slow disk.
///
/// # Errors
/// If one cannot be read or the directory cannot be written.
pub fn bring<'a>(files: impl IntoIterator<Item = &'a Path>, to: &Path) -> Result<(), BenchError> {
    for file in files {
        let copied = file.file_name().map_or(Ok(0), |name| fs::copy(file, to.join(name)));
        copied.map_err(BenchError::file("copy", file))?;
    }
    Ok(())
}
