//! Where viewers find the screens of machines in other processes, and how they are served.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn_vmm::socket::{Listener, connect_to};
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::private::Place;
use crate::scratch;

/// The socket in a machine's state directory that serves the Remote Framebuffer protocol (VNC), if it has a screen.
pub const SOCKET: &str = "vnc.sock";

/// The socket in a run's directory that leads to the machines of a run in a carrier. An empty line is answered with
/// their ids, a JSON list; an id connects to that machine.
pub const CARRIER_SOCKET: &str = "carrier.sock";

/// How long a carrier may take to list its machines: it may be busy.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause before accepting another client after an error.
const PAUSE: Duration = Duration::from_millis(40);
/// The longest list of machines, in bytes.
const MAX_LIST: u64 = 64 << 10;

/// A machine with a screen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    name: String,
    /// The distinctive part of its run's directory name.
    run: String,
    socket: PathBuf,
    /// Its id in its carrier, if it runs in one.
    inner: Option<String>,
}

impl Found {
    /// Its name, with its run's name if that has one.
    #[must_use]
    pub fn id(&self) -> String {
        match &*self.run {
            "" => self.name.clone(),
            run => format!("{} ({run})", self.name),
        }
    }

    /// Connects a viewer to it, with a non-blocking stream.
    ///
    /// # Errors
    /// If it has ended.
    pub fn connect(&self) -> io::Result<UnixStream> {
        let mut stream = connect_to(&self.socket)?;
        if let Some(id) = &self.inner {
            // A new stream's buffer has room for this.
            stream.write_all(format!("{id}\n").as_bytes())?;
        }
        Ok(stream)
    }
}

/// The machines with a screen whose state is in `dir`: TMPDIR, a run's directory, or a machine's. In a directory that
/// other users may write to, only this user's count.
///
/// # Errors
/// If the directory cannot be read.
pub fn find(dir: &Path) -> io::Result<Vec<Found>> {
    let place = Place::open(dir)?;
    let mut found = Vec::new();
    let own = place.path().file_name().and_then(scratch::machine_of).unwrap_or_default();
    add(&mut found, &own, "", place.path());
    add_carriers(&mut found, "", place.path());
    for (name, dir) in scratch::own_directories(&place)? {
        if let Some(machine) = scratch::machine_of(&name) {
            add(&mut found, &machine, "", &dir);
        } else if let Some(run) = scratch::run_of(&name) {
            // It may be about to be removed.
            let Ok(inner) = Place::open(&dir) else { continue };
            add_carriers(&mut found, &run, &dir);
            for (name, dir) in scratch::own_directories(&inner).unwrap_or_default() {
                if let Some(machine) = scratch::machine_of(&name) {
                    add(&mut found, &machine, &run, &dir);
                }
            }
        }
    }
    found.sort();
    Ok(found)
}

fn add(found: &mut Vec<Found>, name: &str, run: &str, dir: &Path) {
    let socket = dir.join(SOCKET);
    // The sockets of killed runs stay until the next run.
    if connect_to(&socket).is_ok() {
        found.push(Found { name: name.to_owned(), run: run.to_owned(), socket, inner: None });
    }
}

fn add_carriers(found: &mut Vec<Found>, run: &str, dir: &Path) {
    let socket = dir.join(CARRIER_SOCKET);
    let Ok(stream) = connect_to(&socket) else { return };
    let Ok(ids) = listed(stream) else { return };
    found.extend(ids.into_iter().map(|id| Found {
        name: id.clone(),
        run: run.to_owned(),
        socket: socket.clone(),
        inner: Some(id),
    }));
}

/// Asks a carrier for its machines.
fn listed(mut stream: UnixStream) -> io::Result<Vec<String>> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"\n")?;
    let mut list = String::new();
    BufReader::new(stream.take(MAX_LIST)).read_line(&mut list)?;
    Ok(serde_json::from_str(&list)?)
}

/// Serves viewers that connect to `listener`, at most `most` at once, each with `attend`, until it is dropped, which
/// disconnects them.
pub async fn serve<F>(listener: Listener, most: usize, attend: impl Fn(tokio::net::UnixStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let clients = match listener.try_clone().and_then(UnixListener::from_std) {
        Ok(clients) => clients,
        Err(error) => return tracing::debug!(%error, "viewers cannot connect"),
    };
    let mut viewers = JoinSet::new();
    loop {
        tokio::select! {
            accepted = clients.accept(), if viewers.len() < most => match accepted {
                Ok((stream, _)) => drop(viewers.spawn(attend(stream))),
                // Probably out of descriptors, which other viewers will free.
                Err(_) => sleep(PAUSE).await,
            },
            Some(_) = viewers.join_next() => {}
        }
    }
}
