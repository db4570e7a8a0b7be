"""Tries until it works."""

import time
from collections.abc import Callable
from datetime import timedelta

from firn.errors import RequestedAssertionFailed

Duration = timedelta | float


def seconds(duration: Duration) -> float:
    """Seconds of a duration: a timedelta, or an int or float of seconds."""
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if isinstance(duration, bool) or not isinstance(duration, int | float):
        raise TypeError("a duration is a datetime.timedelta, or an int or float of seconds")
    return float(duration)


def retry(fn: Callable[[bool], bool], timeout: Duration = 900) -> None:
    """Call `fn(False)` each second until it is true; after `timeout` once more, with True.

    Only `fn` knows what it looks at, so no event can say when to look.
    """
    budget = seconds(timeout)
    deadline = time.monotonic() + budget
    while (left := deadline - time.monotonic()) > 0:
        if fn(False):
            return
        time.sleep(min(1.0, max(0.0, left)))
    if not fn(True):
        raise RequestedAssertionFailed(f"action timed out after {budget:g} seconds")
