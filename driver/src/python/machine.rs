//! A machine, in Python.

use std::collections::BTreeMap;
use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::exceptions::{PyAttributeError, PyDeprecationWarning};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use serde_json::Value;

use super::duration::Timeout;
use super::errors::exception;
use super::log::{PyLogger, PyStep};
use super::wait::{wait, wait_through_signals};
use crate::error::{MachineError, Result};
use crate::machine::{ExecOptions, Machine};

/// What a call waits for at most, unless the script says otherwise.
const DEFAULT: Timeout = Timeout(crate::machine::DEFAULT_TIMEOUT);

/// How long an event of QEMU's machine protocol is waited for, unless the script says otherwise.
const QMP_TIMEOUT: Duration = Duration::from_secs(600);

/// A machine of a test.
#[pyclass(frozen, name = "Machine", module = "firn")]
pub(super) struct PyMachine(pub(super) Machine);

#[pymethods]
impl PyMachine {
    /// Names of upstream's that are still missing say so, instead of being unknown.
    fn __getattr__(&self, py: Python<'_>, name: &str) -> PyResult<Py<PyAny>> {
        let why = match name {
            "send_key" | "send_chars" => "firn's machines have no keyboard yet",
            "screenshot"
            | "get_screen_text"
            | "get_screen_text_variants"
            | "wait_for_text"
            | "wait_for_x"
            | "wait_for_window"
            | "get_window_names" => "firn's machines have no screen yet",
            "process" => "it runs in firn's own process, and there is none to look at; see `pid`",
            _ => {
                let message = format!("a machine has no attribute `{name}`");
                return Err(PyAttributeError::new_err(message));
            }
        };
        let message = format!("{}: {name}: {why}", self.0.name());
        Err(exception(py, &MachineError::Usage(message).into()))
    }

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

    /// The process that it runs in, if it runs: this one.
    #[getter]
    fn pid(&self) -> Option<u32> {
        self.0.booted().then(std::process::id)
    }

    /// The root shell's socket. Python waits on it without making it blocking, which its other users would notice.
    #[getter]
    fn shell(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let shell = self.0.shell().map_err(|e| exception(py, &e))?;
        let socket = py.import("socket")?;
        let (family, kind) = (socket.getattr("AF_UNIX")?, socket.getattr("SOCK_STREAM")?);
        let shell = socket.call_method1("socket", (family, kind, 0, shell.into_raw_fd()))?;
        shell.call_method1("settimeout", (DEFAULT.0.as_secs(),))?;
        Ok(shell.unbind())
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

    /// The index is upstream's way to number CIDs; a machine here knows its own.
    #[pyo3(signature = (index = None))]
    fn ssh_backdoor_command(&self, py: Python<'_>, index: Option<u32>) -> PyResult<String> {
        let _ = index;
        self.0.ssh_backdoor_command().map_err(|error| exception(py, &error))
    }

    fn connect(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.connect())
    }

    #[pyo3(signature = (command, check_return = true, check_output = true, timeout = Some(DEFAULT)))]
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

    #[pyo3(signature = (command, timeout = DEFAULT, attempt_timeout = None))]
    fn wait_until_succeeds(
        &self,
        py: Python<'_>,
        command: &str,
        timeout: Timeout,
        attempt_timeout: Option<Timeout>,
    ) -> PyResult<String> {
        wait(py, self.0.wait_until_succeeds(command, timeout.0, seconds(attempt_timeout)))
    }

    #[pyo3(signature = (command, timeout = DEFAULT, attempt_timeout = None))]
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

    #[pyo3(signature = (q, user = None))]
    fn systemctl(&self, py: Python<'_>, q: &str, user: Option<&str>) -> PyResult<(i32, String)> {
        wait(py, self.0.systemctl(q, user))
    }

    #[pyo3(signature = (unit, user = None, timeout = DEFAULT))]
    fn wait_for_unit(
        &self,
        py: Python<'_>,
        unit: &str,
        user: Option<&str>,
        timeout: Timeout,
    ) -> PyResult<()> {
        wait(py, self.0.wait_for_unit(unit, user, timeout.0))
    }

    #[pyo3(signature = (unit, user = None))]
    fn get_unit_info(
        &self,
        py: Python<'_>,
        unit: &str,
        user: Option<&str>,
    ) -> PyResult<BTreeMap<String, String>> {
        wait(py, self.0.get_unit_info(unit, user))
    }

    #[pyo3(signature = (unit, property, user = None))]
    fn get_unit_property(
        &self,
        py: Python<'_>,
        unit: &str,
        property: &str,
        user: Option<&str>,
    ) -> PyResult<String> {
        wait(py, self.0.get_unit_property(unit, property, user))
    }

    #[pyo3(signature = (unit, require_state = "active"))]
    fn require_unit_state(&self, py: Python<'_>, unit: &str, require_state: &str) -> PyResult<()> {
        wait(py, self.0.require_unit_state(unit, require_state))
    }

    #[pyo3(signature = (jobname, user = None))]
    fn start_job(
        &self,
        py: Python<'_>,
        jobname: &str,
        user: Option<&str>,
    ) -> PyResult<(i32, String)> {
        wait(py, self.0.start_job(jobname, user))
    }

    #[pyo3(signature = (jobname, user = None))]
    fn stop_job(
        &self,
        py: Python<'_>,
        jobname: &str,
        user: Option<&str>,
    ) -> PyResult<(i32, String)> {
        wait(py, self.0.stop_job(jobname, user))
    }

    #[pyo3(signature = (filename, timeout = DEFAULT))]
    fn wait_for_file(&self, py: Python<'_>, filename: &str, timeout: Timeout) -> PyResult<()> {
        wait(py, self.0.wait_for_file(filename, timeout.0))
    }

    #[pyo3(signature = (port, addr = "localhost", timeout = DEFAULT))]
    fn wait_for_open_port(
        &self,
        py: Python<'_>,
        port: u16,
        addr: &str,
        timeout: Timeout,
    ) -> PyResult<()> {
        wait(py, self.0.wait_for_open_port(port, addr, timeout.0))
    }

    #[pyo3(signature = (port, addr = "localhost", timeout = DEFAULT))]
    fn wait_for_closed_port(
        &self,
        py: Python<'_>,
        port: u16,
        addr: &str,
        timeout: Timeout,
    ) -> PyResult<()> {
        wait(py, self.0.wait_for_closed_port(port, addr, timeout.0))
    }

    #[pyo3(signature = (addr, is_datagram = false, timeout = DEFAULT))]
    fn wait_for_open_unix_socket(
        &self,
        py: Python<'_>,
        addr: &str,
        is_datagram: bool,
        timeout: Timeout,
    ) -> PyResult<()> {
        wait(py, self.0.wait_for_open_unix_socket(addr, is_datagram, timeout.0))
    }

    fn get_tty_text(&self, py: Python<'_>, tty: &str) -> PyResult<String> {
        wait(py, self.0.get_tty_text(tty))
    }

    #[pyo3(signature = (tty, regexp, timeout = DEFAULT))]
    fn wait_until_tty_matches(
        &self,
        py: Python<'_>,
        tty: &str,
        regexp: Bound<'_, PyAny>,
        timeout: Timeout,
    ) -> PyResult<()> {
        let pattern = Pattern::new(py, &regexp)?;
        let find = |text: &str| Ok(pattern.end_in(text)?.is_some());
        wait(py, self.0.wait_until_tty_matches(tty, &pattern.shown, find, timeout.0))
    }

    fn dump_tty_contents(&self, py: Python<'_>, tty: &str) -> PyResult<()> {
        wait(py, self.0.dump_tty_contents(tty))
    }

    fn get_console_log(&self) -> String {
        self.0.get_console_log()
    }

    fn send_console(&self, py: Python<'_>, chars: &str) -> PyResult<()> {
        wait(py, self.0.send_console(chars))
    }

    #[pyo3(signature = (regex, timeout = None))]
    fn wait_for_console_text(
        &self,
        py: Python<'_>,
        regex: Bound<'_, PyAny>,
        timeout: Option<Timeout>,
    ) -> PyResult<()> {
        let pattern = Pattern::new(py, &regex)?;
        let find = |text: &str| pattern.end_in(text);
        wait(py, self.0.wait_for_console(&pattern.shown, find, seconds(timeout)))
    }

    fn copy_from_host(&self, py: Python<'_>, source: PathBuf, target: PathBuf) -> PyResult<()> {
        wait(py, self.0.copy_from_host(&source, &target))
    }

    fn copy_from_host_via_shell(
        &self,
        py: Python<'_>,
        source: PathBuf,
        target: PathBuf,
    ) -> PyResult<()> {
        let target = target.to_string_lossy();
        wait(py, self.0.copy_from_host_via_shell(&source, &target))
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

    #[pyo3(signature = (source, target_dir = PathBuf::new()))]
    fn copy_from_vm(&self, py: Python<'_>, source: PathBuf, target_dir: PathBuf) -> PyResult<()> {
        let category = py.get_type::<PyDeprecationWarning>();
        PyErr::warn(py, &category, c"copy_from_vm is the old name of copy_from_machine", 1)?;
        self.copy_from_machine(py, source, target_dir)
    }

    fn shell_interact(slf: Bound<'_, Self>) -> PyResult<()> {
        interact(&slf, "shell")
    }

    fn console_interact(slf: Bound<'_, Self>) -> PyResult<()> {
        interact(&slf, "console")
    }

    fn send_monitor_command(&self, py: Python<'_>, command: &str) -> PyResult<String> {
        wait(py, self.0.send_monitor_command(command))
    }

    #[pyo3(signature = (event_filter, timeout = Timeout(QMP_TIMEOUT)))]
    fn wait_for_qmp_event(
        &self,
        py: Python<'_>,
        event_filter: Py<PyAny>,
        timeout: Timeout,
    ) -> PyResult<Py<PyAny>> {
        let filter = |event: &Value| {
            let taken = Python::attach(|py: Python<'_>| {
                event_filter.bind(py).call1((to_python(py, event)?,))?.is_truthy()
            });
            taken.map_err(|e| MachineError::Usage(format!("the event filter failed: {e}")).into())
        };
        let event = wait(py, self.0.wait_for_qmp_event(filter, timeout.0))?;
        to_python(py, &event)
    }

    #[getter]
    fn qmp_client(&self) -> PyQmpClient {
        PyQmpClient(self.0.clone())
    }

    fn switch_root(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.switch_root())
    }

    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.shutdown())
    }

    fn wait_for_shutdown(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.wait_for_shutdown())
    }

    fn reboot(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.reboot())
    }

    fn crash(&self, py: Python<'_>) -> PyResult<()> {
        wait_through_signals(py, self.0.crash())
    }

    fn release(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.release())
    }

    /// Returns the host's port: with 0 the system chooses it.
    #[pyo3(signature = (host_port = 8080, guest_port = 80))]
    fn forward_port(&self, py: Python<'_>, host_port: u16, guest_port: u16) -> PyResult<u16> {
        wait(py, self.0.forward_port(host_port, guest_port))
    }

    fn block(&self, py: Python<'_>) {
        py.detach(|| self.0.block());
    }

    fn unblock(&self, py: Python<'_>) {
        py.detach(|| self.0.unblock());
    }
}

/// QEMU's machine protocol, as far as firn has the same thing.
#[pyclass(frozen, name = "QmpClient", module = "firn")]
pub(super) struct PyQmpClient(Machine);

#[pymethods]
impl PyQmpClient {
    #[pyo3(signature = (command, args = None))]
    fn send(&self, py: Python<'_>, command: &str, args: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
        let arguments: String = py.import("json")?.call_method1("dumps", (args,))?.extract()?;
        let arguments = serde_json::from_str(&arguments).unwrap_or(Value::Null);
        let answer = wait(py, self.0.send_qmp(command, &arguments))?;
        to_python(py, &answer)
    }
}

/// A machine whose terminal is the user's for a while.
fn interact(machine: &Bound<'_, PyMachine>, with: &str) -> PyResult<()> {
    machine.py().import("firn.interact")?.call_method1(with, (machine,)).map(drop)
}

fn to_python(py: Python<'_>, value: &Value) -> PyResult<Py<PyAny>> {
    Ok(py.import("json")?.call_method1("loads", (value.to_string(),))?.unbind())
}

fn seconds(timeout: Option<Timeout>) -> Option<Duration> {
    timeout.map(|timeout| timeout.0)
}

/// As upstream's attributes: `pathlib.Path`.
fn path(py: Python<'_>, path: PathBuf) -> PyResult<Py<PyAny>> {
    Ok(py.import("pathlib")?.call_method1("Path", PyTuple::new(py, [path])?)?.unbind())
}

/// A regular expression of Python's `re`, whose syntax is not that of Rust's.
struct Pattern {
    shown: String,
    search: Py<PyAny>,
}

impl Pattern {
    fn new(py: Python<'_>, regex: &Bound<'_, PyAny>) -> PyResult<Self> {
        let pattern = py.import("re")?.call_method1("compile", (regex,))?;
        let shown = pattern.getattr("pattern")?.str()?.extract()?;
        Ok(Self { shown, search: pattern.getattr("search")?.unbind() })
    }

    /// Where in the text, in bytes, the match ends.
    fn end_in(&self, text: &str) -> Result<Option<usize>> {
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
