"""Runs a test: what `firn test` executes.

What few runs need is imported where it is needed, here and in what this imports: each such module
takes longer than a run that has nothing to do.
"""

from __future__ import annotations

import os
import signal
import sys

from firn._firn import Test, interrupt_waits_by_signals
from firn.debug import DebugNop
from firn.driver import Driver, ScriptFailed, Settings
from firn.errors import MachineError, RequestedAssertionFailed
from firn.logger import CompositeLogger, JunitXMLLogger, TerminalLogger, XMLLogger
from firn.terminal import filter_output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike
    from pathlib import Path
    from types import FrameType

    from firn.debug import DebugAbstract


class Terminated(BaseException):
    """SIGTERM or SIGHUP was received. Not an Exception, lest scripts catch it by accident."""

    def __init__(self, number: int) -> None:
        """Take the number of the signal."""
        super().__init__(signal.Signals(number).name)
        self.number = number


def terminate(number: int, _frame: FrameType | None) -> None:
    """Handle a signal by raising, so that everything is closed."""
    raise Terminated(number)


def end_at_once() -> None:
    """Let signals end the process, even while Rust waits: nothing needs closing yet."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_by_raising() -> None:
    """Let signals raise, so that everything is closed."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminate)


class Options:
    """The options of a command line."""

    def __init__(
        self,
        load: Callable[[Path | None], Test],
        settings: Settings,
        debug_attach: str | None = None,
        junit: str | PathLike[str] | None = None,
        log_level: str = "info",
    ) -> None:
        """Take all options.

        load: reads the test, or with a path another test.
        debug_attach: turns breakpoints on: the command with which people attach to the driver's
            namespaces.
        junit: a JUnit report, relative to the output directory.
        """
        self.load = load
        self.settings = settings
        self.debug_attach = debug_attach
        self.junit = junit
        self.log_level = log_level


def run(options: Options) -> None:
    """Run the test and clean up after it."""
    log = CompositeLogger([TerminalLogger(options.log_level)])
    # As in upstream's driver. There is no need to write to /dev/null.
    xml = os.environ.get("LOGFILE")
    if xml and xml != os.devnull:
        log.add_logger(XMLLogger(xml))
    if options.junit is not None:
        log.add_logger(JunitXMLLogger(os.path.join(options.settings.out_dir, options.junit)))
    debug: DebugAbstract = DebugNop()
    if options.debug_attach is not None:
        from firn.breakpoints import Debug

        debug = Debug(log, options.debug_attach)
    try:
        test = options.load(None)
        end_by_raising()
        driver = Driver(test, log, options.settings, debug)
        try:
            if options.settings.interactive:
                from firn.interactive import interact

                interact(driver, options.load)
            elif options.settings.keep_world is not None:
                driver.keep_world(options.settings.keep_world)
            else:
                driver.run_tests()
        finally:
            # Cleaning up is quick; a second Ctrl-C must not interrupt it.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            driver.close()
    except ScriptFailed:
        raise
    except BaseException as error:
        if (why := failure(error)) is not None:
            log.fail(why)
        raise
    finally:
        log.finish()


def failure(error: BaseException) -> str | None:
    """Return why `error` makes a run fail; None if it does not."""
    match error:
        case SystemExit(code=None | 0):
            return None
        case SystemExit(code=code):
            return f"the script ended by exit({code!r})"
        case KeyboardInterrupt():
            return "interrupted"
        case Terminated():
            return f"ended by {error}"
    return str(error) or type(error).__name__


def guarded(options: Options) -> int:
    """Run the test and return the exit status."""
    filter_output()
    interrupt_waits_by_signals()
    end_at_once()
    try:
        run(options)
    except ScriptFailed:
        return 1
    except (MachineError, RequestedAssertionFailed, ValueError, OSError) as error:
        status = 1
        said = failure(error)
    except KeyboardInterrupt as error:
        status = 128 + signal.SIGINT
        said = failure(error)
    except Terminated as error:
        status = 128 + error.number
        said = failure(error)
    else:
        return 0
    print(f"error: {said}", file=sys.stderr)
    return status


def main(arguments: list[str]) -> int:
    """Run what `firn test` asks for, which declares the flags and defaults; "" is None."""
    file, out_dir, timeout, junit, log_level, open_vlans, from_boot, *kit_dirs = arguments
    return guarded(
        Options(
            load=lambda other: Test.from_toml_file(other or file),
            settings=Settings(
                out_dir=out_dir,
                kit_dirs=kit_dirs,
                global_timeout=float(timeout) if timeout else None,
                open_vlans=bool(open_vlans),
                from_boot=bool(from_boot),
            ),
            junit=junit or None,
            log_level=log_level,
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
