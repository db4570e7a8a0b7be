//! `firn test`.

use std::ffi::OsString;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use firn::config::TestConfig;
use firn::driver::Driver;
use firn::kit::{Kit, KitName};
use firn::log::Level;
use firn_carrier::Options;
use firn_carrier::accel::run_again;
use serde::Serialize;

use super::{Place, python};

/// Run a test
///
/// Boots the test's machines and runs its script. The log goes to stderr.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 the script succeeded; 1 it failed; 2 the file is invalid; 130 Ctrl-C; 143 SIGTERM,
or the global timeout, which ends everything.")]
pub struct Args {
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    place: Place,
}

/// Flags passed on to the Python runner as they are.
#[derive(Debug, Serialize, clap::Args)]
struct Flags {
    /// The test: a TOML file
    file: PathBuf,
    /// Directory for the script's output files; created if it is missing
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    output_dir: PathBuf,
    /// Limit for the whole test in seconds; overrides the file
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    global_timeout: Option<u32>,
    /// Write a JUnit report to the output directory, with a test case for each subtest
    #[arg(long, value_name = "FILE")]
    junit_xml: Option<PathBuf>,
    /// The lowest level that the log shows
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = Level::NAMES)]
    log_level: String,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    // What is wrong with the file is said before anything is fetched, built or booted.
    let test = TestConfig::from_toml_file(&args.flags.file)?;
    prepare_output(&args.flags.output_dir)?;
    let python = python::find()?;
    let kits = Driver::kits_needed(&test).into_iter().map(build_kit).collect::<Result<Vec<_>>>()?;
    let runner = runner(&args.flags, &python.path, &kits)?;
    if args.place.accel.runs_here()? {
        return Err(super::become_command(&runner));
    }
    let writable = test.writable().into_iter().chain([args.flags.output_dir.clone()]).collect();
    let viewers = std::env::current_exe().ok();
    let options = Options { writable, viewers, ..Options::default() };
    Ok(run_again(&options, runner)?.into())
}

fn prepare_output(dir: &Path) -> Result<()> {
    let what = || format!("cannot use the output directory {}", dir.display());
    std::fs::create_dir_all(dir).with_context(what)?;
    // The only test of being able to write is writing.
    tempfile::tempfile_in(dir).map(drop).with_context(what)
}

fn build_kit(name: KitName) -> Result<Kit> {
    firn_kits::build(name, &|line| eprintln!("{line}")).with_context(|| {
        format!("there is no guest kit `{}`, and it cannot be built", name.as_str())
    })
}

/// The Python runner's arguments.
#[derive(Serialize)]
struct RunnerArguments<'a> {
    #[serde(flatten)]
    flags: &'a Flags,
    kit_dirs: Vec<&'a Path>,
}

/// The command that runs the script.
fn runner(flags: &Flags, python: &Path, kits: &[Kit]) -> Result<Vec<OsString>> {
    let kit_dirs = kits.iter().map(|kit| kit.dir.as_path()).collect();
    let asked = serde_json::to_string(&RunnerArguments { flags, kit_dirs })?;
    // -P: a file of the current directory must not stand in for a module.
    let argv = ["-P", "-m", "firn.runner", &asked].map(OsString::from);
    Ok(iter::once(python.into()).chain(argv).collect())
}
