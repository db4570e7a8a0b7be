"""What can go wrong while a test runs."""


class MachineError(Exception):
    """The machinery failed."""


class RequestedAssertionFailed(AssertionError):
    """What the script asked for did not come true."""
