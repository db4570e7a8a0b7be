//! `firn carrier`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Subcommand, value_parser};
use firn_carrier::Options;
use firn_carrier::accel::Accel;

/// Run commands in an emulated machine where KVM works, on hosts without a usable KVM
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command of this host in a new carrier
    ///
    /// The command sees this host's files. It can write to the working directory and to those that --writable names; what
    /// it writes to /tmp, /run and /dev/shm stays inside. It has /dev/kvm and no network. Its output, input and exit status
    /// are passed on.
    Exec(Exec),
}

#[derive(Debug, clap::Args)]
struct Exec {
    /// The carrier's memory in MiB; by default what this host can spare, at most 9216
    #[arg(long, value_name = "MIB", value_parser = value_parser!(u64).range(512..))]
    memory: Option<u64>,
    /// The carrier's processors; with more than one, QEMU 7.2 corrupts guests under load
    #[arg(long, default_value = "1", value_parser = value_parser!(u32).range(1..=255), conflicts_with = "exact")]
    cores: Option<u32>,
    /// Make the carrier's clock count executed instructions, 1 ns each: slower, but repeatable
    #[arg(long)]
    exact: bool,
    /// A directory that the command may write to, besides the working directory
    #[arg(long, value_name = "DIR")]
    writable: Vec<PathBuf>,
    /// Run the command directly on this host if its KVM works
    #[arg(long)]
    if_needed: bool,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let Command::Exec(args) = &args.command;
    let accel = if args.if_needed { Accel::Auto } else { Accel::Carrier };
    if accel.runs_here()? {
        return Err(super::become_command(&args.command));
    }
    let options = Options {
        viewers: None,
        memory_mib: args.memory,
        cores: args.cores,
        exact: args.exact,
        writable: args.writable.clone(),
        terminal: false,
    };
    Ok(firn_carrier::exec(&options, args.command.clone())?.into())
}
