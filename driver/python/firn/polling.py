"""Polling conditions, which have to hold while a part of a script runs."""

from __future__ import annotations

import time
from _thread import allocate_lock

from firn._firn import set_wait_hook
from firn.duration import one_of, seconds
from firn.errors import PollingConditionError
from firn.retry import retry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import overload

    from firn._firn import Logger
    from firn.duration import Duration

    Check = Callable[[], bool | None]


class PollingCondition:
    """A condition: `with condition:` checks it regularly, `condition.wait()` waits for it.

    It is checked before every call of a machine and about once a second while one waits, but not
    more often than its interval says, and not while it is being checked already. Answering None
    counts as true.
    """

    def __init__(
        self, check: Check, log: Logger, interval: Duration, description: str | None
    ) -> None:
        """Take the function to call, and the interval."""
        self._check = check
        self._log = log
        self._interval = seconds(interval)
        self._checked = float("-inf")
        self._checking = allocate_lock()
        name = getattr(check, "__name__", repr(check))
        self.description = " ".join((description or check.__doc__ or name).split())

    @property
    def condition(self) -> PollingCondition:
        """Itself: upstream's driver has it within another object."""
        return self

    def __call__(self) -> bool | None:
        """Call the decorated function."""
        return self._check()

    @property
    def overdue(self) -> bool:
        """Whether the last check was longer ago than the interval."""
        return time.monotonic() - self._checked >= self._interval

    def check(self, force: bool = False) -> bool:
        """Whether it holds. Checked only if overdue or forced; raising counts as failing."""
        if not (force or self.overdue):
            return True
        if not self._checking.acquire(blocking=False):
            # This check itself called a machine, or another thread is checking.
            return not force
        try:
            with self._log.nested(f"checking polling condition: {self.description}"):
                answer = self._check()
            return answer is None or bool(answer)
        except Exception as error:
            self._log.info(f"{self.description}: {type(error).__name__}: {error}")
            return False
        finally:
            self._checked = time.monotonic()
            self._checking.release()

    def maybe_raise(self) -> None:
        """Raise if the condition no longer holds."""
        if not self.check():
            raise PollingConditionError(f"Polling condition failed: {self.description}")

    def wait(
        self, timeout_seconds: Duration | None = None, timeout: Duration | None = None
    ) -> None:
        """Wait until the condition holds, checking every second.

        timeout: seconds or a timedelta; 900 seconds by default. `timeout_seconds` is its older
        name.

        Raises RequestedAssertionFailed after it.
        """
        with self._log.nested(f"waiting for {self.description}"):
            retry(lambda _last: self.check(force=True), timeout_seconds, timeout)

    def __enter__(self) -> None:
        """Require the condition from now on."""
        _active.add(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop requiring the condition."""
        _active.remove(self)


class _Active:
    """The active conditions, innermost last; machines check them while they wait."""

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._conditions: tuple[PollingCondition, ...] = ()

    def add(self, condition: PollingCondition) -> None:
        with self._lock:
            self._conditions += (condition,)
            set_wait_hook(self.check)

    def remove(self, condition: PollingCondition) -> None:
        with self._lock:
            at = len(self._conditions) - 1 - self._conditions[::-1].index(condition)
            self._conditions = self._conditions[:at] + self._conditions[at + 1 :]
            if not self._conditions:
                set_wait_hook(None)

    def all(self) -> list[PollingCondition]:
        return list(self._conditions)

    def check(self) -> None:
        for condition in self._conditions:
            condition.maybe_raise()


_active = _Active()


def active() -> list[PollingCondition]:
    """Return the active conditions."""
    return _active.all()


def check_active() -> None:
    """Check the active conditions that are due."""
    _active.check()


class Decorator:
    """The script's decorator `polling_condition`, used with or without arguments."""

    def __init__(self, log: Logger) -> None:
        """Take the log of the checks."""
        self._log = log

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            fun_: Check,
            *,
            seconds_interval: Duration | None = None,
            description: str | None = None,
            interval: Duration | None = None,
        ) -> PollingCondition: ...

        @overload
        def __call__(
            self,
            fun_: None = None,
            *,
            seconds_interval: Duration | None = None,
            description: str | None = None,
            interval: Duration | None = None,
        ) -> Callable[[Check], PollingCondition]: ...

    def __call__(
        self,
        fun_: Check | None = None,
        *,
        seconds_interval: Duration | None = None,
        description: str | None = None,
        interval: Duration | None = None,
    ) -> PollingCondition | Callable[[Check], PollingCondition]:
        """Turn a function into a condition. The interval has two names; the default is 2 s."""
        every = one_of("the interval", seconds_interval, interval, default=2.0)

        def made_of(check: Check) -> PollingCondition:
            return PollingCondition(check, self._log, every, description)

        return made_of if fun_ is None else made_of(fun_)
