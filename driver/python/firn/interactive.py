"""The interactive prompt."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from firn._firn import Test, interrupt_waits_by_signals
from firn.driver import Driver, ScriptFailed
from firn.errors import MachineError

#: The history file, in the directory where the driver runs.
HISTORY = ".nixos-test-history"


def history() -> str:
    """Return the history file, readable by this user alone; never one that others planted."""
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(HISTORY, flags, 0o600)
    except OSError:
        return ":memory:"
    is_own = os.fstat(descriptor).st_uid == os.geteuid()
    os.close(descriptor)
    return HISTORY if is_own else ":memory:"


class Rebuild:
    """The prompt's `rebuild`."""

    def __init__(self, driver: Driver, load: Callable[[Path | None], Test]) -> None:
        """Take the function that reads the test."""
        self._driver = driver
        self._load = load

    def __call__(self, command: str) -> None:
        """Run a shell command, reload the configuration, and restart the machines that changed.

        If the last line that the command prints is the path of a file, that is the configuration
        from now on; otherwise the file is read again that the driver was started with.
        """
        with self._driver.logger.nested(f"rebuild: {command}"):
            done = subprocess.run(command, shell=True, check=False, stdout=subprocess.PIPE)
            text = done.stdout.decode(errors="replace")
            print(text, end="")
            if done.returncode != 0:
                raise MachineError(f"`{command}` failed (exit code {done.returncode})")
            last = Path((text.strip().splitlines() or [""])[-1])
            self._driver.replace(self._load(last if last.is_file() else None))


def interact(driver: Driver, load: Callable[[Path | None], Test]) -> None:
    """Run a prompt with the script's names until the user leaves it."""
    try:
        from IPython.terminal.interactiveshell import (
            TerminalInteractiveShell,
        )
        from traitlets.config import Config
    except ImportError as error:
        raise MachineError(
            f"interactive mode needs IPython ({error}): pip install ipython"
        ) from None
    driver.names["rebuild"] = Rebuild(driver, load)
    config = Config()
    config.HistoryManager.hist_file = history()
    config.TerminalInteractiveShell.confirm_exit = False
    config.TerminalInteractiveShell.term_title = False
    shell: Any = TerminalInteractiveShell.instance(config=config, user_ns=driver.names)
    # A script that failed has logged it.
    shell.set_custom_exc((ScriptFailed,), lambda *_: None)
    # The prompt itself takes over the descriptor through which waits notice Ctrl-C.
    shell.events.register("pre_run_cell", lambda _info: interrupt_waits_by_signals())
    names = sorted(name for name in driver.test_symbols() if not name.startswith("_"))
    print("Names you can use, as in the script:")
    print("   ", ", ".join([*names, "rebuild"]))
    print("test_script() runs the script, start_all() starts all machines, Ctrl-D ends them.")
    print("`firn view` in another terminal shows the machines' screens in the browser.")
    shell.mainloop()
