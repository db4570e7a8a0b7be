"""Where machines run: here, or in a carrier."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from firn._firn import in_carrier_if_needed
from firn.terminal import with_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: Set for a driver in a carrier, so that it does not start another.
IN_CARRIER = "FIRN_IN_CARRIER"

#: Where machines may run.
ACCELS = ("auto", "kvm", "carrier", "none")


def in_carrier() -> bool:
    """Return whether this process was started by `again`."""
    return IN_CARRIER in os.environ


def name_agent() -> None:
    """Say where the agent is. This process is Python, so it cannot be found beside it."""
    agent = Path(sys.executable).with_name("firn-agent")
    if agent.is_file():
        os.environ.setdefault("FIRN_AGENT", str(agent))


def again(
    accel: str, command: Sequence[str], writable: Sequence[Path], terminal: bool = False
) -> int | None:
    """Run a command line in a carrier and return its exit status; None if machines can run here."""
    name_agent()
    command = ["env", f"{IN_CARRIER}=1", *command]
    if terminal:
        command = with_terminal(command)
    return in_carrier_if_needed(accel, command, writable, terminal)
