"""The runner as a process: exit statuses, tracebacks, signals, what it leaves behind."""

import os
import signal
import subprocess
import time
import unittest

from .support import NODE, RunTest, runner


class Runner(RunTest):
    """Runs of a test file."""

    def setUp(self) -> None:
        """Choose the file."""
        super().setUp()
        self.file = self.dir / "test.toml"

    def spawn(
        self, script: str, head: str = "", timeout: float | None = None
    ) -> "subprocess.Popen[str]":
        """Start the runner on a test whose machine cannot boot."""
        text = f"{head}\ntest_script = '''\n{script}\n'''\n{NODE.format(file=self.file)}"
        self.file.write_text(text)
        return self.start(timeout)

    def start(self, timeout: float | None = None) -> "subprocess.Popen[str]":
        """Start the runner on the file that is there."""
        return subprocess.Popen(
            runner(self.file, timeout="" if timeout is None else str(timeout)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(self.state)},
        )

    def run_script(
        self, script: str, head: str = "", timeout: float | None = None
    ) -> tuple[int, str, str]:
        """Run it to its end."""
        with self.spawn(script, head, timeout) as process:
            out, err = process.communicate(timeout=30)
        self.assertEqual(list(self.state.iterdir()), [], "the run has left something behind")
        return process.returncode, out, err

    def interrupt(self, number: signal.Signals, script: str) -> tuple[int, float, str]:
        """Send a signal once the script has printed; the status, the seconds it took, the log."""
        with self.spawn(script) as process:
            assert process.stdout is not None
            process.stdout.readline()
            began = time.monotonic()
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        return process.returncode, time.monotonic() - began, err

    def test_success(self) -> None:
        """A script that ends has succeeded."""
        status, out, err = self.run_script("with subtest('a'):\n    print(machine.name, vlan1.nr)")
        self.assertEqual((status, out), (0, "machine 1\n"), err)
        self.assertRegex(err, r"subtest: a\n\(finished: subtest: a, in 0\.\d\d seconds\)\n")
        self.assertRegex(err, r"\(finished: run the VM test script, in 0\.\d\d seconds\)\n")
        self.assertNotIn("\x1b", err)

    def test_names(self) -> None:
        """The names a script can use."""
        names = "machines vlans vlan1 driver log os start_all join_all subtest retry t test_script"
        status, _, err = self.run_script(f"print({', '.join(names.split())}, run_tests)")
        self.assertEqual(status, 0, err)

    def test_assertions(self) -> None:
        """Whatever is done with `t` first, it is a test case."""
        for script in (
            "import unittest\nassert isinstance(t, unittest.TestCase)\nt.assertTrue(True)",
            "t.maxDiff = None\nt.assertEqual([1], [1])\nassert t.maxDiff is None",
            "with t.assertRaises(ZeroDivisionError), t.subTest():\n    1 / 0",
            "assert 'assertIn' in dir(t)",
        ):
            status, _, err = self.run_script(script)
            self.assertEqual(status, 0, err)

    def test_traceback(self) -> None:
        """Only the script's own frames are shown, with their lines in the file."""
        script = "def f():\n    t.assertEqual(1, 2, 'so it is')\nf()"
        status, _, err = self.run_script(script)
        self.assertEqual(status, 1)
        expected = (
            "!!! Traceback (most recent call last):\n"
            f'!!!   File "{self.file}", line 5, in <module>\n'
            "!!!     f()\n"
            f'!!!   File "{self.file}", line 4, in f\n'
            "!!!     t.assertEqual(1, 2, 'so it is')\n"
            "!!! RequestedAssertionFailed: 1 != 2 : so it is\n"
        )
        self.assertIn(expected, err)
        self.assertNotIn("unittest", err)

    def test_forks(self) -> None:
        """Functions in worlds of their own: results in order, all failures, and what is wrong."""
        script = """
def good(world):
    return f"{world.name}: {world.machine.name}"
def bad(world):
    raise ValueError(f"no {world.name}")
print(driver.fork_map([good, lambda world: world.name], jobs=1), driver.fork_map([]))
kept = driver.checkpoint("kept")
with driver.fork(kept, "other") as world, world.fork() as inner:
    assert len({w.machine.state_dir for w in (driver, world, inner)}) == 3
    print(world, inner, world.vlans)
assert not inner.machine.state_dir.exists()
kept.forget()
for wrong in (
    lambda: driver.fork(kept), lambda: driver.fork_map([good], jobs=0), lambda: world.nobody
):
    try:
        wrong()
    except Exception as error:
        print(error)
driver.fork_map([good, bad, good, bad])
"""
        status, out, err = self.run_script(script.strip())
        self.assertEqual(
            out.splitlines(),
            [
                "['1-good: machine', '2'] []",
                "<world other> <world fork1> [<vlan 1>]",
                "checkpoint kept is gone: it cannot be forked",
                "fork_map: jobs is 0; allowed is 1 and above",
                "World has no 'nobody', which is no machine either",
            ],
            err,
        )
        self.assertEqual(status, 1)
        self.assertIn("!!! ExceptionGroup: 2 of 4 functions failed", err)
        for name in ("2-bad", "4-bad"):
            self.assertIn(f"!!! ValueError: no {name}\n!!! in the fork {name}\n", err)
        self.assertIn("line 6, in bad\n", err)

    def test_syntax_error(self) -> None:
        """A script that is no Python is shown where it is not."""
        status, _, err = self.run_script("x = 1\nif x\n    pass")
        self.assertEqual(status, 1)
        self.assertIn(f'!!!   File "{self.file}", line 4\n', err)
        self.assertIn("!!! SyntaxError: expected ':'\n", err)

    def test_subtest_error(self) -> None:
        """A subtest that fails says its name."""
        status, _, err = self.run_script("with subtest('one'):\n    raise ValueError('no')")
        self.assertEqual(status, 1)
        self.assertIn('!!! Test "one" failed with error: "no"\n', err)

    def test_machine_that_cannot_start(self) -> None:
        """The reason is said, as an error of the machinery."""
        status, _, err = self.run_script("machine.succeed('true')")
        self.assertEqual(status, 1)
        self.assertIn("!!! MachineError: machine cannot start: ", err)
        self.assertIn("is no kernel", err)

    def test_exceptions_of_upstream(self) -> None:
        """Scripts import the exceptions from where upstream has them."""
        script = (
            "from test_driver.errors import MachineError, RequestedAssertionFailed\n"
            "try:\n    machine.start()\n"
            "except MachineError:\n    print('caught')\n"
            "t.assertTrue(issubclass(RequestedAssertionFailed, AssertionError))"
        )
        self.assertEqual(self.run_script(script)[:2], (0, "caught\n"))

    def test_durations(self) -> None:
        """A bool is no duration."""
        script = (
            "import datetime, time\n"
            "for bad in (True, 'x', None):\n"
            "    with t.assertRaises(TypeError):\n"
            "        machine.wait_until_succeeds('true', timeout=bad)\n"
            "for bad in (True, 'x'):\n"
            "    with t.assertRaises(TypeError):\n"
            "        retry(lambda last: True, bad)\n"
            "with t.assertRaisesRegex(TypeError, 'under two names'):\n"
            "    retry(lambda last: True, 1, timeout=1)\n"
            "began = time.monotonic()\n"
            "for more in ({'timeout_seconds': 0}, {'timeout': 0.0}):\n"
            "    with t.assertRaisesRegex(AssertionError,\n"
            "            r'^action timed out after 0\\.\\d\\d seconds \\(timeout=0(\\.0)?\\)$'):\n"
            "        retry(lambda last: False, **more)\n"
            "retry(lambda last: True, None, None)\n"
            "with t.assertRaises(ValueError):\n"
            "    machine.succeed('true', timeout=-1)\n"
            "retry(lambda last: last, datetime.timedelta(milliseconds=1))"
        )
        status, _, err = self.run_script(script)
        self.assertEqual(status, 0, err)

    def test_polling_condition(self) -> None:
        """It has to hold within its block, is not called too often, and not by itself."""
        script = (
            "import time\n"
            "calls = []\n"
            "@polling_condition(seconds_interval=0)\n"
            "def few():\n"
            "    'few\\n    calls'\n"
            "    calls.append(machine.shutdown())\n"
            "    return len(calls) < 3\n"
            "t.assertEqual(few.description, 'few calls')\n"
            "machine.shutdown()\n"
            "t.assertEqual(calls, [])\n"
            "from test_driver.polling_condition import PollingConditionError\n"
            "said = '^Polling condition failed: few calls$'\n"
            "with t.assertRaisesRegex(PollingConditionError, said):\n"
            "    with few:\n"
            "        machine.shutdown()\n"
            "        machine.shutdown()\n"
            "        print('twice')\n"
            "        retry(lambda last: False, 60)\n"
            "machine.shutdown()\n"
            "t.assertEqual(len(calls), 3)\n"
            "@polling_condition\n"
            "def none(): pass\n"
            "t.assertEqual((none.description, none.condition.description), ('none', 'none'))\n"
            "t.assertEqual(driver.polling_conditions, [])\n"
            "with none:\n"
            "    machine.shutdown()\n"
            "    t.assertEqual(driver.polling_conditions, [none])\n"
            "@polling_condition(interval=0)\n"
            "def broken(): return False\n"
            "with broken, t.assertRaisesRegex(PollingConditionError, 'failed: broken'):\n"
            "    driver.check_polling_conditions()\n"
            "with t.assertRaisesRegex(TypeError, 'interval is given twice'):\n"
            "    polling_condition(interval=1, seconds_interval=1)\n"
            "@polling_condition(description='is late')\n"
            "def late(): return time.monotonic() > there\n"
            "there = time.monotonic() + 0.2\n"
            "late.wait(timeout_seconds=30)\n"
            "late.wait()\n"
            "@polling_condition(seconds_interval=0, description='never')\n"
            "def never(): raise ValueError('no')\n"
            "said = r'after 0\\.\\d\\d seconds \\(timeout=0\\.1\\)$'\n"
            "with t.assertRaisesRegex(AssertionError, said):\n"
            "    never.wait(timeout=0.1)\n"
            "with never: machine.shutdown()\n"
        )
        status, out, err = self.run_script(script)
        self.assertEqual((status, out), (1, "twice\n"), err)
        self.assertIn("!!! PollingConditionError: Polling condition failed: never\n", err)
        self.assertIn("\nwaiting for is late\n", err)

    def test_machine_that_is_off(self) -> None:
        """What needs no machine that runs does nothing."""
        script = (
            "machine.shutdown()\nmachine.crash()\nmachine.wait_for_shutdown()\njoin_all()\n"
            "machine.block()\nmachine.unblock()\nmachine.release()\n"
            "print(machine.booted, machine.is_up(), repr(machine.get_console_log()))"
        )
        self.assertEqual(self.run_script(script)[:2], (0, "False False ''\n"))

    def test_global_timeout(self) -> None:
        """A script that takes too long is ended by SIGTERM, even one that never waits."""
        for script in ("import time\ntime.sleep(60)", "while True: pass"):
            status, _, err = self.run_script(script, "global_timeout = 0.5")
            self.assertEqual(status, -signal.SIGTERM)
            self.assertIn("!!! Timeout of 0.5 seconds reached, exiting\n", err)
        status, _, _ = self.run_script("while True: pass", timeout=0.5)
        self.assertEqual(status, -signal.SIGTERM)

    def test_signals(self) -> None:
        """Ctrl-C and SIGTERM end it within two seconds, without a trace."""
        script = "import time\nprint('here')\ntime.sleep(60)"
        for number in (signal.SIGINT, signal.SIGTERM):
            status, seconds, err = self.interrupt(number, script)
            self.assertEqual(status, 128 + number)
            self.assertRegex(err, r"\nerror: (interrupted|ended by SIGTERM)\n$")
            self.assertLess(seconds, 2)
            self.assertEqual(list(self.state.iterdir()), [])

    def test_signals_before_the_script(self) -> None:
        """Signals end it while it waits for its file, and while it makes the machines."""
        os.mkfifo(self.file)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.start() as process:
                time.sleep(1)
                process.send_signal(number)
                process.communicate(timeout=10)
            self.assertEqual(process.returncode, -number)
        self.file.unlink()
        # What a dead run left, with more than can be removed at once.
        dead = self.state / "firn-run-dead"
        dead.mkdir()
        os.utime(dead, (0, 0))
        parts = 200
        for part in range(parts):
            (dead / str(part)).mkdir()
            for name in range(parts):
                (dead / str(part) / str(name)).touch()
        os.utime(dead, (0, 0))
        with self.spawn("import time\ntime.sleep(60)") as process:
            # It begins to remove that, or has done so.
            while sum(1 for _ in dead.glob("*")) == parts:
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            _, err = process.communicate(timeout=30)
        self.assertEqual(process.returncode, 128 + signal.SIGTERM, err)
        self.assertLess(time.monotonic() - began, 5)
        left = [path.name for path in self.state.iterdir()]
        self.assertIn(left, ([], ["firn-run-dead"]), "what the run itself has made is left")

    def test_what_others_plant(self) -> None:
        """Another user's directories keep no run from starting, and are let alone."""
        if os.geteuid() != 0:
            self.skipTest("only root can be another user")
        self.dir.chmod(0o755)
        self.state.chmod(0o1777)
        planted = self.state / "firn-run-planted"
        command = f"mkdir {planted} && mkfifo {planted}/lock && ln -s /etc {self.state}/firn-run-x"
        subprocess.run(command, shell=True, check=True, user=65534, group=65534)
        with self.spawn("print(machine.state_dir.exists())") as process:
            out, err = process.communicate(timeout=30)
        self.assertEqual((process.returncode, out), (0, "True\n"), err)
        self.assertEqual(
            sorted(path.name for path in self.state.iterdir()), ["firn-run-planted", "firn-run-x"]
        )
        with self.spawn("import time\nprint('here')\ntime.sleep(60)") as process:
            assert process.stdout is not None
            process.stdout.readline()
            find = ["find", str(self.state), "-name", "firn-run-*", "-user", "root", "-print"]
            found = subprocess.run(
                find, check=False, user=65534, group=65534, capture_output=True, text=True
            )
            self.assertRegex(found.stderr, "firn-run-.*Permission denied")
            self.assertEqual(len(found.stdout.splitlines()), 1, found.stdout)
            process.terminate()
            process.communicate(timeout=30)

    def test_killed(self) -> None:
        """The next run removes what a killed one left."""
        status, _, _ = self.interrupt(signal.SIGKILL, "import time\nprint('here')\ntime.sleep(60)")
        self.assertEqual(status, -signal.SIGKILL)
        (left,) = self.state.iterdir()
        # A run that is just beginning is let alone, so the dead one has to be older.
        os.utime(left / "lock", (0, 0))
        self.assertEqual(self.run_script("pass")[0], 0)

    def test_bad_file(self) -> None:
        """What is wrong with the file is said once more than `firn test` does."""
        status, _, err = self.run_script("pass", "globl_timeout = 3")
        self.assertEqual(status, 1)
        self.assertIn("test.toml:1:1", err)


if __name__ == "__main__":
    unittest.main()
