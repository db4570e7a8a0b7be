"""Tries until it works."""

import time
from collections.abc import Callable

from firn._firn import check_wait_hook
from firn.duration import Duration, seconds
from firn.errors import RequestedAssertionFailed


def retry(fn: Callable[[bool], bool], timeout: Duration = 900) -> None:
    """Call `fn(False)` each second until it is true; after `timeout` once more, with True.

    Only `fn` knows what it looks at, so no event can say when to look. A polling condition that
    fails ends it.
    """
    budget = seconds(timeout)
    deadline = time.monotonic() + budget
    while (left := deadline - time.monotonic()) > 0:
        check_wait_hook()
        if fn(False):
            return
        time.sleep(min(1.0, max(0.0, left)))
    if not fn(True):
        raise RequestedAssertionFailed(f"action timed out after {budget:g} seconds")
