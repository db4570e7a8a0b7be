//! Power: from the start to the end of a machine.

use pyo3::prelude::*;

use super::PyMachine;
use super::arguments::Port;
use crate::errors::exception;
use crate::wait::{wait, wait_through_signals};

#[pymethods]
impl PyMachine {
    /// Start the machine unless it is running. Does not wait for the guest to boot.
    ///
    /// allow_reboot: whether the guest may restart; if not, a reset ends the machine.
    ///
    /// Raises MachineError if it cannot be started.
    #[pyo3(signature = (allow_reboot = false))]
    fn start(&self, py: Python<'_>, allow_reboot: bool) -> PyResult<()> {
        self.call(py, |machine| machine.start(allow_reboot))
    }

    /// Return the command that opens an ssh session in the guest over vsock.
    ///
    /// index: ignored. Upstream needs the machine's number; here the machine knows it.
    ///
    /// Raises MachineError if the machine has no vsock.
    #[pyo3(signature = (index = None))]
    fn ssh_backdoor_command(&self, py: Python<'_>, index: Option<u32>) -> PyResult<String> {
        let _ = index;
        self.machine()?.ssh_backdoor_command().map_err(|error| exception(py, &error))
    }

    /// Start the machine if it is off, and wait until it takes commands. Every command does this first.
    ///
    /// Raises MachineError if the guest ends before that.
    fn connect(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.connect())
    }

    /// Leave the initrd and boot the real system. For tests whose backdoor starts in a systemd initrd.
    ///
    /// Raises RequestedAssertionFailed if the guest is not in its initrd.
    fn switch_root(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.switch_root())
    }

    /// Power the machine off and wait until it is. Does nothing if it is off.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.shutdown())
    }

    /// Wait until the machine is off: it powered off, reset, or panicked (the log says which). Returns at once if it is off.
    ///
    /// Raises MachineError if the guest has halted for good or the monitor failed.
    fn wait_for_shutdown(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.wait_for_shutdown())
    }

    /// Waits for the machine to end, for at most `timeout`; returns whether it has.
    fn _wait_for_end(&self, py: Python<'_>, timeout: crate::duration::Timeout) -> PyResult<bool> {
        let machine = self.machine()?;
        let end = machine.clock().timeout(timeout.0, machine.wait_for_end());
        wait(py, async { Ok(end.await.is_some()) })
    }

    /// Reboot the guest and wait until it restarts. The next command waits until it is up again.
    ///
    /// Raises MachineError unless the machine was started with start(allow_reboot=True).
    fn reboot(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |machine| machine.reboot())
    }

    /// Stop the machine at once, as if the power failed. Does nothing if it is off.
    pub(super) fn crash(&self, py: Python<'_>) -> PyResult<()> {
        wait_through_signals(py, self.machine()?.crash())
    }

    /// Stop the machine at once and remove its state, unless that is to be kept.
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.machine()?.release())
    }

    /// Freeze the guest until resume(). Does nothing if it is paused.
    ///
    /// Its vCPUs and devices stop, and so do the timeouts of all calls that wait for it. Calls made while it is paused
    /// wait too, so this script or another of its threads has to resume it. Afterwards the guest's clock shows the right
    /// time. Over the backdoor shell the guest itself measures a command's timeout, and that goes on.
    ///
    /// Raises MachineError if the machine is not running.
    ///
    ///     database.pause()
    ///     client.fail("curl --max-time 5 http://database")
    ///     database.resume()
    fn pause(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        wait(py, machine.pause())
    }

    /// Continue after pause(). Does nothing if the machine is running.
    ///
    /// Raises MachineError if the machine is off or has ended.
    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        wait(py, machine.resume())
    }

    /// Forward a TCP port of the host's loopback to the guest until the machine ends. Returns the host's port.
    ///
    /// host_port: a number, or a string of one; 0 picks a free port.
    /// guest_port: a number, or a string of one.
    ///
    /// Raises MachineError if the machine is not running or the host's port is in use.
    #[pyo3(
        signature = (host_port = Port(8080), guest_port = Port(80)),
        text_signature = "($self, host_port=8080, guest_port=80)"
    )]
    fn forward_port(&self, py: Python<'_>, host_port: Port, guest_port: Port) -> PyResult<u16> {
        self.call(py, |machine| machine.forward_port(host_port.0, guest_port.0))
    }

    /// Unplug the cable of the first vlan: the guest loses the other machines, but not the host.
    fn block(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        py.detach(|| machine.block());
        Ok(())
    }

    /// Plug the cable back in after block().
    fn unblock(&self, py: Python<'_>) -> PyResult<()> {
        let machine = self.machine()?;
        py.detach(|| machine.unblock());
        Ok(())
    }
}
