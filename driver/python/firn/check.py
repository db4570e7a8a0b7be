"""Lints and type-checks a script before it is run: `python3 -m firn.check`, or `firn check`."""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from firn._firn import Test
from firn.config import read_test
from firn.errors import MachineError
from firn.needs import needs
from firn.nixos import SYMBOLS

#: Ruff's rules: syntax errors, and those of pyflakes (undefined names, unused imports…).
RULES = "E9,F"

#: The stub of a module with the names that a script has without importing them.
PRELUDE = """\
import os as os
from collections.abc import Callable
from contextlib import AbstractContextManager
from os import PathLike
from typing import Protocol
from unittest import TestCase

from firn.polling import Decorator
from firn.duration import Duration
from test_driver.debug import DebugAbstract
from test_driver.driver import Driver
from test_driver.logger import CompositeLogger
from test_driver.machine import BaseMachine as BaseMachine
from test_driver.machine import NspawnMachine as NspawnMachine
from test_driver.machine import QemuMachine as QemuMachine
from test_driver.vlan import VLan

class _Retry(Protocol):
    def __call__(
        self,
        fn: Callable[[bool], bool],
        timeout_seconds: Duration | None = None,
        timeout: Duration | None = None,
    ) -> None: ...

class _Subtest(Protocol):
    def __call__(self, name: str, isolated: bool = False) -> AbstractContextManager[None]: ...

class _CreateMachine(Protocol):
    def __call__(
        self,
        start_command_or_config: str | PathLike[str] | dict[str, object],
        *,
        name: str | None = None,
        keep_machine_state: bool = False,
    ) -> QemuMachine: ...

create_machine: _CreateMachine
debug: DebugAbstract
driver: Driver
dump_machine_ssh: Callable[[], None]
join_all: Callable[[], None]
log: CompositeLogger
machines: list[QemuMachine]
machines_nspawn: list[NspawnMachine]
machines_qemu: list[QemuMachine]
polling_condition: Decorator
retry: _Retry
run_tests: Callable[[], None]
serial_stdout_off: Callable[[], None]
serial_stdout_on: Callable[[], None]
start_all: Callable[[], None]
subtest: _Subtest
t: TestCase
test_script: Callable[[], None]
vlans: list[VLan]
"""


def names(test: Test) -> tuple[list[str], list[str]]:
    """Return the names of the script's machines and vlans."""
    machines = test.variables
    alias = ["machine"] if len(machines) == 1 and machines != ["machine"] else []
    return machines + alias, [f"vlan{number}" for number in test.vlans]


def prelude(machines: Sequence[str], vlans: Sequence[str]) -> str:
    """Declare all names that a script has."""
    declared = [f"{name}: QemuMachine" for name in machines] + [f"{name}: VLan" for name in vlans]
    return PRELUDE + "".join(f"{line}\n" for line in declared)


def tool(name: str) -> str:
    """Find a program: in the Python environment, or in PATH."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.is_file() else shutil.which(name)
    if path is None:
        raise MachineError(f"{name} is not installed: pip install {name}")
    return path


def lint(script: str, shown: str, builtins: Sequence[str]) -> Iterator[str]:
    """Run ruff over a script and yield its findings. Ruff tells Python files by their name."""
    argv = [tool("ruff"), "check", "--isolated", "--quiet", "--select", RULES]
    argv += ["--config", f"builtins={json.dumps([*builtins])}", "--output-format", "concise"]
    done = subprocess.run(
        [*argv, "--stdin-filename", "test_script.py", "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise MachineError(f"ruff failed: {done.stderr.strip()}")
    for line in done.stdout.splitlines():
        if place := re.search(r":(\d+:\d+: .*)$", line):
            yield f"{shown}:{place[1]}"


def check_types(script: str, shown: str, declared: str) -> Iterator[str]:
    """Run ty over a script with the declared names and yield its findings."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "test_script.py"
        file.write_text(f"from test_script_names import *\n{script}")
        (Path(directory) / "test_script_names.pyi").write_text(declared)
        argv = [tool("ty"), "check", "--python", sys.prefix, "--output-format", "concise"]
        # Ruff has found undefined names already.
        argv += [
            "--ignore",
            "unresolved-reference",
            "--no-progress",
            "--color",
            "never",
            "--project",
            directory,
            str(file),
        ]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=directory)
    if done.returncode not in (0, 1):
        raise MachineError(f"ty failed: {(done.stderr or done.stdout).strip()}")
    for line in done.stdout.splitlines():
        place = re.match(r".*?test_script\.py:(\d+):(\d+: error.*)$", line)
        if place:
            yield f"{shown}:{int(place[1]) - 1}:{place[2]}"


def check_needs(script: str, shown: str, test: Test) -> Iterator[str]:
    """Find calls that need a part which their machine's description rules out."""
    for need in needs(ast.parse(script), test.variables):
        without = test.without(need.part)
        if need.variable in without or (need.variable is None and without == test.variables):
            yield (
                f"{shown}:{need.line}:{need.column}: error[no-{need.part}] `{need.call}` needs a "
                f"{need.part}, and `{without[0]}` has `{need.part} = false`"
            )


def check(script: str, shown: str, test: Test) -> list[str]:
    """Yield everything that is wrong with a script."""
    machines, vlans = names(test)
    found = list(lint(script, shown, [*SYMBOLS, *machines, *vlans]))
    # What ruff cannot parse, ty cannot parse either.
    if any("syntax" in line.lower() for line in found):
        return found
    found += check_types(script, shown, prelude(machines, vlans))
    return found + list(check_needs(script, shown, test))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="firn check", description="Lint and type-check a test's script."
    )
    parser.add_argument("script", nargs="?", type=Path, help="by default, the test's own")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the test")
    args = parser.parse_args(arguments)
    try:
        test = read_test(args.config)
        text, file, line = test.script
        text, shown = "\n" * (line - 1) + text, str(file)
        if args.script is not None:
            text, shown = args.script.read_text(), str(args.script)
        found = check(text, shown, test)
    except (MachineError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
