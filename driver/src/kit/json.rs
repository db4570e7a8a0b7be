//! The JSON files of a cache.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::KitError;

/// Writes `value` as JSON.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, value: &impl Serialize) -> Result<(), KitError> {
    let json = serde_json::to_vec_pretty(value)
        .map_err(|error| KitError::io("write", path)(error.into()))?;
    fs::write(path, json).map_err(KitError::io("write", path))
}

/// Like [`write`], for a file that others may read at the same time.
///
/// # Errors
/// If it cannot be written.
pub fn replace(path: &Path, value: &impl Serialize) -> Result<(), KitError> {
    let parent = path.parent().unwrap_or(path);
    let file = tempfile::NamedTempFile::new_in(parent).map_err(KitError::io("write", path))?;
    write(file.path(), value)?;
    file.persist(path).map(drop).map_err(|error| KitError::io("replace", path)(error.error))
}

/// Reads what [`write`] wrote; `None` if there is no such file or it holds something else: either way it has to be
/// written again.
///
/// # Errors
/// If the file exists and cannot be read.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, KitError> {
    match fs::read(path) {
        Ok(json) => Ok(serde_json::from_slice(&json).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(KitError::io("read", path)(error)),
    }
}
