//! Where machines run, in Python.

use std::ffi::OsString;
use std::path::PathBuf;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use firn::error::chain;
use firn_carrier::accel::{Accel, Decision, in_carrier};

/// Runs `argv` in a carrier that can write to `writable`, and answers its exit status; does nothing if machines
/// can run here. `accel` is auto, kvm or carrier. With `terminal` the command gets what is typed, key by key.
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
    let failed = |text: String| PyRuntimeError::new_err(text);
    py.detach(|| match accel.decide() {
        Decision::Kvm => Ok(None),
        Decision::Refused(reason) => Err(failed(reason)),
        Decision::Carrier(reason) => {
            if let Some(reason) = reason {
                eprintln!("{reason}: using the carrier");
            }
            in_carrier(writable, terminal, argv).map(Some).map_err(|error| failed(chain(&error)))
        }
    })
}
