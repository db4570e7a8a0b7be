"""The commands of the NixOS test framework: `nixos-test-driver` and `generate-driver-symbols`."""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from firn._firn import Test
from firn.accel import ACCELS, again, in_carrier
from firn.driver import Settings
from firn.logger import LogLevel
from firn.runner import Options, end_at_once, guarded

LEVELS = [level.name.lower() for level in LogLevel]

#: The names that every script has, without machines and vlans.
SYMBOLS = (
    "BaseMachine",
    "NspawnMachine",
    "QemuMachine",
    "create_machine",
    "debug",
    "driver",
    "dump_machine_ssh",
    "join_all",
    "log",
    "machines",
    "machines_nspawn",
    "machines_qemu",
    "os",
    "polling_condition",
    "retry",
    "run_tests",
    "serial_stdout_off",
    "serial_stdout_on",
    "start_all",
    "subtest",
    "t",
    "test_script",
    "vlans",
)


def writable_directory(text: str) -> Path:
    """Check an output directory. It is not created, so that a typo does not go unnoticed."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text} is not a writable directory: {error.strerror}"
        ) from None
    return path


def directory(text: str) -> Path:
    """Check a directory that is read."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    env = os.environ.get
    new = argparse.ArgumentParser(
        prog="nixos-test-driver",
        description="Run a NixOS test: boot its machines and run its script.",
        epilog="Exit status: 0 the script succeeded; 1 it failed; 2 wrong usage; 130 Ctrl-C. "
        "The global timeout ends everything, and this process by SIGTERM. "
        "Environment: TMPDIR holds machines' state; LOGFILE names a file for a log in XML.",
    )
    add = new.add_argument
    add(
        "-c",
        "--config",
        type=Path,
        metavar="FILE",
        help="the test's configuration, as the framework writes it (JSON)",
    )
    add(
        "--test-script",
        type=Path,
        metavar="FILE",
        dest="other_script",
        help="run this script instead of the test's own",
    )
    add(
        "-K",
        "--keep-machine-state",
        "--keep-vm-state",
        action="store_true",
        help="start from the machines' state in TMPDIR, and keep it there",
    )
    add(
        "-I",
        "--interactive",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="open a prompt instead of running the script",
    )
    add(
        "--debug-hook-attach",
        metavar="CMD",
        help="turn breakpoints on; CMD attaches to the driver's namespaces",
    )
    add(
        "--global-timeout",
        type=float,
        default=env("globalTimeout") or None,
        metavar="SECONDS",
        help="limit for the whole test (default: the variable globalTimeout, then the test's own)",
    )
    add(
        "-o",
        "--output_directory",
        type=writable_directory,
        default=".",
        metavar="DIR",
        help="directory for the script's output files; it has to exist (default: %(default)s)",
    )
    add(
        "--junit-xml",
        type=Path,
        metavar="FILE",
        help="write a JUnit report to the output directory",
    )
    add(
        "--log-level",
        choices=LEVELS,
        default=env("logLevel") or "info",
        help="the lowest level that the log shows (default: the variable logLevel, then info)",
    )
    world = new.add_mutually_exclusive_group()
    world.add_argument(
        "--world",
        type=directory,
        default=env("FIRN_WORLD") or None,
        metavar="DIR",
        help="start from the booted world in DIR if it fits, else boot and say why; the script "
        "finds machines that are up (default: the variable FIRN_WORLD)",
    )
    world.add_argument(
        "--keep-world",
        type=Path,
        metavar="DIR",
        help="run no script, but boot all machines and keep that world in DIR, which is made, or "
        "empty",
    )
    add(
        "--open-vlans",
        action="store_true",
        help="let programs outside plug into the networks; `firn vlan` lists them "
        "(always so in interactive mode)",
    )
    add(
        "--dump-vsocks",
        type=int,
        metavar="OFFSET",
        help="turn the ssh backdoor on and print its commands; CIDs count from OFFSET",
    )
    add(
        "--accel",
        choices=ACCELS,
        default="auto",
        help="where machines run: auto is KVM if it works here, else the carrier; "
        "none does not check (default: %(default)s)",
    )
    add(
        "test_script",
        nargs="?",
        type=Path,
        metavar="SCRIPT",
        help="like --test-script; required without --config (default: the variable testScript)",
    )
    old = new.add_argument_group("tests without --config")
    old.add_argument(
        "--start-scripts",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="the machines' files (default: the variable startScripts)",
    )
    old.add_argument(
        "--vlans",
        nargs="*",
        type=int,
        metavar="N",
        help="vlans besides those that machines are on (default: the variable vlans)",
    )
    return new


def source(args: argparse.Namespace, own: argparse.ArgumentParser) -> Callable[[Path | None], Test]:
    """Return a function that reads the test of the command line, or another configuration."""
    scripts = [path for path in (args.other_script, args.test_script) if path is not None]
    if len(scripts) > 1:
        own.error(f"there are two scripts: --test-script {scripts[0]}, and {scripts[1]}")
    script = scripts[0] if scripts else None

    if args.config is not None:
        if args.start_scripts is not None or args.vlans is not None:
            own.error("--start-scripts and --vlans are for a test without --config, which has both")

        def configured(other: Path | None) -> Test:
            test = Test.from_driver_file(other or args.config)
            return test if script is None else test.with_script(script)

        return configured

    env = os.environ.get
    if variable := env("testScript"):
        script = script or Path(variable)
    if script is None:
        own.error("there is no test: give --config FILE, or a test script")
    starts, vlans = args.start_scripts, args.vlans
    if starts is None:
        starts = [Path(word) for word in env("startScripts", "").split()]
    if vlans is None:
        vlans = [int(word) for word in env("vlans", "").split() if word.isdigit()]

    def listed(other: Path | None) -> Test:
        if other is not None:
            return Test.from_driver_file(other)
        return Test.from_start_scripts(starts, vlans, script)

    return listed


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the answer is the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    own = parser()
    args = own.parse_args(arguments)
    if args.log_level not in LEVELS:
        own.error(f"the variable logLevel is {args.log_level!r}; allowed: {', '.join(LEVELS)}")
    if args.interactive and args.keep_world is not None:
        own.error("--keep-world is for runs without --interactive")
    options = Options(
        load=source(args, own),
        settings=Settings(
            out_dir=args.output_directory,
            global_timeout=args.global_timeout,
            named_state=True,
            keep_machine_state=args.keep_machine_state,
            vsock_offset=args.dump_vsocks,
            interactive=args.interactive,
            open_vlans=args.open_vlans,
            # At the prompt, machines are started by hand.
            world=None if args.interactive or args.keep_world is not None else args.world,
            keep_world=args.keep_world,
        ),
        debug_attach=args.debug_hook_attach,
        junit=args.junit_xml,
        log_level=args.log_level,
    )
    if args.accel != "none" and not in_carrier():
        end_at_once()
        try:
            status = elsewhere(args, options, arguments)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if status is not None:
            return status
    return guarded(options)


def elsewhere(args: argparse.Namespace, options: Options, arguments: list[str]) -> int | None:
    """Run the command line in a carrier, unless machines can run here."""
    # Errors in the test are reported before anything boots.
    test = options.load(None)
    command = [sys.executable, "-P", "-m", "firn.nixos", *arguments]
    writable = [args.output_directory, *test.writable]
    if args.keep_world is not None:
        args.keep_world.mkdir(parents=True, exist_ok=True)
        writable.append(args.keep_world)
    if args.keep_machine_state:
        # What is kept after the run must not stay in the carrier.
        state = tempfile.gettempdir()
        writable.append(Path(state))
        command = ["env", f"TMPDIR={state}", *command]
    log = os.environ.get("LOGFILE")
    if log and log != os.devnull:
        writable.append(Path(log).absolute().parent)
    status = again(args.accel, command, writable, args.interactive and sys.stdin.isatty())
    if status == 128 + signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    return status


def generate_driver_symbols() -> int:
    """Write the names of every script to the file `driver-symbols`, for a linter."""
    Path("driver-symbols").write_text(",".join(SYMBOLS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
