"""A test run as its script sees it: its names, how it is run, and how errors are shown."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

from firn._firn import Machine, Run, Test, Timer, VLan
from firn.debug import DebugAbstract, DebugNop
from firn.duration import seconds
from firn.logger import CompositeLogger, TerminalLogger
from firn.machine import BaseMachine, NspawnMachine, QemuMachine
from firn.parts import parts_of, supplied
from firn.polling import Decorator, PollingCondition, active, check_active
from firn.retry import retry
from firn.world import World

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from os import PathLike
    from pathlib import Path
    from typing import NoReturn

    from firn._firn import Logger
    from firn.assertions import Case
    from firn.config import DriverConfiguration
    from firn.duration import Duration


class ScriptFailed(Exception):
    """The script raised. The log has the error already."""


class Settings:
    """How a test is run."""

    def __init__(  # noqa: PLR0913 - a dataclass, which would take long to make
        self,
        *,
        out_dir: str | PathLike[str] = ".",
        kit_dirs: Sequence[str | PathLike[str]] = (),
        global_timeout: Duration | None = None,
        named_state: bool = False,
        keep_machine_state: bool = False,
        vsock_offset: int | None = None,
        interactive: bool = False,
        open_vlans: bool = False,
        from_boot: bool = False,
        world: str | PathLike[str] | None = None,
        keep_world: str | PathLike[str] | None = None,
    ) -> None:
        """Take all settings.

        global_timeout: overrides the test's own.
        named_state: keep state in TMPDIR under the machines' names, as NixOS tests do.
        vsock_offset: set up ssh over vsock for every machine; a CID is this plus its number.
        interactive: for interactive use: machines get a screen, a keyboard and a tablet.
        open_vlans: let programs outside plug into the networks; always so in interactive use.
        from_boot: begin after the boot of all machines, which is kept on disk; also if the test
            says so.
        world: begin after the boot of all machines, with the world that a run has kept in this
            directory, if it fits; nothing is written there.
        keep_world: run no script, but boot all machines and keep that in this directory. Machines
            then have all parts that a script may need, as with `world`, whatever this script does.
        """
        self.out_dir = out_dir
        self.kit_dirs = kit_dirs
        self.global_timeout = global_timeout
        self.named_state = named_state
        self.keep_machine_state = keep_machine_state
        self.vsock_offset = vsock_offset
        self.interactive = interactive
        self.open_vlans = open_vlans
        self.from_boot = from_boot
        self.world = world
        self.keep_world = keep_world

    @property
    def everything(self) -> bool:
        """Whether machines have all parts that some script may need."""
        return self.interactive or self.world is not None or self.keep_world is not None


class VhostVsock:
    """The host's ends of the guests' vsocks."""

    def __init__(self, sockets: Mapping[str, Path]) -> None:
        """Take the host's sockets, by machine name."""
        self.sockets = {name: SimpleNamespace(host=path) for name, path in sockets.items()}


class RaceTimer:
    """The global timeout: ends everything when it runs out, and this process by SIGTERM."""

    def __init__(self, run: Run, interval: float | None) -> None:
        """Take the run to end and its limit in seconds; None for no limit."""
        self._run = run
        self.interval = interval
        self._timer: Timer | None = None

    def start(self) -> None:
        """Start the timer."""
        self.cancel()
        if self.interval is not None:
            self._timer = self._run.terminate_after(self.interval)

    def cancel(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Driver(World):
    """A test run: its machines, networks and script."""

    def __init__(
        self,
        test: Test,
        log: Logger | None = None,
        settings: Settings | None = None,
        debug: DebugAbstract | None = None,
    ) -> None:
        """Make the machines and networks of a test without starting any."""
        logger = log or CompositeLogger([TerminalLogger()])
        self.settings = settings or Settings()
        test = supplied(test, everything=self.settings.everything)
        self.test = test
        self.debug = debug or DebugNop()
        limit = self.settings.global_timeout
        self.global_timeout = test.global_timeout if limit is None else seconds(limit)
        self.polling_condition = Decorator(logger)
        run = Run(
            test,
            logger,
            self.settings.out_dir,
            kit_dirs=self.settings.kit_dirs,
            named_state=self.settings.named_state,
            keep_state=self.settings.keep_machine_state,
            vsock_offset=self.settings.vsock_offset,
        )
        super().__init__(run, logger)
        self.race_timer = RaceTimer(run, self.global_timeout)
        self.machines_qemu = self.machines
        self.machines_nspawn: list[NspawnMachine] = []
        self.names: dict[str, object] = {}
        try:
            self._take_over()
            self.dump_machine_ssh()
        except BaseException:
            # Perhaps a signal. Nobody else can close this object.
            self._run.close()
            raise

    def _take_over(self) -> None:
        """Take the names from the run and the script from the test."""
        self.machines[:] = self._run.machines
        self.vlans[:] = self._run.vlans
        if self.settings.open_vlans or self.settings.interactive:
            for vlan in self.vlans:
                self.logger.info(f"vlan {vlan.nr} can be plugged into: {vlan.socket_dir}")
        text, self.file, line = self.test.script
        # The script may be a part of the file; keep the file's line numbers.
        self.text = "\n" * (line - 1) + text
        if self.settings.interactive or not isinstance(self.debug, DebugNop):
            self._remember_lines()
        self.names.update(self.test_symbols())

    def _remember_lines(self) -> None:
        """Let tracebacks and debuggers show the script as it is run."""
        import linecache

        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.file] = (len(self.text), None, lines, self.file)

    def dump_machine_ssh(self) -> None:
        """Log how to open an ssh session in each machine, if that is possible."""
        if not self.test.ssh_backdoor and self.settings.vsock_offset is None:
            return
        self.logger.info("SSH backdoor enabled, the machines can be accessed like this:")
        for machine in sorted(self.machines, key=lambda machine: machine.name):
            self.logger.info(f"    {machine.name}:  {machine.ssh_backdoor_command()}")

    @property
    def tests(self) -> str:
        """The script's text."""
        return self.test.script[0]

    @property
    def config(self) -> DriverConfiguration:
        """The test's configuration, as the NixOS test framework has it."""
        from firn.config import DriverConfiguration

        return DriverConfiguration.of(self.test)

    @property
    def polling_conditions(self) -> list[PollingCondition]:
        """The active polling conditions, innermost last."""
        return active()

    def check_polling_conditions(self) -> None:
        """Check the active polling conditions that are due."""
        check_active()

    def terminate_test(self) -> NoReturn:
        """End everything at once, and this process by SIGTERM."""
        self._run.terminate("timeout reached; test terminating...")

    @property
    def out_dir(self) -> Path:
        """The output directory."""
        from pathlib import Path

        return Path(self.settings.out_dir)

    @property
    def state_dir(self) -> Path | None:
        """The directory of the run's state, while the run lasts."""
        return self._run.state_dir

    @property
    def vhost_vsock(self) -> VhostVsock:
        """The host's ends of the guests' vsocks."""
        return VhostVsock(self._run.vsock_sockets)

    def test_symbols(self) -> dict[str, object]:
        """Return the names that the script has, with their values."""
        names: dict[str, object] = {
            "__name__": "__test__",
            "__file__": self.file,
            "BaseMachine": BaseMachine,
            "NspawnMachine": NspawnMachine,
            "QemuMachine": QemuMachine,
            "create_machine": self.create_machine,
            "debug": self.debug,
            "driver": self,
            "dump_machine_ssh": self.dump_machine_ssh,
            "join_all": self.join_all,
            "log": self.logger,
            "machines": self.machines,
            "machines_nspawn": self.machines_nspawn,
            "machines_qemu": self.machines_qemu,
            "os": os,
            "polling_condition": self.polling_condition,
            "retry": retry,
            "run_tests": self.run_tests,
            "serial_stdout_off": self.serial_stdout_off,
            "serial_stdout_on": self.serial_stdout_on,
            "start_all": self.start_all,
            "subtest": self.subtest,
            "t": Assertions(),
            "test_script": self.test_script,
            "vlans": self.vlans,
        }
        names.update({f"vlan{vlan.nr}": vlan for vlan in self.vlans})
        if len(self.machines) == 1:
            names["machine"] = self.machines[0]
        names.update({machine.variable: machine for machine in self.machines})
        return names

    def boot_once(self) -> None:
        """Bring all machines, none of which was started, to the end of their boot.

        The first run of a test keeps that on disk; later ones start there, without a boot, until
        something has changed on which it depends: the log says what. What `firn test --from-boot`
        does before the script.
        """
        self._run.boot_once(self.test.name, "allow_reboot" in self.tests)

    def serial_stdout_on(self) -> None:
        """Show the guests' console output."""
        self.logger.print_serial_logs(True)

    def serial_stdout_off(self) -> None:
        """Hide the guests' console output."""
        self.logger.print_serial_logs(False)

    def create_machine(
        self,
        start_command_or_config: str | PathLike[str] | dict[str, object],
        *,
        name: str | None = None,
        keep_machine_state: bool = False,
    ) -> Machine:
        """Make a machine: of a machine file, or its content, or a command that starts QEMU."""
        made_of = start_command_or_config
        if isinstance(made_of, dict) and "startCommand" in made_of:
            options = dict(made_of)
            made_of = str(options.pop("startCommand"))
            given = options.pop("name", None)
            name = name if given is None else str(given)
            keep_machine_state |= bool(options.pop("keep_vm_state", False))
            if options:
                raise TypeError(f"create_machine: unknown options {', '.join(map(repr, options))}")
        parts = parts_of(self.test, everything=self.settings.everything)
        if isinstance(made_of, dict):
            import json

            return self._run.create_machine_of_json(
                json.dumps(made_of), name=name, keep_state=keep_machine_state, parts=parts
            )
        import shlex

        words = shlex.split(made_of) if isinstance(made_of, str) else [os.fspath(made_of)]
        if isinstance(made_of, str) and (len(words) != 1 or "/" not in words[0]):
            return self._run.create_machine_of_command(
                made_of, name=name, keep_state=keep_machine_state
            )
        return self._run.create_machine(
            words[0], name=name, keep_state=keep_machine_state, parts=parts
        )

    def test_script(self) -> None:
        """Run the script."""
        with self.logger.nested("run the VM test script"):
            self._exec()

    def run_tests(self) -> None:
        """Run the script within the global timeout, then sync the machines that are up."""
        self.logger.info(
            "Machines and names of the script: "
            + ", ".join(name for name in self.names if not name.startswith("_"))
        )
        self._start_timer()
        began = time.monotonic()
        if self.settings.world is not None:
            self._run.boot_from(self.settings.world, "allow_reboot" in self.tests)
        elif self.settings.from_boot or self.test.from_boot:
            self.boot_once()
        self.test_script()
        self.logger.info(f"test script finished in {time.monotonic() - began:.2f}s")
        self._run.sync()

    def keep_world(self, directory: str | PathLike[str]) -> None:
        """Boot all machines within the global timeout, and keep that in a directory.

        It is made, or empty. Runs with the setting `world` start there.
        """
        self._start_timer()
        self._run.keep_boot(directory, self.test.name, allow_reboot=True)

    def _start_timer(self) -> None:
        if self.global_timeout is not None:
            self.logger.info(f"Test will time out and terminate in {self.global_timeout:g} seconds")
            self.race_timer.start()

    def replace(self, test: Test) -> None:
        """Continue with a changed test. Machines that are unchanged keep running."""
        test = supplied(test, everything=self.settings.everything)
        self._run = self._run.replace(test, self.settings.kit_dirs)
        self.race_timer.cancel()
        self.race_timer = RaceTimer(self._run, self.global_timeout)
        before = set(self.names)
        self.test = test
        self._take_over()
        for name in before - set(self.test_symbols()):
            if isinstance(self.names[name], Machine | VLan):
                del self.names[name]

    def close(self) -> None:
        """End all machines and remove their state, unless it is kept."""
        self.debug.close()
        self._run.close()

    def _exec(self) -> None:
        try:
            self._warn_of_alias()
            # This file's own future features are not the script's.
            exec(compile(self.text, self.file, "exec", dont_inherit=True), self.names)
        except Exception as error:
            self.logger.log_test_error("\n".join(self._describe(error)))
            self.debug.breakpoint()
            raise ScriptFailed from error

    def _warn_of_alias(self) -> None:
        """Warn if the script calls its only machine `machine` though it has another name."""
        if len(self.machines) != 1 or self.machines[0].variable == "machine":
            return
        if "machine" not in self.text:
            return
        import ast

        tree = ast.parse(self.text, self.file)
        uses = [
            node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "machine"
        ]
        if uses and all(isinstance(node.ctx, ast.Load) for node in uses):
            self.logger.warning(
                f"line {uses[0].lineno}: the script says `machine` for the machine "
                f"`{self.machines[0].variable}`; use its name instead"
            )

    def _describe(self, error: Exception) -> Iterator[str]:
        """Show an error with the script's own frames only; its author did not write the others."""
        import traceback

        self._remember_lines()
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
        if isinstance(error, ExceptionGroup):
            for part in error.exceptions:
                yield from self._describe(part)


class Assertions:
    """The script's `t`: a `Case` from its first use on. Importing unittest takes long."""

    @property  # type: ignore[misc]
    def __class__(self) -> type[Case]:  # type: ignore[override]
        """What isinstance() takes it for."""
        from firn.assertions import Case

        return Case

    def __getattr__(self, name: str) -> object:
        """Become the case, and return its attribute."""
        case = self.__class__
        vars(object)["__class__"].__set__(self, case)
        case.__init__(self)  # type: ignore[arg-type]
        return getattr(self, name)


__all__ = ["Driver", "PollingCondition", "ScriptFailed", "Settings", "VhostVsock"]
