//! Errors of the Rust API as exceptions of `firn.errors`.

use pyo3::exceptions::PyFileNotFoundError;
use pyo3::prelude::*;
use pyo3::types::PyType;

use firn::error::{Error, MachineError, chain};

/// The Python exception for an error.
pub(super) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let name = match error {
        Error::Machine(MachineError::Missing { path }) => {
            let arguments = (
                nix::errno::Errno::ENOENT as i32,
                "No such file or directory",
                path.clone().into_os_string(),
            );
            return PyFileNotFoundError::new_err(arguments);
        }
        Error::Assertion(_) => "RequestedAssertionFailed",
        Error::Machine(_) => "MachineError",
    };
    of_class(py, name, chain(error))
}

/// For what upstream has and firn does not.
pub(super) fn not_here(py: Python<'_>, why: String) -> PyErr {
    of_class(py, "NotHere", why)
}

fn of_class(py: Python<'_>, name: &str, text: String) -> PyErr {
    let class =
        || py.import("firn.errors")?.getattr(name)?.cast_into::<PyType>().map_err(PyErr::from);
    match class() {
        Ok(class) => PyErr::from_type(class, text),
        Err(error) => error,
    }
}
