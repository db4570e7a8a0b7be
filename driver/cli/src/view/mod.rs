//! `firn view`.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use firn::viewers;
use firn_carrier::signals::Signals;
use tokio::net::TcpListener;

use super::run::runtime;

mod pipe;
mod server;

/// View machines' screens in a browser, and use their keyboards and pointers
///
/// Shows the machines of all your runs as they come and go. A machine has a screen if its test asks for one (`screen =
/// "plain"`, enableOCR, or a script that takes screenshots), and always in interactive mode.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  firn view                      all machines, in the browser
  firn view --no-open            only print the address
  firn view /tmp/firn-run-x1y2   the machines of one run
  vncviewer /tmp/firn-run-x1y2/vm-state-machine/vnc.sock
                                 the same screen in any viewer that supports UNIX sockets

The page is served to this host only, and its address contains a secret. Ctrl-C ends it.")]
pub struct Args {
    /// A run's directory or a machine's state directory; by default, all in TMPDIR
    dir: Option<PathBuf>,
    /// Do not open a browser
    #[arg(long)]
    no_open: bool,
    /// The page's port; by default, a free one
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Connect standard input and output to the machine whose id is the first line of input, or list the machines
    #[arg(long, hide = true, conflicts_with_all = ["no_open", "port"])]
    pipe: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    if args.pipe {
        return pipe::run(&dir);
    }
    let machines = viewers::find(&dir)
        .with_context(|| format!("cannot look for machines in {}", dir.display()))?;
    if machines.is_empty() {
        eprintln!("no machine with a screen runs yet: the page will show them when they start");
    }
    let runtime = runtime()?;
    let code = runtime.block_on(async {
        let mut signals = Signals::new().context("cannot catch signals")?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, args.port)).await;
        let listener = listener.with_context(|| format!("cannot listen on port {}", args.port))?;
        let token = server::token()?;
        let address = format!("http://{}/?token={token}", listener.local_addr()?);
        println!("{address}");
        if !args.no_open
            && let Err(error) = open::that_detached(&address)
        {
            eprintln!("cannot open a browser ({error}): open the address yourself");
        }
        tokio::select! {
            served = server::serve(listener, dir, token) => served.map(|()| 0),
            number = signals.next() => Ok(u8::try_from(128 + number).unwrap_or(1)),
        }
    })?;
    runtime.shutdown_background();
    Ok(code.into())
}
