"""Tries until it works."""

import time
from collections.abc import Callable

from firn._firn import check_wait_hook
from firn.duration import Duration, one_of, seconds
from firn.errors import RequestedAssertionFailed


def retry(
    fn: Callable[[bool], bool],
    timeout_seconds: Duration | None = None,
    timeout: Duration | None = None,
) -> None:
    """Call `fn(False)` each second until it is true; after `timeout` once more, with True.

    The timeout has two names, and is 900 seconds by default. Only `fn` knows what it looks at, so
    no event can say when to look. A polling condition that fails ends it.
    """
    given = one_of("timeout", timeout_seconds, timeout, default=900)
    budget = seconds(given)
    began = time.monotonic()
    while (left := began + budget - time.monotonic()) > 0:
        check_wait_hook()
        if fn(False):
            return
        time.sleep(min(1.0, max(0.0, left)))
    elapsed = time.monotonic() - began
    if not fn(True):
        raise RequestedAssertionFailed(
            f"action timed out after {elapsed:.2f} seconds (timeout={given})"
        )
