"""What can go wrong while a test runs."""


class MachineError(Exception):
    """The machinery failed."""


class NotHere(MachineError, AttributeError):
    """The NixOS test driver has it, and here it has no meaning. `hasattr` says that it is not."""


class PollingConditionError(Exception):
    """A condition that had to hold does not."""


class RequestedAssertionFailed(AssertionError):
    """What the script asked for did not come true."""
