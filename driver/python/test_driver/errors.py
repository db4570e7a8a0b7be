"""What can go wrong while a test runs."""

from firn.errors import MachineError, RequestedAssertionFailed

__all__ = ["MachineError", "RequestedAssertionFailed"]
