"""Machines as scripts see them: `firn._firn.Machine`, and what is simpler in Python."""

from __future__ import annotations

from firn._firn import CHAR_TO_KEY, Machine
from firn.duration import seconds
from firn.errors import MachineError
from firn.machine.assignable import assignable
from firn.machine.windows import Windows
from firn.retry import retry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from socket import socket
    from typing import Any, NoReturn

    from firn.duration import Duration
    from firn.machine.lines import ConsoleLines
    from firn.machine.qmp import QMPSession
    from firn.machine.start import Process, QemuStartCommand


class BaseMachine(Machine):
    """A machine of any kind.

    A script's own class may be derived from it, or from QemuMachine: an object of that stands for
    the machine that it is made with.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take the machine to stand for."""
        if not self._made:
            raise MachineError(
                "a machine is made by create_machine(), or from the test's own description of its "
                "machines; a subclass M of yours wraps an existing one: `M(machine)`"
            )

    def __repr__(self) -> str:
        """Show the machine's name."""
        return f"<machine {self.name}>"

    @property
    def callbacks(self) -> list[Callable[[], object]]:
        """Functions without arguments that are called before each command. Scripts may add some."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, callbacks: list[Callable[[], object]]) -> None:
        self._callbacks[:] = callbacks

    def run_callbacks(self) -> None:
        """Call the functions in `callbacks`, as every command does first."""
        for callback in self.callbacks:
            callback()

    @assignable
    def tmp_dir(self) -> Path:
        """The directory of all machines' state."""
        return self.shared_dir.parent

    @property
    def keep_machine_state(self) -> bool:
        """Whether the machine's state is kept after the run."""
        return self._keeps_state

    @keep_machine_state.setter
    def keep_machine_state(self, keep: bool) -> None:
        if keep != self._keeps_state:
            raise MachineError(
                f"{self.name}: whether its state is kept is set when it is made: by "
                "--keep-machine-state, or create_machine(…, keep_machine_state=True)"
            )

    def cleanup_statedir(self) -> None:
        """Remove the machine's state. Its disks are new at the next start."""
        if self.booted:
            raise MachineError(f"{self.name} is running and needs its state")
        import shutil

        shutil.rmtree(self.state_dir)
        self.log(f"deleting machine state directory {self.state_dir}")
        self.log("if you want to keep the machine state, pass --keep-machine-state")


class QemuMachine(Windows, BaseMachine):
    """A virtual machine, under the name that scripts use."""

    @assignable
    def pid(self) -> int | None:
        """The machine's process while it runs: this one."""
        process = self.process
        return None if process is None else process.pid

    @assignable
    def process(self) -> Process | None:
        """A stand-in for the machine's process while it runs; it has no process of its own."""
        from firn.machine.start import Process

        return Process(self) if self.booted else None

    @assignable
    def shell(self) -> socket | None:
        """The backdoor shell's socket while the machine runs; a new one at each call."""
        return self._shell()

    @assignable
    def start_command(self) -> QemuStartCommand:
        """The command that starts the machine by hand."""
        from firn.machine.start import QemuStartCommand

        return QemuStartCommand(f"run-{self.name}-vm")

    @property
    def qmp_client(self) -> QMPSession:
        """A QMP session, for the commands that firn supports."""
        from firn.machine.qmp import QMPSession

        session = self.__dict__.get("_qmp_client")
        if not isinstance(session, QMPSession) or session.closed:
            session = QMPSession(self)
            self.__dict__["_qmp_client"] = session
        return session

    @assignable
    def last_lines(self) -> ConsoleLines:
        """The console lines not consumed yet; wait_for_console_text() consumes lines too."""
        from firn.machine.lines import ConsoleLines

        return ConsoleLines(self)

    @assignable
    def full_console_log(self) -> list[str]:
        """All console lines since the start."""
        return self.get_console_log().splitlines()

    @assignable
    def monitor_path(self) -> Path:
        """The path of QEMU's monitor. There is no such socket: use send_monitor_command()."""
        return self.state_dir / "monitor"

    @assignable
    def qmp_path(self) -> Path:
        """The path of QEMU's QMP socket. Without QEMU there is none: use `qmp_client`."""
        return self.state_dir / "qmp"

    @assignable
    def shell_path(self) -> Path:
        """The path of the root shell's socket. Nobody may connect there: use `shell`."""
        return self.state_dir / "shell"

    @assignable
    def vsock_host(self) -> Path | None:
        """The UNIX socket through which the host reaches the guest's vsock ports, or None."""
        return self._vsock

    @assignable
    def vsock_guest(self) -> Path | None:
        """The same socket: the guest's side is in this process and needs none of its own."""
        return self._vsock

    def wait_for_qmp_event(
        self, event_filter: Callable[[dict[str, Any]], object], timeout: Duration = 600
    ) -> dict[str, Any]:
        """Wait for a QMP event that `event_filter` accepts, and return it.

        There are SHUTDOWN, RESET, STOP, RESUME, POWERDOWN and GUEST_PANICKED. Each is seen once,
        also those that the filter does not take.

        timeout: seconds or a timedelta; 600 seconds by default. Raises TimeoutError after it.
        """
        return self.qmp_client.wait_for(event_filter, seconds(timeout))

    def shell_interact(self, address: str | None = None) -> None:
        """Connect the user to the root shell until Ctrl-D or Ctrl-C, for use at the prompt.

        address: what socat shall connect to the shell instead of the terminal: `tcp-listen:4444`.
        """
        from firn import interact

        interact.shell(self, address)

    def console_interact(self) -> None:
        """Send what the user types to the serial console until Ctrl-D or Ctrl-C."""
        from firn import interact

        interact.console(self)


class NspawnMachine(BaseMachine):
    """A container. Not supported yet."""

    def __new__(cls, *args: object, **kwargs: object) -> NoReturn:
        """Raise MachineError."""
        raise MachineError("containers are not supported yet")


__all__ = [
    "CHAR_TO_KEY",
    "BaseMachine",
    "Machine",
    "NspawnMachine",
    "QemuMachine",
    "retry",
]
