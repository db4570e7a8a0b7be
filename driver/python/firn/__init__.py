"""firn: drives virtual machines from a test script."""

from firn._firn import Logger, Machine, Step, Test, VLan, __version__
from firn.driver import Driver, Settings
from firn.errors import MachineError, RequestedAssertionFailed
from firn.retry import retry

__all__ = [
    "Driver",
    "Logger",
    "Machine",
    "MachineError",
    "RequestedAssertionFailed",
    "Settings",
    "Step",
    "Test",
    "VLan",
    "__version__",
    "retry",
]
