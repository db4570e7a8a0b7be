"""The terminal: filters output to it, and runs a command in one of its own.

The latter is `python3 -m firn.terminal ROWS COLS CMD…`: a carrier passes on what is typed, but has
no terminal, and a prompt needs one.
"""

from __future__ import annotations

import io
import os
import sys

from firn._firn import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

#: Sets the terminal's size, then executes the command.
SIZED = 'stty rows "$1" cols "$2"; shift 2; exec "$@"'

#: Escape sequences that set colours and nothing else.
COLOURS = r"(\x1b\[[0-9;:]*m)"


class Filtered(io.TextIOWrapper):
    """Text for a terminal: control sequences are removed, colours are kept.

    What a script prints may be what a guest has said. Who means to drive the terminal, as the
    prompt does, writes to the buffer.
    """

    def write(self, text: str, /) -> int:
        """Write the printable part of a text."""
        import re

        parts = re.split(COLOURS, text)
        parts[::2] = map(printable, parts[::2])
        super().write("".join(parts))
        return len(text)


def filter_output() -> None:
    """Filter this process's output to a terminal. It is not buffered, even through a pipe."""
    sys.stdout = _filtered(sys.stdout)
    sys.stderr = _filtered(sys.stderr)


def _filtered(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    # Set in a carrier whose output goes to a terminal.
    forced = os.environ.get("CLICOLOR_FORCE", "0") not in ("", "0")
    if not stream.isatty() and not forced:
        stream.reconfigure(line_buffering=True)
        return stream
    stream.flush()
    return Filtered(
        stream.buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True
    )


def with_terminal(command: list[str]) -> list[str]:
    """Return the command line that runs a command in a terminal as large as this process's."""
    import shutil

    size = shutil.get_terminal_size()
    own = [sys.executable, "-P", "-m", "firn.terminal"]
    return [*own, str(size.lines), str(size.columns), *command]


def main() -> int:
    """Run the command line and return the command's exit status."""
    import pty

    status = pty.spawn(["sh", "-c", SIZED, "sh", *sys.argv[1:]])
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
