"""The interactive prompt."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from firn._firn import Checkpoint, Test, interrupt_waits_by_signals
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


class Rollback:
    """The prompt's `checkpoint` and `rollback`."""

    def __init__(self, driver: Driver) -> None:
        """Begin without checkpoints."""
        self._driver = driver
        self._made: list[Checkpoint] = []

    def checkpoint(self, name: str = "") -> Checkpoint:
        """Keep what all machines and networks are, for rollback()."""
        made = self._driver.checkpoint(name)
        self._made.append(made)
        return made

    def rollback(self, name: str | None = None) -> None:
        """Go back to the checkpoint of this name, by default the last one."""
        self._made = [made for made in self._made if made.is_there]
        wanted = [made for made in self._made if name in (None, made.name)]
        if not wanted:
            there = ", ".join(made.name for made in self._made) or "none"
            raise MachineError(f"there is no such checkpoint; there are: {there}")
        wanted[-1].rollback()


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
    back = Rollback(driver)
    own = {
        "checkpoint": back.checkpoint,
        "rebuild": Rebuild(driver, load),
        "rollback": back.rollback,
    }
    driver.names.update(own)
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
    print("   ", ", ".join([*names, *own]))
    print("test_script() runs the script, start_all() starts all machines, Ctrl-D ends them.")
    print("checkpoint() keeps what all machines are, and rollback() goes back to it.")
    print("`firn view` in another terminal shows the machines' screens in the browser.")
    shell.mainloop()
