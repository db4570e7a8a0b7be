"""The log, by the names that scripts know."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

from firn._firn import Logger, Step

Attributes = Mapping[str, str] | None


class AbstractLogger(ABC):
    """What can be asked of a log. `attributes` may name the `machine` that a message is about."""

    @abstractmethod
    def log(self, message: str, attributes: Attributes = None) -> None:
        """Write a message."""

    @abstractmethod
    def subtest(self, name: str, attributes: Attributes = None) -> AbstractContextManager[None]:
        """Group what happens inside as a test case."""

    @abstractmethod
    def nested(self, message: str, attributes: Attributes = None) -> AbstractContextManager[None]:
        """Group what happens inside, and say how long it took."""

    @abstractmethod
    def debug(self, message: str, attributes: Attributes = None) -> None:
        """Write a message that helps to find out why."""

    @abstractmethod
    def info(self, message: str, attributes: Attributes = None) -> None:
        """Write a message."""

    @abstractmethod
    def warning(self, message: str, attributes: Attributes = None) -> None:
        """Write a message that somebody should look at though the test goes on."""

    @abstractmethod
    def error(self, message: str, attributes: Attributes = None) -> None:
        """Write an error of the test."""

    @abstractmethod
    def log_serial(self, message: str, machine: str) -> None:
        """Write a line that a guest printed."""

    @abstractmethod
    def print_serial_logs(self, enable: bool) -> None:
        """Show or hide what guests print."""


AbstractLogger.register(Logger)

# A run has one log, which writes to the terminal, and to files if they are asked for.
CompositeLogger = Logger

__all__ = ["AbstractLogger", "CompositeLogger", "Logger", "Step"]
