"""Breakpoints in a script."""

import os
import random
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod

from firn._firn import Logger
from firn.errors import MachineError


class DebugAbstract(ABC):
    """What scripts know as `debug`."""

    @abstractmethod
    def breakpoint(self, host: str = "127.0.0.1", port: int = 4444) -> None:
        """Stop here, if debugging is on, and serve a debugger at this address."""

    def close(self) -> None:  # noqa: B027 - there is nothing to end by default
        """End what still runs for the debugger."""


class DebugNop(DebugAbstract):
    """Debugging is off."""

    def breakpoint(self, host: str = "127.0.0.1", port: int = 4444) -> None:
        """Do nothing."""


class Debug(DebugAbstract):
    """Debugging is on."""

    def __init__(self, log: Logger, attach: str) -> None:
        """Take the command by which people get to where the script runs."""
        self._log = log
        self._attach = attach
        self._marks: list[subprocess.Popen[bytes]] = []

    def breakpoint(self, host: str = "127.0.0.1", port: int = 4444) -> None:
        """Stop here until somebody connects to this address, and serve pdb there."""
        try:
            from remote_pdb import RemotePdb  # noqa: PLC0415 - needed only here
        except ImportError as error:
            raise MachineError(f"breakpoints need the Python package remote-pdb: {error}") from None
        # The attaching command finds our namespaces by a process whose argument nobody else has.
        mark = str(random.randrange(1_000_000, 10_000_000))
        shell = os.environ | {"bashInteractive": shutil.which("bash") or "/bin/sh"}
        self._marks.append(subprocess.Popen(["sleep", mark], env=shell))
        self._log.log_test_error(f"Breakpoint reached, run '{self._attach} {mark}'")
        self._log.info(f"the debugger listens on {host}:{port}")
        RemotePdb(host, port, quiet=True).set_trace(sys._getframe().f_back)

    def close(self) -> None:
        """End the processes that mark where we are."""
        for process in self._marks:
            process.kill()
            process.wait()
        self._marks.clear()
