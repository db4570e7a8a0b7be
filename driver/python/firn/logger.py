"""The log, under the names that scripts use."""

from __future__ import annotations

import atexit
import sys
from abc import ABC, abstractmethod
from enum import IntEnum

from firn._firn import Logger, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from os import PathLike


class LogLevel(IntEnum):
    """The level of a message."""

    DEBUG = 1
    INFO = 2
    WARNING = 3
    ERROR = 4


class AbstractLogger(ABC):
    """The methods of every log. `attributes` may name the `machine` that a message is about."""

    @abstractmethod
    def log(self, message: str, attributes: dict[str, str] = {}) -> None:  # noqa: B006
        """Log a message."""

    @abstractmethod
    def subtest(
        self,
        name: str,
        attributes: dict[str, str] = {},  # noqa: B006
    ) -> AbstractContextManager[None]:
        """Group what a `with` block does as a test case."""

    @abstractmethod
    def nested(
        self,
        message: str,
        attributes: dict[str, str] = {},  # noqa: B006
    ) -> AbstractContextManager[None]:
        """Group what a `with` block does, and log its duration."""

    @abstractmethod
    def debug(self, message: object, attributes: dict[str, str] = {}) -> None:  # noqa: B006
        """Log a message for debugging."""

    @abstractmethod
    def info(self, message: object, attributes: dict[str, str] = {}) -> None:  # noqa: B006
        """Log a message."""

    @abstractmethod
    def warning(self, message: object, attributes: dict[str, str] = {}) -> None:  # noqa: B006
        """Log a warning."""

    @abstractmethod
    def error(self, message: object, attributes: dict[str, str] = {}) -> None:  # noqa: B006
        """Log an error. In the log of a run this ends the run."""

    @abstractmethod
    def log_test_error(self, message: object, attributes: dict[str, str] = {}) -> None:  # noqa: B006
        """Log an error of the test without ending it."""

    @abstractmethod
    def log_serial(self, message: str, machine: str) -> None:
        """Log a line that a guest printed."""

    @abstractmethod
    def print_serial_logs(self, enable: bool) -> None:
        """Show or hide the guests' console output."""

    @abstractmethod
    def set_log_level(self, level: LogLevel) -> None:
        """Hide messages below a level."""


AbstractLogger.register(Logger)


class TerminalLogger(Logger):
    """A log on stderr."""

    def __init__(self, level: str = "info") -> None:
        """Hide messages below `level`."""
        self.add_terminal(level)


class XMLLogger(Logger):
    """A log in an XML file."""

    def __init__(self, outfile: str | PathLike[str]) -> None:
        """Make the file; it is complete when the run has ended, or at `close`."""
        self.add_xml(outfile)
        atexit.register(self.finish)

    def close(self) -> None:
        """Complete the file."""
        self.finish()


class JunitXMLLogger(Logger):
    """A JUnit report, with a test case for the script and one for each subtest's name."""

    def __init__(self, outfile: str | PathLike[str]) -> None:
        """Make the file; it is written when the run has ended, or at `close`."""
        self.add_junit(outfile)
        atexit.register(self.finish)

    def close(self) -> None:
        """Write the file."""
        self.finish()


class CompositeLogger(Logger):
    """The log of a run, which writes to several outputs."""

    def __init__(self, logger_list: list[AbstractLogger]) -> None:
        """Take the loggers."""
        self.logger_list: list[AbstractLogger] = []
        for logger in logger_list:
            self.add_logger(logger)

    def add_logger(self, logger: AbstractLogger) -> None:
        """Write to this logger too."""
        if isinstance(logger, Logger):
            self.add_log(logger)
        else:
            self.add_listener(_Listener(logger))
        self.logger_list.append(logger)

    def error(self, message: object, attributes: dict[str, str] | None = None) -> None:
        """Log an error and end the run with status 1."""
        self.log_test_error(message, attributes)
        sys.exit(1)

    def print_serial_logs(self, enable: bool) -> None:
        """Show or hide the guests' console output."""
        super().print_serial_logs(enable)
        for logger in self._foreign():
            logger.print_serial_logs(enable)

    def set_log_level(self, level: LogLevel) -> None:
        """Hide messages below a level."""
        super().set_log_level(level)
        for logger in self._foreign():
            logger.set_log_level(level)

    def _foreign(self) -> list[AbstractLogger]:
        """Loggers written by scripts."""
        return [logger for logger in self.logger_list if not isinstance(logger, Logger)]


class _Listener:
    """Passes events to a logger written by a script."""

    def __init__(self, logger: AbstractLogger) -> None:
        self._logger = logger
        self._steps: list[tuple[str, AbstractContextManager[None]]] = []

    def __call__(self, kind: str, text: str, machine: str | None) -> None:
        attributes = {} if machine is None else {"machine": machine}
        match kind:
            case "log_serial":
                self._logger.log_serial(text, machine or "")
            case "nested" | "subtest":
                step = getattr(self._logger, kind)(text, attributes)
                step.__enter__()
                self._steps.append((text, step))
            case "end":
                self._end(text)
            case _:
                getattr(self._logger, kind)(text, attributes)

    def _end(self, text: str) -> None:
        """End the innermost step of this name; threads may end theirs in any order."""
        for at in reversed(range(len(self._steps))):
            if self._steps[at][0] == text:
                self._steps.pop(at)[1].__exit__(None, None, None)
                return


__all__ = [
    "AbstractLogger",
    "CompositeLogger",
    "JunitXMLLogger",
    "LogLevel",
    "Logger",
    "Step",
    "TerminalLogger",
    "XMLLogger",
]
