"""The pytest plugin: its fixtures, what it says, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import unittest
from pathlib import Path

from .support import DEAD, RunTest

#: For machines that cannot boot: they are off in all tests.
NOT_BOOTED = """
import pytest

@pytest.fixture(scope="session")
def firn_boot(firn_driver):
    print("not booted:", *firn_driver.machines)
"""


class Plugin(RunTest):
    """Files of tests, run by pytest."""

    def setUp(self) -> None:
        """Write the configuration."""
        super().setUp()
        self.dir = self.dir.resolve()
        self.write("pytest.ini", "[pytest]\nfirn_test = test.toml\naddopts = -p no:cacheprovider\n")

    def write(self, name: str, text: str) -> Path:
        """Write a file."""
        path = self.dir / name
        path.write_text(text)
        return path

    def machines(self, *names: str, more: str = "") -> None:
        """Write a test with machines that cannot boot."""
        path = self.dir / "test.toml"
        dead = DEAD.format(file=path)
        nodes = [f"[nodes.{name}]\n{dead}" for name in names]
        path.write_text('test_script = ""\n' + "".join(nodes) + more)

    def spawn(self, *arguments: str, accel: str = "none") -> "subprocess.Popen[str]":
        """Start pytest."""
        own = [sys.executable, "-P", "-m", "pytest", "--firn-accel", accel]
        variables = {
            "COLUMNS": "120",
            "FIRN_WORLDS": str(self.dir / "worlds"),
            "PYTHONPATH": str(self.dir),
            "TMPDIR": str(self.state),
        }
        return subprocess.Popen(
            [*own, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | variables,
            cwd=self.dir,
        )

    def check(
        self, status: int, *lines: str, arguments: tuple[str, ...] = (), accel: str = "none"
    ) -> str:
        """Run pytest to its end: its exit status, regular expressions of what it prints."""
        with self.spawn(*arguments, accel=accel) as process:
            out, _ = process.communicate(timeout=580)
        self.assertEqual(process.returncode, status, out)
        for line in lines:
            self.assertRegex(out, line)
        self.assertEqual(list(self.state.iterdir()), [], f"something is left: {out}")
        return out

    def test_no_machines(self) -> None:
        """Who asks for machines where none are named hears how to name them."""
        self.write("pytest.ini", "[pytest]\n")
        self.write(
            "test_it.py",
            "def test_run(driver): pass\n"
            "def test_all(firn_machines): pass\n"
            "def test_none(): pass\n",
        )
        said = r"there are no machines: set the ini option `firn_test = test\.toml`, or give --firn"
        out = self.check(1, said, "1 passed, 2 errors")
        self.assertNotIn("Traceback", out)
        self.assertNotIn("firn:", out)
        # The name `driver` is also that of others' fixtures.
        self.write("other.py", "import pytest\n@pytest.fixture\ndef driver(): return 'theirs'\n")
        self.write("test_it.py", "def test_run(driver): assert driver == 'theirs'\n")
        self.check(0, "1 passed", arguments=("-p", "other"))

    def test_bad_description(self) -> None:
        """What is wrong with the description is said before any test."""
        self.write("test_it.py", "def test_none(): pass\n")
        self.check(4, r"ERROR: firn: .*/test\.toml: No such file|cannot read .*/test\.toml")
        self.check(4, r"ERROR: firn: .*/other\.toml", arguments=("--firn", "other.toml"))
        self.write("test.toml", "test_script = ''\n[nodes.a]\nmemry = 3\n")
        self.check(4, r"ERROR: firn: unknown field `memry`(?s:.*)/test\.toml:3:1")
        self.write("test.toml", "test_script = ''\n")
        self.check(4, "a test needs a machine")

    def test_names(self) -> None:
        """Machines have the names of their variables, unless pytest or Python has taken these."""
        self.machines("a-b", "capsys", "class", "tmp_path")
        self.write("conftest.py", NOT_BOOTED)
        self.write(
            "test_it.py",
            "def test_it(a_b, capsys, tmp_path, driver, firn_machines):\n"
            "    assert a_b.name == 'a-b' and a_b is firn_machines['a_b']\n"
            "    assert driver.machines == list(firn_machines.values())\n"
            "    assert firn_machines['class'].name == 'class'\n"
            "    assert tmp_path.is_dir() and not hasattr(capsys, 'succeed')\n",
        )
        told = [
            rf'machine `{name}` has no fixture of its name.*: use firn_machines\["{name}"\]'
            for name in ("capsys", "class", "tmp_path")
        ]
        basetemp = f"--basetemp={self.dir / 'base'}"
        arguments = (basetemp, "-rA")
        header = r"firn: \S*/test\.toml: a_b, capsys, class, tmp_path\n"
        self.check(0, "1 passed", header, *told, arguments=arguments)
        # Those of others are the machines'.
        self.check(0, r"a_b -- .*\n +The machine `a_b`", arguments=("--fixtures",))

    def test_nixos(self) -> None:
        """The configuration of a NixOS test driver is taken as well."""
        file = self.write("kernel", "")
        machine = {"firn": 1, "name": "one", "kernel": str(file), "cmdline": ""}
        start = self.write("run-one-vm", f"#!/usr/bin/firn run\n{json.dumps(machine)}")
        start.chmod(0o755)
        script = self.write("script", "")
        vms = {"one": {"name": "one", "start_script": str(start)}}
        described = {"vms": vms, "containers": {}, "vlans": [1], "test_script": str(script)}
        self.write("config.json", json.dumps(described))
        self.write("conftest.py", NOT_BOOTED)
        self.write("test_it.py", "def test_it(one): assert one.name == 'one'\n")
        self.check(0, "1 passed", arguments=("--firn", "config.json"))

    def test_goes_back(self) -> None:
        """What a test did is undone; what fixtures for several tests did lasts as long as they."""
        self.machines("one")
        self.write("conftest.py", NOT_BOOTED)
        text = (
            "import pytest\n"
            "def names(machine): return sorted(it.name for it in machine.shared_dir.iterdir())\n"
            "@pytest.fixture(scope='module')\n"
            "def table(firn_machines, firn_driver):\n"
            "    with firn_driver.checkpoint('without the table'):\n"
            "        (firn_machines['one'].shared_dir / 'table').touch()\n"
            "        yield\n"
            "@pytest.mark.parametrize('n', [1, 2])\n"
            "def test_one(one, n):\n"
            "    assert names(one) == []\n"
            "    (one.shared_dir / 'spoilt').touch()\n"
            "@pytest.mark.parametrize('n', [1, 2])\n"
            "def test_prepared(table, firn_machines, n):\n"
            "    assert names(firn_machines['one']) == ['table']\n"
            "    (firn_machines['one'].shared_dir / 'table').unlink()\n"
        )
        self.write("test_a.py", text)
        self.write("test_b.py", text)
        out = self.check(0, "8 passed", arguments=("-s",))
        self.assertEqual(out.count("not booted"), 1)
        # One for each module's beginning, and one once its table is there.
        self.assertEqual(len(re.findall("(?<!to )checkpoint before the test\n", out)), 4, out)

    def test_cannot_go_back(self) -> None:
        """A machine under QEMU is refused before any machine boots."""
        self.machines("one", more="[nodes.two]\nbackend = 'qemu'\n")
        self.write("test_it.py", "def test_it(one): pass\ndef test_none(): pass\n")
        out = self.check(1, "\nno checkpoint: two runs under QEMU, which", "1 passed, 1 error")
        self.assertNotIn("starting vm", out)

    def test_cannot_boot(self) -> None:
        """Why a machine does not boot is said once for each test, and not tried again."""
        self.machines("one")
        self.write("test_it.py", "def test_1(one): pass\ndef test_2(one): pass\n")
        out = self.check(1, "\none cannot start: .* is no kernel.*\n-----", "2 errors")
        self.assertEqual(out.count("starting vm"), 1, out)

    def test_signals(self) -> None:
        """Ctrl-C and SIGTERM end the session, and nothing is left behind."""
        self.machines("one")
        self.write("conftest.py", NOT_BOOTED)
        self.write(
            "test_it.py",
            "import time\n"
            "def test_it(one):\n"
            "    print('here', flush=True)\n"
            "    time.sleep(60)\n"
            "def test_no_more(one): pass\n",
        )
        for number, status, said in (
            (signal.SIGINT, 2, "KeyboardInterrupt"),
            (signal.SIGTERM, 128 + signal.SIGTERM, "ended by SIGTERM"),
        ):
            with self.spawn("-s") as process:
                assert process.stdout is not None
                while "here" not in process.stdout.readline():
                    self.assertIsNone(process.poll())
                process.send_signal(number)
                out, _ = process.communicate(timeout=60)
            self.assertEqual(process.returncode, status, out)
            self.assertIn(said, out)
            self.assertIn("(finished: cleanup", out)
            self.assertEqual(list(self.state.iterdir()), [], out)

    def test_guests(self) -> None:
        """Machines boot once; whatever a test does to them, the next one does not see it."""
        nodes = "[nodes.client]\n[nodes.server]\n"
        self.write("test.toml", f"test_script = ''\nfrom_boot = true\n{nodes}")
        self.write(
            "test_it.py",
            "def test_files(server, client):\n"
            "    server.fail('test -e /tmp/spoilt')\n"
            "    server.succeed('rm -rf /etc', 'touch /tmp/spoilt')\n"
            "    client.succeed('ping -c 1 192.168.1.2')\n"
            "def test_crash(server, client):\n"
            "    server.succeed('test -e /etc', '! test -e /tmp/spoilt')\n"
            "    server.crash()\n"
            "    client.shutdown()\n"
            "def test_fails(driver, server):\n"
            "    assert all(machine.is_up() for machine in driver.machines)\n"
            "    server.succeed('touch /tmp/spoilt', 'echo what it says >&2; false')\n"
            "def test_waits(server):\n"
            "    server.wait_until_succeeds('test -e /tmp/spoilt', timeout=0.1)\n"
            "def test_screen(client):\n"
            "    client.screenshot('screen')\n",
        )
        out = self.check(
            1,
            r"test_it\.py \.\.FF\.  ",
            r"\nE +firn\.errors\.RequestedAssertionFailed: command `echo .*` failed \(exit code",
            r"Captured stderr call -+\nserver: must succeed: touch (?s:.*\n)server # what it says",
            "2 failed, 3 passed",
            accel="auto",
        )
        self.assertEqual(out.count("starting vm"), 0, "what a test passed with is not shown")
        self.assertNotIn("driver/python/firn", out)
        self.assertTrue((self.dir / "screen.png").exists())
        # So it is for the next session, which does not boot.
        said = ("started from the world kept in", "1 passed")
        out = self.check(0, *said, accel="auto", arguments=("-s", "-k", "test_files"))
        self.assertNotIn("starting vm", out)
        # With pytest-xdist all processes start there, side by side.
        beside = ("-n", "2", "--dist", "each", "-rP", "-k", "test_files")
        out = self.check(0, "2 passed", accel="auto", arguments=beside)
        self.assertEqual(out.count("started from the world kept in"), 2, out)
        self.assertNotIn("starting vm", out)


if __name__ == "__main__":
    unittest.main()
