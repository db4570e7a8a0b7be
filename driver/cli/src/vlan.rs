//! `firn vlan`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use firn::vlan;

/// List the networks of running tests that programs can plug into
///
/// Prints the directory of each vlan that is open: in interactive mode, with --open-vlans, and where a machine runs under
/// QEMU. Whoever plugs in becomes one more station. Frames are at most 1500 bytes long, without their headers.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  firn vlan                                    all of your runs
  vde_plug DIR                                 frames on standard input and output
  vde_plug2tap -s DIR tap0                     a network card of this host (as root)
  tcpdump -ni tap0                             what goes to all stations of the vlan
  qemu-system-x86_64 -netdev vde,id=n,sock=DIR -device virtio-net-pci,netdev=n ...
  qemu-system-x86_64 -netdev stream,id=n,server=off,addr.type=unix,addr.path=DIR/stream ...

Exit status: 1 if no vlan is open.")]
pub struct Args {
    /// A run's directory; by default, all runs
    dir: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let found = vlan::find(args.dir.as_deref()).with_context(|| {
        let dir = args.dir.clone().unwrap_or_default();
        format!("cannot look for vlans in {}", dir.display())
    })?;
    for open in &found.vlans {
        println!("vlan {} of process {}: {}", open.number, open.process, open.dir.display());
    }
    for run in &found.in_carriers {
        eprintln!(
            "a test ({}) runs in the carrier: only programs in there can plug into its vlans",
            run.display()
        );
    }
    if found.vlans.is_empty() {
        eprintln!("no vlan is open here: run a test with --open-vlans, or in interactive mode");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
