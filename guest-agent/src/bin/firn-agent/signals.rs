//! Signals as readable descriptors.
//!
//! Handlers write to sockets, rather than a signalfd reading blocked signals: commands inherit the signal mask, and
//! what is blocked here would stay blocked there.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use firn_guest_agent::protocol::Failure;
use nix::errno::Errno;
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM, SIGUSR2};
use signal_hook::low_level::pipe;

use crate::failure::Context;

/// Linux's number of the power-failure signal, which signal-hook does not name (x86 and ARM: 30).
const SIGPWR: i32 = nix::sys::signal::Signal::SIGPWR as i32;

/// The signals that the agent waits for.
pub struct Signals {
    /// A child has changed its state.
    pub child: UnixStream,
    /// As process 1: power off.
    pub power_off: Option<UnixStream>,
    /// As process 1: reboot. The kernel sends SIGINT to process 1 on ctrl-alt-delete.
    pub reboot: Option<UnixStream>,
}

impl Signals {
    /// Installs the handlers; those that end the system only if the agent is process 1.
    pub fn install(init: bool) -> Result<Self, Failure> {
        let power = [SIGTERM, SIGPWR, SIGUSR2];
        Ok(Self {
            child: listen(&[SIGCHLD])?,
            power_off: init.then(|| listen(&power)).transpose()?,
            reboot: init.then(|| listen(&[SIGINT])).transpose()?,
        })
    }
}

/// A stream that becomes readable on any of the signals.
pub fn listen(signals: &[i32]) -> Result<UnixStream, Failure> {
    let (reader, writer) = UnixStream::pair().context(|| "socket pair for signals".to_owned())?;
    reader.set_nonblocking(true).context(|| "socket for signals".to_owned())?;
    for &signal in signals {
        let writer = writer.try_clone().context(|| "socket for signals".to_owned())?;
        pipe::register(signal, writer).context(|| format!("handler of signal {signal}"))?;
    }
    Ok(reader)
}

/// Reads a descriptor until it is empty.
pub fn drain(fd: impl AsFd) {
    let mut bytes = [0; 256];
    loop {
        match nix::unistd::read(&fd, &mut bytes) {
            Ok(0) => return,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}
