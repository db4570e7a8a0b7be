//! What scripts give to a machine's methods, and get from them.

use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyString, PyTuple};

use crate::duration::Timeout;
use firn::error::{MachineError, Result};

/// The default timeout of calls that wait.
pub(super) const DEFAULT: Timeout = Timeout(firn::machine::DEFAULT_TIMEOUT);

pub(super) fn seconds(timeout: Option<Timeout>) -> Option<Duration> {
    timeout.map(|timeout| timeout.0)
}

/// `pathlib.Path`, as upstream's attributes have it.
pub(super) fn path(py: Python<'_>, path: PathBuf) -> PyResult<Py<PyAny>> {
    Ok(py.import("pathlib")?.call_method1("Path", PyTuple::new(py, [path])?)?.unbind())
}

/// A port number, or a string of one.
#[derive(Clone, Copy)]
pub(super) struct Port(pub(super) u16);

impl FromPyObject<'_, '_> for Port {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let wrong =
            || PyTypeError::new_err("a port is a number from 0 to 65535, or a string of one");
        if let Ok(text) = value.cast::<PyString>() {
            let text = text.to_str()?;
            let wrong = |_| PyValueError::new_err(format!("{text:?} is not a port"));
            return text.trim().parse().map(Self).map_err(wrong);
        }
        match value.is_instance_of::<PyInt>() && !value.is_instance_of::<PyBool>() {
            true => value.extract().map(Self),
            false => Err(wrong()),
        }
    }
}

/// A path in the guest: a string, which its shell may expand, or a `pathlib.Path`.
pub(super) struct GuestPath(String);

impl FromPyObject<'_, '_> for GuestPath {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let text = value.py().import("os")?.call_method1("fspath", (value,))?;
        Ok(Self(text.extract()?))
    }
}

impl Deref for GuestPath {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// The number of a virtual terminal, or a string of one.
pub(super) struct Tty(String);

impl FromPyObject<'_, '_> for Tty {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        match value.is_instance_of::<PyString>() || value.is_instance_of::<PyInt>() {
            true => Ok(Self(value.str()?.extract()?)),
            false => Err(PyTypeError::new_err("a terminal is a number, or a string of one")),
        }
    }
}

impl Deref for Tty {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

/// A regular expression of Python's `re`; Rust's have another syntax.
pub(super) struct Pattern {
    pub(super) shown: String,
    search: Py<PyAny>,
}

impl Pattern {
    pub(super) fn new(py: Python<'_>, regex: &Bound<'_, PyAny>) -> PyResult<Self> {
        let pattern = py.import("re")?.call_method1("compile", (regex,))?;
        let shown = pattern.getattr("pattern")?.str()?.extract()?;
        Ok(Self { shown, search: pattern.getattr("search")?.unbind() })
    }

    /// Byte offset of the match's end in the text.
    pub(super) fn end_in(&self, text: &str) -> Result<Option<usize>> {
        let find = |py: Python<'_>| {
            let found = self.search.bind(py).call1((text,))?;
            if found.is_none() {
                return Ok(None);
            }
            let end: usize = found.call_method0("end")?.extract()?;
            // Python counts characters.
            Ok(Some(text.char_indices().nth(end).map_or(text.len(), |(at, _)| at)))
        };
        Python::attach(find).map_err(|e: PyErr| {
            MachineError::Usage(format!("cannot search for {}: {e}", self.shown)).into()
        })
    }
}
