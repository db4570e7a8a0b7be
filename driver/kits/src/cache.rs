//! The cache directory: locking it, and adding directories atomically.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use firn::kit::{self, KitError};
use firn::private::{self, Place};
use tempfile::TempDir;

use super::BuildError;

/// How long an unused kit is kept.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// `$XDG_CACHE_HOME/firn`.
pub(crate) struct Cache {
    root: PathBuf,
}

/// The lock on the cache, held by one process at a time.
pub(crate) struct Lock<'a> {
    cache: &'a Cache,
    _file: File,
}

impl Cache {
    /// Returns this user's cache.
    pub(crate) fn of_user() -> Result<Self, BuildError> {
        Ok(Self::at(kit::cache_dir()?))
    }

    pub(crate) const fn at(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn base_dir(&self, kit: &str, key: &str) -> PathBuf {
        self.root.join("base").join(format!("{kit}-{key}"))
    }

    pub(crate) fn kit_dir(&self, kit: &str, key: &str) -> PathBuf {
        self.root.join("kits").join(format!("{kit}-{key}"))
    }

    pub(crate) fn apt_dir(&self, suite: &str) -> PathBuf {
        self.root.join("apt").join(suite)
    }

    fn staging_dir(&self) -> PathBuf {
        self.root.join("staging")
    }

    /// Takes the lock; calls `waiting` first if another process holds it. Removes what killed builds left behind.
    pub(crate) fn lock(&self, waiting: impl FnOnce()) -> Result<Lock<'_>, BuildError> {
        private::make(&self.root)
            .map_err(|reason| KitError::Cache { path: self.root.clone(), reason })?;
        let path = self.root.join("lock");
        let file = File::create(&path).map_err(BuildError::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(BuildError::io("lock", &path))?;
            }
            Err(TryLockError::Error(source)) => return Err(BuildError::io("lock", path)(source)),
        }
        let staging = self.staging_dir();
        remove_all(&staging)?;
        fs::create_dir(&staging).map_err(BuildError::io("create", staging))?;
        Ok(Lock { cache: self, _file: file })
    }
}

impl Lock<'_> {
    /// An empty directory on the cache's file system, removed when dropped.
    pub(crate) fn staging(&self) -> Result<TempDir, BuildError> {
        let parent = self.cache.staging_dir();
        Place::open(&parent)
            .and_then(|place| private::temporary(&place, ".tmp"))
            .map_err(BuildError::io("create a directory in", parent))
    }

    /// Moves `staging` to `target`, replacing what is there.
    pub(crate) fn publish(&self, staging: TempDir, target: &Path) -> Result<(), BuildError> {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(BuildError::io("create", parent))?;
        }
        if target.exists() {
            // Moved aside into staging first, so that a kill leaves nothing half removed.
            let aside = self.staging()?;
            fs::rename(target, aside.path().join("old"))
                .map_err(BuildError::io("replace", target))?;
        }
        let staged = staging.keep();
        fs::rename(&staged, target).map_err(BuildError::io("rename to", target))
    }

    /// Removes other kits of this name that were not used for [`KEEP`]. Each new agent creates a new kit.
    pub(crate) fn prune_kits(&self, kit: &str, current: &Path) -> Result<(), BuildError> {
        let Some(parent) = current.parent() else { return Ok(()) };
        let entries = fs::read_dir(parent).map_err(BuildError::io("list", parent))?;
        for entry in entries.filter_map(Result::ok) {
            let path = entry.path();
            let ours = entry.file_name().to_string_lossy().starts_with(&format!("{kit}-"));
            let used =
                fs::metadata(path.join("manifest.json")).and_then(|manifest| manifest.modified());
            let age = used.map(|used| SystemTime::now().duration_since(used).unwrap_or_default());
            if ours && path != current && age.map_or(true, |age| age > KEEP) {
                remove_all(&path)?;
            }
        }
        Ok(())
    }
}

fn remove_all(path: &Path) -> Result<(), BuildError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(BuildError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}
