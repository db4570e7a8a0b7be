"""Durations."""

from firn.duration import Duration, seconds

__all__ = ["Duration", "seconds"]
