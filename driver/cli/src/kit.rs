//! `firn kit`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use firn::kit::{KitError, KitName};

/// Make guest kits: kernel, initrd and userland from Debian packages
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build a kit unless it is in the cache and intact; prints its directory
    ///
    /// apt downloads packages into the user's cache, without root. The network is needed the first time only.
    Build {
        /// `micro`, the default of machines; `systemd`, a Debian system laid out like NixOS; `desktop`, the same with an X
        /// server and a Wayland compositor; or `carrier`, which the carrier boots
        #[arg(value_parser = |name: &str| name.parse::<KitName>().map_err(|error: KitError| error.to_string()))]
        kit: KitName,
        /// Use Debian's newest packages
        #[arg(long)]
        update: bool,
    },
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let Command::Build { kit, update } = &args.command;
    let make = if *update { firn_kits::update } else { firn_kits::check };
    let kit = make(*kit, &|line| eprintln!("{line}"))?;
    println!("{}", kit.dir.display());
    Ok(ExitCode::SUCCESS)
}
