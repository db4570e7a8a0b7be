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
