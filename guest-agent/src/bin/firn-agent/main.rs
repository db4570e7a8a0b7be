//! firn's agent in the guest: runs commands and moves files for the driver.
//!
//! Started as process 1 it is the guest's init as well; otherwise it is a service. One thread waits for everything
//! with epoll: the port, the commands' pipes, signals and deadlines. It alone starts processes and reaps them, so a
//! process is always registered before its exit is looked for. Only file requests, which may block, have threads of
//! their own.
#![forbid(unsafe_code)]

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
mod watch;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;

use nix::sys::reboot::RebootMode;

use crate::agent::{Agent, Outcome};
use crate::port::Place;

const USAGE: &str = "\
usage: firn-agent [--port PATH | --connect SOCKET]
  --port PATH       serve a virtio port (default /dev/virtio-ports/org.firn.agent), waiting until it is there
  --connect SOCKET  connect to a UNIX socket and serve that until it is closed
  --version         print the version
As process 1 it sets the system up first: /etc/firn/modules, /etc/firn/boot.";

/// What the command line asks for.
enum Request {
    Serve(Place),
    Print(String),
}

fn parse(
    mut args: impl Iterator<Item = std::ffi::OsString>,
    init: bool,
) -> Result<Request, String> {
    let mut place = Place::default();
    while let Some(arg) = args.next() {
        let mut value =
            |name: &str| args.next().map(PathBuf::from).ok_or(format!("{name} needs a path"));
        match arg.to_str() {
            Some("--port") => place = Place::Port(value("--port")?),
            Some("--connect") => place = Place::Socket(value("--connect")?),
            Some("--version") => return Ok(Request::Print(env!("CARGO_PKG_VERSION").to_owned())),
            Some("--help") => return Ok(Request::Print(USAGE.to_owned())),
            // The kernel passes words of its command line that it does not know to process 1.
            _ if init => {}
            _ => return Err(format!("unknown argument {}\n{USAGE}", arg.display())),
        }
    }
    Ok(Request::Serve(place))
}

fn main() -> ExitCode {
    let init = std::process::id() == 1;
    let place = match parse(std::env::args_os().skip(1), init) {
        Ok(Request::Serve(place)) => place,
        Ok(Request::Print(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            eprintln!("firn-agent: {message}");
            return ExitCode::from(2);
        }
    };
    let result = catch_unwind(AssertUnwindSafe(|| serve(place, init)));
    let outcome = match result {
        Ok(Ok(outcome)) => Some(outcome),
        Ok(Err(message)) => {
            eprintln!("firn-agent: {message}");
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
                eprintln!("firn-agent: process 1 cannot go on, powering off");
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

fn serve(place: Place, init: bool) -> Result<Outcome, String> {
    let setup = if init { Some(init::set_up()) } else { None };
    Agent::new(place, setup).and_then(|mut agent| agent.run()).map_err(|failure| failure.message)
}
