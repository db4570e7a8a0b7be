//! `firn test`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use firn::config::TestConfig;
use firn::driver::Driver;
use firn::kit::{Kit, KitName};
use firn::log::Level;
use firn::worlds::Worlds;
use firn_carrier::Options;
use firn_carrier::accel::run_again;

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
#[derive(Debug, clap::Args)]
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
    /// Let programs outside plug into the test's networks: see `firn vlan`
    #[arg(long)]
    open_vlans: bool,
    /// Begin after the boot of all machines: the first run keeps it on disk, later ones start there
    ///
    /// The script finds machines that are up. `firn cache` shows what is kept. `from_boot = true` in the file does the
    /// same.
    #[arg(long)]
    from_boot: bool,
    /// The lowest level that the log shows
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = Level::NAMES)]
    log_level: String,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    // What is wrong with the file is said before anything is fetched, built or booted.
    let test = TestConfig::from_toml_file(&args.flags.file)?;
    prepare_output(&args.flags.output_dir)?;
    let python = python::locate()?;
    // Python checks itself when it starts; but before anything else that takes long, it is asked.
    let mut asked = false;
    let mut ask = || {
        if std::mem::replace(&mut asked, true) { Ok(()) } else { python::check(&python).map(drop) }
    };
    let mut kits = Vec::new();
    for name in Driver::kits_needed(&test) {
        kits.push(match firn_kits::lookup(name) {
            Ok(Some(kit)) => kit,
            _ => ask().and_then(|()| build_kit(name))?,
        });
    }
    let runner = runner(&args.flags, &python, &kits);
    if args.place.accel.runs_here()? {
        return Err(super::become_command(&runner));
    }
    ask()?;
    if args.flags.open_vlans {
        eprintln!(
            "note: this test runs in the carrier, so only programs in there can plug into its networks"
        );
    }
    let mut writable = test.writable();
    writable.push(args.flags.output_dir.clone());
    if args.flags.from_boot || test.from_boot {
        let worlds = Worlds::of_user()?;
        worlds.prepare()?;
        writable.push(worlds.path().to_owned());
    }
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

/// The command that runs the script. Its arguments are words: reading JSON takes Python longer than a script that does
/// nothing.
fn runner(flags: &Flags, python: &Path, kits: &[Kit]) -> Vec<OsString> {
    let timeout = flags.global_timeout.map(|seconds| seconds.to_string());
    let junit = flags.junit_xml.clone().unwrap_or_default();
    let flags: [OsString; 7] = [
        flags.file.clone().into(),
        flags.output_dir.clone().into(),
        timeout.unwrap_or_default().into(),
        junit.into(),
        flags.log_level.clone().into(),
        if flags.open_vlans { "yes" } else { "" }.into(),
        if flags.from_boot { "yes" } else { "" }.into(),
    ];
    let kits = kits.iter().map(|kit| kit.dir.clone().into());
    python::execute(python, "firn.runner", flags.into_iter().chain(kits))
}
