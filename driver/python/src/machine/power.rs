//! From start to end.

use pyo3::prelude::*;

use super::PyMachine;
use super::arguments::Port;
use crate::errors::exception;
use crate::wait::{wait, wait_through_signals};

#[pymethods]
impl PyMachine {
    /// Start it, if it does not run; does not wait until the guest is up.
    ///
    /// allow_reboot: whether the guest may restart; otherwise its reset ends the machine.
    ///
    /// Raises MachineError if it cannot be started.
    #[pyo3(signature = (allow_reboot = false))]
    fn start(&self, py: Python<'_>, allow_reboot: bool) -> PyResult<()> {
        self.call(py, |machine| machine.start(allow_reboot))
    }

    /// Give the command that enters the guest by ssh over vsock.
    ///
    /// index: upstream's way to number machines, which know their own number here; it may be left out.
    ///
    /// Raises MachineError if the machine has no vsock.
    #[pyo3(signature = (index = None))]
    fn ssh_backdoor_command(&self, py: Python<'_>, index: Option<u32>) -> PyResult<String> {
        let _ = index;
        self.machine()?.ssh_backdoor_command().map_err(|error| exception(py, &error))
    }

    /// Start it if it is off, and wait until commands can be run in it. Every command does so first.
    ///
    /// Raises MachineError if the guest ends meanwhile.
    fn connect(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.connect())
    }

    /// Go on from systemd in the initrd, with the backdoor there, to the system itself.
    ///
    /// Raises RequestedAssertionFailed if the guest is not in its initrd.
    fn switch_root(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.switch_root())
    }

    /// Power it off, and wait until that is done. Nothing if it is off.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.shutdown())
    }

    /// Wait until it is off: has powered off, reset itself, or panicked, which the log then says. Nothing if it is off.
    ///
    /// Raises MachineError if the guest stands still for good, or the monitor cannot go on.
    fn wait_for_shutdown(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_shutdown())
    }

    /// Wait until it does not run, at most so long; says whether it does not.
    fn _wait_for_end(&self, py: Python<'_>, timeout: crate::duration::Timeout) -> PyResult<bool> {
        let machine = self.machine()?;
        let end = machine.clock().timeout(timeout.0, machine.wait_for_end());
        wait(py, async { Ok(end.await.is_some()) })
    }

    /// Have the guest restart, and wait until it does so; the next command waits until it is up again.
    ///
    /// Raises MachineError unless it was started by start(allow_reboot=True).
    fn reboot(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.reboot())
    }

    /// End it at once, as if the power went. Nothing if it is off.
    pub(super) fn crash(&self, py: Python<'_>) -> PyResult<()> {
        wait_through_signals(py, self.machine()?.crash())
    }

    /// End it at once, and remove its state unless that shall be kept.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.machine()?.release())
    }

    /// Have the guest stand still until resume(). Nothing if it is paused.
    ///
    /// Its processors and devices stop, and with them the time of all calls that wait for it: no timeout of theirs runs
    /// out meanwhile. Calls that begin while it is paused wait too, so somebody has to resume it: this script, or another
    /// thread of it. The guest's own clock shows afterwards what time it is: over the backdoor's shell, where the guest
    /// itself counts a command's timeout, that runs on.
    ///
    /// Raises MachineError if it does not run.
    ///
    ///     database.pause()
    ///     client.fail("curl --max-time 5 http://database")
    ///     database.resume()
    fn pause(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        wait(py, machine.pause())
    }

    /// Let a guest go on after pause(). Nothing if it runs.
    ///
    /// Raises MachineError if the machine is off, or has ended.
    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        wait(py, machine.resume())
    }

    /// Forward a TCP port of the host's loopback to one of the guest, until the machine ends; give the host's port.
    ///
    /// host_port: a number, or that as a text; for 0 the system chooses one.
    /// guest_port: a number, or that as a text.
    ///
    /// Raises MachineError if the machine does not run, or the host's port is in use.
    #[pyo3(
        signature = (host_port = Port(8080), guest_port = Port(80)),
        text_signature = "($self, host_port=8080, guest_port=80)"
    )]
    fn forward_port(&self, py: Python<'_>, host_port: Port, guest_port: Port) -> PyResult<u16> {
        self.call(py, |machine| machine.forward_port(host_port.0, guest_port.0))
    }

    /// Pull the cable of the first vlan: the guest no longer hears the others. Its way to the host stays.
    fn block(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        py.detach(|| machine.block());
        Ok(())
    }

    /// Plug the cable in again that block() has pulled.
    fn unblock(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        py.detach(|| machine.unblock());
        Ok(())
    }
}
