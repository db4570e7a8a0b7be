//! Commands of a test, by `firn test`: the first, from the exec of it, and others. The machine is one of firn's with its
//! agent, or a start script's, as nixpkgs makes them, with QEMU and NixOS's shell on a console.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use firn_bench::Sample;
use firn_bench::monitor::find;
use firn_tests::{firn, noise, start_script};
use firn_vmm::device::boot_timer::now_ns;

use super::{FIRN, Subject, Way, write};

const QEMU: &str = "a start script's QEMU";
/// The machine's, in a test of one.
const NAME: &str = "machine";

pub(crate) struct Commands;

impl Subject for Commands {
    fn title(&self) -> String {
        "Commands in the systemd kit, the first from the exec of `firn test`".to_owned()
    }

    fn ways(&self) -> Vec<Way> {
        let mut ways = vec![Way::firn(FIRN)];
        if find("qemu-system-x86_64").is_some() {
            ways.push(Way::other(QEMU));
        }
        ways
    }

    fn prepare(&self, dir: &Path) -> Result<()> {
        write(dir, "file", noise(16 << 20))?;
        let script = start_script::like_nixos(dir, NAME, &[NAME]);
        let test = |keys: &str| {
            let script = include_str!("commands.py");
            format!("name = 'commands'\ntest_script = '''\n{script}'''\n[nodes.{NAME}]\n{keys}\n")
        };
        write(dir, "firn.toml", test("kit = 'systemd'"))?;
        // A start script says nothing of its network: another machine is on it, which is never started.
        let other = "[nodes.plugged]";
        write(dir, "qemu.toml", test(&format!("start_command = {script:?}\n{other}")))?;
        Ok(())
    }

    fn round(&self, way: &str, dir: &Path) -> Result<Sample> {
        let test = if way == FIRN { "firn.toml" } else { "qemu.toml" };
        let out = tempfile::tempdir_in(dir)?;
        let steps = out.path().join("steps.json");
        let mut command = Command::new(firn());
        command
            .arg("test")
            .arg(dir.join(test))
            .arg("--output-dir")
            .arg(out.path())
            .args(["--accel", "kvm"])
            .env("FIRN_BENCH_FILE", dir.join("file"))
            .env("FIRN_BENCH_STEPS", &steps)
            .env("FIRN_BENCH_BEGAN", now_ns().to_string())
            // What this process prints is what it has measured.
            .stdout(std::io::stderr());
        ensure!(command.status()?.success(), "the test has failed");
        let steps = std::fs::read(&steps).context("it has measured something")?;
        Ok(serde_json::from_slice(&steps)?)
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(600)
    }
}
