//! The directory a test run keeps its state in, removed in the end.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

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
pub(crate) fn make_dir(path: PathBuf) -> Result<PathBuf, crate::error::MachineError> {
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(crate::error::MachineError::file("make", path)(source)),
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
