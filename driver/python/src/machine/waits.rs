//! Waits for files, ports, sockets and terminals.

use pyo3::prelude::*;

use super::PyMachine;
use super::arguments::{DEFAULT, GuestPath, Pattern, Port, Tty};
use crate::duration::Timeout;

#[pymethods]
impl PyMachine {
    /// Wait until a file of the guest exists.
    ///
    /// filename: a text, which the guest's shell expands, or a pathlib.Path.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed after it.
    #[pyo3(
        signature = (filename, timeout = DEFAULT),
        text_signature = "($self, filename, timeout=900)"
    )]
    fn wait_for_file(&self, py: Python<'_>, filename: GuestPath, timeout: Timeout) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_file(&filename, timeout.0))
    }

    /// Wait until something listens on a TCP port.
    ///
    /// port: a number, or that as a text.
    /// addr: where, as the guest sees it: a name or an address.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed after it.
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

    /// Wait until nothing listens on a TCP port; the arguments are those of wait_for_open_port().
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

    /// Wait until something listens on a UNIX socket of the guest.
    ///
    /// addr: its path: a text, which the guest's shell expands, or a pathlib.Path.
    /// is_datagram: whether it is one of datagrams; by default of streams.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed after it.
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

    /// Give what a virtual terminal shows, its lines as wide as its screen. Nothing if there is no such terminal yet.
    ///
    /// tty: its number, or that as a text.
    fn get_tty_text(&self, py: Python<'_>, tty: Tty) -> PyResult<String> {
        self.call(py, |machine| machine.get_tty_text(&tty))
    }

    /// Wait until a regular expression matches what a virtual terminal shows.
    ///
    /// tty: its number, or that as a text; it need not be there yet.
    /// regexp: as for re.search(), or a compiled one.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed after it.
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

    /// Write what a virtual terminal shows to the guest's journal, and so to the log.
    ///
    /// tty: its number, or that as a text.
    fn dump_tty_contents(&self, py: Python<'_>, tty: Tty) -> PyResult<()> {
        self.call(py, |machine| machine.dump_tty_contents(&tty))
    }
}
