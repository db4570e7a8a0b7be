"""What can go wrong while a test runs."""

from firn.errors import (
    MachineError,
    NotHere,
    PollingConditionError,
    RequestedAssertionFailed,
)

__all__ = ["MachineError", "NotHere", "PollingConditionError", "RequestedAssertionFailed"]
