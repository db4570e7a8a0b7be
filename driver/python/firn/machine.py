"""Machines, by the names that scripts know."""

from typing import NoReturn

from firn._firn import Machine
from firn.errors import MachineError
from firn.retry import retry

BaseMachine = Machine
QemuMachine = Machine


class NspawnMachine:
    """A container beside the machines: not there yet."""

    def __new__(cls) -> NoReturn:
        """Say so."""
        raise MachineError("containers are not there yet, only machines are")


__all__ = ["BaseMachine", "Machine", "NspawnMachine", "QemuMachine", "retry"]
