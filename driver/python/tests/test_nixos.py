"""`nixos-test-driver` as a process, with machines that cannot boot."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import unittest
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import pexpect

from .support import BIN, RunTest

DRIVER = str(BIN / "nixos-test-driver")


class NixosTestDriver(RunTest):
    """Runs of a configuration."""

    def setUp(self) -> None:
        """Make a directory for results, and choose the script's file."""
        super().setUp()
        self.out = self.dir / "out"
        self.out.mkdir()
        self.script = self.dir / "test-script"

    def machine(self, name: str, **fields: object) -> Path:
        """Write a machine file whose kernel is none."""
        path = self.dir / f"run-{name}-vm"
        spec: dict[str, object] = {"firn": 1, "name": name, "kernel": str(self.script)} | fields
        path.write_text(f"#!{BIN}/firn run\n{json.dumps(spec)}\n")
        path.chmod(0o755)
        return path

    def config(self, script: str, machines: tuple[str, ...] = ("machine",), **more: object) -> str:
        """Write a configuration, and answer its path."""
        self.script.write_text(script)
        vms = {name: {"name": name, "start_script": str(self.machine(name))} for name in machines}
        base: dict[str, object] = {"vms": vms, "containers": {}, "vlans": [1]}
        path = self.dir / "config.json"
        path.write_text(json.dumps(base | {"test_script": str(self.script)} | more))
        return str(path)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Give the environment of a driver."""
        return {**os.environ, "TMPDIR": str(self.state), **(more or {})}

    def spawn(
        self, *arguments: str, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Start the driver."""
        return subprocess.Popen(
            [DRIVER, "--accel", "none", "-o", str(self.out), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(env),
            cwd=self.dir,
        )

    def drive(self, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        """Run the driver to its end; nothing may be left of it."""
        with self.spawn(*arguments, env=env) as process:
            out, err = process.communicate(timeout=120)
        left = [path.name for path in self.state.iterdir() if not path.name.startswith("kept")]
        self.assertEqual(left, [], "the run has left something behind")
        return process.returncode, out, err

    def run_script(self, script: str, *arguments: str) -> tuple[int, str, str]:
        """Run a script with one machine, called `machine`."""
        return self.drive("--config", self.config(script), *arguments)

    def test_names(self) -> None:
        """A script has its names, and no others."""
        script = (
            "print(sorted(n for n in globals() if not n.startswith('_')))\n"
            "print(machines == machines_qemu, machines_nspawn, a_b is machines[0], vlan1.nr)\n"
            "print(isinstance(a_b, BaseMachine), driver.machines == machines)\n"
            "print(a_b.state_dir, a_b.shared_dir, a_b.out_dir)\n"
            "assert os.path.isdir(a_b.state_dir) and os.path.isdir(a_b.shared_dir)\n"
        )
        status, out, err = self.drive("--config", self.config(script, ("a-b", "c")))
        self.assertEqual(status, 0, err)
        names, lists, classes, places = out.splitlines()
        subprocess.run([BIN / "generate-driver-symbols"], cwd=self.dir, check=True)
        symbols = (self.dir / "driver-symbols").read_text().split(",")
        self.assertEqual(names, str(sorted([*symbols, "a_b", "c", "vlan1"])))
        self.assertEqual((lists, classes), ("True [] True 1", "True True"))
        self.assertEqual(places, f"{self.state}/vm-state-a-b {self.state}/shared-xchg {self.out}")

    def test_alias(self) -> None:
        """The only machine is `machine` too, and a script that says so is warned."""
        script = "print(machine is server)\nmachine.shutdown()"
        status, out, err = self.drive("--config", self.config(script, ("server",)))
        self.assertEqual((status, out), (0, "True\n"))
        self.assertIn("warning: line 1: the script says `machine` for the machine `server`", err)
        for quiet in ("server.shutdown()", "machine = server\nmachine.shutdown()"):
            _, _, err = self.drive("--config", self.config(quiet, ("server",)))
            self.assertNotIn("warning", err)

    def test_no_alias(self) -> None:
        """Where there are several machines, none is `machine`."""
        status, _, err = self.drive("--config", self.config("machine", ("a", "b")))
        self.assertEqual(status, 1)
        self.assertIn("NameError: name 'machine' is not defined", err)

    def test_failures(self) -> None:
        """A script that fails ends with 1; one that exits, with what it says."""
        for script, status, said in [
            ("raise ValueError('no')", 1, "!!! ValueError: no"),
            ("if x\n", 1, "!!! SyntaxError: expected ':'"),
            ("t.assertIn(1, [2])", 1, "!!! RequestedAssertionFailed: 1 not found in [2]"),
            ("import sys\nsys.exit(3)", 3, "cleanup"),
            ("import sys\nsys.exit(0)", 0, "cleanup"),
        ]:
            answer = self.run_script(script)
            self.assertEqual(answer[0], status, answer[2])
            self.assertIn(said, answer[2])

    def test_bad_configuration(self) -> None:
        """What is wrong is said, with its file."""
        qemu = self.dir / "qemu"
        qemu.write_text("#!/bin/sh\nexec qemu-system-x86_64 -m 1024\n")
        config = self.config("pass", vms={"a": {"start_script": str(qemu)}})
        status, _, err = self.drive("--config", config)
        self.assertEqual(status, 1)
        self.assertIn(
            f"{qemu} is no machine file of firn, it is a program that nobody may execute", err
        )
        status, _, err = self.drive("--config", self.config("pass", containers={"c": {}}))
        self.assertEqual(status, 1)
        self.assertIn("`containers.c`: containers are not supported yet", err)
        status, _, err = self.drive("--config", "/no/such/file")
        self.assertEqual(status, 1)
        self.assertIn("/no/such/file", err)

    def test_usage(self) -> None:
        """A wrong command line ends with 2 and says why."""
        config = self.config("pass")
        for arguments, said in [
            (("-o", "/no/such"), "/no/such is not a directory"),
            (("--test-script", "a", "b"), "two scripts: --test-script a, and b"),
            (("--start-scripts", "a"), "--start-scripts and --vlans are for a test without"),
            (("--vlans", "1"), "--start-scripts and --vlans are for a test without"),
            (("-o", "/proc"), "/proc is not a writable directory"),
            (("--log-level", "loud"), "invalid choice: 'loud'"),
            (("--global-timeout", "x"), "invalid float"),
            (("--debug-hook-attach",), "expected one argument"),
            (("--no-such-flag",), "unrecognized arguments"),
            (("--world", "/no/such"), "argument --world: /no/such is not a directory"),
            (("--world", "/", "--keep-world", "x"), "not allowed with argument --world"),
            (("--keep-world", "x", "-I"), "--keep-world is for runs without --interactive"),
        ]:
            status, _, err = self.drive("--config", config, *arguments)
            self.assertEqual(status, 2, err)
            self.assertIn(said, err)
        status, _, err = self.drive("--config", config, env={"logLevel": "loud"})
        self.assertEqual(status, 2)
        self.assertIn("logLevel is 'loud'; allowed: debug, info, warning, error", err)
        status, _, err = self.drive("--config", config, "/no/such/script")
        self.assertEqual(status, 1)
        self.assertIn("/no/such/script", err)
        status, _, err = self.drive()
        self.assertEqual(status, 2)
        self.assertIn("give --config FILE, or a test script", err)
        help_text = subprocess.check_output([BIN / "run-nixos-test", "--help"], text=True)
        flags = ("--keep-vm-state", "-c", "--no-interactive", "--test-script", "logLevel")
        for flag in flags:
            self.assertIn(flag, help_text)

    def test_other_script(self) -> None:
        """A script that the command line names runs instead of the test's own."""
        config = self.config("raise ValueError('the own one')")
        other = self.dir / "other"
        other.write_text("print([m.name for m in machines], driver.tests)\nraise ValueError\n")
        for arguments in (
            ("-c", config, str(other)),
            ("-c", config, "--test-script", str(other)),
            ("--test-script", str(other), "--config", config, "--no-interactive"),
        ):
            status, out, err = self.drive(*arguments, env={"testScript": "/none"})
            self.assertEqual(status, 1, err)
            self.assertEqual(out, f"['machine'] {other.read_text()}\n")
            self.assertIn(f'!!!   File "{other}", line 2, in <module>\n', err)
        # The variable is for tests without --config.
        _, _, err = self.drive("-c", config, env={"testScript": str(other)})
        self.assertIn("!!! ValueError: the own one", err)

    def test_without_configuration(self) -> None:
        """The older form: machines and script one by one, or in the environment."""
        self.script.write_text("print([m.name for m in machines], [v.nr for v in vlans])")
        scripts = [str(self.machine(name)) for name in ("b", "a")]
        expected = (0, "['a', 'b'] [2, 7]\n")
        answer = self.drive(
            "--vlans", "7", "2", "--start-scripts", *scripts, "--", str(self.script)
        )
        self.assertEqual(answer[:2], expected, answer[2])
        environment = {
            "startScripts": " ".join(scripts),
            "vlans": "2 7",
            "testScript": str(self.script),
        }
        self.assertEqual(self.drive(env=environment)[:2], expected)
        self.script.write_text("while True: pass")
        status, _, err = self.drive(env=environment | {"globalTimeout": "0.5"})
        self.assertEqual(status, -signal.SIGTERM, err)

    def test_global_timeout(self) -> None:
        """It ends everything, and the report is there all the same."""
        script = "with subtest('slow'):\n    while True: pass\n"
        config = self.config(script, global_timeout=0.5)
        status, _, err = self.drive("--config", config, "--junit-xml", "junit.xml")
        self.assertEqual(status, -signal.SIGTERM)
        self.assertIn("!!! Timeout of 0.5 seconds reached, exiting\n", err)
        status, _, err = self.drive("-c", self.config(script, global_timeout="PT0.5S"))
        self.assertEqual(status, -signal.SIGTERM)
        self.assertIn("!!! Timeout of 0.5 seconds reached, exiting\n", err)
        quick = "driver.race_timer.cancel()\nimport time\ntime.sleep(1)\nprint('here')"
        answer = self.drive("-c", self.config(quick, global_timeout=0.5))
        self.assertEqual(answer[:2], (0, "here\n"), answer[2])
        status, _, err = self.run_script("driver.terminate_test()\nprint('never')")
        self.assertEqual(status, -signal.SIGTERM)
        self.assertIn("timeout reached; test terminating...", err)
        report = ET.parse(self.out / "junit.xml").getroot()
        slow = report.find(".//testcase[@name='slow']")
        assert slow is not None
        self.assertGreater(float(slow.get("time", "0")), 0.4)
        self.assertIsNotNone(slow.find("failure"))

    def test_reports(self) -> None:
        """JUnit has a case for each subtest; LOGFILE has it all in XML."""
        script = (
            "with subtest('good'):\n    log.info('fine')\n"
            "with subtest('bad'):\n    t.fail('for <this>')\n"
        )
        log = self.dir / "log.xml"
        config = self.config(script)
        arguments = ("--config", config, "--junit-xml", "junit.xml")
        self.assertEqual(self.drive(*arguments, env={"LOGFILE": str(log)})[0], 1)
        report = ET.parse(self.out / "junit.xml").getroot()
        failed = {
            case.get("name"): case.find("failure") is not None for case in report.iter("testcase")
        }
        self.assertEqual(failed, {"main": True, "good": False, "bad": True})
        for case in report.iter("testcase"):
            failure, errors = case.find("failure"), case.find("system-err")
            self.assertEqual(failure is None, errors is None)
            if failure is not None:
                told = {"type": "failure", "message": "test case failed"}
                self.assertEqual(failure.attrib, told)
        nest = ET.parse(log).getroot().find(".//nest[head='subtest: bad']")
        assert nest is not None
        error = nest.find("line[@type='error']")
        assert error is not None
        self.assertEqual(error.text, 'Test "bad" failed with error: "for <this>"')
        self.assertEqual(self.drive("--config", config, env={"LOGFILE": "/dev/null"})[0], 1)

    def test_bad_reports(self) -> None:
        """A report that cannot be written is said before the script runs."""
        config = self.config("print('it ran')")
        none = "no/such/report.xml"
        for arguments, env in [
            (("--junit-xml", none), {}),
            ((), {"LOGFILE": str(self.dir / none)}),
        ]:
            status, out, err = self.drive("--config", config, *arguments, env=env)
            self.assertEqual((status, out), (1, ""), err)
            self.assertRegex(err, f"{none}.*No such file")

    def test_log(self) -> None:
        """Levels, and the classes that scripts know."""
        script = (
            "from test_driver.logger import AbstractLogger, CompositeLogger\n"
            "assert isinstance(log, AbstractLogger) and isinstance(log, CompositeLogger)\n"
            "with log.nested('outer'):\n"
            "    log.log('about', {'machine': 'm'})\n"
            "    log.log_serial('line\\x1b[2J', 'm')\n"
            "    serial_stdout_off()\n"
            "    log.log_serial('hidden', 'm')\n"
            "    serial_stdout_on()\n"
            "    log.debug('detail')\n"
            "    log.warning('careful')\n"
        )
        status, _, err = self.run_script(script)
        self.assertEqual(status, 0, err)
        self.assertRegex(
            err,
            r"outer\nm: about\nm # line\nwarning: careful\n"
            r"\(finished: outer, in 0\.\d\d seconds\)\n",
        )
        status, _, err = self.run_script(script, "--log-level", "warning")
        self.assertEqual((status, err), (0, "warning: careful\n"))
        config = self.config(script)
        quiet = self.drive("-c", config, env={"logLevel": "warning"})
        self.assertEqual(quiet, (0, "", "warning: careful\n"))
        loud = self.drive("-c", config, "--log-level", "info", env={"logLevel": "warning"})
        self.assertIn("\nm: about\n", loud[2])
        self.assertIn("\ndetail\n", self.run_script(script, "--log-level", "debug")[2])

    def test_keep_machine_state(self) -> None:
        """State is kept if it shall be, and else begins anew."""
        script = (
            "path = machine.state_dir / 'kept'\n"
            "print(path.exists())\n"
            "path.touch()\n"
            "machine.release()\n"
            "print(path.exists())\n"
        )
        config = self.config(script)
        for flags, expected in [
            ((), "False\nFalse\n"),
            (("--keep-machine-state",), "False\nTrue\n"),
            (("-K",), "True\nTrue\n"),
            (("--keep-vm-state",), "True\nTrue\n"),
        ]:
            with self.spawn("--config", config, *flags) as process:
                out, err = process.communicate(timeout=60)
            self.assertEqual((process.returncode, out), (0, expected), err)
            self.assertEqual((self.state / "vm-state-machine").exists(), bool(flags))
        self.assertEqual(self.drive("--config", config)[1], "False\nFalse\n")

    def test_two_runs(self) -> None:
        """A second run does not take the first one's state away."""
        config = self.config("print('here', flush=True)\nimport time\ntime.sleep(60)")
        with self.spawn("--config", config) as first:
            assert first.stdout is not None
            first.stdout.readline()
            with self.spawn("--config", config) as second:
                _, err = second.communicate(timeout=60)
            self.assertEqual(second.returncode, 1)
            self.assertIn("set TMPDIR to another directory", err)
            self.assertTrue((self.state / "vm-state-machine").is_dir())
            first.send_signal(signal.SIGINT)
            began = time.monotonic()
            first.communicate(timeout=60)
        self.assertEqual(first.returncode, 128 + signal.SIGINT)
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual(list(self.state.iterdir()), [])

    def test_what_others_plant(self) -> None:
        """State that another user made is not used, kept or not, and not removed."""
        if os.geteuid() != 0:
            self.skipTest("only root can be another user")
        # In naps: Python does not notice a signal that comes just as it falls asleep.
        naps = "import time\nfor _ in range(600): time.sleep(0.1)"
        config = self.config(f"print('here', flush=True)\n{naps}")
        self.dir.chmod(0o755)
        self.state.chmod(0o1777)
        names = ("vm-state-machine", "shared-xchg", ".firn-run.lock")
        for name, command in zip(names, ("mkdir", "ln -s /root", "touch"), strict=True):
            planted = self.state / name
            plant = [*command.split(), str(planted)]
            subprocess.run(plant, check=True, user=65534, group=65534)
            for flags in ((), ("-K",)):
                with self.spawn("--config", config, *flags) as process:
                    out, err = process.communicate(timeout=60)
                self.assertEqual((process.returncode, out), (1, ""), err)
                expected = (
                    f"error: cannot keep state in {self.state}: {planted} belongs to another user "
                    "(65534); set TMPDIR to another directory of yours\n"
                )
                self.assertEqual(err, expected)
                self.assertEqual(planted.lstat().st_uid, 65534)
            subprocess.run(["rm", "-r", str(planted)], check=True)
            for own in self.state.iterdir():
                subprocess.run(["rm", "-r", str(own)], check=True)
        with self.spawn("--config", config) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for name in ("vm-state-machine", "shared-xchg"):
                self.assertEqual((self.state / name).stat().st_mode & 0o777, 0o700)
            process.terminate()
            process.communicate(timeout=60)
        # Others write to it, and nothing keeps them from renaming what is there.
        self.state.chmod(0o777)
        _, _, err = self.drive("--config", config)
        self.assertIn(f"{self.state} can be written to by other users; set TMPDIR", err)
        os.chown(self.state, 65534, 65534)
        _, _, err = self.drive("--config", config)
        self.assertIn(f"{self.state} belongs to another user (65534); set TMPDIR", err)

    def test_signals_before_the_script(self) -> None:
        """Signals end it while it waits for its configuration, with or without a carrier."""
        config = self.dir / "fifo"
        os.mkfifo(config)
        for accel in ("none", "carrier"):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                with self.spawn("--accel", accel, "--config", str(config)) as process:
                    time.sleep(1)
                    process.send_signal(number)
                    process.communicate(timeout=10)
                self.assertEqual(process.returncode, -number)
        self.assertEqual(list(self.state.iterdir()), [])

    def test_create_machine(self) -> None:
        """A script makes machines of files and of their content."""
        path = self.machine("extra", vlans=[1])
        content = {"firn": 1, "name": "inline", "kernel": "/k"}
        far = self.machine("far", vlans=[9])
        script = f"""
print(create_machine({str(path)!r}).name)
print(create_machine({str(path)!r}, name="other", keep_machine_state=True).state_dir)
print(create_machine({{"startCommand": {str(path)!r}, "name": "old"}}).name)
print(create_machine({content!r}).name)
print(create_machine("qemu-system-x86_64 -m 512", name="command").name)
print(create_machine("/bin/sh", name="elf").name)
for bad, text in [
    ({str(path)!r}, "there is a machine extra already"),
    ("/etc/passwd", "is no machine file of firn, it is some text"),
    ("/no/such", "cannot read /no/such"),
    ("{path} -m 512", "which takes no arguments"),
    ({{"firn": 1}}, "missing field `name`"),
    ({{"startCommand": "x", "qemuFlags": "-m 1"}}, "unknown options 'qemuFlags'"),
    ({str(far)!r}, "far is on vlan 9, which this test does not have"),
]:
    with t.assertRaisesRegex(Exception, text):
        create_machine(bad)
with t.assertRaisesRegex(ValueError, "allowed: 1 to 63 of"):
    create_machine({str(path)!r}, name="a b")
"""
        with self.spawn("--config", self.config(script)) as process:
            out, err = process.communicate(timeout=60)
        other = self.state / "vm-state-other"
        self.assertEqual(
            (process.returncode, out), (0, f"extra\n{other}\nold\ninline\ncommand\nelf\n"), err
        )
        self.assertEqual(list(self.state.iterdir()), [other])

    def test_machine_file_at_start(self) -> None:
        """Variables are looked up when a machine starts: scripts change them."""
        vm = self.machine("machine", kernel="${FIRN_TEST_KERNEL}")
        script = (
            "with t.assertRaisesRegex(Exception, 'variable FIRN_TEST_KERNEL is not set'):\n"
            "    machine.start()\n"
            "os.environ['FIRN_TEST_KERNEL'] = '/no/kernel'\n"
            "with t.assertRaisesRegex(Exception, '/no/kernel'):\n"
            "    machine.start()\n"
        )
        config = self.config(script)
        self.machine("machine", kernel="${FIRN_TEST_KERNEL}")
        status, _, err = self.drive("--config", config)
        self.assertEqual(status, 0, err)
        self.assertTrue(vm.exists())

    def test_vsocks(self) -> None:
        """The ssh backdoor is said, and scripts find the sockets."""
        script = (
            "print(driver.vhost_vsock.sockets['machine'].host)\n"
            "print(machine.ssh_backdoor_command(1))\n"
        )
        socket_path = self.state / "vm-state-machine/vsock"
        proxy = Path("/usr/lib/systemd/systemd-ssh-proxy")
        ssh = "ssh -o User=root vsock-mux/" if proxy.exists() else "firn ssh "
        for status, out, err in [
            self.run_script(script, "--dump-vsocks", "5"),
            self.drive("--config", self.config(script, enable_ssh_backdoor=True)),
        ]:
            self.assertEqual((status, out), (0, f"{socket_path}\n{ssh}{socket_path}\n"), err)
            self.assertIn(f"    machine:  {ssh}{socket_path}\n", err)

    def test_vlans(self) -> None:
        """Programs outside plug into a network, and find its directory by `firn vlan`."""
        firn = str(BIN / "firn")
        script = (
            "import socket, struct, subprocess\n"
            f"shown = lambda: subprocess.run([{firn!r}, 'vlan'], text=True, capture_output=True)\n"
            "found = shown()\n"
            "print(found.stdout, found.stderr)\n"
            "directories = [vlan.socket_dir for vlan in (vlan1, vlan2)]\n"
            "for nr, directory in enumerate(directories, 1):\n"
            "    t.assertIn(f'vlan {nr} of process {vlan1.pid}: {directory}\\n', shown().stdout)\n"
            # A wire between the two vlans.
            "wire = subprocess.Popen(['vde_plug', *map(str, directories)])\n"
            "frame = bytes([255] * 6 + [2, 0, 0, 0, 0, 1, 0x88, 0xb5]) + b'hello' * 9\n"
            "plugs = [socket.socket(socket.AF_UNIX) for _ in range(2)]\n"
            "for plug, directory in zip(plugs, directories):\n"
            "    plug.connect(str(directory / 'stream'))\n"
            "    plug.settimeout(0.1)\n"
            "for one, other in (plugs, plugs[::-1]):\n"
            "    got = b''\n"
            "    while len(got) < 4 + len(frame):\n"
            "        one.sendall(struct.pack('>I', len(frame)) + frame)\n"
            "        try:\n"
            "            got += other.recv(4096)\n"
            "        except TimeoutError:\n"
            "            pass\n"
            "    t.assertEqual(got[4:][:len(frame)], frame)\n"
            "wire.kill()\n"
            "wire.wait()\n"
        )
        # The paths of sockets are short: with a long TMPDIR they are elsewhere.
        long = self.state / ("x" * 80)
        runtime = self.dir / "runtime"
        for directory in (long, runtime):
            directory.mkdir(mode=0o700)
        for place, variables in (
            (self.state, {}),
            (runtime, {"TMPDIR": str(long), "XDG_RUNTIME_DIR": str(runtime)}),
        ):
            for arguments, said in (([], "no vlan is open"), (["--open-vlans"], "vlan 1 of proc")):
                with self.subTest(place=place, arguments=arguments):
                    config = self.config(script, vlans=[1, 2])
                    with self.spawn(*arguments, "--config", config, env=variables) as process:
                        out, err = process.communicate(timeout=120)
                    self.assertEqual(process.returncode, 0, err)
                    self.assertIn(said, out)
                    opened = f"vlan 1 can be plugged into: {place}/firn-run-"
                    self.assertEqual(opened in err, bool(arguments), err)
                    self.assertEqual([*runtime.iterdir(), *long.iterdir()], [])
        long.rmdir()
        self.assertEqual(list(self.state.iterdir()), [])

    def test_vlans_after_a_kill(self) -> None:
        """What a killed run leaves keeps nobody from plugging in again."""
        script = "print(vlan1.socket_dir, flush=True)\nimport os\nos.kill(os.getpid(), 9)\n"
        with self.spawn("--config", self.config(script)) as process:
            left = Path(process.communicate(timeout=120)[0].strip())
        self.assertEqual(process.returncode, -signal.SIGKILL)
        self.assertTrue((left / "ctl").is_socket())
        past = time.time() - 60
        os.utime(left.parent / "lock", (past, past))
        status, _, err = self.run_script("vlan1.socket_dir\n")
        self.assertEqual(status, 0, err)

    def test_without_vsocks(self) -> None:
        """Without the ssh backdoor there are no sockets."""
        for script, said in [
            ("driver.vhost_vsock.sockets['machine']", "KeyError: 'machine'"),
            ("machine.ssh_backdoor_command(1)", "machine has no vsock"),
        ]:
            status, _, err = self.run_script(script)
            self.assertEqual(status, 1)
            self.assertIn(said, err)

    def test_breakpoint(self) -> None:
        """A breakpoint serves a debugger, if the hook is on."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        script = f"answer = 41\ndebug.breakpoint(port={port})\nprint(answer)\n"
        self.assertEqual(self.run_script(script)[:2], (0, "41\n"))
        config = self.config(script)
        with self.spawn("--config", config, "--debug-hook-attach", "attach-here") as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "the debugger listens" in line:
                    break
                if "Breakpoint reached" in line:
                    self.assertRegex(line, r"^!!! Breakpoint reached, run 'attach-here \d{7}'$")
            strangers = as_another_user(port, "answer = 0\nc\n")
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"answer += 1\nc\n")
                said = b"".join(iter(lambda: connection.recv(4096), b""))
            out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out), (0, "42\n"), err)
        self.assertRegex(said, rb"-> print\(answer\)\r\n\(Pdb\) ")
        self.assertEqual(strangers, "")
        if os.getuid() == 0:
            self.assertIn("warning: the debugger refused a connection by user 65533", err)
        self.assertEqual(list(self.state.iterdir()), [])

    def test_threads(self) -> None:
        """Threads of a script call machines at the same time."""
        script = (
            "import threading\n"
            "seen = []\n"
            "def call(machine):\n"
            "    for _ in range(100):\n"
            "        machine.shutdown()\n"
            "        with machine.nested('step'): pass\n"
            "    seen.append(machine.name)\n"
            "threads = [threading.Thread(target=call, args=[m]) for m in machines]\n"
            "for thread in threads: thread.start()\n"
            "for thread in threads: thread.join()\n"
            "print(sorted(seen))\n"
        )
        status, out, err = self.drive("--config", self.config(script, ("a", "b")))
        self.assertEqual((status, out), (0, "['a', 'b']\n"), err)

    def test_modules(self) -> None:
        """The modules and names that scripts import."""
        script = (
            "import test_driver.errors\n"
            "from test_driver.debug import DebugAbstract, DebugNop\n"
            "from test_driver.driver import Driver\n"
            "from test_driver.logger import AbstractLogger, CompositeLogger\n"
            "from test_driver.machine import BaseMachine, NspawnMachine, QemuMachine, retry as r\n"
            "from test_driver.vlan import VLan\n"
            "assert isinstance(debug, DebugNop) and isinstance(debug, DebugAbstract)\n"
            "assert isinstance(driver, Driver) and isinstance(vlan1, VLan) and r is retry\n"
            "assert isinstance(machine, QemuMachine) and isinstance(machine, BaseMachine)\n"
            "with t.assertRaisesRegex(test_driver.errors.MachineError, 'not supported yet'):\n"
            "    NspawnMachine()\n"
            "import test_driver.duration, test_driver.polling_condition\n"
            "from test_driver.config import DriverConfiguration, load_driver_configuration\n"
            "from test_driver.driver import pythonize_name, AssertionTester\n"
            "t.assertIsInstance(t, AssertionTester)\n"
            "t.assertEqual(pythonize_name('1a-b.c'), '_a_b_c')\n"
            "t.assertIsInstance(driver.config, DriverConfiguration)\n"
            f"loaded = load_driver_configuration({str(self.dir / 'config.json')!r})\n"
            "t.assertEqual(loaded, driver.config)\n"
            "t.assertEqual(loaded.vms['machine'].start_script.name, 'run-machine-vm')\n"
            "t.assertEqual((loaded.vlans, loaded.global_timeout), ([1], None))\n"
            "from test_driver.efi import Variables\n"
            "from test_driver.errors import MachineError\n"
            "with t.assertRaisesRegex(MachineError, 'efi.Variables is not for firn'):\n"
            "    Variables('x')\n"
            "t.assertNotIsInstance(3, Variables)\n"
            "t.assertEqual(vlan1.pid, os.getpid())\n"
            "t.assertFalse(hasattr(vlan1, 'process'))\n"
            "with t.assertRaisesRegex(test_driver.errors.MachineError, '^vlan1 has no '):\n"
            "    vlan1.process\n"
            "vlan1.stop()\n"
            "dump_machine_ssh()\n"
        )
        status, _, err = self.run_script(script)
        self.assertEqual(status, 0, err)

    def prompt(self, config: str) -> "pexpect.spawn[str]":
        """Start a prompt."""
        return pexpect.spawn(
            DRIVER,
            ["--accel", "none", "-o", str(self.out), "-I", "--config", config],
            env=self.environment(
                {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(self.dir)}
            ),
            cwd=str(self.dir),
            timeout=30,
            encoding="utf-8",
            dimensions=(60, 200),
        )

    def leave(self, child: "pexpect.spawn[str]") -> None:
        """End a prompt, of which nothing may be left."""
        child.sendeof()
        child.expect("cleanup")
        child.expect(pexpect.EOF)
        child.close()
        self.assertEqual(child.exitstatus, 0)
        self.assertEqual(list(self.state.iterdir()), [])

    def test_interactive(self) -> None:
        """A prompt with the names, completion, history, the script, and rebuilding."""
        child = self.prompt(self.config("print('the script ran')", ("a",)))
        child.expect(r"BaseMachine, NspawnMachine, QemuMachine, a, create_machine, .*rebuild")
        child.expect(prompt(1))
        child.send("print(a.na")
        child.expect("na")
        child.send("\t")
        child.expect("me")
        child.send(", 40 + 2)\r")
        child.expect(r"a 42\r")
        child.expect(prompt(2))
        child.send("test_script()\r")
        child.expect("the script ran")
        child.expect(prompt(3))
        self.config("pass", ("a", "b"))
        child.send("rebuild('echo building'); print(b, machines)\r")
        child.expect(r"<machine b> \[<machine a>, <machine b>\]")
        child.expect(prompt(4))
        self.leave(child)
        self.assertTrue((self.dir / ".nixos-test-history").is_file())

    def test_interactive_errors(self) -> None:
        """What fails leads back to the prompt, with what there was before."""
        child = self.prompt(self.config("raise ValueError('in it')", ("a",)))
        child.expect(prompt(1))
        child.send("test_script()\r")
        child.expect("!!! ValueError: in it")
        child.expect(prompt(2))
        child.send("rebuild('exit 3')\r")
        child.expect(r"`exit 3` failed \(exit code 3\)")
        child.expect(prompt(3))
        child.send("import time; time.sleep(50)\r")
        child.expect("50")
        time.sleep(0.5)
        child.sendintr()
        child.expect("KeyboardInterrupt")
        child.expect(prompt(4))
        child.send("print(machines)\r")
        child.expect(r"\[<machine a>\]")
        child.expect(prompt(5))
        self.leave(child)

    def test_carrier(self) -> None:
        """The carrier that is asked for runs the script, and starts no other in itself."""
        config = self.config("print('ran in', os.environ['FIRN_IN_CARRIER'])\nt.fail('there')")
        status, out, err = self.drive("--config", config, "--accel", "carrier")
        self.assertEqual((status, out), (1, "ran in 1\n"), err)
        self.assertIn("!!! RequestedAssertionFailed: there", err)

    def test_terminal(self) -> None:
        """A command that has none gets a terminal: what the prompt has in a carrier."""
        code = "import os; print(os.get_terminal_size(), input()); os._exit(3)"
        done = subprocess.run(
            [sys.executable, "-m", "firn.terminal", "50", "150", sys.executable, "-c", code],
            input="typed\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertIn("os.terminal_size(columns=150, lines=50) typed", done.stdout)


def prompt(number: int) -> str:
    """Match IPython's prompt, with whatever moves the cursor and sets colours."""
    return rf"In \[(\x1b\[[\d;]*m)?{number}(\x1b\[[\d;]*m)?\]: "


def as_another_user(port: int, text: str) -> str:
    """Send text to a port as another user, which only root can be; give the answer."""
    if os.getuid() != 0:
        return ""
    talk = f'exec 3<>/dev/tcp/127.0.0.1/{port}; printf "$1" >&3; cat <&3'
    become = ["setpriv", "--reuid=65533", "--clear-groups", "bash", "-c", talk, "bash"]
    done = subprocess.run(
        [*become, text],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout


if __name__ == "__main__":
    unittest.main()
