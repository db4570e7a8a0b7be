"""The pytest plugin: tests have a test's machines as fixtures, and leave no trace in them.

    # pytest.ini
    [pytest]
    firn_test = test.toml

    # test_database.py
    def test_insert(server):
        server.succeed("…")

The machines boot once, for the first test that asks for one. After each test they go back to what
they were before it.
"""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, contextmanager
from keyword import iskeyword
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from firn._firn import Checkpoint, Machine, Test
    from firn.driver import Driver

NO_TEST = "there are no machines: set the ini option `firn_test = test.toml`, or give --firn PATH"

#: Options with which pytest runs no tests.
NO_TESTS_RUN = (
    "cacheshow",
    "collectonly",
    "help",
    "markers",
    "setupplan",
    "show_fixtures_per_test",
    "showfixtures",
    "version",
)

#: The type of what `pytest.fixture` makes.
FIXTURE = type(pytest.fixture(lambda: None))

TEST = pytest.StashKey["Test | None"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    what = "a test in TOML, or the file that `nixos-test-driver --config` takes"
    parser.addini("firn_test", f"firn's machines: {what}", type="string")
    group = parser.getgroup("firn", "virtual machines")
    group.addoption("--firn", metavar="PATH", help=f"{what}; overrides `firn_test`")
    group.addoption(
        "--firn-accel",
        choices=["auto", "kvm", "carrier", "none"],
        default="auto",
        help="where tests and machines run: auto is KVM if it works here, else the carrier; "
        "none does not check (default: %(default)s)",
    )


def path_of(config: pytest.Config) -> Path | None:
    """Return the path of the description of the machines."""
    here = config.invocation_params.dir
    if given := config.getoption("firn"):
        return here.joinpath(given)
    if named := config.getini("firn_test"):
        return (config.inipath.parent if config.inipath else here).joinpath(named)
    return None


def description(config: pytest.Config) -> Test | None:
    """Return the description of the machines, which is read once."""
    if TEST not in config.stash:
        config.stash[TEST] = None
        if path := path_of(config):
            from firn.config import read_test

            try:
                config.stash[TEST] = read_test(path)
            except (ValueError, OSError) as error:
                why = str(error).removeprefix("error: ")
                raise pytest.UsageError(f"firn: {why}") from None
    return config.stash[TEST]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Make what machines boot, and run all of pytest in a carrier if they cannot run here."""
    # Workers of pytest-xdist are where the process is that started them.
    if any(config.getoption(name, None) for name in NO_TESTS_RUN) or hasattr(config, "workerinput"):
        return None
    test = description(config)
    if test is None:
        return None
    from firn.accel import again, in_carrier, name_agent
    from firn.errors import MachineError

    if in_carrier():
        return None
    # `python -m pytest` has the working directory among the places of modules, `pytest` has not.
    flags = [] if Path(sys.argv[0]).name == "__main__.py" else ["-P"]
    command = [sys.executable, *flags, "-m", "pytest", *map(str, config.invocation_params.args)]
    writable = [config.rootpath, *test.writable]
    if report := config.getoption("xmlpath", None):
        writable.append(Path(report).absolute().parent)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    name_agent()
    try:
        with ended_at_once():
            test.build_kits()
            if worlds := test.worlds():
                writable.append(worlds)
            accel = config.getoption("firn_accel")
            return None if accel == "none" else again(accel, command, writable, terminal)
    except (MachineError, ValueError, RuntimeError, OSError) as error:
        raise pytest.UsageError(f"firn: {error}") from None


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Make the fixtures."""
    test = description(config)
    plugins = config.pluginmanager.get_plugins()
    if test is None:
        if "driver" not in fixtures_of(plugins):
            config.pluginmanager.register(Unconfigured(), "firn-fixtures")
        return
    end_by_signals(config)
    own = {it for it in plugins if getattr(it, "__name__", "").startswith("_pytest.")}
    taken = {"driver", "request", *fixtures_of({sys.modules[__name__], *own})}
    names = [name for name in test.variables if name not in taken and not iskeyword(name)]
    for name in sorted(set(test.variables) - set(names)):
        what = f"machine `{name}` has no fixture of its name, which has another meaning: "
        warning = pytest.PytestWarning(f'{what}use firn_machines["{name}"]')
        config.issue_config_time_warning(warning, stacklevel=2)
    fixtures = {name: fixture_of(name) for name in names}
    config.pluginmanager.register(type("Machines", (Machines,), fixtures)(), "firn-fixtures")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the machines."""
    test = description(config)
    return test and f"firn: {path_of(config)}: {', '.join(test.variables)}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> None:
    """Leave firn's own frames out of tracebacks."""
    if call.excinfo is not None:
        for name, module in list(sys.modules.items()):
            if name.startswith("firn."):
                vars(module)["__tracebackhide__"] = True


def fixtures_of(plugins: set[object]) -> set[str]:
    """Return the names of all fixtures that plugins define in their modules."""
    all_of = [vars(plugin) for plugin in plugins if isinstance(plugin, ModuleType)]
    made = [(name, it) for names in all_of for name, it in names.items() if type(it) is FIXTURE]
    return {getattr(it, "name", None) or name for name, it in made}


def fixture_of(variable: str) -> object:
    """Make the fixture of a machine."""

    def machine(self: Machines, driver: Driver, firn_machines: dict[str, Machine]) -> Machine:
        return firn_machines[variable]

    machine.__doc__ = f"The machine `{variable}`, which goes back after the test."
    return pytest.fixture(name=variable)(machine)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process even while Rust waits: nothing needs closing yet."""
    from firn.runner import end_at_once

    before = signal.getsignal(signal.SIGINT)
    end_at_once()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_by_signals(config: pytest.Config) -> None:
    """Let SIGTERM and SIGHUP end the session as Ctrl-C does, so that nothing is left behind."""

    def end(number: int, _frame: object) -> None:
        pytest.exit(f"ended by {signal.Signals(number).name}", returncode=128 + number)

    restored = ExitStack()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
            restored.callback(signal.signal, number, signal.SIG_DFL)
    config.add_cleanup(restored.close)


@contextmanager
def plainly() -> Iterator[None]:
    """Show what firn says, and no traceback: no line of a test's file has raised it."""
    from firn.errors import MachineError

    try:
        yield
    except (MachineError, OSError) as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


@pytest.fixture(scope="session")
def firn_driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """The run with its machines, which need not be up: for fixtures of your own.

    What fixtures of a module or session do to machines stays until these go back by themselves:
    `with firn_driver.checkpoint(): yield`.
    """
    test = description(request.config)
    if test is None:
        pytest.fail(NO_TEST, pytrace=False)
    from firn._firn import interrupt_waits_by_signals
    from firn.driver import Driver
    from firn.logger import CompositeLogger, TerminalLogger
    from firn.parts import supplied

    paths = {item.path for item in request.session.items}
    texts = [path.read_text() for path in sorted(paths) if path.suffix == ".py"]
    interrupt_waits_by_signals()
    log = CompositeLogger([TerminalLogger()])
    with plainly():
        driver = Driver(supplied(test, more=texts), log)
    try:
        with plainly():
            # A machine that can never go back says so before it boots.
            driver.checkpoint("before the boot").forget()
        yield driver
    finally:
        driver.close()
        log.finish()


@pytest.fixture(scope="session")
def firn_machines(firn_driver: Driver) -> dict[str, Machine]:
    """All machines, by the names of their fixtures. They need not be up."""
    return {machine.variable: machine for machine in firn_driver.machines}


@pytest.fixture(scope="session")
def firn_boot(firn_driver: Driver) -> None:
    """Boot the machines: start all, and wait until each takes commands.

    With `from_boot = true` in the test's file they start where an earlier session had booted.
    A fixture of this name in your conftest.py may do more, and take this one as its argument.
    """
    with plainly():
        if firn_driver.test.from_boot:
            firn_driver.boot_once()
            return
        firn_driver.start_all()
        for machine in firn_driver.machines:
            machine.connect()


class Unconfigured:
    """The fixtures where there are no machines."""

    @pytest.fixture
    def driver(self, firn_driver: Driver) -> None:
        """The run with its machines: there are none, see the option `firn_test`."""


class Machines:
    """The fixtures where there are machines. A subclass has one for each machine."""

    def __init__(self) -> None:
        """Begin without a checkpoint."""
        self._checkpoint: Checkpoint | None = None
        #: A test has run since the machines were what they are at the checkpoint.
        self._spoiled = False
        #: A fixture for several tests may have changed the machines on purpose.
        self._prepared = False

    @pytest.fixture
    def driver(self, firn_driver: Driver, firn_boot: None) -> Iterator[Driver]:
        """The run, with all machines up: driver.machines, driver.vlans, driver.checkpoint()…

        After the test, all machines and networks go back to what they were before it.
        """
        with plainly():
            if self._spoiled:
                self._go_back()
            if self._prepared or self._checkpoint is None or not self._checkpoint.is_there:
                # The earlier one is dropped last: what it has copied is not copied again.
                self._checkpoint = firn_driver.checkpoint("before the test")
                self._prepared = False
        self._spoiled = True
        yield firn_driver
        with plainly():
            self._go_back()

    def _go_back(self) -> None:
        if self._checkpoint is not None and self._checkpoint.is_there:
            self._checkpoint.rollback()
        self._spoiled = False

    @pytest.fixture(autouse=True)
    def _firn_goes_back(self, request: pytest.FixtureRequest) -> None:
        """Undo what a test does by the session's fixtures, too."""
        if not {"firn_driver", "firn_machines"}.isdisjoint(request.fixturenames):
            request.getfixturevalue("driver")

    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> None:
        """Notice fixtures that last longer than a test."""
        self._prepared |= fixturedef.scope != "function"

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[object]) -> None:
        """Notice their ends."""
        self._prepared |= fixturedef.scope != "function"
