"""Scripts before they are run: linter and type checkers."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from .support import BIN

#: Uses what scripts use, rightly.
GOOD = """\
import datetime
from test_driver.errors import RequestedAssertionFailed
from test_driver.machine import retry as try_again

def greet(m: BaseMachine) -> str:
    return m.succeed("echo hello", timeout=datetime.timedelta(seconds=3))

start_all()
with subtest("greeting"):
    t.assertIn("hello", greet(a_b))
    log.info(f"{a_b.name} {vlan1.nr} {os.environ['HOME']}")
status, output = c.execute("false", timeout=None)
t.assertEqual(status, 1, output)

@polling_condition
def plain() -> bool:
    return a_b.is_up()

@polling_condition(interval=5, description="is there")
def with_arguments() -> None:
    c.succeed("true")

with plain, with_arguments:
    c.wait_until_succeeds("true", timeout=10)
plain.wait(timeout=10)
plain.wait(timeout_seconds=10)
print(plain.condition.description)
retry(lambda last: True, timeout=3)
retry(lambda last: True, timeout_seconds=3)
try_again(lambda last: not last)
try:
    machines[0].fail("true")
except RequestedAssertionFailed:
    pass
other = create_machine("/run-x-vm", name="x")
other.crash()
debug.breakpoint()
for socket in driver.vhost_vsock.sockets.values():
    print(socket.host)
with machines_qemu[0].nested("last"):
    serial_stdout_off()
    serial_stdout_on()
    join_all()
"""

#: What the framework puts before a script, and how it declares machines and networks.
PRELUDE = """\
import os
from contextlib import contextmanager
from typing import Any, Callable, ContextManager, Generator, List, Optional, Union
from unittest import TestCase

from test_driver.debug import DebugAbstract, DebugNop
from test_driver.driver import Driver
from test_driver.logger import AbstractLogger, CompositeLogger
from test_driver.machine import BaseMachine, NspawnMachine, QemuMachine
from test_driver.vlan import VLan


class Assertions(TestCase):
    pass


def made_of(kind: Any) -> Any:
    raise Exception("only types are looked at")


def a_driver() -> Driver:
    return made_of(Driver)


def a_machine() -> QemuMachine:
    return made_of(QemuMachine)


def a_container() -> NspawnMachine:
    return made_of(NspawnMachine)


def a_vlan() -> VLan:
    return made_of(VLan)


def create_machine(
    start_command: Union[str, dict], *, name: Optional[str] = None, keep_machine_state: bool = False
) -> QemuMachine:
    return a_machine()


def start_all() -> None: ...
def join_all() -> None: ...
def test_script() -> None: ...
def run_tests() -> None: ...
def serial_stdout_on() -> None: ...
def serial_stdout_off() -> None: ...
def dump_machine_ssh() -> None: ...
def retry(fn: Callable, timeout_seconds: int = 900, timeout: int = 900) -> None: ...


@contextmanager
def subtest(name: str) -> Generator[None, None, None]:
    yield


polling_condition: Any = made_of
debug: DebugAbstract = DebugNop()
driver = a_driver()
log: AbstractLogger = CompositeLogger([])
machines: List[BaseMachine] = []
machines_nspawn: List[NspawnMachine] = []
machines_qemu: List[QemuMachine] = []
t = Assertions()
vlans: List[VLan] = []
vlan1 = a_vlan()
a_b = a_machine()
c = a_machine()
box = a_container()
"""

#: What the framework's own declarations allow on a log.
LOGS = """\
from test_driver.logger import JunitXMLLogger, LogLevel, TerminalLogger, XMLLogger

both = CompositeLogger([TerminalLogger()])
both.add_logger(CompositeLogger(both.logger_list))
both.set_log_level(LogLevel.DEBUG)

class Mine(AbstractLogger):
    def log(self, message: str, attributes: dict[str, str] = {}) -> None: ...
    @contextmanager
    def subtest(self, name: str, attributes: dict[str, str] = {}) -> Generator[None, None, None]:
        yield
    @contextmanager
    def nested(self, message: str, attributes: dict[str, str] = {}) -> Generator[None, None, None]:
        yield
    def debug(self, *args: Any, **kwargs: Any) -> None: ...
    def info(self, *args: Any, **kwargs: Any) -> None: ...
    def warning(self, *args: Any, **kwargs: Any) -> None: ...
    def error(self, *args: Any, **kwargs: Any) -> None: ...
    def log_test_error(self, *args: Any, **kwargs: Any) -> None: ...
    def log_serial(self, message: str, machine: str) -> None: ...
    def print_serial_logs(self, enable: bool) -> None: ...
    def set_log_level(self, level: LogLevel) -> None: ...

both.add_logger(Mine())
with log.nested("step", {"machine": "c"}):
    log.log_test_error("oh")
    log.log_serial("line", "c")
    log.debug({"a": 1})
    log.print_serial_logs(False)
    log.set_log_level(LogLevel.ERROR)
log.error("this ends it")
"""

#: Scripts with what must be found in them, and the line.
BAD = [
    ("start_al()", 1, "F821 Undefined name `start_al`"),
    ("import json", 1, "F401"),
    ("start_all()\nmachine.succeed('true')", 2, "F821 Undefined name `machine`"),
    ("if x", 1, "yntax"),
    ("a_b.suceed('true')", 1, "has no attribute"),
    ("a_b.succeed(3)", 1, "invalid-argument-type"),
    ("start_all()\n\nc.wait_until_succeeds('true', timout=3)", 3, "unknown-argument"),
    ("n: int = c.succeed('true')", 1, "invalid-assignment"),
    ("retry('true')", 1, "invalid-argument-type"),
    ("log.inform('x')", 1, "has no attribute"),
]


class Check(unittest.TestCase):
    """Each test has a directory with a configuration: two machines, `a-b` and `c`."""

    def setUp(self) -> None:
        """Make the directory."""
        temp = tempfile.TemporaryDirectory()
        self.addCleanup(temp.cleanup)
        self.dir = Path(temp.name)
        self.script = self.dir / "script"
        self.config = self.configure("a-b", "c")

    def configure(self, *names: str) -> Path:
        """Write a configuration."""
        vms = {}
        for name in names:
            path = self.dir / f"run-{name}-vm"
            spec = {"firn": 1, "name": name, "kernel": "/k", "vlans": [1]}
            path.write_text(f"#!/usr/bin/firn run\n{json.dumps(spec)}")
            vms[name] = {"start_script": str(path)}
        config = self.dir / "config.json"
        self.script.write_text("")
        config.write_text(json.dumps({"vms": vms, "test_script": str(self.script)}))
        return config

    def check(self, script: str, *arguments: str) -> tuple[int, str, str]:
        """Check a script through the real command line."""
        self.script.write_text(script)
        argv = [str(BIN / "firn"), "check", *arguments, "--config", str(self.config)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
        return done.returncode, done.stdout, done.stderr

    def test_good(self) -> None:
        """Nothing is found in a script that is right."""
        self.assertEqual(self.check(GOOD), (0, "", ""))

    def test_bad(self) -> None:
        """What is wrong is found, at its line."""
        for script, line, said in BAD:
            with self.subTest(script):
                status, out, err = self.check(script + "\n")
                self.assertEqual((status, err), (1, ""), out)
                self.assertIn(f"{self.script}:{line}:", out)
                self.assertIn(said, out)

    def test_script_and_alias(self) -> None:
        """Another script can be named, and the only machine has two names."""
        self.config = self.configure("server")
        other = self.dir / "other.py"
        other.write_text("machine.start()\nserver.stat()\n")
        status, out, _ = self.check("start_all()", str(other))
        self.assertEqual(status, 1)
        self.assertEqual(out.count("\n"), 1, out)
        self.assertIn(f"{other}:2:", out)

    def test_toml(self) -> None:
        """A script in a TOML file is checked where it is."""
        self.config = self.dir / "test.toml"
        self.config.write_text("test_script = '''\nmachine.start()\nx.y()\n'''\n[nodes.machine]\n")
        status, out, _ = self.check("")
        self.assertEqual(status, 1)
        self.assertIn(f"{self.config}:3:1: F821", out)

    def test_bad_configuration(self) -> None:
        """What is wrong with the configuration is no fault of the script."""
        self.config = self.dir / "none.json"
        status, out, err = self.check("pass")
        self.assertEqual((status, out), (2, ""))
        self.assertIn("none.json", err)

    def test_behind_the_frameworks_prelude(self) -> None:
        """The stubs fit what the framework declares, by mypy and by ty."""
        file = self.dir / "behind.py"
        file.write_text(PRELUDE + GOOD + LOGS)
        mypy = [str(BIN / "mypy"), "--no-implicit-optional", "--config-file=", str(file)]
        ty = [str(BIN / "ty"), "check", "--python", sys.prefix, "--project", str(self.dir)]
        ty += ["--ignore", "unresolved-reference", str(file)]
        for argv in (mypy, ty):
            done = subprocess.run(
                argv, capture_output=True, text=True, check=False, timeout=300, cwd=self.dir
            )
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        # And they are looked at.
        bad = "a_b.succeed(3)\nlog.inform(4)\nvlan1.number\nCompositeLogger('info')\n"
        file.write_text(PRELUDE + bad)
        for argv in (mypy, ty):
            done = subprocess.run(
                argv, capture_output=True, text=True, check=False, timeout=300, cwd=self.dir
            )
            self.assertRegex(done.stdout, "Found 4 (errors|diagnostics)", done.stderr)


if __name__ == "__main__":
    unittest.main()
