"""Stand-ins for QEMU's process and command line, under upstream's names."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from firn._firn import Machine
from firn.config import pythonize_name
from firn.errors import MachineError


def make_command(args: Iterable[object]) -> str:
    """Join words into a shell command that takes each as it is."""
    return shlex.join(map(str, args))


class QemuStartCommand:
    """The command that starts a machine. firn reads the file it names and runs no command."""

    def __init__(self, script: str) -> None:
        """Take the command."""
        self._cmd = script

    @property
    def machine_name(self) -> str:
        """The machine's name, taken from the program's."""
        found = re.search("run-(.+)-vm$", self._cmd)
        return found[1] if found else "machine"

    @staticmethod
    def build_environment(state_dir: Path, shared_dir: Path) -> dict[str, str]:
        """Return the environment in which the command would run."""
        own = {"TMPDIR": str(state_dir), "SHARED_DIR": str(shared_dir), "USE_TMPDIR": "1"}
        return os.environ | own

    def cmd(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise MachineError: there is no QEMU to give options to."""
        raise MachineError(f"{self._cmd}: firn starts machines itself: there is no QEMU to run")

    def run(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise MachineError: there is no QEMU to run."""
        self.cmd()


class _Console:
    """A machine's serial console as a process's standard input."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def write(self, chars: bytes) -> int:
        """Type."""
        self._machine.send_console(chars.decode())
        return len(chars)

    def flush(self) -> None:
        """Do nothing: writes are not buffered."""


class Process:
    """A run of a machine in the shape of `subprocess.Popen`."""

    def __init__(self, machine: Machine) -> None:
        """Take a machine that runs."""
        self._machine = machine
        self.args = f"run-{machine.name}-vm"
        self.pid = os.getpid()
        self.stdin = _Console(machine)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return 0 if the machine has ended, else None."""
        if self.returncode is None and not self._machine.booted:
            self.returncode = 0
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the machine's end. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        limit = float("inf") if timeout is None else timeout
        if self.poll() is None and not self._machine._wait_for_end(limit):
            raise subprocess.TimeoutExpired(self.args, limit)
        self.returncode = 0
        return 0

    def terminate(self) -> None:
        """End the machine at once."""
        if self.poll() is None:
            self._machine.crash()

    kill = terminate


__all__ = ["Process", "QemuStartCommand", "make_command", "pythonize_name"]
