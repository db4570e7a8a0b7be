//! A test's networks, and how programs outside plug into them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use firn_net_switch::plugs::PlugDir;
use firn_net_switch::{Switch, SwitchPort};
use firn_vmm::socket::connect_to;
use firn_vmm::spec::Number;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::error::{MachineError, chain};
use crate::private::Place;
use crate::scratch::{self, Scratch};
use crate::viewers;

/// How the variables begin that tell start scripts for QEMU where to plug in; the vlan's number follows.
pub const SOCKET_VARIABLE: &str = "QEMU_VDE_SOCKET_";

/// The prefix of the names of vlans' directories.
const PREFIX: &str = "vlan";
/// The longest name of such a directory.
const LONGEST: &str = "vlan254";

/// A vlan: one virtual Ethernet segment. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Vlan {
    number: Number,
    switch: Switch,
    sockets: Arc<Sockets>,
}

impl Vlan {
    pub(crate) fn new(number: Number, sockets: &Arc<Sockets>) -> Self {
        let switch = Switch::new(format!("{PREFIX}{number}"));
        Self { number, switch, sockets: Arc::clone(sockets) }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> Number {
        self.number
    }

    /// Stops the network: from now on it forwards nothing.
    pub fn stop(&self) {
        self.switch.stop();
    }

    /// The directory through which programs outside plug in, such as QEMU and `vde_plug`: see [`PlugDir`]. Created on
    /// first use, and removed when the run ends.
    ///
    /// # Errors
    /// If it cannot be created, or the run is over.
    pub fn socket_dir(&self) -> Result<PathBuf, MachineError> {
        self.sockets.open(self.number, &self.switch)
    }

    pub(crate) fn switch(&self) -> &Switch {
        &self.switch
    }

    pub(crate) fn plug(&self, machine: &str) -> Arc<SwitchPort> {
        Arc::new(self.switch.add_port(machine))
    }
}

/// The directories through which programs outside plug into a run's vlans. They are in a directory of their own, because
/// the paths of sockets must be short, and because the next run removes what a killed one left there.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    open: BTreeMap<Number, PlugDir>,
    /// Dropped after what is in it.
    place: Option<Scratch>,
    closed: bool,
}

impl Sockets {
    fn open(&self, number: Number, switch: &Switch) -> Result<PathBuf, MachineError> {
        let mut state = self.state();
        let State { open, place, closed } = &mut *state;
        if *closed {
            return Err(MachineError::Usage("the run is over".to_owned()));
        }
        if let Some(there) = open.get(&number) {
            return Ok(there.path().to_owned());
        }
        let place = match place {
            Some(place) => place,
            None => place.insert(scratch()?),
        };
        let made = PlugDir::open(place.path().join(format!("{PREFIX}{number}")), switch);
        let made = made.map_err(|error| {
            MachineError::Usage(format!("vlan {number} cannot be opened: {}", chain(&error)))
        })?;
        Ok(open.entry(number).or_insert(made).path().to_owned())
    }

    /// Closes the directories of all other vlans.
    pub(crate) fn keep(&self, vlans: &[Vlan]) {
        self.state().open.retain(|number, _| vlans.iter().any(|vlan| vlan.number == *number));
    }

    /// Unplugs everything and removes the directories; no more are opened.
    pub(crate) fn close(&self) {
        *self.state() = State { closed: true, ..State::default() };
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where runs have such directories.
fn places() -> Vec<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let runtime = runtime.filter(|dir| dir.is_absolute());
    let mut places = vec![std::env::temp_dir()];
    places.extend(runtime.into_iter().chain([PathBuf::from("/tmp")]));
    places
}

/// A directory with a path that is short enough, in the first place where that is possible.
fn scratch() -> Result<Scratch, MachineError> {
    let mut failed = None;
    for place in places() {
        let made = Scratch::new_in(&place).and_then(|made| {
            match PlugDir::has_room(&made.path().join(LONGEST)) {
                true => Ok(made),
                false => Err(io::Error::other("its path is too long for sockets")),
            }
        });
        match made {
            Ok(made) => return Ok(made),
            Err(reason) => {
                failed.get_or_insert(MachineError::State { path: place, reason });
            }
        }
    }
    Err(failed.unwrap_or_else(|| MachineError::Usage("there is no place for sockets".to_owned())))
}

/// A vlan of a running test into which programs can plug.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Open {
    /// The run's directory.
    pub run: PathBuf,
    /// The vlan's number.
    pub number: u8,
    /// The directory to plug into.
    pub dir: PathBuf,
    /// The process that runs the test.
    pub process: i32,
}

/// What runs of this user can be plugged into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenVlans {
    /// Vlans, sorted by their directories.
    pub vlans: Vec<Open>,
    /// The directories of runs whose vlans are in a carrier, where nothing of this host can plug in.
    pub in_carriers: Vec<PathBuf>,
}

/// The vlans of running tests that programs can plug into: in the directory of one run, or in TMPDIR and wherever else
/// runs have such directories.
///
/// # Errors
/// If `dir` cannot be read.
pub fn find(dir: Option<&Path>) -> io::Result<OpenVlans> {
    let mut found = OpenVlans::default();
    match dir {
        Some(dir) => find_in(&Place::open(dir)?, &mut found)?,
        None => {
            // Where no run can be, none is.
            for place in places().iter().filter_map(|place| Place::open(place).ok()) {
                let _ = find_in(&place, &mut found);
            }
        }
    }
    found.vlans.sort();
    found.vlans.dedup();
    found.in_carriers.sort();
    found.in_carriers.dedup();
    Ok(found)
}

/// Looks into a run's directory and those in it.
fn find_in(place: &Place, found: &mut OpenVlans) -> io::Result<()> {
    look_into(place, found)?;
    for (name, dir) in scratch::own_directories(place)? {
        // It may be on its way out.
        if scratch::run_of(&name).is_some()
            && let Ok(run) = Place::open(&dir)
        {
            let _ = look_into(&run, found);
        }
    }
    Ok(())
}

fn look_into(run: &Place, found: &mut OpenVlans) -> io::Result<()> {
    let path = run.path();
    if connect_to(&path.join(viewers::CARRIER_SOCKET)).is_ok() {
        found.in_carriers.push(path.to_owned());
    }
    for name in fs::read_dir(path)?.flatten().map(|entry| entry.file_name()) {
        let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse().ok());
        if let Some(number) = number
            && run.open_own(&name).is_ok()
            && let dir = path.join(&name)
            // Those of killed runs stay until the next one.
            && let Ok(line) = connect_to(&PlugDir::control(&dir))
            && let Ok(peer) = getsockopt(&line, PeerCredentials)
        {
            found.vlans.push(Open { run: path.to_owned(), number, dir, process: peer.pid() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vlans(numbers: &[u64]) -> (Arc<Sockets>, Vec<Vlan>) {
        let sockets = Arc::default();
        let number = |number: &u64| Number::try_from(*number).expect("a vlan's number");
        let vlans = numbers.iter().map(|one| Vlan::new(number(one), &sockets)).collect();
        (sockets, vlans)
    }

    #[test]
    fn a_vlan_is_opened_once_found_and_closed() {
        let (sockets, vlans) = vlans(&[1, 254]);
        let dirs: Vec<_> = vlans.iter().map(|vlan| vlan.socket_dir().expect("opened")).collect();
        assert_eq!(vlans[0].socket_dir().expect("it is open"), dirs[0]);
        let run = dirs[0].parent().expect("it has one");
        let process = i32::try_from(std::process::id()).expect("a number");
        let found = find(Some(run)).expect("readable");
        let expected = dirs.iter().zip([1, 254]).map(|(dir, number)| Open {
            run: run.to_owned(),
            number,
            dir: dir.clone(),
            process,
        });
        assert_eq!(found.vlans, expected.collect::<Vec<_>>());
        let all = find(None).expect("readable");
        assert!(found.vlans.iter().all(|open| all.vlans.contains(open)), "{all:?}");

        sockets.keep(&vlans[1..]);
        assert!(!dirs[0].exists() && dirs[1].exists());
        sockets.close();
        assert!(!run.exists());
        let error = vlans[0].socket_dir().expect_err("closed").to_string();
        assert_eq!(error, "the run is over");
    }

    #[test]
    fn what_is_no_vlan_or_has_nobody_is_not_found() {
        let dir = tempfile::tempdir().expect("a temp dir");
        let run = dir.path().join("firn-run-x");
        for name in ["vlan1", "vlan300", "vlanx", "vm-state-a"] {
            fs::create_dir_all(run.join(name)).expect("made");
        }
        // A killed run's.
        drop(std::os::unix::net::UnixListener::bind(PlugDir::control(&run.join("vlan1"))));
        assert_eq!(find(Some(dir.path())).expect("readable"), OpenVlans::default());
        find(Some(&dir.path().join("none"))).expect_err("there is nothing");
    }
}
