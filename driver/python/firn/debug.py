"""The script's `debug`. What serves debuggers is in `breakpoints`, which most runs never import."""

from abc import ABC, abstractmethod


class DebugAbstract(ABC):
    """The script's `debug`."""

    @abstractmethod
    def breakpoint(self, host: str = "127.0.0.1", port: int = 4444) -> None:
        """Stop here and serve a debugger at this address, if debugging is on."""

    def close(self) -> None:  # noqa: B027 - there is nothing to end by default
        """End the debugger's helper processes."""


class DebugNop(DebugAbstract):
    """Debugging is off."""

    def breakpoint(self, host: str = "127.0.0.1", port: int = 4444) -> None:
        """Do nothing."""
