//! The directories a test run keeps its state in, removed in the end.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tempfile::TempDir;

use crate::error::MachineError;

/// Where the machines of a run keep their state: below `TMPDIR`, or /tmp.
#[derive(Clone, Debug, Default)]
pub enum StatePlace {
    /// In a new directory, which is removed in the end.
    #[default]
    New,
    /// In `vm-state-NAME` for each machine, as NixOS tests have it. One run at a time can do that. What an earlier run
    /// left is removed, and in the end everything, unless it is kept.
    Named {
        /// Whether to go on with what is there, and to leave it there.
        keep: bool,
    },
    /// In this directory, which is the only machine's own, and is left there.
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
        let parent = std::env::temp_dir();
        match place {
            StatePlace::New => Scratch::new().map(Self::New),
            StatePlace::Named { keep } => Named::new(&parent, *keep).map(Self::Named),
            StatePlace::Of(dir) => Ok(Self::Of(dir.clone())),
        }
        .map_err(MachineError::file("keep state in", parent))
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::New(scratch) => scratch.path(),
            Self::Named(named) => &named.parent,
            Self::Of(dir) => dir,
        }
    }

    /// The directories of a machine: its own, the one that all share, and whether its own is kept.
    pub(crate) fn machine(
        &self,
        name: &str,
        keep: bool,
    ) -> Result<(PathBuf, PathBuf, bool), MachineError> {
        let own = self.path().join(format!("vm-state-{name}"));
        let shared = self.path().join(SHARED);
        let keep = match self {
            Self::New(_) => false,
            Self::Named(named) => named.enter(&own, keep)?,
            Self::Of(dir) => return Ok((dir.clone(), dir.join("xchg"), true)),
        };
        Ok((own, shared, keep))
    }
}

/// The directory that all machines share.
const SHARED: &str = "shared-xchg";
/// Locked as long as a run with named directories lives.
const NAMED_LOCK: &str = ".firn-run.lock";

/// Directories with names that everybody knows.
#[derive(Debug)]
pub(crate) struct Named {
    parent: PathBuf,
    keep: bool,
    /// What to remove in the end.
    entered: Mutex<Vec<PathBuf>>,
    _lock: File,
}

impl Named {
    fn new(parent: &Path, keep: bool) -> io::Result<Self> {
        let lock = lock_named(&parent.join(NAMED_LOCK))?;
        let named =
            Self { parent: parent.to_owned(), keep, entered: Mutex::default(), _lock: lock };
        if !keep {
            remove_if_there(&parent.join(SHARED))?;
        }
        Ok(named)
    }

    /// Makes ready a directory; answers whether it will be kept.
    fn enter(&self, dir: &Path, keep: bool) -> Result<bool, MachineError> {
        let keep = keep || self.keep;
        if !keep {
            remove_if_there(dir).map_err(MachineError::file("remove", dir))?;
            let mut entered = self.entered.lock().unwrap_or_else(PoisonError::into_inner);
            entered.push(dir.to_owned());
        }
        Ok(keep)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let entered = self.entered.get_mut().unwrap_or_else(PoisonError::into_inner);
        let shared = Some(self.parent.join(SHARED)).filter(|_| !self.keep);
        for dir in entered.iter().cloned().chain(shared) {
            // Nobody is left to tell.
            let _ = fs::remove_dir_all(dir);
        }
        let _ = fs::remove_file(self.parent.join(NAMED_LOCK));
    }
}

/// The lock file, held. The one who held it before may have removed it meanwhile.
fn lock_named(path: &Path) -> io::Result<File> {
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::other(
                    "another run of tests keeps its machines' state there; \
                     wait for it, or set TMPDIR to another directory",
                ));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let still_there = fs::symlink_metadata(path);
        if still_there.is_ok_and(|there| file.metadata().is_ok_and(|own| own.ino() == there.ino()))
        {
            return Ok(file);
        }
    }
}

fn remove_if_there(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// How such directories' names begin.
const PREFIX: &str = "firn-run-";
/// The file in it that is locked as long as its run lives.
const LOCK: &str = "lock";

/// A directory of its own for a run.
///
/// Dropping it removes it. A run that was killed by SIGKILL cannot do that; the kernel however releases
/// its lock, and the next run removes what it left.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
    _lock: File,
}

impl Scratch {
    /// Makes one in `TMPDIR`, or in /tmp, and removes those of dead runs.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new() -> io::Result<Self> {
        Self::new_in(&std::env::temp_dir())
    }

    fn new_in(parent: &Path) -> io::Result<Self> {
        sweep(parent);
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
        let lock = File::create_new(dir.path().join(LOCK))?;
        lock.lock()?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes the directories of runs that are dead. Others' directories fail to open or to be removed, and stay.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes())
            && is_dead(&entry.path())
        {
            tracing::debug!(path = %entry.path().display(), "removing what a killed run left");
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Without a lock file yet it is one that is being made.
fn is_dead(dir: &Path) -> bool {
    match File::open(dir.join(LOCK)) {
        Ok(lock) => {
            !matches!(lock.try_lock(), Err(TryLockError::WouldBlock | TryLockError::Error(_)))
                && aged(&lock)
        }
        Err(_) => false,
    }
}

/// Between a lock file's making and its locking lies a moment.
fn aged(lock: &File) -> bool {
    let age = lock.metadata().and_then(|meta| meta.modified()).map(|at| at.elapsed());
    matches!(age, Ok(Ok(age)) if age.as_secs() >= 5)
}

/// Makes a directory, and its parents.
pub(crate) fn make_dir(path: PathBuf) -> Result<PathBuf, MachineError> {
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(MachineError::file("make", path)(source)),
    }
}

#[cfg(test)]
mod tests {
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
        let kept = State::Named(Named::new(parent.path(), true).expect("made"));
        assert_eq!(
            kept.machine("a", false).expect("made"),
            (old.clone(), parent.path().join(SHARED), true)
        );
        let error = Named::new(parent.path(), false).expect_err("it is taken").to_string();
        assert!(error.contains("set TMPDIR"), "{error}");
        drop(kept);
        assert!(old.join("x").exists());
        let fresh = State::Named(Named::new(parent.path(), false).expect("free again"));
        assert!(!fresh.machine("a", false).expect("made").2 && !old.exists());
        fs::create_dir_all(&old).expect("made");
        assert!(fresh.machine("b", true).expect("made").2);
        let b = parent.path().join("vm-state-b");
        fs::create_dir(&b).expect("made");
        drop(fresh);
        let left = fs::read_dir(parent.path()).expect("readable").flatten().map(|e| e.path());
        assert_eq!(left.collect::<Vec<_>>(), [b], "what shall be kept, and no lock");
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
}
