"""Runs a test: `python3 -m firn.runner FILE`. The command `firn test` ends here."""

import argparse
import io
import signal
import sys
from pathlib import Path
from types import FrameType

from firn._firn import Driver, interrupt_waits_by_signals
from firn.errors import MachineError, RequestedAssertionFailed
from firn.script import Script, ScriptFailed


class Terminated(BaseException):
    """SIGTERM or SIGHUP came. No Exception, so that scripts do not catch it by accident."""

    def __init__(self, number: int) -> None:
        """Take the number of the signal."""
        super().__init__(signal.Signals(number).name)
        self.number = number


def terminate(number: int, _frame: FrameType | None) -> None:
    """Handle a signal by raising, so that all that is open is closed."""
    raise Terminated(number)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="firn.runner", description="Run a test.")
    parser.add_argument("file", type=Path, help="the test, a TOML file")
    parser.add_argument("-o", "--output-dir", type=Path, default=Path(), metavar="DIR")
    parser.add_argument("--kit-dir", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--global-timeout", type=float, default=None, metavar="SECONDS")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Run the test and leave nothing of it behind."""
    driver = Driver(options.file, options.output_dir, options.kit_dir)
    try:
        Script(driver, options.global_timeout).run_tests()
    finally:
        # Cleaning up is quick, and must not be cut short by a second Ctrl-C.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        driver.close()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the answer is the exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # What the script prints comes at once, in order with the log, also through a pipe.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    interrupt_waits_by_signals()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminate)
    try:
        run(options)
    except ScriptFailed:
        return 1
    except (MachineError, RequestedAssertionFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated as error:
        print(f"error: ended by {error}", file=sys.stderr)
        return 128 + error.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
