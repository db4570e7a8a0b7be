"""Gives a command a terminal of its own: `python3 -m firn.terminal ROWS COLS CMD…`.

A carrier passes on what is typed, but has no terminal; a prompt needs one.
"""

import os
import pty
import shutil
import sys

#: Sets the terminal's size and becomes the command.
SIZED = 'stty rows "$1" cols "$2"; shift 2; exec "$@"'


def with_terminal(command: list[str]) -> list[str]:
    """Give the command line that runs a command in a terminal as large as this process's."""
    size = shutil.get_terminal_size()
    own = [sys.executable, "-P", "-m", "firn.terminal"]
    return [*own, str(size.lines), str(size.columns), *command]


def main() -> int:
    """Run the command line; the answer is the command's exit status."""
    status = pty.spawn(["sh", "-c", SIZED, "sh", *sys.argv[1:]])
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
