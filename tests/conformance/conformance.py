#!/usr/bin/env python3
"""Which names of the NixOS test driver's API do what they should.

A family of the API is a test script in scripts/. Each of its behaviours is a subtest, called
`NAME: what` or, for wrong use and for failures, `NAME, wrongly: what`; each name has both kinds.
A case that asserts nothing, a second case of one name, and a test of the command line that stands
for a name's right and wrong use are refused: they could not fail, or would count twice.
The script's machines are in comments at its beginning:

    #: none: NAME         a machine that cannot boot, for what needs none
    #: file: NAME         a machine file that boots the micro kit
    #: nix: NAME          one that nix/machine-spec.nix makes for the systemd kit
    #: [nodes.NAME]       lines of a firn test file
    #: arguments: WORDS   kernel arguments of those with the systemd kit

Scripts are run through the real command lines, `nixos-test-driver` or `firn test`, and the outcome
is read from the JUnit report; a case that is not in it, or is skipped there, has failed. `firn
check` looks at the scripts too. A script with `#: ways: agent backdoor qemu` is run once each way:
over firn's agent; over the root shell on hvc0; and over that shell with all machines under QEMU,
which has no KVM here. What QEMU does in another way is in DIFFERS.

    conformance.py run [FAMILY…]    run them; with --write keep the outcome in results.json
        --way WAY                   only this way
        --quick                     under QEMU only what takes less than a minute
    conformance.py table [--check]  write README.md's table here, or check it
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
RESULTS = HERE / "results.json"
BIN = Path(sys.executable).parent
CASE = re.compile(r"(?P<name>[\w.-]+)(?P<wrong>, wrongly)?: (?P<what>.+)")
BEGIN = "<!-- made by tests/conformance/conformance.py from its results -->"
END = "<!-- end -->"

#: How many families run at the same time: a carrier has one processor, and some GiB of memory.
MOST_AT_ONCE = 4

#: The ways in which a family can be run, and the table's headings of them.
WAYS = {
    "agent": "over the agent",
    "backdoor": "over the root shell",
    "qemu": "under QEMU",
}

#: The families whose guests are quick enough under QEMU to be run each time.
QUICK = {"monitor"}

#: Cases that are not run under QEMU, by family, and why.
DIFFERS = {
    "attributes": {
        "monitor_path, wrongly: nobody listens there": "the sockets of QEMU's machine protocol and "
        "of the root shell are there",
    },
    "machine_files": {
        "join_all, wrongly: a machine that stands still": "QEMU does not tell that a kernel has "
        "halted",
    },
    "nixos": {
        "start, wrongly: a credential is longer than what there is room for": "QEMU says so in its "
        "own words",
    },
    "monitor": {
        "send_monitor_command: info about firn itself": "QEMU says its own version, and has no KVM "
        "where tests run",
        "send_monitor_command, wrongly: what a machine has nothing for": "QEMU adds devices to a "
        "machine that runs",
        "wait_for_shutdown, wrongly: one that stands still is not": "QEMU does not tell that a "
        "kernel has halted",
    },
    "screen": {
        "screenshot: black before anything is shown": "the firmware draws",
        "screenshot: of the size that the screen has": "the kernel draws on it as on a VGA's text "
        "mode, in the firmware's size",
        "send_monitor_command, wrongly: no such key": "QEMU says so in its answer, and nothing is "
        "raised",
    }
    | {
        f"{name}, wrongly: {what} a machine that has none": "QEMU's machines have a keyboard, and "
        "QEMU has its own words for a screen that is not there"
        for name, what in [
            ("get_screen_text", "of"),
            ("get_screen_text_variants", "of"),
            ("screenshot", "of"),
            ("send_key", "to"),
        ]
    },
    "files": {
        "send_monitor_command, wrongly: what firn does not know": "QEMU says so in its answer, and "
        "nothing is raised",
        "wait_for_shutdown, wrongly: of a guest that halts and stands still": "QEMU does not tell "
        "that a kernel has halted",
    },
}

#: What fails unless the guest is as it should be: at the end of another name's case, an assertion.
GUEST_CHECKS = {"succeed", "fail", "wait_until_succeeds", "wait_until_fails"}

#: The command line's names, and the tests of driver/python/tests that show them: right and wrong.
COMMANDS = {
    "--config": ("test_nixos.test_names", "test_nixos.test_bad_configuration"),
    "--test-script": ("test_nixos.test_other_script", "test_nixos.test_usage"),
    "--no-interactive": ("test_nixos.test_other_script", "test_nixos.test_usage"),
    "--start-scripts": ("test_nixos.test_without_configuration", "test_nixos.test_usage"),
    "--vlans": ("test_nixos.test_without_configuration", "test_nixos.test_create_machine"),
    "--keep-machine-state": ("test_nixos.test_keep_machine_state", "test_nixos.test_two_runs"),
    "--interactive": ("test_nixos.test_interactive", "test_nixos.test_interactive_errors"),
    "--debug-hook-attach": ("test_nixos.test_breakpoint", "test_nixos.test_usage"),
    "--global-timeout": ("test_nixos.test_global_timeout", "test_nixos.test_usage"),
    "--output_directory": ("test_nixos.test_names", "test_nixos.test_usage"),
    "--junit-xml": ("test_nixos.test_reports", "test_nixos.test_bad_reports"),
    "--log-level": ("test_nixos.test_log", "test_nixos.test_usage"),
    "--dump-vsocks": ("test_nixos.test_vsocks", "test_nixos.test_without_vsocks"),
    "logLevel": ("test_nixos.test_log", "test_nixos.test_usage"),
    "LOGFILE": ("test_nixos.test_reports", "test_nixos.test_bad_reports"),
    "generate-driver-symbols": ("test_nixos.test_names", "test_check.test_bad"),
    "machine": ("test_nixos.test_alias", "test_nixos.test_no_alias"),
    "rebuild": ("test_nixos.test_interactive", "test_nixos.test_interactive_errors"),
    "test_script": ("test_nixos.test_interactive", "test_nixos.test_failures"),
    "run_tests": ("test_nixos.test_names", "test_nixos.test_failures"),
}


@dataclass
class Family:
    """A script, and what its comments and subtests say."""

    name: str
    path: Path
    title: str
    nodes: str
    none: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    nix: list[str] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    cases: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Family":
        """Read a script."""
        text = path.read_text()
        told = [line[2:].strip() for line in text.splitlines() if line.startswith("#:")]
        title = text.splitlines()[0].removeprefix("#").strip().rstrip(".")
        new = cls(path.stem, path, title, "")
        lines = []
        for line in told:
            key, _, value = line.partition(":")
            names = {"none": new.none, "file": new.files, "nix": new.nix}
            if key in names:
                names[key].append(value.strip())
            elif key == "ways":
                new.ways = value.split()
                if unknown := set(new.ways) - set(WAYS):
                    raise SystemExit(f"{path}: there are no ways {unknown}; allowed: {[*WAYS]}")
            elif key == "arguments":
                new.arguments = value.split()
            else:
                lines.append(line)
        new.nodes = "\n".join(lines)
        new.ways = new.ways or ["agent"]
        tree = ast.parse(text)
        new.cases = [case for case, _ in subtests(tree)]
        new.unproven = unproven(tree)
        return new

    def cases_of(self, way: str) -> list[str]:
        """Give the cases that are run one way."""
        left_out = DIFFERS.get(self.name, {}) if way == "qemu" else {}
        return [case for case in self.cases if case not in left_out]

    def script(self, way: str) -> str:
        """Give the script with the cases that are run one way."""
        text = self.path.read_text()
        lines = text.splitlines()
        left_out = set(self.cases) - set(self.cases_of(way))
        for case, node in subtests(ast.parse(text)):
            if case in left_out:
                # All others keep their places.
                for at in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[at] = ""
        return "\n".join(lines) + "\n"


def subtests(tree: ast.AST) -> list[tuple[str, ast.With]]:
    """Give the subtests of a script, in their order."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and isinstance(call := node.items[0].context_expr, ast.Call):
            name = call.args[0] if called(call) == "subtest" and call.args else None
            if isinstance(name, ast.Constant):
                found.append((str(name.value), node))
    return sorted(found, key=lambda pair: pair[1].lineno)


def called(call: ast.Call) -> str:
    """Give the last name of what is called."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def asserts(part: ast.AST, helpers: set[str]) -> bool:
    """Tell whether a part of a script asserts something, or a helper of the script does."""
    for node in ast.walk(part):
        match node:
            case ast.Assert():
                return True
            case ast.Call(func=ast.Attribute(value=ast.Name(id="t"), attr=attr)):
                if attr.startswith("assert"):
                    return True
            case ast.Call(func=ast.Name(id=helper)) if helper in helpers:
                return True
    return False


def unproven(tree: ast.AST) -> list[str]:
    """Give the cases of a script that could not fail if what they are about did nothing."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    helpers: set[str] = set()
    # Helpers call helpers.
    while more := {f.name for f in functions if asserts(f, helpers)} - helpers:
        helpers |= more
    found = []
    for case, node in subtests(tree):
        checks = GUEST_CHECKS - {re.split("[,:]", case)[0]}
        last = [called(call) for call in ast.walk(node.body[-1]) if isinstance(call, ast.Call)]
        if not asserts(node, helpers) and checks.isdisjoint(last):
            found.append(case)
    return found


def families() -> list[Family]:
    """Read all scripts."""
    return [Family.read(path) for path in sorted((HERE / "scripts").glob("*.py"))]


def faults(all_families: list[Family]) -> list[str]:
    """Give what is wrong with the list: what is missing, counts twice, or cannot fail."""
    right, wrong, found = set(), set(), []
    for family in all_families:
        where = f"{family.name}: "
        found += [f"{where}`{case}` asserts nothing" for case in family.unproven]
        for case, times in Counter(family.cases).items():
            if times > 1:
                found.append(f"{where}`{case}` is there {times} times")
            if match := CASE.fullmatch(case):
                (wrong if match["wrong"] else right).add(match["name"])
            else:
                found.append(f"{where}`{case}` is neither `NAME: what` nor `NAME, wrongly: what`")
    found += [f"{name} has no case of right use" for name in sorted(wrong - right)]
    found += [f"{name} has no case of wrong use" for name in sorted(right - wrong)]
    for name, tests in COMMANDS.items():
        if len(set(tests)) != len(tests):
            found.append(f"{name}: one test cannot show right and wrong use")
    cases = {family.name: family.cases for family in all_families if "qemu" in family.ways}
    for name, differing in DIFFERS.items():
        for case in set(differing).difference(cases.get(name, [])):
            found.append(f"DIFFERS: {name} has no `{case}` under QEMU")
    return found


def command(family: Family, way: str, directory: Path) -> list[str]:
    """Write the test of a family, and give the command that runs it."""
    report = ["--junit-xml", "junit.xml", "-o", str(directory)]
    script = family.path
    if way == "qemu":
        script = directory / script.name
        script.write_text(family.script(way))
    if way == "qemu" or family.none:
        # QEMU works without KVM, and what cannot boot needs none.
        report += ["--accel", "none"]
    if family.none or family.files or family.nix:
        vms = {}
        for name in family.none + family.files + family.nix:
            file = directory / f"run-{name}-vm"
            spec = {"firn": 1, "name": name, "kernel": str(family.path)}
            if name in family.files:
                spec |= bootable()
            if name in family.nix:
                spec = made_by_nix(name)
            if way == "qemu":
                spec["backend"] = "qemu"
            file.write_text(f"#!{BIN}/firn run\n{json.dumps(spec)}\n")
            vms[name] = {"start_script": str(file)}
        config = directory / "config.json"
        told = {"vms": vms, "vlans": [1], "test_script": str(script)}
        config.write_text(json.dumps(told))
        return [str(BIN / "nixos-test-driver"), "--config", str(config), *report]
    file = directory / "test.toml"
    nodes = family.nodes
    arguments = family.arguments
    if way == "qemu":
        nodes = re.sub(r"^\[nodes\.[^].]+\]$", '\\g<0>\nbackend = "qemu"', nodes, flags=re.M)
    if way != "agent":
        # A guest without an agent has the root shell on hvc0 only.
        arguments = arguments + [f"{rd}systemd.mask=firn-agent.service" for rd in ("", "rd.")]
    if arguments:
        line = f"cmdline = '{' '.join([cmdline('systemd'), *arguments])}'"
        nodes = re.sub(r'^kit = "systemd"$', rf"\g<0>\n{line}", nodes, flags=re.M)
    # An emulated processor is slow.
    limit = 1800 if way == "qemu" else 600
    head = f"global_timeout = {limit}\ntest_script_file = {json.dumps(str(script))}\n"
    file.write_text(head + nodes + "\n")
    return [str(BIN / "firn"), "test", str(file), *report]


def check(family: Family) -> bool:
    """Lint and type-check a script."""
    with tempfile.TemporaryDirectory() as name:
        command(family, "agent", Path(name))
        config = Path(name, "test.toml" if family.nodes else "config.json")
        return (
            subprocess.run([BIN / "firn", "check", "--config", config], check=False).returncode == 0
        )


def bootable() -> dict[str, object]:
    """Give what a machine file says to boot the micro kit."""
    kit = kit_directory("micro")
    return {
        "memory": 256,
        "kernel": str(kit / "vmlinux"),
        "initrd": [str(kit / "initrd")],
        "cmdline": f"{cmdline('micro')} ${{QEMU_KERNEL_PARAMS:-}}",
        "disks": [{"image": "${NIX_DISK_IMAGE:-made.img}", "size": 16, "serial": "root"}],
        "shares": [
            {"tag": "shared", "source": "${SHARED_DIR:-${TMPDIR}/xchg}"},
            {"tag": "xchg", "source": "${TMPDIR}/xchg"},
        ],
        "vlans": [1],
    }


def made_by_nix(name: str) -> dict[str, object]:
    """Give what the machine file of a node says whose system is the systemd kit."""
    arguments = ["--argstr", "name", name, "--argstr", "store", kit_directory("systemd") / "store"]
    made = subprocess.run(
        [
            "nix-instantiate",
            "--eval",
            "--strict",
            "--json",
            *arguments,
            HERE.parent / "nix/kit.nix",
        ],
        env=os.environ | {"NIX_REMOTE": "dummy://"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(json.loads(made.stdout))


def kit_directory(kit: str) -> Path:
    """Build a kit if need be, and say where it is."""
    built = subprocess.run(
        [BIN / "firn", "kit", "build", kit], capture_output=True, text=True, check=True
    )
    return Path(built.stdout.strip().splitlines()[-1])


def cmdline(kit: str) -> str:
    """Give the kernel arguments of a kit."""
    return str(json.loads((kit_directory(kit) / "manifest.json").read_text())["cmdline"])


def run_family(family: Family, way: str) -> dict[str, bool]:
    """Run a script one way; give which cases have passed."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        environment = None if family.nodes else os.environ | {"TMPDIR": name}
        done = subprocess.run(
            command(family, way, directory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env=environment,
        )
        report = directory / "junit.xml"
        outcome = {}
        if report.is_file() and report.stat().st_size:
            for case in ET.parse(report).getroot().iter("testcase"):
                bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
                outcome[str(case.get("name"))] = not bad
    passed = {case: outcome.get(case, False) for case in family.cases_of(way)}
    if done.returncode != 0 or not all(passed.values()):
        print(done.stdout)
        print(f"{family.name} over {way}: exit status {done.returncode}")
    return passed


def run_commands() -> dict[str, bool]:
    """Run the tests of the command line; give which cases have passed."""
    tests = sorted({test for pair in COMMANDS.values() for test in pair})
    wanted = [word for test in tests for word in ("-k", "*" + test.replace(".", ".*."))]
    package = HERE.parent.parent / "driver/python"
    where = ["-s", str(package / "tests"), "-t", str(package)]
    done = subprocess.run(
        [sys.executable, "-m", "unittest", "discover", "-v", *where, *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    good = set()
    # A test's name, then its description, behind which the outcome stands.
    for match in re.finditer(r"^(\w+) \(tests\.(\w+)\.[\w.]+\)\n.* \.\.\. ok$", done.stderr, re.M):
        good.add(f"{match[2]}.{match[1]}")
    passed = {}
    for name, (right, wrong) in COMMANDS.items():
        passed[f"{name}: on the command line"] = right in good
        passed[f"{name}, wrongly: on the command line"] = wrong in good
    if not all(passed.values()):
        print(done.stderr)
    return passed


def run(wanted: list[str], wanted_way: str | None, quick: bool, write: bool) -> int:
    """Run families; the answer is the exit status."""
    results: dict[str, dict[str, dict[str, bool]]] = {}
    found = faults(families())
    for fault in found:
        print(fault, file=sys.stderr)
    unclean = len(found)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_AT_ONCE)) as pool:
        chosen = [family for family in families() if not wanted or family.name in wanted]
        unclean += len(chosen) - sum(pool.map(check, chosen))
        runs = [
            (family, way)
            for family in chosen
            for way in family.ways
            if wanted_way in (None, way)
            and not (quick and way == "qemu" and family.name not in QUICK)
        ]
        outcomes = pool.map(lambda run: run_family(*run), runs)
        for (family, way), passed in zip(runs, outcomes, strict=True):
            results.setdefault(family.name, {})[way] = passed
    if wanted_way in (None, "agent") and (not wanted or "commands" in wanted):
        results["command-line"] = {"agent": run_commands()}
    failed = 0
    for name, ways in results.items():
        for way, passed in ways.items():
            bad = [case for case, good in passed.items() if not good]
            failed += len(bad)
            print(f"{name} over {way}: {len(passed) - len(bad)} of {len(passed)} pass")
            for case in bad:
                print(f"    FAILED {case}")
    if write:
        some = wanted or wanted_way or quick
        kept = json.loads(RESULTS.read_text()) if some and RESULTS.is_file() else {}
        kept |= {name: kept.get(name, {}) | ways for name, ways in results.items()}
        RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        table(check=False)
    return 1 if failed or unclean else 0


def lines(results: dict[str, dict[str, dict[str, bool]]]) -> list[str]:
    """Make the table: a row for each family, with its names and how many of its cases pass."""
    titles = {family.name: family.title for family in families()} | {
        "command-line": "The command line and the prompt"
    }
    made = [f"| | names | {' | '.join(WAYS.values())} |", "|---" * (2 + len(WAYS)) + "|"]
    for name, ways in sorted(results.items(), key=lambda item: titles.get(item[0], "")):
        names: dict[str, None] = {}
        counts: dict[str, str] = defaultdict(str)
        for way, passed in ways.items():
            counts[way] = f"{sum(passed.values())} of {len(passed)}"
            for case in passed:
                if match := CASE.fullmatch(case):
                    names[f"`{match['name']}`"] = None
        row = [titles.get(name, name), ", ".join(names), *(counts[way] for way in WAYS)]
        made.append("| " + " | ".join(row) + " |")
    made += ["", "Left out under QEMU:", "", "| | |", "|---|---|"]
    for differing in DIFFERS.values():
        made += [f"| {case} | {why} |" for case, why in differing.items()]
    return made


def table(check: bool) -> int:
    """Write the README's table, or look whether it and the results fit the scripts."""
    results = json.loads(RESULTS.read_text())
    found = faults(families())
    for family in families():
        kept = results.get(family.name, {})
        for way in family.ways:
            if sorted(kept.get(way, {})) != sorted(set(family.cases_of(way))):
                found.append(f"results.json does not fit {family.name} over {way}: run it")
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        found.append(f"tests/conformance/README.md has no place for the table: {BEGIN} … {END}")
    else:
        fresh = "\n".join([before + BEGIN, "", *lines(results), "", END]) + after
        if not check:
            README.write_text(fresh)
        elif fresh != text:
            found.append("README.md here does not have the table of results.json: `… table`")
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Run the conformance list.")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run families")
    runner.add_argument("family", nargs="*", help="all, unless some are named")
    runner.add_argument("--way", choices=WAYS, help="only this way")
    runner.add_argument(
        "--quick", action="store_true", help=f"under QEMU only {', '.join(sorted(QUICK))}"
    )
    runner.add_argument("--write", action="store_true", help="keep the outcome")
    tabler = commands.add_parser("table", help="write the README's table")
    tabler.add_argument("--check", action="store_true", help="only look whether it is right")
    args = parser.parse_args()
    if args.command == "table":
        return table(args.check)
    return run(args.family, args.way, args.quick, args.write)


if __name__ == "__main__":
    sys.exit(main())
