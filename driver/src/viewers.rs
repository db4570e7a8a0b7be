//! Where viewers find the screens of machines that other processes run.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use firn_vmm::socket::connect_to;

use crate::private::Place;
use crate::scratch;

/// The socket in a machine's state directory at which it speaks the Remote Framebuffer protocol (VNC), if it has a
/// screen.
pub const SOCKET: &str = "vnc.sock";

/// A machine with a screen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    name: String,
    /// What is special in the name of its run's directory.
    run: String,
    socket: PathBuf,
}

impl Found {
    /// Its name, with that of its run where it has one.
    #[must_use]
    pub fn id(&self) -> String {
        match &*self.run {
            "" => self.name.clone(),
            run => format!("{} ({run})", self.name),
        }
    }

    /// Connects a viewer to it. The stream does not block.
    ///
    /// # Errors
    /// If it has ended.
    pub fn connect(&self) -> io::Result<UnixStream> {
        connect_to(&self.socket)
    }
}

/// The machines with a screen whose state is in `dir`: TMPDIR, the directory of a run, or that of one machine. In a
/// directory that other users write to, only this user's count.
///
/// # Errors
/// If the directory cannot be read.
pub fn find(dir: &Path) -> io::Result<Vec<Found>> {
    let place = Place::open(dir)?;
    let mut found = Vec::new();
    let own = place.path().file_name().and_then(scratch::machine_of).unwrap_or_default();
    add(&mut found, &own, "", place.path());
    for (name, dir) in own_directories(&place)? {
        if let Some(machine) = scratch::machine_of(&name) {
            add(&mut found, &machine, "", &dir);
        } else if let Some(run) = scratch::run_of(&name) {
            // It may be on its way out.
            let Ok(inner) = Place::open(&dir) else { continue };
            for (name, dir) in own_directories(&inner).unwrap_or_default() {
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
    // The sockets of runs that were killed stay until the next run.
    if connect_to(&socket).is_ok() {
        found.push(Found { name: name.to_owned(), run: run.to_owned(), socket });
    }
}

/// The directories in a place that belong to this user, and that nobody else can have put anything into.
fn own_directories(place: &Place) -> io::Result<Vec<(std::ffi::OsString, PathBuf)>> {
    let names = fs::read_dir(place.path())?.flatten().map(|entry| entry.file_name());
    let candidates = names.filter(|name: &std::ffi::OsString| {
        let name: &OsStr = name;
        scratch::machine_of(name).is_some() || scratch::run_of(name).is_some()
    });
    let own = candidates.filter(|name| place.open_own(name).is_ok());
    Ok(own.map(|name| (name.clone(), place.path().join(name))).collect())
}
