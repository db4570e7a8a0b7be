"""Durations: a timedelta, or an int or float of seconds."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from datetime import timedelta

    Duration = timedelta | float


def __getattr__(name: str) -> object:
    """Make the type when it is asked for."""
    if name != "Duration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from datetime import timedelta

    return timedelta | float


def seconds(duration: Duration) -> float:
    """Convert a duration to seconds. A bool is not a duration."""
    if not isinstance(duration, int | float):
        from datetime import timedelta

        if isinstance(duration, timedelta):
            return duration.total_seconds()
    if isinstance(duration, bool) or not isinstance(duration, int | float):
        raise TypeError("a duration is a datetime.timedelta, or seconds as an int or float")
    return float(duration)


def one_of(
    name: str, first: Duration | None, second: Duration | None, default: Duration
) -> Duration:
    """Return the value of an argument that has two names, only one of which may be used."""
    if first is not None and second is not None:
        raise TypeError(f"{name} is given twice, under two names")
    if first is None:
        return default if second is None else second
    return first
