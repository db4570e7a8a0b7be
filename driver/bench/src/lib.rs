//! Measures the cost of a boot: whole processes, from exec to exit.
//!
//! In a carrier whose clock counts instructions, all figures are instructions and repeatable to half a per cent;
//! elsewhere they are nanoseconds.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn::error::chain;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub mod chart;
pub mod compare;
pub mod guest;
pub mod monitor;
mod process;
pub mod report;

pub use guest::Guest;
pub use monitor::OtherMonitor;

/// A boot that takes longer counts as hung.
pub const LIMIT: Duration = Duration::from_secs(120);
/// The same where instructions are the clock, which are a hundred times as slow; a boot has one to ten such seconds,
/// and as many more while a busy host makes it wait for its files.
pub const LIMIT_COUNTED: Duration = Duration::from_secs(90);

/// The stages of a boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The first vCPU is about to enter the guest.
    Run,
    /// The kernel has used a device.
    Kernel,
    /// The guest's first program is running.
    Init,
    /// The guest accepts commands.
    Ready,
    /// The monitor's process has exited.
    End,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Self; 5] = [Self::Run, Self::Kernel, Self::Init, Self::Ready, Self::End];

    /// Its heading in tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Run => "first entry",
            Self::Kernel => "kernel",
            Self::Init => "init",
            Self::Ready => "agent",
            Self::End => "end",
        }
    }
}

/// When the stages of a boot were reached, in nanoseconds: of the host's monotonic clock, or since the exec.
pub type Stages = BTreeMap<Stage, u64>;

/// The measurements of one process, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// When stages were reached, since the exec.
    pub stages: Stages,
    /// Processor time in the guest and in the monitor.
    pub user: u64,
    /// Processor time in the host's kernel.
    pub system: u64,
}

/// A subject to measure.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its name in the report.
    pub name: String,
    /// How many machines the command boots at once; if more than one, copies of the previous subject's.
    pub machines: u8,
    /// The command, and how to watch it.
    pub run: monitor::Run,
}

/// All measurements of a subject.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Its name in the report.
    pub name: String,
    /// The number of machines; see [`Subject`].
    pub machines: u8,
    /// Its runs.
    pub samples: Vec<Sample>,
    /// The process's resident memory without the guest's, in KiB, if it could be measured.
    pub memory_kib: Option<u64>,
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
    /// A boot failed.
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

/// Boots each subject `runs` times, in turns, so that changes on the host affect all alike. Calls `progress` before
/// each boot. A subject that fails or exceeds `limit` is abandoned; the others go on.
pub fn measure(
    subjects: &[Subject],
    runs: usize,
    limit: Duration,
    mut progress: impl FnMut(&str),
) -> Vec<Measured> {
    let mut all = Vec::new();
    for subject in subjects {
        progress(&format!("{}: memory", subject.name));
        let (name, machines) = (subject.name.clone(), subject.machines);
        let (memory_kib, failure) = match process::memory(subject, limit) {
            Ok(memory_kib) => (memory_kib, None),
            Err(error) => (None, Some(chain(&error))),
        };
        all.push(Measured { name, machines, samples: Vec::new(), memory_kib, failure });
    }
    for run in 1..=runs {
        for (subject, measured) in subjects.iter().zip(&mut all) {
            if measured.failure.is_some() {
                continue;
            }
            progress(&format!("{}: boot {run} of {runs}", subject.name));
            match process::time(subject, limit) {
                Ok(sample) => measured.samples.push(sample),
                Err(error) => measured.failure = Some(chain(&error)),
            }
        }
    }
    all
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
