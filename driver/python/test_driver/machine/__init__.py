"""Machines."""

from firn.machine import (
    CHAR_TO_KEY,
    BaseMachine,
    NspawnMachine,
    QemuMachine,
    retry,
)
from firn.machine.start import QemuStartCommand, make_command

# The name before there were containers.
Machine = QemuMachine

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
