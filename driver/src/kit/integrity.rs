//! Checks that the files of a kit are unchanged.
//!
//! Each file has a stamp. A file whose size and time match its stamp counts as unchanged; if only the time differs, as
//! after a copy, the hash decides.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::KitError;

/// The identity of a file when it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    size: u64,
    /// Seconds and nanoseconds since 1970.
    modified: (i64, i64),
    sha256: String,
}

/// How thoroughly files are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// By size and time.
    Quick,
    /// Every byte.
    Full,
}

/// Files by their paths relative to a directory.
pub type Stamps = BTreeMap<String, Stamp>;

/// The stamps of all files in `dir`, except those below the directory `except`.
///
/// # Errors
/// If a file cannot be read.
pub fn stamps(dir: &Path, except: Option<&Path>) -> Result<Stamps, KitError> {
    let mut found = Stamps::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(&at).map_err(KitError::io("list", &at))? {
            let entry = entry.map_err(KitError::io("list", &at))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(KitError::io("look at", &path))?;
            if kind.is_dir() && except != Some(&path) {
                dirs.push(path);
            } else if kind.is_file() {
                let stamp = stamp(&path).map_err(KitError::io("read", &path))?;
                let name = path.strip_prefix(dir).unwrap_or(&path);
                found.insert(name.to_string_lossy().into_owned(), stamp);
            }
        }
    }
    Ok(found)
}

/// Compares `files` in `dir` with their stamps, and updates the stamps' times. Returns whether any changed.
///
/// # Errors
/// If a file is damaged.
pub fn check<'a>(
    dir: &Path,
    files: impl Iterator<Item = (&'a String, &'a mut Stamp)>,
    look: Check,
) -> Result<bool, KitError> {
    let mut touched = false;
    for (name, stamp) in files {
        let path = dir.join(name);
        match stamp.compare(&path, look) {
            Ok(is_touched) => touched |= is_touched,
            Err(what) => return Err(KitError::Damaged { path, what }),
        }
    }
    Ok(touched)
}

impl Stamp {
    fn compare(&mut self, path: &Path, look: Check) -> Result<bool, String> {
        let meta = fs::metadata(path).map_err(|error| error.to_string())?;
        if !meta.is_file() || meta.len() != self.size {
            return Err(format!("it has {} bytes, and {} were written", meta.len(), self.size));
        }
        let touched = time(&meta) != self.modified;
        if touched || look == Check::Full {
            if stamp(path).map_err(|error| error.to_string())?.sha256 != self.sha256 {
                return Err("it is not what was written".to_owned());
            }
            self.modified = time(&meta);
        }
        Ok(touched)
    }
}

/// Formats bytes in hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn time(file: &Metadata) -> (i64, i64) {
    (file.mtime(), file.mtime_nsec())
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    io::copy(&mut file, &mut HashWriter(&mut hash))?;
    let meta = file.metadata()?;
    Ok(Stamp { size: meta.len(), modified: time(&meta), sha256: hex(&hash.finalize()) })
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
