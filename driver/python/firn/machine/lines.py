"""A machine's console lines as a queue."""

import queue

from firn._firn import Machine
from firn.errors import RequestedAssertionFailed


class ConsoleLines(queue.Queue[str]):
    """A machine's unconsumed console lines, as a queue."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine."""
        super().__init__()
        self._machine = machine

    def get(self, block: bool = True, timeout: float | None = None) -> str:
        """Take the next line. Raises queue.Empty if none comes in time."""
        limit = (float("inf") if timeout is None else timeout) if block else 0.0
        try:
            return self._machine._next_console_line(limit)
        except RequestedAssertionFailed:
            raise queue.Empty from None

    def qsize(self) -> int:
        """Return the number of lines."""
        return self._machine._console_lines_left()

    def empty(self) -> bool:
        """Whether the queue is empty."""
        return self.qsize() == 0
