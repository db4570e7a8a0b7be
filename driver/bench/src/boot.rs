//! The stages and the costs of a boot.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Measured;
use super::report::{Column, Report, Summary, Unit};

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

/// Processor time in the guest and in the monitor, and in the host's kernel, and both.
pub(super) const USER: &str = "user";
pub(super) const SYSTEM: &str = "sys";
pub(super) const TOTAL: &str = "total";
/// The process's memory without the guest's: what is resident, what of that no other process has, and what is in no
/// file, so that the host could not drop it.
pub(super) const MEMORY: [&str; 3] = ["memory", "private", "written"];

/// What is measured, of machines one by one or also of several at once: it names files.
#[must_use]
pub fn subject(several: bool) -> &'static str {
    match several {
        true => "machines",
        false => "boot",
    }
}

/// The report of boots; if several machines were booted at once, it is one of that.
#[must_use]
pub fn report(unit: Unit, runs: usize, measured: &[Measured]) -> Report {
    let stages = Stage::ALL.map(|stage| Column::new(stage.as_str(), unit));
    let parts: Vec<_> = [USER, SYSTEM].map(str::to_owned).into();
    let work = [USER, SYSTEM].map(|name| Column::new(name, unit));
    let total = Column { parts, ..Column::new(TOTAL, unit) };
    let memory = MEMORY.map(|name| Column::new(name, Unit::Kib));
    let columns = stages.into_iter().chain(work).chain([total]).chain(memory);
    let subject = subject(measured.iter().any(|of| of.machines > 1));
    let heading = (subject, "A boot from exec to exit");
    Report::new(heading, Summary::Median, columns.collect(), runs, measured)
}
