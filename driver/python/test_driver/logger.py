"""The log."""

from firn.logger import AbstractLogger, CompositeLogger

__all__ = ["AbstractLogger", "CompositeLogger"]
