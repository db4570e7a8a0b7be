"""A test run."""

from firn.driver import Driver
from firn.machine.start import pythonize_name

__all__ = ["Driver", "pythonize_name"]
