//! What of a directory's top guests see, where that is not all.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::tree::plain;

/// The names at the top of a directory that are there for guests. All are without a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filter(Option<Arc<BTreeSet<Box<CStr>>>>);

impl Filter {
    /// Reads a list of what is to be seen in `source`: on each line a name, or a path directly below it.
    pub(crate) fn read(list: &Path, source: &Path) -> io::Result<Filter> {
        let bytes = fs::read(list)?;
        let lines = bytes.split(|byte| *byte == b'\n').enumerate();
        let names = lines.filter(|(_, line)| !line.is_empty()).map(|(at, line)| {
            name(line, source.as_os_str().as_bytes()).ok_or_else(|| {
                let (line, source) = (String::from_utf8_lossy(line), source.display());
                let allowed = format!("a name in {source}, or its path there");
                io::Error::other(format!("line {}: {line:?}; allowed: {allowed}", at + 1))
            })
        });
        Ok(Filter(Some(Arc::new(names.collect::<io::Result<_>>()?))))
    }

    /// Whether guests see the file of this name at the top.
    pub(crate) fn shows(&self, name: &CStr) -> bool {
        self.0.as_ref().is_none_or(|names| names.contains(name))
    }

    /// The names that may be there; None for those that the host has.
    pub(crate) fn names(&self) -> Option<&BTreeSet<Box<CStr>>> {
        self.0.as_deref()
    }
}

/// The name that a line means.
fn name(line: &[u8], source: &[u8]) -> Option<Box<CStr>> {
    let below = || line.strip_prefix(source)?.strip_prefix(b"/");
    let name = if line.contains(&b'/') { below()? } else { line };
    let name = CString::new(name).ok()?;
    plain(&name).ok()?;
    Some(name.into_boxed_c_str())
}
