//! A disk whose image is in the host's memory: what counts is the monitor, not the host's disk.

use std::path::Path;

use anyhow::Result;
use firn_bench::monitor::Devices;
use firn_bench::{OtherMonitor, Sample};
use firn_tests::noise;

use super::running::{self, Parts, Running};
use super::{Subject, Way, write};

const DISK_MIB: usize = 128;
const MEMORY_MIB: u64 = 256;
const IMAGE: &str = "disk.img";

pub(crate) struct Disk;

impl Subject for Disk {
    fn title(&self) -> String {
        format!(
            "A disk of {DISK_MIB} MiB, past the guest's cache: by the MiB, and pages of 4 KiB at random"
        )
    }

    fn ways(&self) -> Vec<Way> {
        running::ways(OtherMonitor::ALL)
    }

    fn prepare(&self, dir: &Path) -> Result<()> {
        // All of it is there, so that no way has to make room.
        write(dir, IMAGE, noise(DISK_MIB << 20))?;
        let program = Path::new(env!("CARGO_BIN_EXE_bench-guest"));
        running::prepare(include_str!("disk.sh"), Some(program), dir)
    }

    fn round(&self, way: &str, dir: &Path) -> Result<Sample> {
        let image = dir.join(IMAGE);
        let guest = running::guest(dir, MEMORY_MIB, &format!("mib={DISK_MIB}"));
        let spec = serde_json::json!({ "disks": [{ "image": image }] });
        let parts = Parts { spec, ..Parts::default() };
        let devices = Devices { disk: Some(image), ..Devices::default() };
        Running::start(way, &guest, parts, &devices, dir)?.steps()
    }
}
