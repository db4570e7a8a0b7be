//! Copies files.

use std::path::PathBuf;

use pyo3::exceptions::PyDeprecationWarning;
use pyo3::prelude::*;

use super::PyMachine;

#[pymethods]
impl PyMachine {
    /// Copy a file or directory from the host to the guest. Permission bits are kept; root owns the copy.
    ///
    /// source: path on the host. target: path in the guest; missing parent directories are created.
    fn copy_from_host(&self, py: Python<'_>, source: PathBuf, target: PathBuf) -> PyResult<()> {
        self.call(py, |machine| machine.copy_from_host(&source, &target))
    }

    /// Like copy_from_host(), but the guest's shell expands the target.
    fn copy_from_host_via_shell(
        &self,
        py: Python<'_>,
        source: PathBuf,
        target: PathBuf,
    ) -> PyResult<()> {
        let target = target.to_string_lossy();
        self.call(py, |machine| machine.copy_from_host_via_shell(&source, &target))
    }

    /// Copy a file or directory from the guest into `out_dir`.
    ///
    /// source: path in the guest. target_dir: a directory below `out_dir`, created if it is missing.
    #[pyo3(
        signature = (source, target_dir = PathBuf::new()),
        text_signature = "($self, source, target_dir='')"
    )]
    fn copy_from_machine(
        &self,
        py: Python<'_>,
        source: PathBuf,
        target_dir: PathBuf,
    ) -> PyResult<()> {
        self.call(py, |machine| machine.copy_from_machine(&source, &target_dir))
    }

    /// Old name of copy_from_machine().
    #[pyo3(
        signature = (source, target_dir = PathBuf::new()),
        text_signature = "($self, source, target_dir='')"
    )]
    fn copy_from_vm(&self, py: Python<'_>, source: PathBuf, target_dir: PathBuf) -> PyResult<()> {
        let category = py.get_type::<PyDeprecationWarning>();
        PyErr::warn(py, &category, c"copy_from_vm is the old name of copy_from_machine", 1)?;
        self.copy_from_machine(py, source, target_dir)
    }
}
