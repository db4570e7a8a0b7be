//! The directories that hold a test run's state, removed at the end.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::OFlag;

use crate::error::MachineError;
use crate::private::{self, DIR_MODE, FILE_MODE, Place};

/// Where the machines of a run keep their state: in `TMPDIR` or /tmp. No other user can read it.
#[derive(Clone, Debug, Default)]
pub enum StatePlace {
    /// In a new directory, which is removed at the end.
    #[default]
    New,
    /// In `vm-state-NAME` for each machine, as in NixOS tests. Only one run at a time can do this. What an earlier run
    /// left is removed first, and everything at the end, unless it is kept.
    Named {
        /// Whether to start from the existing state and keep it.
        keep: bool,
    },
    /// In this directory, for a run with one machine; it is kept. Only this user may write to it.
    Of(PathBuf),
}

/// The state of a run.
#[derive(Debug)]
pub(crate) enum State {
    New(Scratch),
    Named(Named),
    Of(PathBuf),
}

impl State {
    pub(crate) fn new(place: &StatePlace) -> Result<Self, MachineError> {
        let parent = match place {
            StatePlace::Of(dir) => dir.clone(),
            _ => std::env::temp_dir(),
        };
        match place {
            StatePlace::New => Scratch::new_in(&parent).map(Self::New),
            StatePlace::Named { keep } => Named::new(&parent, *keep).map(Self::Named),
            StatePlace::Of(dir) => own(dir).map(Self::Of),
        }
        .map_err(unusable(parent))
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::New(scratch) => scratch.path(),
            Self::Named(named) => named.place.path(),
            Self::Of(dir) => dir,
        }
    }

    /// Creates the directories of a machine: its own, the shared one, and whether its own is kept.
    pub(crate) fn machine(
        &self,
        name: &str,
        keep: bool,
    ) -> Result<(PathBuf, PathBuf, bool), MachineError> {
        let state = OsString::from(format!("{MACHINE_PREFIX}{name}"));
        let made = match self {
            Self::New(scratch) => private::make(&scratch.path().join(&state)).map(|()| false),
            Self::Named(named) => named.enter(&state, keep),
            Self::Of(dir) => {
                let exchange = dir.join("xchg");
                let made = private::make_for_guests(&exchange);
                return made.map(|()| (dir.clone(), exchange, true)).map_err(unusable(dir));
            }
        };
        let shared = self.path().join(SHARED);
        let keep = made
            .and_then(|keep| private::make(&shared).map(|()| keep))
            .map_err(unusable(self.path()))?;
        Ok((self.path().join(state), shared, keep))
    }
}

/// The error for a place that cannot hold state.
fn unusable(place: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> MachineError {
    let path = place.into();
    move |reason| MachineError::State { path, reason }
}

/// Opens `dir` if only this user may write to it, and creates it if missing.
fn own(dir: &Path) -> io::Result<PathBuf> {
    if !dir.exists() {
        private::make(dir)?;
    }
    Place::closed(dir).map(|place| place.path().to_owned())
}

/// The prefix of machines' directories.
const MACHINE_PREFIX: &str = "vm-state-";

/// Returns the machine whose state a directory of this name holds.
pub(crate) fn machine_of(name: &OsStr) -> Option<String> {
    name.to_str()?.strip_prefix(MACHINE_PREFIX).map(str::to_owned)
}

/// The variable part of the name of a run's directory.
pub(crate) fn run_of(name: &OsStr) -> Option<String> {
    name.to_str()?.strip_prefix(PREFIX).map(str::to_owned)
}

/// The directories of runs and machines in a place that belong to this user and that nobody else could write to.
pub(crate) fn own_directories(place: &Place) -> io::Result<Vec<(OsString, PathBuf)>> {
    let names = fs::read_dir(place.path())?.flatten().map(|entry| entry.file_name());
    let own = names
        .filter(|name| machine_of(name).is_some() || run_of(name).is_some())
        .filter(|name| place.open_own(name).is_ok());
    Ok(own.map(|name| (name.clone(), place.path().join(name))).collect())
}

/// The directory that all machines share.
const SHARED: &str = "shared-xchg";
/// Locked while a run with named directories lives.
const NAMED_LOCK: &str = ".firn-run.lock";

/// Directories with fixed names.
#[derive(Debug)]
pub(crate) struct Named {
    place: Place,
    keep: bool,
    /// What to remove at the end.
    entered: Mutex<Vec<OsString>>,
    _lock: File,
}

impl Named {
    fn new(parent: &Path, keep: bool) -> io::Result<Self> {
        let place = Place::open(parent)?;
        let lock = lock_named(&place)?;
        let named = Self { place, keep, entered: Mutex::default(), _lock: lock };
        if keep {
            named.reopen(SHARED.as_ref())?;
        } else {
            named.place.remove(SHARED.as_ref())?;
        }
        Ok(named)
    }

    /// Creates a directory; returns whether it will be kept.
    fn enter(&self, name: &OsStr, keep: bool) -> io::Result<bool> {
        let keep = keep || self.keep;
        if !keep {
            self.place.remove(name)?;
            let mut entered = self.entered.lock().unwrap_or_else(PoisonError::into_inner);
            entered.push(name.to_owned());
        }
        self.reopen(name)?;
        Ok(keep)
    }

    /// Creates a directory, or removes others' permissions on an existing one.
    fn reopen(&self, name: &OsStr) -> io::Result<()> {
        private::close(&self.place.make(name, DIR_MODE)?)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let entered =
            std::mem::take(self.entered.get_mut().unwrap_or_else(PoisonError::into_inner));
        let shared = Some(OsString::from(SHARED)).filter(|_| !self.keep);
        for name in entered.into_iter().chain(shared) {
            // There is nobody to report an error to.
            let _ = self.place.remove(&name);
        }
        let _ = fs::remove_file(self.place.entry(NAMED_LOCK.as_ref()));
    }
}

/// Locks the lock file. Its previous holder may have removed it meanwhile.
fn lock_named(place: &Place) -> io::Result<File> {
    loop {
        let file = place.open_file(NAMED_LOCK.as_ref())?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::other(
                    "another run of tests keeps its machines' state there; wait for it",
                ));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let still_there = fs::symlink_metadata(place.entry(NAMED_LOCK.as_ref()));
        if still_there.is_ok_and(|there| file.metadata().is_ok_and(|own| own.ino() == there.ino()))
        {
            return Ok(file);
        }
    }
}

/// The prefix of such directories.
const PREFIX: &str = "firn-run-";
/// The file in it that is locked while its run lives.
const LOCK: &str = "lock";

/// A run's own directory, which no other user can read.
///
/// Dropping it removes it. A run killed by SIGKILL cannot do that, but the kernel releases its lock, and the next run
/// removes what it left.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Creates one in `TMPDIR` or /tmp, and removes those of dead runs.
    ///
    /// # Errors
    /// If it cannot be created, or others could replace it there.
    pub fn new() -> io::Result<Self> {
        Self::new_in(&std::env::temp_dir())
    }

    /// As [`Self::new`], in `parent`.
    pub(crate) fn new_in(parent: &Path) -> io::Result<Self> {
        let place = Place::open(parent)?;
        sweep(&place);
        let dir = private::temporary(&place, PREFIX)?;
        let lock = File::options()
            .write(true)
            .create_new(true)
            .mode(FILE_MODE)
            .open(dir.path().join(LOCK))?;
        lock.lock()?;
        Ok(Self { dir: dir.keep(), _lock: lock })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // There is nobody to report an error to.
        let _ = private::remove(&self.dir);
    }
}

/// Removes the directories of this user's dead runs, without blocking.
fn sweep(place: &Place) {
    let Ok(entries) = fs::read_dir(place.path()) else { return };
    for name in entries.flatten().map(|entry| entry.file_name()) {
        if name.as_encoded_bytes().starts_with(PREFIX.as_bytes()) && is_dead(place, &name) {
            let path = place.path().join(&name);
            tracing::debug!(path = %path.display(), "removing the leftovers of a killed run");
            let _ = place.remove(&name);
        }
    }
}

fn is_dead(place: &Place, name: &OsStr) -> bool {
    let Ok(own) = place.open_own(name) else { return false };
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let lock = place.entry(name).join(LOCK);
    match File::options().read(true).custom_flags(flags.bits()).open(lock) {
        Ok(lock) => private::is_own_file(&lock) && lock.try_lock().is_ok() && aged(&lock),
        // It is being created, unless its creator was killed.
        Err(error) => error.kind() == io::ErrorKind::NotFound && aged(&own),
    }
}

/// Creating a directory, creating its lock and locking it are not one atomic step.
fn aged(file: &File) -> bool {
    let age = file.metadata().and_then(|meta| meta.modified()).map(|at| at.elapsed());
    matches!(age, Ok(Ok(age)) if age.as_secs() >= 5)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;
    use std::time::{Duration, SystemTime};

    use super::*;

    fn age(dir: &Path) {
        let lock = File::options().write(true).open(dir.join(LOCK)).expect("it is there");
        let past = SystemTime::now() - Duration::from_secs(60);
        lock.set_modified(past).expect("the file is ours");
    }

    #[test]
    fn named_directories() {
        let parent = tempfile::tempdir().expect("a temp dir");
        let old = parent.path().join("vm-state-a");
        fs::create_dir_all(old.join("x")).expect("made");
        let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode();
        let kept = State::Named(Named::new(parent.path(), true).expect("made"));
        assert_eq!(
            kept.machine("a", false).expect("made"),
            (old.clone(), parent.path().join(SHARED), true)
        );
        assert_eq!(mode(&old) & 0o777, 0o700, "it is closed to others");
        assert_eq!(mode(&parent.path().join(SHARED)) & 0o777, 0o700);
        let error = Named::new(parent.path(), false).expect_err("it is taken").to_string();
        assert!(error.contains("another run"), "{error}");
        drop(kept);
        assert!(old.join("x").exists());
        let fresh = State::Named(Named::new(parent.path(), false).expect("free again"));
        assert!(!fresh.machine("a", false).expect("made").2 && !old.join("x").exists());
        assert!(fresh.machine("b", true).expect("made").2);
        let b = parent.path().join("vm-state-b");
        drop(fresh);
        let left = fs::read_dir(parent.path()).expect("readable").flatten().map(|e| e.path());
        assert_eq!(left.collect::<Vec<_>>(), [b], "what is to be kept, and no lock");
    }

    #[test]
    fn removed_with_its_content() {
        let parent = tempfile::tempdir().expect("a temp dir");
        let scratch = Scratch::new_in(parent.path()).expect("made");
        fs::create_dir_all(scratch.path().join("a/b")).expect("made");
        drop(scratch);
        assert_eq!(fs::read_dir(parent.path()).expect("readable").count(), 0);
    }

    #[test]
    fn the_next_run_removes_what_a_killed_one_left() {
        let parent = tempfile::tempdir().expect("a temp dir");
        let dead = parent.path().join("firn-run-dead");
        fs::create_dir(&dead).expect("made");
        File::create(dead.join(LOCK)).expect("made");
        age(&dead);
        let other = parent.path().join("other");
        fs::create_dir(&other).expect("made");
        let alive = Scratch::new_in(parent.path()).expect("made");
        age(alive.path());
        assert!(!dead.exists());
        let second = Scratch::new_in(parent.path()).expect("made");
        assert!(alive.path().exists() && second.path().exists() && other.exists());
    }
    #[test]
    fn nothing_that_others_plant_keeps_a_run_waiting() {
        let parent = tempfile::tempdir().expect("a temp dir");
        let planted = parent.path().join("firn-run-planted");
        fs::create_dir(&planted).expect("made");
        let made = Command::new("mkfifo").arg(planted.join(LOCK)).status().expect("it can be run");
        assert!(made.success());
        fs::write(parent.path().join("firn-run-file"), "").expect("written");
        std::os::unix::fs::symlink("/etc", parent.path().join("firn-run-link")).expect("made");
        let scratch = Scratch::new_in(parent.path()).expect("made");
        assert!(planted.join(LOCK).exists() && scratch.path().exists());
        let fifo = parent.path().join(NAMED_LOCK);
        assert!(Command::new("mkfifo").arg(&fifo).status().expect("it can be run").success());
        Named::new(parent.path(), false).expect_err("no lock is a FIFO");
    }

    #[test]
    fn what_was_killed_before_it_had_a_lock_goes_too() {
        let parent = tempfile::tempdir().expect("a temp dir");
        let dead = parent.path().join("firn-run-dead");
        fs::create_dir(&dead).expect("made");
        let _young = Scratch::new_in(parent.path()).expect("made");
        assert!(dead.exists());
        let past = SystemTime::now() - Duration::from_secs(60);
        File::open(&dead).and_then(|dir| dir.set_modified(past)).expect("it is ours");
        let _second = Scratch::new_in(parent.path()).expect("made");
        assert!(!dead.exists());
    }

    #[test]
    fn a_directory_of_the_users_own_is_left_as_it_is() {
        let dir = tempfile::tempdir().expect("a temp dir");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("ours");
        let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode();
        let state = State::new(&StatePlace::Of(dir.path().to_owned())).expect("it is ours");
        let (own, exchange, keep) = state.machine("a", false).expect("made");
        assert_eq!((own.as_path(), keep), (dir.path(), true));
        assert_eq!((mode(dir.path()) & 0o777, mode(&exchange) & 0o777), (0o755, 0o700));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).expect("ours");
        let error = State::new(&StatePlace::Of(dir.path().to_owned())).expect_err("as /tmp");
        let expected = format!(
            "cannot keep state in {0}: {0} can be written to by other users; set TMPDIR to another \
             directory of yours",
            dir.path().display()
        );
        assert_eq!(error.to_string(), expected);
    }
}
