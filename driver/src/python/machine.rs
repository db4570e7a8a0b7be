//! A machine, in Python.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::duration::Timeout;
use super::log::{PyLogger, PyStep};
use super::wait::{wait, wait_through_signals};
use crate::error::{Error, MachineError};
use crate::machine::{ExecOptions, Machine};

/// A machine of a test.
#[pyclass(frozen, name = "Machine", module = "firn")]
pub(super) struct PyMachine(pub(super) Machine);

#[pymethods]
impl PyMachine {
    #[getter]
    fn name(&self) -> &str {
        self.0.name()
    }

    /// The name of the script's variable for it.
    #[getter]
    fn variable(&self) -> String {
        self.0.config().variable()
    }

    #[getter]
    fn booted(&self) -> bool {
        self.0.booted()
    }

    #[getter]
    fn connected(&self) -> bool {
        self.0.connected()
    }

    #[getter]
    fn state_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.0.state_dir().to_owned())
    }

    #[getter]
    fn shared_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.0.shared_dir().to_owned())
    }

    #[getter]
    fn out_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.0.out_dir().to_owned())
    }

    #[getter]
    fn logger(&self) -> PyLogger {
        PyLogger(self.0.logger().clone())
    }

    fn __repr__(&self) -> String {
        format!("<machine {}>", self.0.name())
    }

    fn is_up(&self) -> bool {
        self.0.is_up()
    }

    fn log(&self, message: &str) {
        self.0.log(message);
    }

    fn nested(&self, message: &str) -> PyStep {
        PyStep::new(self.0.logger().clone(), message)
    }

    #[pyo3(signature = (allow_reboot = false))]
    fn start(&self, py: Python<'_>, allow_reboot: bool) -> PyResult<()> {
        wait(py, self.0.start(allow_reboot))
    }

    fn connect(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.connect())
    }

    #[pyo3(signature = (command, check_return = true, check_output = true, timeout = Some(Timeout(crate::machine::DEFAULT_TIMEOUT))))]
    fn execute(
        &self,
        py: Python<'_>,
        command: &str,
        check_return: bool,
        check_output: bool,
        timeout: Option<Timeout>,
    ) -> PyResult<(i32, String)> {
        let options = ExecOptions { check_return, check_output, timeout: seconds(timeout) };
        wait(py, self.0.execute(command, options))
    }

    #[pyo3(signature = (*commands, timeout = None))]
    fn succeed(
        &self,
        py: Python<'_>,
        commands: Vec<String>,
        timeout: Option<Timeout>,
    ) -> PyResult<String> {
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        wait(py, self.0.succeed(&commands, seconds(timeout)))
    }

    #[pyo3(signature = (*commands, timeout = None))]
    fn fail(
        &self,
        py: Python<'_>,
        commands: Vec<String>,
        timeout: Option<Timeout>,
    ) -> PyResult<String> {
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        wait(py, self.0.fail(&commands, seconds(timeout)))
    }

    #[pyo3(signature = (command, timeout = Timeout(crate::machine::DEFAULT_TIMEOUT), attempt_timeout = None))]
    fn wait_until_succeeds(
        &self,
        py: Python<'_>,
        command: &str,
        timeout: Timeout,
        attempt_timeout: Option<Timeout>,
    ) -> PyResult<String> {
        wait(py, self.0.wait_until_succeeds(command, timeout.0, seconds(attempt_timeout)))
    }

    #[pyo3(signature = (command, timeout = Timeout(crate::machine::DEFAULT_TIMEOUT), attempt_timeout = None))]
    fn wait_until_fails(
        &self,
        py: Python<'_>,
        command: &str,
        timeout: Timeout,
        attempt_timeout: Option<Timeout>,
    ) -> PyResult<String> {
        wait(py, self.0.wait_until_fails(command, timeout.0, seconds(attempt_timeout)))
    }

    fn sleep(&self, py: Python<'_>, secs: Timeout) -> PyResult<()> {
        wait(py, self.0.sleep(secs.0))
    }

    fn get_console_log(&self) -> String {
        self.0.get_console_log()
    }

    fn send_console(&self, py: Python<'_>, chars: &str) -> PyResult<()> {
        wait(py, self.0.send_console(chars))
    }

    /// Searches by Python's `re`: its syntax is not that of Rust's.
    #[pyo3(signature = (regex, timeout = None))]
    fn wait_for_console_text(
        &self,
        py: Python<'_>,
        regex: Bound<'_, PyAny>,
        timeout: Option<Timeout>,
    ) -> PyResult<()> {
        let pattern = py.import("re")?.call_method1("compile", (regex,))?;
        let shown: String = pattern.getattr("pattern")?.str()?.extract()?;
        let search = pattern.getattr("search")?.unbind();
        let find = |text: &str| {
            let found = Python::attach(|py| match_end(search.bind(py), text));
            found.map_err(|e| {
                Error::from(MachineError::Usage(format!("cannot search for {shown}: {e}")))
            })
        };
        wait(py, self.0.wait_for_console(&shown, find, seconds(timeout)))
    }

    fn copy_from_host(&self, py: Python<'_>, source: PathBuf, target: PathBuf) -> PyResult<()> {
        wait(py, self.0.copy_from_host(&source, &target))
    }

    #[pyo3(signature = (source, target_dir = PathBuf::new()))]
    fn copy_from_machine(
        &self,
        py: Python<'_>,
        source: PathBuf,
        target_dir: PathBuf,
    ) -> PyResult<()> {
        wait(py, self.0.copy_from_machine(&source, &target_dir))
    }

    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.shutdown())
    }

    fn wait_for_shutdown(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.wait_for_shutdown())
    }

    fn crash(&self, py: Python<'_>) -> PyResult<()> {
        wait_through_signals(py, self.0.crash())
    }

    fn release(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.release())
    }

    fn block(&self, py: Python<'_>) {
        py.detach(|| self.0.block());
    }

    fn unblock(&self, py: Python<'_>) {
        py.detach(|| self.0.unblock());
    }
}

fn seconds(timeout: Option<Timeout>) -> Option<std::time::Duration> {
    timeout.map(|timeout| timeout.0)
}

/// As upstream's attributes: `pathlib.Path`.
fn path(py: Python<'_>, path: PathBuf) -> PyResult<Py<PyAny>> {
    Ok(py.import("pathlib")?.call_method1("Path", PyTuple::new(py, [path])?)?.unbind())
}

/// Where in the text, in bytes, Python's match ends; Python counts characters.
fn match_end(search: &Bound<'_, PyAny>, text: &str) -> PyResult<Option<usize>> {
    let found = search.call1((text,))?;
    if found.is_none() {
        return Ok(None);
    }
    let end: usize = found.call_method0("end")?.extract()?;
    Ok(Some(text.char_indices().nth(end).map_or(text.len(), |(at, _)| at)))
}
