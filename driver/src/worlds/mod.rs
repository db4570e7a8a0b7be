//! A cache of booted worlds: tests start from there instead of booting.
//!
//! ```text
//! $XDG_CACHE_HOME/firn/worlds/, or $FIRN_WORLDS/
//!   KEY/              an entry: manifest.json, and the files that it lists with sizes and checksums, read-only
//!   KEY.new/          one that is being written
//!   KEY.lock          locked by whoever writes it
//! ```
//!
//! An entry appears whole, by a rename, and is never written again. Its name is a hash of everything that the world
//! depends on; the manifest spells that out, so that a miss can say what has changed. Every byte is checked before an
//! entry is used. What killed processes leave is removed when the cache is opened the next time. Readers hold a shared
//! lock on the manifest, so that nobody removes what they read.
//!
//! A world can also be kept in a directory outside of the cache, such as a path of the Nix store: what an entry has, its
//! manifest written last. Nothing is locked, removed or written there once it is whole.
//!
//! Everything here blocks; async callers use `spawn_blocking`.

use std::env;
use std::fmt::{self, Display};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use thiserror::Error;

use crate::kit::{self, KitError};
use crate::private;

mod boot;
mod key;
mod manifest;
#[cfg(test)]
mod tests;
mod tree;

pub(crate) use key::Key;
use manifest::{FORMAT, MANIFEST, Manifest, Stamp};

/// Sets the directory.
pub const DIR_VARIABLE: &str = "FIRN_WORLDS";
/// Sets how many MiB all worlds may take.
pub const LIMIT_VARIABLE: &str = "FIRN_WORLDS_MIB";
/// How many they may take by default.
pub const DEFAULT_LIMIT_MIB: u64 = 8192;
/// Ends the name of an entry that is being written.
const NEW: &str = ".new";
/// Ends the name of its lock.
const LOCK: &str = ".lock";

/// Why the cache cannot be used.
#[derive(Debug, Error)]
pub enum WorldsError {
    /// There is no place for it.
    #[error(transparent)]
    Cache(#[from] KitError),
    /// The limit is no number.
    #[error("{LIMIT_VARIABLE} is {0:?}; allowed: a number of MiB")]
    Limit(String),
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It is larger than all worlds may be.
    #[error(
        "the world takes {needed} MiB, and all worlds may take {limit}: {LIMIT_VARIABLE} sets that"
    )]
    TooLarge {
        /// What it takes, in MiB.
        needed: u64,
        /// What there is, in MiB.
        limit: u64,
    },
    /// No world is called that.
    #[error("there is no world {0:?}; `firn cache` lists them")]
    NoSuchWorld(String),
    /// A world was to be kept among other files.
    #[error("{} is not empty; allowed: an empty directory, or one that is not there", .0.display())]
    NotEmpty(PathBuf),
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WorldsError {
    let path = path.to_owned();
    move |source| WorldsError::Io { action, path, source }
}

/// The cache.
#[derive(Clone, Debug)]
pub struct Worlds {
    dir: PathBuf,
    /// In bytes.
    limit: u64,
}

/// What there is for a key.
#[derive(Debug)]
pub(crate) enum Found {
    World(World),
    Nothing(Why),
}

/// Why there is no world to start from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// None of this test was kept.
    New,
    /// What the nearest one depends on has changed: this.
    Changed(String),
    /// It cannot be used: where it is, and what is wrong.
    Damaged(PathBuf, String),
}

impl Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::New => f.write_str("no world of this test has been kept"),
            Self::Changed(what) => f.write_str(what),
            Self::Damaged(path, what) => {
                write!(f, "the world kept in {} cannot be used: {what}", path.display())
            }
        }
    }
}

/// An entry, whose files are whole.
#[derive(Debug)]
pub(crate) struct World {
    dir: PathBuf,
    manifest: Manifest,
    /// Keeps others from removing it from the cache.
    _in_use: Option<File>,
}

impl World {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// Opens one that was kept in a directory outside of the cache, if it depends on all that `key` says.
    pub(crate) fn in_dir(dir: PathBuf, key: &Key) -> Found {
        let manifest = match Manifest::read(&dir) {
            Ok(manifest) if manifest.key != *key => {
                return Found::Nothing(Why::Changed(key.changes_since(&manifest.key)));
            }
            manifest => manifest.and_then(|manifest| manifest.check(&dir).map(|()| manifest)),
        };
        match manifest {
            Ok(manifest) => Found::World(Self { dir, manifest, _in_use: None }),
            Err(what) => Found::Nothing(Why::Damaged(dir, what)),
        }
    }

    /// How long the boot took that it saves.
    pub(crate) fn boot(&self) -> Duration {
        Duration::from_millis(self.manifest.boot_ms)
    }

    /// Opens a file of it for reading.
    pub(crate) fn open(&self, name: &str) -> io::Result<File> {
        match self.manifest.files.contains_key(name) {
            true => manifest::open(&self.dir.join(name)),
            false => Err(io::Error::new(io::ErrorKind::NotFound, format!("it has no {name}"))),
        }
    }
}

/// An entry, as `firn cache` shows it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The hash of what it depends on.
    pub id: String,
    /// The test's name.
    pub test: String,
    /// The machines' names.
    pub machines: Vec<String>,
    /// The space that it takes, in bytes.
    pub size: u64,
    /// When it was made.
    pub made: SystemTime,
    /// When it was used last.
    pub used: SystemTime,
}

impl Worlds {
    /// The user's: `$FIRN_WORLDS`, or `$XDG_CACHE_HOME/firn/worlds`.
    ///
    /// # Errors
    /// There is no place for it; the limit in the environment is no number.
    pub fn of_user() -> Result<Self, WorldsError> {
        let mib = match env::var_os(LIMIT_VARIABLE).filter(|text| !text.is_empty()) {
            None => DEFAULT_LIMIT_MIB,
            Some(text) => {
                let text = text.to_string_lossy();
                text.parse().map_err(|_| WorldsError::Limit(text.into_owned()))?
            }
        };
        let dir = match env::var_os(DIR_VARIABLE).filter(|dir| !dir.is_empty()) {
            Some(dir) => std::path::absolute(&dir).map_err(failed("find", Path::new(&dir)))?,
            None => kit::cache_dir()?.join("worlds"),
        };
        Ok(Self::at(dir, mib))
    }

    /// The one in `dir`, which may take so many MiB. Nobody else may be able to write to it.
    #[must_use]
    pub fn at(dir: PathBuf, limit_mib: u64) -> Self {
        Self { dir, limit: limit_mib.saturating_mul(1 << 20) }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// How much all worlds may take, in bytes.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Makes the directory if it is missing, and removes what killed processes left.
    ///
    /// # Errors
    /// It cannot be made; another user may write to it.
    pub fn prepare(&self) -> Result<(), WorldsError> {
        private::make(&self.dir).map_err(failed("make", &self.dir))?;
        for name in self.names()? {
            if let Some(id) = name.strip_suffix(LOCK).or_else(|| name.strip_suffix(NEW)) {
                // It removes what it finds, and itself.
                drop(self.lock(id));
            } else if !self.dir.join(&name).join(MANIFEST).exists() {
                // Somebody was removing it.
                let _ = private::remove_tree(&self.dir.join(&name));
            }
        }
        Ok(())
    }

    /// Looks for the world of a test that depends on all that `key` says.
    pub(crate) fn find(&self, test: &str, key: &Key) -> Found {
        let dir = self.dir.join(key.id());
        match Self::open(&dir, key) {
            Ok(Some(world)) => Found::World(world),
            Ok(None) => Found::Nothing(self.nearest(test, key)),
            Err(what) => Found::Nothing(Why::Damaged(dir, what)),
        }
    }

    fn open(dir: &Path, key: &Key) -> Result<Option<World>, String> {
        if !dir.exists() {
            return Ok(None);
        }
        let in_use = manifest::open(&dir.join(MANIFEST)).and_then(|file| {
            file.lock_shared()?;
            Ok(file)
        });
        let in_use = in_use.map_err(|error| format!("{MANIFEST}: {error}"))?;
        let manifest = Manifest::read(dir)?;
        if manifest.key != *key {
            return Err(format!("{MANIFEST}: it is that of another world"));
        }
        manifest.check(dir)?;
        // In a cache that is read-only, it is merely removed early.
        let _ = in_use.set_modified(SystemTime::now());
        Ok(Some(World { dir: dir.to_owned(), manifest, _in_use: Some(in_use) }))
    }

    /// What has changed since the entry of this test that is most like `key`.
    fn nearest(&self, test: &str, key: &Key) -> Why {
        let others = self.names().unwrap_or_default().into_iter();
        let others = others.filter_map(|name| Manifest::read(&self.dir.join(name)).ok());
        let nearest = others
            .filter(|manifest| manifest.test == test)
            .min_by_key(|manifest| (key.distance(&manifest.key), u64::MAX - manifest.made));
        nearest.map_or(Why::New, |manifest| Why::Changed(key.changes_since(&manifest.key)))
    }

    /// Removes the entry of `key`, which is of no use after all, unless it is in use.
    pub(crate) fn forget(&self, key: &Key) {
        if let Err(error) = self.remove(&key.id()) {
            tracing::debug!(%error, "a world of no use stays");
        }
    }

    /// Begins to write the entry of `key`; None if another process does already, or has done it.
    pub(crate) fn fill(&self, key: Key) -> Result<Option<Filling>, WorldsError> {
        self.prepare()?;
        let id = key.id();
        let Some(lock) = self.lock(&id)? else { return Ok(None) };
        let place = self.dir.join(&id);
        match Self::open(&place, &key) {
            Ok(Some(_)) => return Ok(None),
            Ok(None) => {}
            Err(_) => private::remove_tree(&place).map_err(failed("remove", &place))?,
        }
        let dir = lock.new.clone();
        private::make(&dir).map_err(failed("make", &dir))?;
        let entry = Entry { worlds: self.clone(), place, _lock: lock };
        Ok(Some(Filling { key, dir, entry: Some(entry) }))
    }

    /// Locks the place where an entry is written, and empties it; None if another process has it.
    fn lock(&self, id: &str) -> Result<Option<Lock>, WorldsError> {
        let path = self.dir.join(format!("{id}{LOCK}"));
        let locked = lock_file(&path).map_err(failed("lock", &path))?;
        let Some(file) = locked else { return Ok(None) };
        let lock = Lock { new: self.dir.join(format!("{id}{NEW}")), path, _file: file };
        lock.clean().map_err(failed("remove", &lock.new))?;
        Ok(Some(lock))
    }

    /// The entries, the last used first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, WorldsError> {
        let entry = |id: String| {
            let dir = self.dir.join(&id);
            let used = fs::metadata(dir.join(MANIFEST)).and_then(|meta| meta.modified()).ok()?;
            let of_unknown = |why| Manifest {
                format: FORMAT,
                test: format!("(unusable: {why})"),
                machines: Vec::new(),
                made: used.duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs()),
                boot_ms: 0,
                key: Key::default(),
                files: Default::default(),
            };
            let manifest = Manifest::read(&dir).unwrap_or_else(of_unknown);
            let made = UNIX_EPOCH.checked_add(Duration::from_secs(manifest.made)).unwrap_or(used);
            let Manifest { test, machines, .. } = manifest;
            Some(Listed { id, test, machines, size: space(&dir), made, used })
        };
        let names = self.names()?.into_iter().filter(|name| !name.ends_with(NEW));
        let mut entries: Vec<Listed> = names.filter_map(entry).collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.used));
        Ok(entries)
    }

    /// Removes the worlds of the tests of these names, or all; answers those that are gone and those that are in use.
    ///
    /// # Errors
    /// There is none of that name; they cannot be removed.
    pub fn clear(&self, names: &[String]) -> Result<(Vec<Listed>, Vec<Listed>), WorldsError> {
        self.prepare()?;
        let entries = self.list()?;
        let is = |entry: &Listed, name: &String| entry.test == *name || entry.id == *name;
        if let Some(name) = names.iter().find(|name| !entries.iter().any(|entry| is(entry, name))) {
            return Err(WorldsError::NoSuchWorld(name.clone()));
        }
        let (mut gone, mut in_use) = (Vec::new(), Vec::new());
        for entry in entries {
            if names.is_empty() || names.iter().any(|name| is(&entry, name)) {
                let removed = self.remove(&entry.id)?;
                if removed { gone.push(entry) } else { in_use.push(entry) }
            }
        }
        Ok((gone, in_use))
    }

    /// Removes those not used for the longest time until all but `keep` fit, and it does.
    fn prune(&self, keep: &str) -> Result<(), WorldsError> {
        let entries = self.list()?;
        let mut size: u64 = entries.iter().map(|entry| entry.size).sum();
        for entry in entries.iter().rev().filter(|entry| entry.id != keep) {
            if size <= self.limit {
                break;
            }
            if self.remove(&entry.id)? {
                size -= entry.size;
            }
        }
        Ok(())
    }

    /// Removes an entry; false if it is in use.
    fn remove(&self, id: &str) -> Result<bool, WorldsError> {
        let dir = self.dir.join(id);
        let path = dir.join(MANIFEST);
        let removed = manifest::open(&path).and_then(|file| match file.try_lock() {
            Ok(()) => {
                // First, so that nobody takes the rest for an entry.
                fs::remove_file(&path)?;
                private::remove_tree(&dir).map(|()| true)
            }
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(error)) => Err(error),
        });
        match removed {
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            removed => removed.map_err(failed("remove", &dir)),
        }
    }

    /// All names in the directory.
    fn names(&self) -> Result<Vec<String>, WorldsError> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed("list", &self.dir))?,
        };
        Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }
}

/// The lock of an entry that is being written. What is in its place goes with it.
#[derive(Debug)]
struct Lock {
    new: PathBuf,
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn clean(&self) -> io::Result<()> {
        match self.new.symlink_metadata() {
            Ok(_) => private::remove_tree(&self.new),
            Err(_) => Ok(()),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // There is nobody to report an error to; the next one that opens the cache tries again.
        if self.clean().is_ok() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes and locks a file; None if another process holds it.
fn lock_file(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        // Its previous holder may have removed it meanwhile.
        let there = fs::symlink_metadata(path);
        if there.is_ok_and(|there| file.metadata().is_ok_and(|own| own.ino() == there.ino())) {
            return Ok(Some(file));
        }
    }
}

/// A world that is being written. Dropped before [`Self::finish`], it leaves nothing in the cache, and nothing that is
/// taken for a world elsewhere.
#[derive(Debug)]
pub(crate) struct Filling {
    key: Key,
    /// Where it is written.
    dir: PathBuf,
    /// None outside of the cache.
    entry: Option<Entry>,
}

/// Where in the cache a world that is being written will be.
#[derive(Debug)]
struct Entry {
    worlds: Worlds,
    place: PathBuf,
    _lock: Lock,
}

impl Filling {
    /// Begins to write a world outside of the cache, to a directory that is empty or made.
    pub(crate) fn into_dir(dir: PathBuf, key: Key) -> Result<Self, WorldsError> {
        fs::create_dir_all(&dir).map_err(failed("make", &dir))?;
        let mut entries = fs::read_dir(&dir).map_err(failed("list", &dir))?;
        match entries.next() {
            Some(_) => Err(WorldsError::NotEmpty(dir)),
            None => Ok(Self { key, dir, entry: None }),
        }
    }

    /// Makes a file of it.
    pub(crate) fn create(&self, name: &str) -> io::Result<File> {
        match manifest::is_name(name) {
            true => File::create_new(self.dir.join(name)),
            false => Err(io::Error::other(format!("{name:?} is no name of a file"))),
        }
    }

    /// Puts it in its place; answers where that is. Others that are too many then go.
    pub(crate) fn finish(
        self,
        test: &str,
        machines: Vec<String>,
        boot: Duration,
    ) -> Result<PathBuf, WorldsError> {
        let read = failed("read", &self.dir);
        let files = fs::read_dir(&self.dir).and_then(|entries| {
            let stamp = |entry: io::Result<fs::DirEntry>| {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                // Machines map what cannot change, and copy what can.
                let mode = entry.metadata()?.mode() & 0o555;
                fs::set_permissions(entry.path(), Permissions::from_mode(mode))?;
                Ok((name, Stamp::of(&entry.path())?))
            };
            entries.map(stamp).collect::<io::Result<_>>()
        });
        let made = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let manifest = Manifest {
            format: FORMAT,
            test: test.to_owned(),
            machines,
            made: made.as_secs(),
            boot_ms: u64::try_from(boot.as_millis()).unwrap_or(u64::MAX),
            key: self.key.clone(),
            files: files.map_err(read)?,
        };
        let path = self.dir.join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest).map_err(io::Error::from);
        text.and_then(|text| private::write(&path, &text)).map_err(failed("write", &path))?;
        let Some(Entry { worlds, place, _lock }) = self.entry else { return Ok(self.dir) };
        let (needed, limit) = (space(&self.dir), worlds.limit);
        if needed > limit {
            return Err(WorldsError::TooLarge {
                needed: needed.div_ceil(1 << 20),
                limit: limit >> 20,
            });
        }
        fs::rename(&self.dir, &place).map_err(failed("make", &place))?;
        let id = place.file_name().unwrap_or_default().to_string_lossy();
        worlds.prune(&id)?;
        Ok(place)
    }
}

/// The space that the files in a directory take, in bytes.
fn space(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum()
}
