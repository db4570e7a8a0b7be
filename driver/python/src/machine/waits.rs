//! Waits for files, ports, sockets and terminals.

use pyo3::prelude::*;

use super::PyMachine;
use super::arguments::{DEFAULT, GuestPath, Pattern, Port, Tty};
use crate::duration::Timeout;

#[pymethods]
impl PyMachine {
    /// Wait until a file exists in the guest.
    ///
    /// filename: a string, which the guest's shell expands, or a pathlib.Path.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed when it runs out.
    #[pyo3(
        signature = (filename, timeout = DEFAULT),
        text_signature = "($self, filename, timeout=900)"
    )]
    fn wait_for_file(&self, py: Python<'_>, filename: GuestPath, timeout: Timeout) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_file(&filename, timeout.0))
    }

    /// Wait until something listens on a TCP port.
    ///
    /// port: a number, or a string of one.
    /// addr: the name or address, as seen in the guest.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed when it runs out.
    #[pyo3(
        signature = (port, addr = "localhost", timeout = DEFAULT),
        text_signature = "($self, port, addr='localhost', timeout=900)"
    )]
    fn wait_for_open_port(
        &self,
        py: Python<'_>,
        port: Port,
        addr: &str,
        timeout: Timeout,
    ) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_open_port(port.0, addr, timeout.0))
    }

    /// Wait until nothing listens on a TCP port. Takes the arguments of wait_for_open_port().
    #[pyo3(
        signature = (port, addr = "localhost", timeout = DEFAULT),
        text_signature = "($self, port, addr='localhost', timeout=900)"
    )]
    fn wait_for_closed_port(
        &self,
        py: Python<'_>,
        port: Port,
        addr: &str,
        timeout: Timeout,
    ) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_closed_port(port.0, addr, timeout.0))
    }

    /// Wait until something listens on a UNIX socket in the guest.
    ///
    /// addr: its path: a string, which the guest's shell expands, or a pathlib.Path.
    /// is_datagram: whether it is a datagram socket; by default it is a stream socket.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed when it runs out.
    #[pyo3(
        signature = (addr, is_datagram = false, timeout = DEFAULT),
        text_signature = "($self, addr, is_datagram=False, timeout=900)"
    )]
    fn wait_for_open_unix_socket(
        &self,
        py: Python<'_>,
        addr: GuestPath,
        is_datagram: bool,
        timeout: Timeout,
    ) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_open_unix_socket(&addr, is_datagram, timeout.0))
    }

    /// Return what a virtual terminal shows, its lines padded to the width of the screen; "" if it does not exist yet.
    ///
    /// tty: its number, or a string of it.
    fn get_tty_text(&self, py: Python<'_>, tty: Tty) -> PyResult<String> {
        self.call(py, |machine| machine.get_tty_text(&tty))
    }

    /// Wait until a regular expression matches what a virtual terminal shows.
    ///
    /// tty: its number, or a string of it; it need not exist yet.
    /// regexp: as for re.search(), or compiled.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed when it runs out.
    #[pyo3(
        signature = (tty, regexp, timeout = DEFAULT),
        text_signature = "($self, tty, regexp, timeout=900)"
    )]
    fn wait_until_tty_matches(
        &self,
        py: Python<'_>,
        tty: Tty,
        regexp: Bound<'_, PyAny>,
        timeout: Timeout,
    ) -> PyResult<()> {
        let pattern = Pattern::new(py, &regexp)?;
        let find = |text: &str| Ok(pattern.end_in(text)?.is_some());
        self.call(py, |machine| {
            machine.wait_until_tty_matches(&tty, &pattern.shown, find, timeout.0)
        })
    }

    /// Print what a virtual terminal shows to the guest's journal, and so to the log.
    ///
    /// tty: its number, or a string of it.
    fn dump_tty_contents(&self, py: Python<'_>, tty: Tty) -> PyResult<()> {
        self.call(py, |machine| machine.dump_tty_contents(&tty))
    }
}
