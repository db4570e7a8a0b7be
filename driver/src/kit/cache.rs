//! The cache directory: who may change it, and how a directory appears in it all at once.

use std::env;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use super::KitError;
use crate::private::{self, Place};

/// How long a kit stays that nobody uses.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// `$XDG_CACHE_HOME/firn`.
pub(super) struct Cache {
    root: PathBuf,
}

/// The right to change the cache, held by one process at a time.
pub(super) struct Lock<'a> {
    cache: &'a Cache,
    _file: File,
}

impl Cache {
    /// The cache of this user, by the XDG base directory specification: a relative `XDG_CACHE_HOME` does not count.
    pub(super) fn of_user() -> Result<Self, KitError> {
        let absolute =
            |variable| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = || absolute("HOME").map(|home| home.join(".cache"));
        let base = absolute("XDG_CACHE_HOME").or_else(home).ok_or(KitError::NoCache)?;
        let root = base.join("firn");
        match Place::closed(&root).and_then(|place| place.close()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(KitError::Cache { path: root, reason: error })
            }
            _ => Ok(Self::at(root)),
        }
    }

    pub(super) const fn at(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn base_dir(&self, kit: &str, key: &str) -> PathBuf {
        self.root.join("base").join(format!("{kit}-{key}"))
    }

    pub(super) fn kit_dir(&self, kit: &str, key: &str) -> PathBuf {
        self.root.join("kits").join(format!("{kit}-{key}"))
    }

    pub(super) fn apt_dir(&self, suite: &str) -> PathBuf {
        self.root.join("apt").join(suite)
    }

    /// See [`crate::kernels`].
    pub(super) fn kernels_dir(&self) -> PathBuf {
        self.root.join("vmlinux")
    }

    fn staging_dir(&self) -> PathBuf {
        self.root.join("staging")
    }

    /// Takes the lock; calls `waiting` first if another process has it. What killed builds left behind is removed.
    pub(super) fn lock(&self, waiting: impl FnOnce()) -> Result<Lock<'_>, KitError> {
        private::make(&self.root)
            .map_err(|reason| KitError::Cache { path: self.root.clone(), reason })?;
        let path = self.root.join("lock");
        let file = File::create(&path).map_err(KitError::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(KitError::io("lock", &path))?;
            }
            Err(TryLockError::Error(source)) => return Err(KitError::io("lock", path)(source)),
        }
        let staging = self.staging_dir();
        remove_all(&staging)?;
        fs::create_dir(&staging).map_err(KitError::io("create", staging))?;
        Ok(Lock { cache: self, _file: file })
    }
}

impl Lock<'_> {
    /// An empty directory on the cache's file system. It vanishes when dropped.
    pub(super) fn staging(&self) -> Result<TempDir, KitError> {
        let parent = self.cache.staging_dir();
        Place::open(&parent)
            .and_then(|place| private::temporary(&place, ".tmp"))
            .map_err(KitError::io("create a directory in", parent))
    }

    /// Makes `staging` appear as `target`, in the place of what may be there.
    pub(super) fn publish(&self, staging: TempDir, target: &Path) -> Result<(), KitError> {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(KitError::io("create", parent))?;
        }
        if target.exists() {
            // Moved aside into staging, so that a kill in between leaves no half of it.
            let aside = self.staging()?;
            fs::rename(target, aside.path().join("old"))
                .map_err(KitError::io("replace", target))?;
        }
        let staged = staging.keep();
        fs::rename(&staged, target).map_err(KitError::io("rename to", target))
    }

    /// Removes the other kits of this name that were not used for [`KEEP`]. Each new agent makes a new kit.
    pub(super) fn prune_kits(&self, kit: &str, current: &Path) -> Result<(), KitError> {
        let Some(parent) = current.parent() else { return Ok(()) };
        let entries = fs::read_dir(parent).map_err(KitError::io("list", parent))?;
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

fn remove_all(path: &Path) -> Result<(), KitError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KitError::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Writes `value` as JSON.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), KitError> {
    let json = serde_json::to_vec_pretty(value)
        .map_err(|error| KitError::io("write", path)(error.into()))?;
    fs::write(path, json).map_err(KitError::io("write", path))
}

/// As [`write_json`], for a file that others may read meanwhile.
pub(super) fn replace_json(path: &Path, value: &impl Serialize) -> Result<(), KitError> {
    let parent = path.parent().unwrap_or(path);
    let file = tempfile::NamedTempFile::new_in(parent).map_err(KitError::io("write", path))?;
    write_json(file.path(), value)?;
    file.persist(path).map(drop).map_err(|error| KitError::io("replace", path)(error.error))
}

/// Reads what [`write_json`] wrote; `None` if there is no such file or it holds something else: both mean that there is
/// work to do.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, KitError> {
    match fs::read(path) {
        Ok(json) => Ok(serde_json::from_slice(&json).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(KitError::io("read", path)(error)),
    }
}
