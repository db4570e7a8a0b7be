"""Retries until a function succeeds."""

from __future__ import annotations

import time

from firn._firn import check_wait_hook
from firn.duration import one_of, seconds
from firn.errors import RequestedAssertionFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from firn.duration import Duration


def retry(
    fn: Callable[[bool], bool],
    timeout_seconds: Duration | None = None,
    timeout: Duration | None = None,
) -> None:
    """Call `fn(False)` every second until it returns true; after `timeout` once more, with True.

    fn: takes whether this is the last try, and gives whether it has worked.
    timeout: seconds or a timedelta; 900 seconds by default. `timeout_seconds` is its older name.

    Raises RequestedAssertionFailed if the last try gives False too, what `fn` raises, and
    PollingConditionError if a polling condition fails meanwhile.

        retry(lambda last: machine.execute("test -e /run/ready")[0] == 0, timeout=60)
    """
    retry_on(time.monotonic, fn, one_of("timeout", timeout_seconds, timeout, default=900))


def retry_on(now: Callable[[], float], fn: Callable[[bool], bool], timeout: Duration) -> None:
    """Like `retry`, on another clock, such as that of a machine that may be paused."""
    budget = seconds(timeout)
    began = now()
    while (left := began + budget - now()) > 0:
        check_wait_hook()
        if fn(False):
            return
        time.sleep(min(1.0, max(0.0, left)))
    elapsed = now() - began
    if not fn(True):
        raise RequestedAssertionFailed(
            f"action timed out after {elapsed:.2f} seconds (timeout={timeout})"
        )
