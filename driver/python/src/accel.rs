//! Where machines run, in Python.

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;

use firn::error::chain;
use firn_carrier::Options;
use firn_carrier::accel::{Accel, run_again};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// Runs `argv` in a carrier that can write to `writable` and returns its exit status; does nothing if machines can run
/// here. `accel` is auto, kvm or carrier. With `terminal` the command receives each key as it is typed.
#[pyfunction]
#[pyo3(signature = (accel, argv, writable, terminal = false))]
pub(super) fn in_carrier_if_needed(
    py: Python<'_>,
    accel: &str,
    argv: Vec<OsString>,
    writable: Vec<PathBuf>,
    terminal: bool,
) -> PyResult<Option<u8>> {
    let accel: Accel = accel.parse().map_err(PyValueError::new_err)?;
    let failed = |error: &(dyn Error + 'static)| PyRuntimeError::new_err(chain(error));
    // The command is installed beside the interpreter; without it nobody can view anything either.
    let python: PathBuf = py.import("sys")?.getattr("executable")?.extract()?;
    let viewers = Some(python.with_file_name("firn")).filter(|firn| firn.exists());
    py.detach(|| {
        if accel.runs_here().map_err(|error| failed(&error))? {
            return Ok(None);
        }
        let options = Options { writable, terminal, viewers, ..Options::default() };
        run_again(&options, argv).map(Some).map_err(|error| failed(&error))
    })
}
