//! Memory that a guest uses for the first time, which the host has to give it, and that it uses again.

use std::path::Path;

use anyhow::Result;
use firn_bench::monitor::Devices;
use firn_bench::{OtherMonitor, Sample};

use super::running::{self, Parts, Running};
use super::{Subject, Way};

/// How much is used, of how much.
const USED_MIB: u64 = 256;
const MEMORY_MIB: u64 = 512;

pub(crate) struct Memory;

impl Subject for Memory {
    fn title(&self) -> String {
        format!("{USED_MIB} MiB of memory, a write to each page")
    }

    fn ways(&self) -> Vec<Way> {
        running::ways(OtherMonitor::ALL)
    }

    fn prepare(&self, dir: &Path) -> Result<()> {
        let program = Path::new(env!("CARGO_BIN_EXE_bench-guest"));
        running::prepare(include_str!("memory.sh"), Some(program), dir)
    }

    fn round(&self, way: &str, dir: &Path) -> Result<Sample> {
        let guest = running::guest(dir, MEMORY_MIB, &format!("mib={USED_MIB}"));
        Running::start(way, &guest, Parts::default(), &Devices::default(), dir)?.steps()
    }
}
