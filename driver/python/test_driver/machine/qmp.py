"""QEMU's machine protocol."""

from firn.machine.qmp import QMPAPIError, QMPSession

__all__ = ["QMPAPIError", "QMPSession"]
