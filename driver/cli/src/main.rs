//! The command `firn`.
//!
//! Each subcommand is a file here with `pub struct Args` (clap) and
//! `pub fn run(args: &Args) -> anyhow::Result<ExitCode>`.
#![forbid(unsafe_code)]

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};

use anstyle::AnsiColor;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Parser, Subcommand};
use firn::config::ConfigError;
use firn::error::chain;
use firn::log::{colours_wanted, printable};
use firn_carrier::accel::Accel;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::{Layer, fmt, layer::SubscriberExt, util::SubscriberInitExt};

mod bench;
mod cache;
mod carrier;
mod check;
mod doctor;
mod kit;
mod python;
mod run;
mod ssh;
mod test;
mod view;
mod vlan;

/// Runs tests that boot virtual machines and drive them from a Python script.
#[derive(Debug, Parser)]
#[command(
    name = "firn",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  firn doctor                          can tests run here? what is missing?
  firn kit build micro                 build the guest that tests boot by default (once)
  firn test tests/examples/ping/test.toml
  firn test -o results my-test.toml    the script's output files go to results/
  firn carrier exec -- cargo test      run a command where KVM works
  firn bench boot                      what does a boot cost?

A test is a TOML file:
  name = \"ping\"
  test_script = '''
  start_all()
  machine1.succeed(\"ping -c 1 machine2\")
  '''
  [nodes.machine1]
  [nodes.machine2]
  memory = 1024

Exit status: 0 success; 1 a test failed, or something is missing; 2 wrong usage, or an invalid
test file; 130 Ctrl-C; 143 SIGTERM, or the global timeout.

Environment: FIRN_PYTHON is the Python that runs scripts; FIRN_LOG sets what firn itself logs (for
example `debug` or `firn_vmm=trace`); NO_COLOR turns colours off; TMPDIR holds runs' state;
FIRN_WORLDS and FIRN_WORLDS_MIB say where booted worlds are kept, and how many: `firn cache --help`.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a test
    Test(test::Args),
    Run(run::Args),
    Ssh(ssh::Args),
    View(view::Args),
    Vlan(vlan::Args),
    Check(check::Args),
    /// Show what this host can do and what is missing
    Doctor(doctor::Args),
    Kit(kit::Args),
    Cache(cache::Args),
    Carrier(carrier::Args),
    Bench(bench::Args),
}

fn main() -> ExitCode {
    // Clap prints help and usage errors itself and exits with 0 or 2.
    let cli = Cli::parse();
    init_tracing();
    let done = match cli.command {
        Command::Test(args) => test::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Ssh(args) => ssh::run(&args),
        Command::View(args) => view::run(&args),
        Command::Vlan(args) => vlan::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Kit(args) => kit::run(&args),
        Command::Cache(args) => cache::run(&args),
        Command::Carrier(args) => carrier::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    done.unwrap_or_else(|error| report(&error))
}

/// The flag shared by all commands that run machines.
#[derive(Debug, clap::Args)]
struct Place {
    /// Where machines run
    #[arg(long, value_parser = accels(), default_value = Accel::Auto.as_str())]
    accel: Accel,
}

fn accels() -> impl TypedValueParser<Value = Accel> {
    let values = Accel::ALL.map(|accel| PossibleValue::new(accel.as_str()).help(accel.help()));
    PossibleValuesParser::new(values).try_map(|name| name.parse::<Accel>())
}

/// Replaces this process by the command. Returns only if that fails.
fn become_command(argv: &[OsString]) -> anyhow::Error {
    let Some((program, arguments)) = argv.split_first() else {
        return anyhow::Error::msg("there is no command to run");
    };
    let error = process::Command::new(program).args(arguments).exec();
    anyhow::Error::new(error).context(format!("cannot run {}", program.display()))
}

/// Prints an error and its causes once, and returns the exit status for it.
fn report(error: &anyhow::Error) -> ExitCode {
    let colours = colours_wanted(&io::stderr());
    let mut err = io::stderr().lock();
    if let Some(ConfigError::Invalid(report)) = error.downcast_ref() {
        let _ = writeln!(err, "{}", report.render(colours));
        return ExitCode::from(2);
    }
    let red = if colours { AnsiColor::Red.on_default().bold() } else { anstyle::Style::new() };
    let _ = writeln!(err, "{red}error{red:#}: {}", printable(&chain(error.as_ref())));
    ExitCode::from(if error.is::<ConfigError>() { 2 } else { 1 })
}

fn init_tracing() {
    let wanted = env::var("FIRN_LOG").ok().and_then(|text| text.parse().ok());
    let targets = wanted.unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN));
    let log = fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    // Somebody else has set one up already: no reason to stop.
    let _ = tracing_subscriber::registry().with(log.with_filter(targets)).try_init();
}

#[cfg(test)]
mod tests;
