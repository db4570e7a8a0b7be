//! The serial console, the root shell, and QEMU's monitors.

use std::os::fd::IntoRawFd;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde_json::Value;

use super::PyMachine;
use super::arguments::{DEFAULT, Pattern, seconds};
use crate::duration::Timeout;
use crate::errors::exception;
use crate::wait::wait;

#[pymethods]
impl PyMachine {
    /// Return everything the guest has printed on its serial console since it started.
    fn get_console_log(&self) -> PyResult<String> {
        Ok(self.machine()?.get_console_log())
    }

    /// Type into the guest's serial console. Raises MachineError if the machine is not running.
    fn send_console(&self, py: Python<'_>, chars: &str) -> PyResult<()> {
        self.call(py, |machine| machine.send_console(chars))
    }

    /// Wait until a regular expression matches the output on the guest's serial console.
    ///
    /// Searches everything since the machine's start that no earlier call has consumed, both as it is and with the line
    /// ends removed. A match consumes the output up to the end of its last line; get_console_log() still has it.
    ///
    /// regex: as for re.search(), or compiled.
    /// timeout: seconds or a timedelta; None for no limit. Raises RequestedAssertionFailed when it runs out, and
    /// MachineError if the guest ends.
    #[pyo3(signature = (regex, timeout = None))]
    fn wait_for_console_text(
        &self,
        py: Python<'_>,
        regex: Bound<'_, PyAny>,
        timeout: Option<Timeout>,
    ) -> PyResult<()> {
        let pattern = Pattern::new(py, &regex)?;
        let find = |text: &str| pattern.end_in(text);
        self.call(py, |machine| machine.wait_for_console(&pattern.shown, find, seconds(timeout)))
    }

    /// The next console line that nobody has consumed.
    fn _next_console_line(&self, py: Python<'_>, timeout: Timeout) -> PyResult<String> {
        wait(py, self.machine()?.next_console_line(timeout.0))
    }

    fn _console_lines_left(&self) -> PyResult<usize> {
        Ok(self.machine()?.console_lines_left())
    }

    /// The root shell's socket while the machine runs. Python polls it and leaves it non-blocking, as others use it too.
    fn _shell(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let machine = self.machine()?;
        if !machine.booted() {
            return Ok(None);
        }
        let shell = machine.shell().map_err(|e| exception(py, &e))?;
        let socket = py.import("socket")?;
        let (family, kind) = (socket.getattr("AF_UNIX")?, socket.getattr("SOCK_STREAM")?);
        let shell = socket.call_method1("socket", (family, kind, 0, shell.into_raw_fd()))?;
        shell.call_method1("settimeout", (DEFAULT.0.as_secs(),))?;
        Ok(Some(shell.unbind()))
    }

    /// Carry out a command of QEMU's human monitor. Returns what QEMU would print, up to its next prompt.
    ///
    /// `help` lists the supported commands, and says why others are not. Raises MachineError for those.
    fn send_monitor_command(&self, py: Python<'_>, command: &str) -> PyResult<String> {
        let text = self.call(py, |machine| machine.send_monitor_command(command))?;
        // It is a terminal, which shows what is typed.
        Ok(format!("{command}\r\n{}(qemu) ", text.replace('\n', "\r\n")))
    }

    /// Send a QMP command with its arguments as JSON. Returns the whole answer as JSON.
    fn _send_qmp(&self, py: Python<'_>, command: &str, arguments: &str) -> PyResult<String> {
        let arguments: Value = serde_json::from_str(arguments)
            .map_err(|e| PyValueError::new_err(format!("the arguments are not JSON: {e}")))?;
        let answer = self.call(py, |machine| machine.send_qmp(command, &arguments))?;
        Ok(answer.to_string())
    }

    /// The next QMP event as JSON, or None if none comes in time.
    fn _next_qmp_event(&self, py: Python<'_>, timeout: Timeout) -> PyResult<Option<String>> {
        let machine = self.machine()?;
        let next = async { Ok(machine.next_qmp_event(timeout.0).await) };
        Ok(wait(py, next)?.map(|event| event.to_string()))
    }
}
