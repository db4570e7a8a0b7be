//! The files of a report.

use std::fs;
use std::path::{Path, PathBuf};

use super::BenchError;
use super::report::Report;

impl Report {
    /// Reads the report of a subject that is to be compared with: a file, or the one of its name in a directory, if it has
    /// one.
    ///
    /// # Errors
    /// If it cannot be read, or is none.
    pub fn earlier(at: &Path, subject: &str) -> Result<Option<Self>, BenchError> {
        let within = at.join(format!("{subject}.json"));
        match at.is_dir() {
            true if !within.exists() => Ok(None),
            true => Self::read(&within).map(Some),
            false => Self::read(at).map(Some),
        }
    }

    /// Reads what [`Self::write`] wrote: SUBJECT.json.
    ///
    /// # Errors
    /// If it cannot be read, or is none.
    pub fn read(file: &Path) -> Result<Self, BenchError> {
        let text = fs::read(file).map_err(BenchError::file("read", file))?;
        serde_json::from_slice(&text)
            .map_err(|error| BenchError::file("read the report", file)(error.into()))
    }

    /// Writes SUBJECT.json and a chart, SUBJECT.svg, to a directory, which is created if it is missing.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, dir: &Path) -> Result<(), BenchError> {
        fs::create_dir_all(dir).map_err(BenchError::file("make", dir))?;
        let write = |file: PathBuf, text: String| {
            fs::write(&file, text).map_err(BenchError::file("write", &file))
        };
        let json = self.json().map_err(BenchError::file("write", dir))?;
        let chart = self.chart().map_err(BenchError::file("write", dir))?;
        write(dir.join(format!("{}.json", self.subject)), json)?;
        write(dir.join(format!("{}.svg", self.subject)), chart)
    }

    /// For programs, and for [`Self::read`].
    ///
    /// # Errors
    /// None in practice: it writes to memory.
    pub fn json(&self) -> std::io::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}
