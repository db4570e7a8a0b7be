//! Runs commands.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::PyMachine;
use super::arguments::{DEFAULT, seconds};
use crate::duration::Timeout;
use firn::machine::ExecOptions;

#[pymethods]
impl PyMachine {
    /// Run a shell command as root. Returns its exit status and its standard output.
    ///
    /// It runs in bash with `set -euo pipefail`, in root's login environment. Standard error goes to the guest's console,
    /// and so to the log. The call waits until standard output is closed, so a program left in the background has to
    /// close it or redirect it (`>&2`).
    ///
    /// check_return: if False, the status is -1, and it is no error if the machine goes away.
    /// check_output: if False, only start the command and return (-2, "") at once.
    /// timeout: seconds or a timedelta, after which the command is killed and its status is 124; None for no limit.
    ///
    /// Starts the machine if it is off. Raises MachineError if the guest ends before the command does.
    #[pyo3(
        signature = (command, check_return = true, check_output = true, timeout = Some(DEFAULT)),
        text_signature = "($self, command, check_return=True, check_output=True, timeout=900)"
    )]
    fn execute(
        &self,
        py: Python<'_>,
        command: &str,
        check_return: bool,
        check_output: bool,
        timeout: Option<Timeout>,
    ) -> PyResult<(i32, String)> {
        let options = ExecOptions { check_return, check_output, timeout: seconds(timeout) };
        self.call(py, |machine| machine.execute(command, options))
    }

    /// Run shell commands in turn, as execute() does. Returns their joined output.
    ///
    /// timeout: limit for each command, in seconds or a timedelta; None for no limit.
    ///
    /// Raises RequestedAssertionFailed at the first command that fails.
    ///
    ///     kernel = machine.succeed("uname -r").strip()
    ///     machine.succeed("mkdir /tmp/a", "touch /tmp/a/b", timeout=10)
    #[pyo3(signature = (*commands, timeout = None))]
    fn succeed(
        &self,
        py: Python<'_>,
        commands: Vec<String>,
        timeout: Option<Timeout>,
    ) -> PyResult<String> {
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        self.call(py, |machine| machine.succeed(&commands, seconds(timeout)))
    }

    /// Like succeed(), but every command has to fail: raises RequestedAssertionFailed at the first that succeeds.
    ///
    ///     machine.fail("ping -c 1 192.168.1.9")
    #[pyo3(signature = (*commands, timeout = None))]
    fn fail(
        &self,
        py: Python<'_>,
        commands: Vec<String>,
        timeout: Option<Timeout>,
    ) -> PyResult<String> {
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        self.call(py, |machine| machine.fail(&commands, seconds(timeout)))
    }

    /// Run a command every second until it succeeds. Returns its output.
    ///
    /// timeout: for all attempts together, in seconds or a timedelta; 900 seconds by default. One last attempt follows it.
    /// attempt_timeout: for a single attempt, which is then killed and repeated; None for all the time that is left.
    ///
    /// Raises RequestedAssertionFailed if the last attempt fails too.
    ///
    ///     machine.wait_until_succeeds("curl --fail http://localhost/", timeout=60)
    #[pyo3(
        signature = (command, timeout = DEFAULT, attempt_timeout = None),
        text_signature = "($self, command, timeout=900, attempt_timeout=None)"
    )]
    fn wait_until_succeeds(
        &self,
        py: Python<'_>,
        command: &str,
        timeout: Timeout,
        attempt_timeout: Option<Timeout>,
    ) -> PyResult<String> {
        let attempt = seconds(attempt_timeout);
        self.call(py, |machine| machine.wait_until_succeeds(command, timeout.0, attempt))
    }

    /// Like wait_until_succeeds(), but waits until the command fails.
    #[pyo3(
        signature = (command, timeout = DEFAULT, attempt_timeout = None),
        text_signature = "($self, command, timeout=900, attempt_timeout=None)"
    )]
    fn wait_until_fails(
        &self,
        py: Python<'_>,
        command: &str,
        timeout: Timeout,
        attempt_timeout: Option<Timeout>,
    ) -> PyResult<String> {
        let attempt = seconds(attempt_timeout);
        self.call(py, |machine| machine.wait_until_fails(command, timeout.0, attempt))
    }

    /// Sleep in guest time. Takes either `secs` (seconds) or `duration` (seconds or a timedelta).
    #[pyo3(signature = (secs = None, duration = None))]
    fn sleep(
        &self,
        py: Python<'_>,
        secs: Option<Timeout>,
        duration: Option<Timeout>,
    ) -> PyResult<()> {
        let time = match (secs, duration) {
            (Some(time), None) | (None, Some(time)) => time.0,
            _ => return Err(PyTypeError::new_err("sleep() takes either `secs` or `duration`")),
        };
        self.call(py, |machine| machine.sleep(time))
    }
}
