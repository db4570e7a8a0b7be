//! `firn test`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use super::accel::{Accel, Decision};
use super::python;
use crate::config::TestConfig;
use crate::driver::Driver;
use crate::kit::{self, KitName};

/// Run a test
///
/// Boots the machines of the test and runs its script. The log goes to stderr.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The test, a TOML file
    file: PathBuf,
    /// Where files that the script keeps go; made if it is not there
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    output_dir: PathBuf,
    /// Where machines run
    #[arg(long, value_enum, default_value_t)]
    accel: Accel,
    /// Seconds the whole test may take, instead of what the file says
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    global_timeout: Option<u32>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    // What is wrong with the file is said before anything is fetched, built or booted.
    let test = TestConfig::from_toml_file(&args.file)?;
    prepare_output(&args.output_dir)?;
    let python = python::find()?;
    if Driver::needs_kit(&test) {
        kit::build(KitName::Micro, &|line| eprintln!("{line}"))
            .context("there is no guest kit, and it cannot be built")?;
    }
    match args.accel.decide() {
        Decision::Kvm => Err(exec_runner(args, &python.path)),
        Decision::Refused(reason) => bail!("{reason}; `--accel carrier` would do without"),
        Decision::Carrier(reason) => {
            if let Some(reason) = reason {
                eprintln!("{reason}: using the carrier");
            }
            in_carrier(args)
        }
    }
}

fn prepare_output(dir: &Path) -> Result<()> {
    let what = || format!("cannot use the output directory {}", dir.display());
    std::fs::create_dir_all(dir).with_context(what)?;
    // The only test of being able to write is writing.
    tempfile::tempfile_in(dir).map(drop).with_context(what)
}

/// Becomes the Python that runs the script. Returns only if that fails.
fn exec_runner(args: &Args, python: &Path) -> anyhow::Error {
    let mut command = Command::new(python);
    command.args(["-P", "-m", "firn.runner"]).arg("--output-dir").arg(&args.output_dir);
    if let Some(seconds) = args.global_timeout {
        command.arg("--global-timeout").arg(seconds.to_string());
    }
    let error = command.arg("--").arg(&args.file).exec();
    anyhow::Error::new(error).context(format!("cannot run {}", python.display()))
}

fn in_carrier(_args: &Args) -> Result<ExitCode> {
    bail!("the carrier is not there yet")
}
