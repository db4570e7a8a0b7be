"""A test run."""

from firn.driver import Driver

__all__ = ["Driver"]
