"""The commands of the NixOS test framework: `nixos-test-driver` and `generate-driver-symbols`."""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from firn._firn import Test, in_carrier_if_needed
from firn.driver import Settings
from firn.runner import Options, end_at_once, guarded
from firn.terminal import with_terminal

#: Set for the driver in a carrier, which shall not look for another.
IN_CARRIER = "FIRN_IN_CARRIER"

#: The names of every script, without machines and vlans.
SYMBOLS = (
    "BaseMachine",
    "create_machine",
    "debug",
    "driver",
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
    """Check an output directory. It is not made: a typing error would go unnoticed."""
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


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    env = os.environ.get
    new = argparse.ArgumentParser(
        prog="nixos-test-driver",
        description="Run a NixOS test: boot its machines and run its script.",
        epilog="Exit status: 0 the script ended; 1 it failed; 2 wrong usage. The global timeout "
        "ends everything, and this process by SIGTERM.",
    )
    add = new.add_argument
    add("--config", type=Path, metavar="FILE", help="the test, as the framework writes it (JSON)")
    add(
        "-K",
        "--keep-machine-state",
        "--keep-vm-state",
        action="store_true",
        help="go on with the machines' state below TMPDIR, and leave it there",
    )
    add("-I", "--interactive", action="store_true", help="give a prompt instead of running it")
    add("--debug-hook-attach", metavar="CMD", help="turn breakpoints on; CMD leads people to them")
    add(
        "--global-timeout",
        type=float,
        default=env("globalTimeout") or None,
        metavar="SECONDS",
        help="time for the whole test (default: the variable globalTimeout, then the test's own)",
    )
    add(
        "-o",
        "--output_directory",
        type=writable_directory,
        default=".",
        metavar="DIR",
        help="where files that the script keeps go; it has to be there (default: %(default)s)",
    )
    add("--junit-xml", type=Path, metavar="FILE", help="a JUnit report, in the output directory")
    add(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="what the log shows at least (default: %(default)s)",
    )
    add(
        "--dump-vsocks",
        type=int,
        metavar="OFFSET",
        help="turn the ssh backdoor on, and say how to enter machines; their CIDs follow OFFSET",
    )
    add(
        "--accel",
        choices=["auto", "kvm", "carrier", "none"],
        default="auto",
        help="where machines run: auto takes KVM if it works here, else the carrier; "
        "none does not look (default: %(default)s)",
    )
    old = new.add_argument_group("a test without --config")
    old.add_argument(
        "--start-scripts",
        nargs="*",
        type=Path,
        default=[Path(word) for word in env("startScripts", "").split()],
        metavar="FILE",
        help="the machines' files (default: the variable startScripts)",
    )
    old.add_argument(
        "--vlans",
        nargs="*",
        type=int,
        default=[int(word) for word in env("vlans", "").split() if word.isdigit()],
        metavar="N",
        help="vlans beside those that machines are on (default: the variable vlans)",
    )
    old.add_argument(
        "test_script",
        nargs="?",
        type=Path,
        default=env("testScript") or None,
        help="the script (default: the variable testScript)",
    )
    return new


def load(args: argparse.Namespace, other: Path | None) -> Test:
    """Read the test that the command line names, or another configuration."""
    config = other or args.config
    if config is not None:
        return Test.from_driver_file(config)
    return Test.from_start_scripts(args.start_scripts, args.vlans, args.test_script)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the answer is the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    own = parser()
    args = own.parse_args(arguments)
    if args.config is None and args.test_script is None:
        own.error("there is no test: give --config FILE, or a test script")
    options = Options(
        load=lambda other: load(args, other),
        settings=Settings(
            out_dir=args.output_directory,
            global_timeout=args.global_timeout,
            named_state=True,
            keep_machine_state=args.keep_machine_state,
            vsock_offset=args.dump_vsocks,
        ),
        interactive=args.interactive,
        debug_attach=args.debug_hook_attach,
        junit=args.junit_xml,
        log_level=args.log_level,
    )
    if args.accel != "none" and IN_CARRIER not in os.environ:
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
    # What is wrong with the test is said before anything is booted.
    test = options.load(None)
    # This process is Python, so the agent cannot be found beside it.
    agent = Path(sys.executable).with_name("firn-agent")
    if agent.is_file():
        os.environ.setdefault("FIRN_AGENT", str(agent))
    command = ["env", f"{IN_CARRIER}=1", sys.executable, "-P", "-m", "firn.nixos", *arguments]
    terminal = args.interactive and sys.stdin.isatty()
    if terminal:
        command = with_terminal(command)
    writable = [args.output_directory, *test.writable]
    if args.keep_machine_state:
        # What shall outlive the run must not stay in the carrier.
        state = tempfile.gettempdir()
        writable.append(Path(state))
        command = ["env", f"TMPDIR={state}", *command]
    log = os.environ.get("LOGFILE")
    if log and log != os.devnull:
        writable.append(Path(log).absolute().parent)
    status = in_carrier_if_needed(args.accel, command, writable, terminal)
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
