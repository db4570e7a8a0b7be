//! firn's agent in the guest: runs commands and moves files for the driver.
//!
//! Started as process 1 it is the guest's init as well; otherwise it is a service. One thread waits for everything
//! with epoll: the port, the commands' pipes, signals and deadlines. It alone starts processes and reaps them, so a
//! process is always registered before its exit is handled. Only file requests, which may block, have threads of
//! their own.
#![forbid(unsafe_code)]

/// Prints to standard error, whatever has become of that: `eprintln!` would panic once the journal is gone.
macro_rules! complain {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stderr(), $($words)*).ok();
    }};
}

mod agent;
mod boot_timer;
mod exec;
mod failure;
mod files;
mod init;
mod outbox;
mod port;
mod power;
mod session;
mod signals;
mod spawn;
mod watch;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::sys::reboot::RebootMode;

use crate::agent::{Agent, Outcome};
use crate::port::Place;

/// How systemd recognizes an initrd (os-release(5)). Requests there have to be served before the system is up.
const INITRD: &str = "/etc/initrd-release";

const USAGE: &str = "\
usage: firn-agent [--port PATH | --connect SOCKET] [--console PATH] [--early]
  --port PATH       serve a virtio port (default /dev/virtio-ports/org.firn.agent), waiting until it is there
  --connect SOCKET  connect to a UNIX socket and serve that until it is closed
  --console PATH    where the standard error of commands goes (default: where the agent's does)
  --early           tell the host that the system may not be up yet; not in an initrd
  --version         print the version
As process 1 it sets the system up first: /etc/firn/modules, /etc/firn/boot.";

/// Options of the agent.
#[derive(Default)]
pub struct Options {
    /// The stream to the host.
    pub place: Place,
    /// Where the standard error of commands goes.
    pub console: Option<PathBuf>,
    /// Whether the system may not be up yet.
    pub early: bool,
}

/// What the command line asks for.
enum Request {
    Serve(Options),
    Print(String),
}

fn parse(
    mut args: impl Iterator<Item = std::ffi::OsString>,
    init: bool,
) -> Result<Request, String> {
    let mut options = Options::default();
    while let Some(arg) = args.next() {
        let mut value =
            |name: &str| args.next().map(PathBuf::from).ok_or(format!("{name} needs a path"));
        match arg.to_str() {
            Some("--port") => options.place = Place::Port(value("--port")?),
            Some("--connect") => options.place = Place::Socket(value("--connect")?),
            Some("--console") => options.console = Some(value("--console")?),
            Some("--early") => options.early = !Path::new(INITRD).exists(),
            Some("--version") => return Ok(Request::Print(env!("CARGO_PKG_VERSION").to_owned())),
            Some("--help") => return Ok(Request::Print(USAGE.to_owned())),
            // The kernel passes words of its command line that it does not know to process 1.
            _ if init => {}
            _ => return Err(format!("unknown argument {}\n{USAGE}", arg.display())),
        }
    }
    Ok(Request::Serve(options))
}

fn main() -> ExitCode {
    let init = std::process::id() == 1;
    let options = match parse(std::env::args_os().skip(1), init) {
        Ok(Request::Serve(options)) => options,
        Ok(Request::Print(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            complain!("firn-agent: {message}");
            return ExitCode::from(2);
        }
    };
    let result = catch_unwind(AssertUnwindSafe(|| serve(options, init)));
    let outcome = match result {
        Ok(Ok(outcome)) => Some(outcome),
        Ok(Err(message)) => {
            complain!("firn-agent: {message}");
            None
        }
        // The panic's message has been printed.
        Err(_) => None,
    };
    if init {
        // Were process 1 to return, the kernel would panic and hide the reason.
        let mode = match outcome {
            Some(Outcome::Reboot) => RebootMode::RB_AUTOBOOT,
            Some(Outcome::PowerOff) => RebootMode::RB_POWER_OFF,
            Some(Outcome::Disconnected) | None => {
                complain!("firn-agent: process 1 cannot go on, powering off");
                RebootMode::RB_POWER_OFF
            }
        };
        return power::end(mode);
    }
    match outcome {
        Some(_) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    }
}

fn serve(options: Options, init: bool) -> Result<Outcome, String> {
    let setup = if init { Some(init::set_up()) } else { None };
    Agent::new(options, setup).and_then(|mut agent| agent.run()).map_err(|failure| failure.message)
}
