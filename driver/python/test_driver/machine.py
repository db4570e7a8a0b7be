"""Machines."""

from firn.machine import BaseMachine, NspawnMachine, QemuMachine, retry

# The name before there were containers.
Machine = QemuMachine

__all__ = ["BaseMachine", "Machine", "NspawnMachine", "QemuMachine", "retry"]
