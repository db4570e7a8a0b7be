"""Machines under QEMU that `nixos-test-driver` starts, without guests: what can go wrong."""

import os
import signal
import subprocess
import time
from pathlib import Path

from .support import BIN, RunTest

#: QEMU without a guest: its processors stand still.
QEMU = 'exec qemu-system-x86_64 -accel tcg -m 64 -S "$@"'


def environments(state: Path) -> list[Path]:
    """Find the processes that were started for machines whose state is below a directory."""
    wanted = f"TMPDIR={state}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(variable.startswith(wanted + b"/") for variable in variables):
            found.append(path)
    return found


class QemuMachines(RunTest):
    """Runs of start scripts."""

    def setUp(self) -> None:
        """Choose the script's file."""
        super().setUp()
        self.script = self.dir / "test-script"
        self.prefix: list[str] = []

    def spawn(self, script: str, *starts: Path | str) -> "subprocess.Popen[str]":
        """Start the driver with a script, and machines that are started so, or other words."""
        self.script.write_text(script)
        machines = ["--start-scripts", *map(str, starts), "--test-script", str(self.script)]
        return subprocess.Popen(
            [*self.prefix, BIN / "nixos-test-driver", "--accel", "none", "-o", self.dir, *machines],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(self.state)},
        )

    def drive(self, script: str, *starts: Path | str) -> tuple[int, str, str]:
        """Run the driver to its end; nothing may be left of it."""
        with self.spawn(script, *starts) as process:
            out, err = process.communicate(timeout=120)
        left = [path.name for path in self.state.iterdir()]
        self.assertEqual((left, environments(self.state)), ([], []), err)
        return process.returncode, out, err

    def start_script(self, text: str, name: str = "q") -> Path:
        """Write a start script."""
        path = self.dir / f"run-{name}-vm"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def test_environment_and_arguments(self) -> None:
        """A start script meets what upstream's driver gives it."""
        start = self.start_script(f'env > "$SHARED_DIR/env"; pwd > "$SHARED_DIR/pwd"; {QEMU}')
        status, out, err = self.drive(
            "q.start()\n"
            "print(q.name, q.send_monitor_command('info status').splitlines()[1])\n"
            "with t.assertRaisesRegex(Exception, 'q runs under QEMU, which firn cannot'):\n"
            "    driver.checkpoint()\n"
            "env = (q.shared_dir / 'env').read_text().splitlines()\n"
            "for line in (f'TMPDIR={q.state_dir}', f'SHARED_DIR={q.shared_dir}', 'USE_TMPDIR=1'):\n"
            "    t.assertIn(line, env)\n"
            "t.assertEqual((q.shared_dir / 'pwd').read_text(), f'{q.state_dir}\\n')\n"
            "print(q.qmp_client.send('query-status')['return']['status'])\n"
            "q.crash()\n"
            "print(q.booted)\n",
            start,
        )
        self.assertEqual(
            (status, out), (0, "q VM status: paused (prelaunch)\nprelaunch\nFalse\n"), err
        )
        self.assertIn("q: runs under QEMU: its start command is not firn's", err)

    def test_vsock(self) -> None:
        """The ssh backdoor leads into each, at an address of its own, and no module of the host."""
        shared = (
            "-object memory-backend-memfd,id=mem0,size=64M,share=on -machine memory-backend=mem0"
        )
        text = f'exec qemu-system-x86_64 -accel tcg -m 64 -S {shared} "$@"'
        starts = [self.start_script(text, name) for name in ("one", "two")]
        status, out, err = self.drive(
            "for m in (one, two):\n"
            "    m.start()\n"
            "    t.assertTrue(m.vsock_host.is_socket())\n"
            "    t.assertTrue(m.ssh_backdoor_command().endswith(f' vsock-mux/{m.vsock_host}')\n"
            "        or m.ssh_backdoor_command() == f'firn ssh {m.vsock_host}')\n"
            "    t.assertIn('dev: vhost-user-vsock-pci', m.send_monitor_command('info qtree'))\n"
            "one.crash()\n"
            "print(one.vsock_host.exists(), two.vsock_host.exists())\n",
            *starts,
            "--dump-vsocks",
            "5",
        )
        self.assertEqual((status, out), (0, "False True\n"), err)
        for m in ("one", "two"):
            self.assertRegex(err, rf"    {m}:  .*/vm-state-{m}/vsock\n")

    def test_vsock_of_its_own(self) -> None:
        """Beside that of an older start script there is no other, which no guest would heed."""
        start = self.start_script(
            "vsock='-device vhost-vsock-pci,guest-cid=4321'\n"
            "test -w /dev/vhost-vsock || vsock=\n"
            'exec qemu-system-x86_64 -accel tcg -m 64 -S $vsock "$@"'
        )
        status, out, err = self.drive(
            "q.start()\n"
            "t.assertNotIn('vhost-user-vsock', q.send_monitor_command('info qtree'))\n"
            "print(q.ssh_backdoor_command(), q.vsock_host)\n",
            start,
            "--dump-vsocks",
            "5",
        )
        self.assertEqual((status, out), (0, "ssh -o User=root vsock/4321 None\n"), err)
        self.assertIn("    q:  ssh -o User=root vsock/4321\n", err)

    def test_acceleration(self) -> None:
        """What falls back to emulation does so; what has to have KVM says why it has none."""
        # On a host whose KVM is none.
        hide = 'test ! -e /dev/kvm || mount --bind /dev/null /dev/kvm; exec "$@"'
        self.prefix = ["unshare", "-m" if os.getuid() == 0 else "-mr", "sh", "-c", hide, "sh"]
        if subprocess.run([*self.prefix, "true"], capture_output=True, check=False).returncode:
            self.skipTest("nothing can be mounted here")
        told = "q.start()\nprint(q.send_monitor_command('info kvm').splitlines()[1])\n"
        # As nixpkgs writes them without and with `qemu.forceAccel`.
        text = 'exec qemu-system-x86_64 -machine accel={} -cpu max -m 64 -S "$@"'
        start = self.start_script(text.format("kvm:tcg"))
        status, out, err = self.drive(told, start)
        self.assertEqual((status, out), (0, "kvm support: disabled\n"), err)
        status, _, err = self.drive(told, self.start_script(text.format("kvm")))
        self.assertEqual(status, 1)
        self.assertRegex(err, "it ended at once, with exit status: 1: (?s:.*)(?i:kvm)")
        # The driver itself has this argument then.
        status, out, err = self.drive(told, start, "--accel", "kvm")
        self.assertEqual((status, out), (1, ""), err)
        self.assertRegex(err, "error: .*/dev/kvm.*; `--accel carrier` does not need it")

    def test_it_does_not_start(self) -> None:
        """What is wrong is said, in QEMU's words."""
        for start, said in {
            "exec no-such-qemu": "a program of its start command was not found: .*no-such-qemu",
            f"{QEMU} -no-such-option": "it ended at once, with exit status: 1: .*-no-such-option",
            "exit 0": "it ended at once, with exit status: 0",
            "kill -9 $$": "it ended at once, with signal: 9",
        }.items():
            with self.subTest(start):
                script = f"with t.assertRaisesRegex(Exception, {said!r}):\n    q.start()\n"
                status, _, err = self.drive(script, self.start_script(start))
                self.assertEqual(status, 0, err)

    def test_it_ends(self) -> None:
        """QEMU is killed while somebody waits."""
        start = self.start_script(f'echo $$ > "$SHARED_DIR/pid"; {QEMU}')
        status, _, err = self.drive(
            "q.start()\n"
            "os.kill(int((q.shared_dir / 'pid').read_text()), 9)\n"
            "with t.assertRaisesRegex(Exception, 'QEMU ended with signal: 9'):\n"
            "    q.wait_for_unit('default.target')\n",
            start,
        )
        self.assertEqual(status, 0, err)

    def test_long_paths(self) -> None:
        """The paths of sockets are limited, and the error says what to do."""
        self.state = self.state / ("x" * 80)
        self.state.mkdir()
        status, _, err = self.drive("q.start()\n", self.start_script(QEMU))
        self.assertEqual(status, 1)
        self.assertRegex(err, "bytes, and .*(set TMPDIR|at most)")

    def test_driver_is_killed(self) -> None:
        """No QEMU survives a driver that was killed, nor do its helpers."""
        path = self.start_script(f"sleep 1000 & setsid sleep 1000 & {QEMU}")
        script = "q.start()\nprint('runs', flush=True)\nimport time\ntime.sleep(1000)\n"
        with self.spawn(script, path) as process:
            assert process.stdout is not None
            self.assertEqual(process.stdout.readline(), "runs\n")
            self.assertGreaterEqual(len(environments(self.state)), 3)
            os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while environments(self.state):
            self.assertLess(time.monotonic(), deadline, environments(self.state))
            time.sleep(0.05)

    def test_create_machine(self) -> None:
        """A script may start QEMU by a command of its own."""
        status, out, err = self.drive(
            "q = create_machine('qemu-system-x86_64 -accel tcg -m 64 -S', name='q')\n"
            "q.start()\n"
            "print(q.send_monitor_command('info name').splitlines()[0])\n"
            "with t.assertRaisesRegex(Exception, 'q has no vsock for ssh'):\n"
            "    q.ssh_backdoor_command()\n"
            "q.release()\n"
            "create_machine('qemu-system-x86_64 -accel tcg -m 64 -S', name='other').start()\n"
        )
        self.assertEqual((status, out), (0, "info name\n"), err)
