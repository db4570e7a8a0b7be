//! ssh into machines over their vsocks.
//!
//! The monitor listens on a UNIX socket: a client that sends `CONNECT PORT` is connected to that port of the guest.
//! systemd's ssh proxy supports that as `vsock-mux/SOCKET` from version 257 on; [`command`] and [`connect`] do not need
//! it.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use thiserror::Error;

use crate::error::{MachineError, Result as MachineResult};
use crate::machine::Machine;

/// The port on which sshd listens, on vsocks as elsewhere.
pub const PORT: u32 = 22;

/// Where distributions install systemd's proxy, along with the ssh configuration that uses it.
const PROXIES: [&str; 2] = [
    "/usr/lib/systemd/systemd-ssh-proxy",
    "/run/current-system/systemd/lib/systemd/systemd-ssh-proxy",
];

/// The machine or its guest answers at once; a paused guest does not.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest reply to `CONNECT`, in bytes: `OK ` and a port.
const MAX_ANSWER: usize = 32;

/// Why connecting failed.
#[derive(Debug, Error)]
pub enum SshError {
    /// The machine is not running, or the file is not its socket.
    #[error("cannot connect to {socket}")]
    Connect {
        /// The machine's socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest does not listen on the port.
    #[error("{socket}: nothing listens on port {port} of the guest (yet)")]
    Refused {
        /// The machine's socket.
        socket: PathBuf,
        /// The guest's port.
        port: u32,
    },
    /// The other end of standard output does not accept file descriptors.
    #[error("cannot pass the connection to ssh; is `ProxyUseFdpass yes` set?")]
    Pass(#[source] io::Error),
}

/// Returns the command line, for a person to type, that opens an ssh session in the machine with this socket.
#[must_use]
pub fn command_line(socket: &Path) -> String {
    if PROXIES.iter().any(|proxy| Path::new(proxy).exists()) {
        format!("ssh -o User=root vsock-mux/{}", socket.display())
    } else {
        format!("firn ssh {}", socket.display())
    }
}

impl Machine {
    /// Returns the command line, for a person to type, that opens an ssh session in it.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if it has no vsock.
    pub fn ssh_backdoor_command(&self) -> MachineResult<String> {
        let node = self.config();
        if let Some(vsock) = &node.vsock {
            return Ok(command_line(&vsock.socket));
        }
        match node.own_vsock() {
            Some(cid) => Ok(format!("ssh -o User=root vsock/{cid}")),
            None => {
                let what = format!("{} has no vsock for ssh", self.name());
                Err(MachineError::Usage(what).into())
            }
        }
    }
}

/// Returns the command for ssh as root into the machine with this socket; `program` is firn.
#[must_use]
pub fn command(program: &Path, socket: &Path) -> Command {
    let mut ssh = Command::new("ssh");
    // A machine's host key changes with each run, so it is not remembered.
    for option in [
        "User=root",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "GlobalKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        "ProxyUseFdpass=yes",
    ] {
        ssh.args(["-o", option]);
    }
    // ssh runs it through the shell, with `exec`.
    let mut proxy = b"ProxyCommand=".to_vec();
    proxy.extend(word(program));
    proxy.extend_from_slice(b" ssh --proxy --port %p ");
    proxy.extend(word(socket));
    ssh.arg("-o").arg(OsString::from_vec(proxy));
    ssh.args(["-p", &PORT.to_string(), "firn-vsock"]);
    ssh
}

/// Quotes a path for the shell, with ssh's `%` tokens escaped.
fn word(path: &Path) -> Vec<u8> {
    let mut word = vec![b'\''];
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'\'' => word.extend_from_slice(br"'\''"),
            b'%' => word.extend_from_slice(b"%%"),
            byte => word.push(*byte),
        }
    }
    word.push(b'\'');
    word
}

/// Connects to a port of the guest.
///
/// # Errors
/// If the machine is not running, or nothing listens on the port.
pub fn connect(socket: &Path, port: u32) -> Result<UnixStream, SshError> {
    let failed = |source| SshError::Connect { socket: socket.to_owned(), source };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(failed)?;
    // What follows the line belongs to the guest's stream and must not be consumed here.
    let mut reader = BufReader::with_capacity(1, &stream);
    let mut answer = Vec::new();
    while answer.len() < MAX_ANSWER && !answer.ends_with(b"\n") {
        match reader.fill_buf() {
            Ok([]) => break,
            Ok(bytes) => answer.extend_from_slice(bytes),
            // It was closed with our line unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => return Err(failed(error)),
        }
        reader.consume(1);
    }
    if !(answer.starts_with(b"OK ") && answer.ends_with(b"\n")) {
        return Err(SshError::Refused { socket: socket.to_owned(), port });
    }
    stream.set_read_timeout(None).map_err(failed)?;
    Ok(stream)
}

/// Passes a connection over the socket `to`, as ssh with `ProxyUseFdpass` expects.
///
/// # Errors
/// If `to` is not a UNIX socket.
pub fn pass(connection: &UnixStream, to: BorrowedFd<'_>) -> Result<(), SshError> {
    let descriptors = [connection.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&descriptors)];
    // An empty message would not be delivered (`man 7 unix`).
    let byte = [IoSlice::new(&[0])];
    sendmsg::<()>(to.as_raw_fd(), &byte, &message, MsgFlags::empty(), None)
        .map_err(|errno| SshError::Pass(errno.into()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// Connects to a machine that gives this answer; also returns the request.
    fn asked(answer: &'static [u8]) -> (Result<UnixStream, SshError>, String) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let machine = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::with_capacity(1, &stream).read_line(&mut line).unwrap();
            (&stream).write_all(answer).unwrap();
            line
        });
        let connection = connect(&socket, 22);
        (connection, machine.join().unwrap())
    }

    #[test]
    fn the_guests_first_bytes_are_not_taken() {
        let (connection, line) = asked(b"OK 1073741824\nSSH-2.0-");
        assert_eq!(line, "CONNECT 22\n");
        let mut text = String::new();
        connection.unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "SSH-2.0-");
    }

    #[test]
    fn refusals() {
        for answer in [&b""[..], b"OK", b"NO 1\n", &[b'x'; 10_000]] {
            let (connection, _) = asked(answer);
            assert!(matches!(connection, Err(SshError::Refused { port: 22, .. })), "{answer:?}");
        }
        let none = connect(Path::new("/nonexistent"), 22);
        assert!(matches!(none, Err(SshError::Connect { .. })), "{none:?}");
    }

    #[test]
    fn descriptors_need_a_socket() {
        let (connection, mut far) = UnixStream::pair().unwrap();
        let (ssh, ours) = UnixStream::pair().unwrap();
        pass(&connection, ours.as_fd()).unwrap();
        drop((connection, ours));
        let mut byte = [1];
        // The descriptor in the message, the last one of its end, is closed with it as nobody received it.
        (&ssh).read_exact(&mut byte).unwrap();
        assert_eq!((byte, far.read(&mut [0]).unwrap()), ([0], 0));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(pass(&far, file.as_fd()), Err(SshError::Pass(_))));
    }

    #[test]
    fn odd_paths_survive_the_shell_and_ssh() {
        let command = command(Path::new("/a b/firn"), Path::new("/it's 100%/$HOME"));
        let arguments: Vec<_> = command.get_args().map(|word| word.to_str().unwrap()).collect();
        let proxy = r"ProxyCommand='/a b/firn' ssh --proxy --port %p '/it'\''s 100%%/$HOME'";
        assert!(arguments.contains(&proxy), "{arguments:?}");
    }
}
