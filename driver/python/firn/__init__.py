"""firn: drives virtual machines from a test script."""

from firn._firn import Checkpoint, Machine, Step, Test, VLan, __version__
from firn.driver import Driver, Settings
from firn.errors import MachineError, RequestedAssertionFailed
from firn.logger import CompositeLogger, Logger, TerminalLogger
from firn.retry import retry

__all__ = [
    "Checkpoint",
    "CompositeLogger",
    "Driver",
    "Logger",
    "Machine",
    "MachineError",
    "RequestedAssertionFailed",
    "Settings",
    "Step",
    "TerminalLogger",
    "Test",
    "VLan",
    "__version__",
    "retry",
]
