"""Exceptions of a test run."""


class MachineError(Exception):
    """A machine, or firn itself, failed."""


class NotHere(MachineError, AttributeError):
    """An attribute that the NixOS test driver has and firn does not; `hasattr` is False for it."""


class PollingConditionError(Exception):
    """A polling condition no longer holds."""


class RequestedAssertionFailed(AssertionError):
    """What the script required did not happen."""
