"""firn: drives virtual machines from a test script."""

from firn._firn import Driver, Logger, Machine, Step, VLan, __version__
from firn.errors import MachineError, RequestedAssertionFailed
from firn.retry import retry

__all__ = [
    "Driver",
    "Logger",
    "Machine",
    "MachineError",
    "RequestedAssertionFailed",
    "Step",
    "VLan",
    "__version__",
    "retry",
]
