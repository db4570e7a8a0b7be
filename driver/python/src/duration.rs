//! Durations: `datetime.timedelta`, or an int or float of seconds.

use std::time::Duration;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDelta};

/// A duration given by a script.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeout(pub(super) Duration);

/// Longest duration, about 30 years. Anything longer would overflow clocks and means "no limit".
const MAX: Duration = Duration::from_secs(1_000_000_000);

impl FromPyObject<'_, '_> for Timeout {
    type Error = PyErr;

    fn extract(value: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let wrong = || {
            PyTypeError::new_err(
                "a duration is a datetime.timedelta, or seconds as an int or float",
            )
        };
        if value.is_instance_of::<PyBool>() {
            return Err(wrong());
        }
        let seconds: f64 = if value.is_instance_of::<PyDelta>() {
            value.call_method0("total_seconds")?.extract()?
        } else {
            value.extract().map_err(|_| wrong())?
        };
        if seconds.is_nan() || seconds < 0.0 {
            return Err(PyValueError::new_err(format!("a duration of {seconds} seconds")));
        }
        Ok(Self(Duration::try_from_secs_f64(seconds).map_or(MAX, |time| time.min(MAX))))
    }
}
