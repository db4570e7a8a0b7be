//! `firn test`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use firn::config::TestConfig;
use firn::driver::Driver;
use firn::kit::{Kit, KitName};
use firn_carrier::Options;
use firn_carrier::accel::run_again;

use super::{Place, python};

/// Run a test
///
/// Boots the machines of the test and runs its script. The log goes to stderr.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 the script ended; 1 it failed; 2 the file makes no sense; 130 Ctrl-C; 143 SIGTERM,
and the global timeout, after which everything is ended.")]
pub struct Args {
    /// The test, a TOML file
    file: PathBuf,
    /// Where files that the script keeps go; made if it is not there
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    output_dir: PathBuf,
    #[command(flatten)]
    place: Place,
    /// Seconds the whole test may take, instead of what the file says
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    global_timeout: Option<u32>,
    /// A JUnit report, in the output directory: a test case for each subtest
    #[arg(long, value_name = "FILE")]
    junit_xml: Option<PathBuf>,
    /// What the log shows at least: debug, info, warning or error
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = ["debug", "info", "warning", "error"])]
    log_level: String,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    // What is wrong with the file is said before anything is fetched, built or booted.
    let test = TestConfig::from_toml_file(&args.file)?;
    prepare_output(&args.output_dir)?;
    let python = python::find()?;
    let kits = Driver::kits_needed(&test).into_iter().map(build_kit).collect::<Result<Vec<_>>>()?;
    let runner = runner(args, &python.path, &kits);
    if args.place.accel.runs_here()? {
        return Err(super::become_command(&runner));
    }
    let writable = test.writable().into_iter().chain([args.output_dir.clone()]).collect();
    let options = Options { writable, viewers: std::env::current_exe().ok(), ..Options::default() };
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

/// The command that runs the script.
fn runner(args: &Args, python: &Path, kits: &[Kit]) -> Vec<OsString> {
    // -P: a file of the current directory must not stand in for a module.
    let mut argv: Vec<OsString> =
        vec![python.into(), "-P".into(), "-m".into(), "firn.runner".into()];
    argv.extend(["--output-dir".into(), args.output_dir.clone().into()]);
    for kit in kits {
        argv.extend(["--kit-dir".into(), kit.dir.clone().into()]);
    }
    if let Some(seconds) = args.global_timeout {
        argv.extend(["--global-timeout".into(), seconds.to_string().into()]);
    }
    if let Some(file) = &args.junit_xml {
        argv.extend(["--junit-xml".into(), file.into()]);
    }
    argv.extend(["--log-level".into(), args.log_level.clone().into()]);
    argv.extend(["--".into(), args.file.clone().into()]);
    argv
}
