"""A test's script: the names it can use, how it is run, and how its errors are shown."""

import linecache
import os
import time
import traceback
import unittest
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import CodeType

from firn._firn import Driver
from firn.duration import Duration
from firn.errors import RequestedAssertionFailed
from firn.polling import Decorator
from firn.retry import retry


class ScriptFailed(Exception):
    """The script raised; what and where is in the log already."""


class Script:
    """A test's script, ready to be run against the machines of a driver."""

    def __init__(self, driver: Driver, global_timeout: Duration | None = None) -> None:
        """Make it from the driver's test; `global_timeout` replaces the test's own."""
        self.driver = driver
        self.log = driver.logger
        self.global_timeout = driver.global_timeout if global_timeout is None else global_timeout
        text, file, line = driver.script
        self.file = str(file)
        # Line numbers are those of the file, of which the script may be a part.
        self.text = "\n" * (line - 1) + text
        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.file] = (len(self.text), None, lines, self.file)
        self.names = self._names()

    def _names(self) -> dict[str, object]:
        machines = self.driver.machines
        vlans = self.driver.vlans
        names: dict[str, object] = {
            "__name__": "__test__",
            "__file__": self.file,
            "driver": self.driver,
            "join_all": self.driver.join_all,
            "log": self.log,
            "machines": machines,
            "os": os,
            "polling_condition": Decorator(self.log),
            "retry": retry,
            "run_tests": self.run_tests,
            "serial_stdout_off": lambda: self.log.print_serial_logs(False),
            "serial_stdout_on": lambda: self.log.print_serial_logs(True),
            "start_all": self.driver.start_all,
            "subtest": self.subtest,
            "t": _Case(),
            "test_script": self.test_script,
            "vlans": vlans,
        }
        names.update({f"vlan{vlan.nr}": vlan for vlan in vlans})
        names.update({machine.variable: machine for machine in machines})
        if len(machines) == 1:
            names["machine"] = machines[0]
        return names

    def subtest(self, name: str) -> AbstractContextManager[None]:
        """Group what happens inside under a name in the log."""
        return self._subtest(name)

    @contextmanager
    def _subtest(self, name: str) -> Iterator[None]:
        with self.log.nested(f"subtest: {name}"):
            try:
                yield
            except Exception as error:
                self.log.error(f'Test "{name}" failed with error: "{error}"')
                raise

    def test_script(self) -> None:
        """Run the script."""
        with self.log.nested("run the VM test script"):
            self._run()

    def run_tests(self) -> None:
        """Run the script within the global timeout, then sync the machines that are up."""
        self.log.info(
            "Machines and names of the script: "
            + ", ".join(name for name in self.names if not name.startswith("_"))
        )
        if self.global_timeout is not None:
            self.log.info(f"Test will time out and terminate in {self.global_timeout:g} seconds")
            self.driver.terminate_after(self.global_timeout)
        began = time.monotonic()
        self.test_script()
        self.log.info(f"test script finished in {time.monotonic() - began:.2f}s")
        self.driver.sync()

    def _run(self) -> None:
        try:
            exec(self._compile(), self.names)
        except Exception as error:
            for line in self._describe(error):
                self.log.error(line)
            raise ScriptFailed from error

    def _compile(self) -> CodeType:
        return compile(self.text, self.file, "exec")

    def _describe(self, error: Exception) -> Iterator[str]:
        """Show an error with the script's own frames; its author did not write the others."""
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == self.file
        ]
        if frames:
            yield "Traceback (most recent call last):"
            yield from "".join(traceback.format_list(frames)).splitlines()
        elif not isinstance(error, SyntaxError):
            yield from "".join(traceback.format_tb(error.__traceback__)).splitlines()
        text = "".join(traceback.format_exception_only(error))
        yield from text.removeprefix("firn.errors.").splitlines()


class _Case(unittest.TestCase):
    """The script's `t`: its methods assert."""

    failureException = RequestedAssertionFailed


__all__ = ["Script", "ScriptFailed"]
