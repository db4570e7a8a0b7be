"""Durations: a timedelta, or an int or float of seconds."""

from datetime import timedelta

Duration = timedelta | float


def seconds(duration: Duration) -> float:
    """Seconds of a duration. A bool is none."""
    if isinstance(duration, timedelta):
        return duration.total_seconds()
    if isinstance(duration, bool) or not isinstance(duration, int | float):
        raise TypeError("a duration is a datetime.timedelta, or an int or float of seconds")
    return float(duration)


def one_of(
    name: str, first: Duration | None, second: Duration | None, default: Duration
) -> Duration:
    """Give an argument that has two names, of which a call may use one."""
    if first is not None and second is not None:
        raise TypeError(f"{name} is given twice, by two names")
    if first is None:
        return default if second is None else second
    return first
