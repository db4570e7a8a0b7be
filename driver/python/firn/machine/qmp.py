"""QMP, under upstream's names."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from firn._firn import Machine
from firn.duration import Duration, seconds


class QMPAPIError(RuntimeError):
    """QMP answered with an error."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        """Take the answer."""
        error = message["error"]
        self.class_name = str(error["class"])
        self.description = str(error["desc"])
        self.transaction_id = message.get("id")
        super().__init__(message)

    def __str__(self) -> str:
        """Say what went wrong."""
        return f"QMP: {self.class_name}: {self.description}"


class QMPSession:
    """A machine's QMP session."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine."""
        self._machine = machine
        self.closed = False

    def send(self, cmd: str, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a command and return the whole answer: `{"return": …}`.

        query-commands says which there are. Raises QMPAPIError for others, and for arguments that
        make no sense.
        """
        self._check()
        answer: dict[str, Any] = json.loads(self._machine._send_qmp(cmd, json.dumps(args or {})))
        if "error" in answer:
            raise QMPAPIError(answer)
        return answer

    def wait_for_event(self, timeout: Duration = 10) -> dict[str, Any]:
        """Return the next event that has not been returned yet.

        timeout: seconds or a timedelta; 10 seconds by default. Raises TimeoutError after it.
        """
        self._check()
        event = self._machine._next_qmp_event(timeout)
        if event is None:
            raise TimeoutError(
                f"{self._machine.name}: no QMP event within {seconds(timeout):g} seconds"
            )
        return dict(json.loads(event))

    def events(self, timeout: Duration = 10) -> Iterator[dict[str, Any]]:
        """Yield the events received so far that have not been returned yet, without waiting."""
        del timeout
        self._check()
        while (event := self._machine._next_qmp_event(0)) is not None:
            yield json.loads(event)

    def wait_for(
        self, wanted: Callable[[dict[str, Any]], object], timeout: float
    ) -> dict[str, Any]:
        """Return the next event that the filter accepts; see `QemuMachine.wait_for_qmp_event`."""
        deadline = time.monotonic() + timeout
        while True:
            event = self.wait_for_event(max(0.0, deadline - time.monotonic()))
            if wanted(event):
                return event

    def close(self) -> None:
        """End the session. The machine's `qmp_client` is a new one then."""
        self.closed = True

    def _check(self) -> None:
        if self.closed:
            raise ValueError("this QMP session is closed")


__all__ = ["QMPAPIError", "QMPSession"]
