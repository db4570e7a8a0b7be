//! Runs commands.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::PyMachine;
use super::arguments::{DEFAULT, seconds};
use crate::duration::Timeout;
use firn::machine::ExecOptions;

#[pymethods]
impl PyMachine {
    /// Run a shell command as root; give its exit status and what it printed on its standard output.
    ///
    /// It runs in bash with `set -euo pipefail`, in root's login environment. Its standard error goes to the guest's
    /// console, and so to the log. The call waits until the output is closed: a program that stays in the background
    /// has to close it or send it elsewhere (`>&2`).
    ///
    /// check_return: False gives -1 as the status, and does not mind that the machine goes away.
    /// check_output: False starts the command only, and gives (-2, "") at once.
    /// timeout: seconds or a timedelta, after which the command is killed and the status is 124; None: never.
    ///
    /// Starts the machine if it is off. Raises MachineError if the guest ends meanwhile.
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

    /// Run shell commands one after the other, as execute() does; give their outputs joined.
    ///
    /// timeout: for each command, in seconds or a timedelta; None: none.
    ///
    /// Raises RequestedAssertionFailed at the first that does not exit with 0.
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

    /// As succeed(), for commands none of which may exit with 0: raises RequestedAssertionFailed at the first that does.
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

    /// Run a command each second until it exits with 0; give its output then.
    ///
    /// timeout: of all tries together, in seconds or a timedelta; 900 seconds by default. A last try is made after it.
    /// attempt_timeout: of a single try, which is then given up and made again; None: what is left of the whole.
    ///
    /// Raises RequestedAssertionFailed if the last try fails, too.
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

    /// As wait_until_succeeds(), until the command does not exit with 0.
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

    /// Sleep, in the guest's time: `secs` seconds, or `duration`, seconds or a timedelta. One of them is needed.
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
