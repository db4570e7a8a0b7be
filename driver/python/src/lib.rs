//! The Python extension module `firn._firn`: a thin projection of the Rust API.

#![expect(
    clippy::needless_pass_by_value,
    reason = "Python hands over what PyO3 made of its arguments"
)]

use pyo3::prelude::*;

mod accel;
mod checkpoint;
mod driver;
mod duration;
mod errors;
mod listen;
mod log;
mod machine;
mod wait;

/// The native part of the Python package `firn`.
#[pymodule(name = "_firn")]
mod module {
    use pyo3::prelude::*;
    use pyo3::types::IntoPyDict;

    #[pymodule_export]
    use super::accel::in_carrier_if_needed;
    #[pymodule_export]
    use super::checkpoint::PyCheckpoint;
    #[pymodule_export]
    use super::driver::{PyRun, PyTest, PyTimer, PyVlan};
    #[pymodule_export]
    use super::log::{PyLogger, PyStep, py_printable};
    #[pymodule_export]
    use super::machine::{PyMachine, read_picture};
    #[pymodule_export]
    use super::wait::{check_wait_hook, interrupt_waits_by_signals, set_wait_hook};

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Adds the computed table of keys by character.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let keys = firn::machine::characters().into_iter().into_py_dict(module.py())?;
        module.add("CHAR_TO_KEY", keys)
    }
}
