//! `firn ssh`.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use firn::private::Place;
use firn::ssh;

/// Open an ssh session in a machine as root, over its vsock
///
/// The machine needs a vsock: `vsock` in a test or machine file, or nixos-test-driver's --dump-vsocks. Its guest needs
/// an sshd that lets root in; systemd 256 and newer starts one on the vsock by itself.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  firn ssh ./vsock                       a shell
  firn ssh machine -- systemctl status   a command, in the machine of nixos-test-driver
  ssh -o ProxyUseFdpass=yes -o ProxyCommand='firn ssh --proxy ./vsock' root@machine

Where systemd 257 or newer is installed, `ssh root@vsock-mux//SOCKET` does the same.

Exit status: that of ssh.")]
pub struct Args {
    /// The machine: its vsock's socket, its state directory, or the name that its state directory in TMPDIR has
    machine: PathBuf,
    /// Act as ssh's ProxyCommand with ProxyUseFdpass: pass the connection to standard output
    #[arg(long, conflicts_with = "ssh")]
    proxy: bool,
    /// The guest's vsock port
    #[arg(long, default_value_t = ssh::PORT, requires = "proxy")]
    port: u32,
    /// A command to run in the guest; ssh options may come before it
    #[arg(last = true, value_name = "COMMAND")]
    ssh: Vec<OsString>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    // No option, and no other place if ssh changes its directory.
    let socket = std::path::absolute(find(&args.machine)?)?;
    if args.proxy {
        ssh::pass(&ssh::connect(&socket, args.port)?, io::stdout().as_fd())?;
        return Ok(ExitCode::SUCCESS);
    }
    let program = env::current_exe().context("cannot find this program")?;
    let error = ssh::command(&program, &socket).args(&args.ssh).exec();
    Err(error).context("cannot run ssh; is OpenSSH's client installed?")
}

/// The vsock socket of `machine`.
fn find(machine: &Path) -> Result<PathBuf> {
    if machine.is_dir() {
        return Ok(machine.join("vsock"));
    }
    let mut words = machine.components();
    if machine.exists() || words.next().is_none() || words.next().is_some() {
        return Ok(machine.to_owned());
    }
    let mut state = OsString::from("vm-state-");
    state.push(machine);
    let place = Place::open(&env::temp_dir()).context("cannot look for machines")?;
    let socket = place.path().join(&state).join("vsock");
    if let Err(error) = place.open_own(&state)
        && error.kind() != io::ErrorKind::NotFound
    {
        // Whoever made it could be the machine.
        return Err(error).with_context(|| format!("cannot enter {}", machine.display()));
    }
    if !socket.exists() {
        bail!("there is neither a socket {} nor {}", machine.display(), socket.display());
    }
    Ok(socket)
}
