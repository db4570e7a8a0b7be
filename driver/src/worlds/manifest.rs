//! What an entry of the cache says of itself.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::File;
use std::hash::Hasher;
use std::io::{self, Read};
use std::num::NonZero;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path};
use std::sync::{Mutex, PoisonError};
use std::thread;

use firn_vmm::file;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::key::Key;

/// Its file. An entry without one is none.
pub(super) const MANIFEST: &str = "manifest.json";
/// The layout of entries.
pub(super) const FORMAT: u64 = 2;
/// The largest manifest that is read, in bytes.
const MAX_MANIFEST: u64 = 16 << 20;

/// An entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) format: u64,
    /// The test's name.
    pub(super) test: String,
    /// The machines' names.
    pub(super) machines: Vec<String>,
    /// When it was made, in seconds since 1970.
    pub(super) made: u64,
    /// How long the boot took, in milliseconds.
    pub(super) boot_ms: u64,
    /// What it depends on.
    pub(super) key: Key,
    /// The other files, by their names.
    pub(super) files: BTreeMap<String, Stamp>,
}

/// What a file held when it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stamp {
    size: u64,
    xxh3: String,
}

impl Stamp {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let mut hash = XxHash3_64::with_seed(0);
        let mut size = 0;
        file::read(&open(path)?, |part| {
            hash.write(part);
            size += part.len() as u64;
        })?;
        Ok(Self { size, xxh3: format!("{:016x}", hash.finish()) })
    }
}

impl Manifest {
    /// The manifest of the entry in `dir`.
    ///
    /// # Errors
    /// Why it cannot be used, in words.
    pub(super) fn read(dir: &Path) -> Result<Self, String> {
        let path = dir.join(MANIFEST);
        let text = open(&path).and_then(|file| {
            let mut text = Vec::new();
            file.take(MAX_MANIFEST).read_to_end(&mut text)?;
            Ok(text)
        });
        let text = text.map_err(|error| format!("{MANIFEST}: {error}"))?;
        Self::parse(&text)
    }

    fn parse(text: &[u8]) -> Result<Self, String> {
        /// What all layouts have.
        #[derive(Deserialize)]
        struct Any {
            format: u64,
        }
        let damaged = |error: serde_json::Error| format!("{MANIFEST}: {error}");
        let any: Any = serde_json::from_slice(text).map_err(damaged)?;
        if any.format != FORMAT {
            return Err(format!("it has format {}, this firn reads {FORMAT}", any.format));
        }
        let manifest: Self = serde_json::from_slice(text).map_err(damaged)?;
        match manifest.files.keys().find(|name| !is_name(name)) {
            Some(name) => Err(format!("{MANIFEST}: {name:?} is no name of a file")),
            None => Ok(manifest),
        }
    }

    /// Compares the files in `dir`, all at the same time, with what was written.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub(super) fn check(&self, dir: &Path) -> Result<(), String> {
        let check = |name: &String, stamp: &Stamp| {
            let now = Stamp::of(&dir.join(name)).map_err(|error| format!("{name}: {error}"))?;
            if now.size != stamp.size {
                return Err(format!(
                    "{name} has {} bytes, and {} were written",
                    now.size, stamp.size
                ));
            }
            match now == *stamp {
                true => Ok(()),
                false => Err(format!("{name} is not what was written")),
            }
        };
        let mut files: Vec<_> = self.files.iter().collect();
        // The large ones first.
        files.sort_by_key(|(_, stamp)| Reverse(stamp.size));
        let files = Mutex::new(files.into_iter());
        let next = || files.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while let Some((name, stamp)) = next() {
                check(name, stamp)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let more =
                thread::available_parallelism().map_or(1, NonZero::get).min(self.files.len());
            // Where there can be no more threads, this one does it all.
            let helpers =
                (1..more).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok());
            let helpers: Vec<_> = helpers.collect();
            let done = helpers.into_iter().map(|helper| {
                helper.join().unwrap_or_else(|_| Err("its check has panicked".to_owned()))
            });
            done.fold(work(), Result::and)
        })
    }
}

/// Whether it names a file in an entry: no path.
pub(super) fn is_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name && name != MANIFEST)
}

/// Opens a regular file for reading.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags.bits()).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no file")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        let mut key = Key::default();
        key.add("firn", "0.1.0");
        let stamp = Stamp { size: 5, xxh3: "0123456789abcdef".to_owned() };
        Manifest {
            format: FORMAT,
            test: "ping".to_owned(),
            machines: vec!["a".to_owned()],
            made: 1,
            boot_ms: 2000,
            key,
            files: [("a.memory".to_owned(), stamp)].into(),
        }
    }

    #[test]
    fn only_names_are_names() {
        assert!(["a", "a.memory", "..a"].into_iter().all(is_name));
        for other in ["", ".", "..", "/", "/a", "a/b", "a/", "./a", "../a", MANIFEST] {
            assert!(!is_name(other), "{other}");
        }
        let mut bad = manifest();
        let stamp = Stamp { size: 0, xxh3: String::new() };
        bad.files.insert("../../etc/passwd".to_owned(), stamp);
        let text = serde_json::to_vec(&bad).unwrap();
        assert!(Manifest::parse(&text).unwrap_err().contains("is no name of a file"));
    }

    proptest! {
        /// A damaged manifest is refused, or says what it said: nothing else.
        #[test]
        fn damage_is_survived(at in any::<prop::sample::Index>(), byte: u8, cut: bool) {
            let good = manifest();
            let mut text = serde_json::to_vec(&good).unwrap();
            let at = at.index(text.len());
            if cut { text.truncate(at) } else { text[at] = byte }
            match Manifest::parse(&text) {
                Ok(read) => {
                    prop_assert!(!cut, "cut short, and used");
                    prop_assert!(read.files.keys().all(|name| is_name(name)));
                }
                Err(why) => prop_assert!(!why.is_empty()),
            }
        }
    }
}
