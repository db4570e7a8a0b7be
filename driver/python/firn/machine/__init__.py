"""Machines, as scripts have them: `firn._firn.Machine`, and what is easier said in Python."""

import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from socket import socket
from typing import Any, Generic, NoReturn, TypeVar, overload

from firn import interact
from firn._firn import Machine
from firn.duration import Duration, seconds
from firn.errors import MachineError, RequestedAssertionFailed
from firn.machine.keys import CHAR_TO_KEY
from firn.machine.qmp import QMPSession
from firn.machine.start import Process, QemuStartCommand, make_command
from firn.machine.windows import Windows
from firn.retry import retry

T = TypeVar("T")


class assignable(Generic[T]):
    """An attribute that is worked out, until a script assigns something to it."""

    def __init__(self, get: Callable[[Any], T]) -> None:
        """Take what works it out."""
        self._get = get
        self.__doc__ = get.__doc__

    @overload
    def __get__(self, machine: None, owner: type) -> "assignable[T]": ...
    @overload
    def __get__(self, machine: object, owner: type) -> T: ...
    def __get__(self, machine: object | None, owner: type) -> "T | assignable[T]":
        """Work it out."""
        return self if machine is None else self._get(machine)


class BaseMachine(Machine):
    """A machine of whatever kind.

    A script's own class may be derived from it, or from QemuMachine: an object of that stands for
    the machine that it is made with.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Stand for the machine that is given."""
        if not self._made:
            raise MachineError(
                "a machine is made by create_machine(), with what a test says of its machines and "
                "networks; a class of your own takes over one that there is: `M(machine)`"
            )

    def __repr__(self) -> str:
        """Show its name."""
        return f"<machine {self.name}>"

    @property
    def callbacks(self) -> list[Callable[[], object]]:
        """What is called before each command: functions without arguments. Scripts may add some."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, callbacks: list[Callable[[], object]]) -> None:
        self._callbacks[:] = callbacks

    def run_callbacks(self) -> None:
        """Call what is in `callbacks`, as every command does first."""
        for callback in self.callbacks:
            callback()

    @assignable
    def tmp_dir(self) -> Path:
        """The directory in which all machines' state is."""
        return self.shared_dir.parent

    @property
    def keep_machine_state(self) -> bool:
        """Whether its state outlives the run."""
        return self._keeps_state

    @keep_machine_state.setter
    def keep_machine_state(self, keep: bool) -> None:
        if keep != self._keeps_state:
            raise MachineError(
                f"{self.name}: whether its state is kept is said when it is made: by "
                "--keep-machine-state, or create_machine(…, keep_machine_state=True)"
            )

    def cleanup_statedir(self) -> None:
        """Remove its state: its disks are new at the next start."""
        if self.booted:
            raise MachineError(f"{self.name} runs, and needs its state")
        shutil.rmtree(self.state_dir)
        self.log(f"deleting machine state directory {self.state_dir}")
        self.log("if you want to keep the machine state, pass --keep-machine-state")


class QemuMachine(Windows, BaseMachine):
    """A virtual machine, by the name that scripts know."""

    @assignable
    def pid(self) -> int | None:
        """The process that it runs in, if it runs: this one."""
        process = self.process
        return None if process is None else process.pid

    @assignable
    def process(self) -> Process | None:
        """What stands for its process, if it runs: it has none of its own."""
        return Process(self) if self.booted else None

    @assignable
    def shell(self) -> socket | None:
        """The socket of the backdoor's root shell, if it runs; each time another one."""
        return self._shell()

    @assignable
    def start_command(self) -> QemuStartCommand:
        """What would start it by hand."""
        return QemuStartCommand(f"run-{self.name}-vm")

    @property
    def qmp_client(self) -> QMPSession:
        """QEMU's machine protocol, as far as firn has the same thing."""
        session = self.__dict__.get("_qmp_client")
        if not isinstance(session, QMPSession) or session.closed:
            session = QMPSession(self)
            self.__dict__["_qmp_client"] = session
        return session

    @assignable
    def last_lines(self) -> "ConsoleLines":
        """The lines of its console that nobody has taken yet: also wait_for_console_text() does."""
        return ConsoleLines(self)

    @assignable
    def full_console_log(self) -> list[str]:
        """The lines of its console since its start."""
        return self.get_console_log().splitlines()

    @assignable
    def monitor_path(self) -> Path:
        """Where QEMU's monitor would be: send_monitor_command() reaches what there is."""
        return self.state_dir / "monitor"

    @assignable
    def qmp_path(self) -> Path:
        """Where QEMU's machine protocol would be: `qmp_client` speaks it."""
        return self.state_dir / "qmp"

    @assignable
    def shell_path(self) -> Path:
        """Where the root shell's socket would be: `shell` is that."""
        return self.state_dir / "shell"

    @assignable
    def vsock_host(self) -> Path | None:
        """The UNIX socket by which the host reaches the guest's vsock ports, if it has any."""
        return self._vsock

    @assignable
    def vsock_guest(self) -> Path | None:
        """The same: the guest's side is in this process, and needs no socket of its own."""
        return self._vsock

    def wait_for_qmp_event(
        self, event_filter: Callable[[dict[str, Any]], object], timeout: Duration = 600
    ) -> dict[str, Any]:
        """Wait for an event of QEMU's machine protocol that `event_filter` takes, and give it.

        There are SHUTDOWN, RESET, STOP, RESUME, POWERDOWN and GUEST_PANICKED. Each is seen once,
        also those that the filter does not take.

        timeout: seconds or a timedelta; 600 seconds by default. Raises TimeoutError after it.
        """
        return self.qmp_client.wait_for(event_filter, seconds(timeout))

    def shell_interact(self, address: str | None = None) -> None:
        """Let the user talk to the root shell until Ctrl-D or Ctrl-C; for use at the prompt.

        address: what socat shall connect to the shell instead of the terminal: `tcp-listen:4444`.
        """
        interact.shell(self, address)

    def console_interact(self) -> None:
        """Send what the user types to the serial console until Ctrl-D or Ctrl-C."""
        interact.console(self)


class ConsoleLines(queue.Queue[str]):
    """The lines of a machine's console that nobody has taken yet, as a queue."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine."""
        super().__init__()
        self._machine = machine

    def get(self, block: bool = True, timeout: float | None = None) -> str:
        """Take the next line; raise queue.Empty if there is none in time."""
        limit = (float("inf") if timeout is None else timeout) if block else 0.0
        try:
            return self._machine._next_console_line(limit)
        except RequestedAssertionFailed:
            raise queue.Empty from None

    def qsize(self) -> int:
        """Say how many lines there are."""
        return self._machine._console_lines_left()

    def empty(self) -> bool:
        """Whether there is none."""
        return self.qsize() == 0


class NspawnMachine(BaseMachine):
    """A container beside the machines: not there yet."""

    def __new__(cls, *args: object, **kwargs: object) -> NoReturn:
        """Say so."""
        raise MachineError("containers are not there yet, only machines are")


__all__ = [
    "CHAR_TO_KEY",
    "BaseMachine",
    "Machine",
    "NspawnMachine",
    "QemuMachine",
    "QemuStartCommand",
    "make_command",
    "retry",
]
