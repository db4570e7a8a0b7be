"""What tests of runs, which are processes, share."""

import signal
import sys
import tempfile
import unittest
from pathlib import Path

#: Where the commands are.
BIN = Path(sys.executable).parent

#: What is set of a machine that cannot boot.
DEAD = 'kernel = "{file}"\ninitrd = ["{file}"]\ncmdline = ""\n'

#: Such a machine.
NODE = f"\n[nodes.machine]\n{DEAD}"


def runner(file: Path, out_dir: str = ".", *, timeout: str = "", junit: str = "") -> list[str]:
    """Give the command that runs a test, as `firn test` makes it."""
    flags = [str(file), out_dir, timeout, junit, "info", "", ""]
    return [sys.executable, "-P", "-m", "firn.runner", *flags]


class RunTest(unittest.TestCase):
    """Each test has a directory of its own, in which runs keep their state."""

    def setUp(self) -> None:
        """Make the directory, and hear of Ctrl-C.

        A shell that starts the tests in the background has them, and so their children, ignore it.
        """
        self.addCleanup(
            signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler)
        )
        temp = tempfile.TemporaryDirectory()
        self.addCleanup(temp.cleanup)
        self.dir = Path(temp.name)
        self.state = self.dir / "state"
        self.state.mkdir()
