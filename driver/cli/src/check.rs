//! `firn check`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

use super::python;

/// Lint and type-check a test's script
///
/// Runs ruff and ty on the script with the machines' names and types, as the NixOS test framework does. Exits with 1
/// if they find anything.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The script; by default, the test's own
    script: Option<PathBuf>,
    /// The test: a TOML file, or the JSON file of `nixos-test-driver --config`
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let mut arguments: Vec<OsString> = vec!["--config".into(), args.config.clone().into()];
    if let Some(script) = &args.script {
        arguments.extend(["--".into(), script.clone().into()]);
    }
    let argv = python::execute(&python::locate()?, "firn.check", arguments);
    Err(super::become_command(&argv))
}
