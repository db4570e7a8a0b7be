# What a machine has beside its methods, and what a script may change of it.
#: ways: agent qemu
#: [nodes.machine]
#: memory = 256
#: disks = [{ size = 8 }]
#: [nodes.other]
#: memory = 256
#: disks = [{ size = 8 }]
import queue
import subprocess
from pathlib import Path
from unittest.mock import MagicMock, call

from test_driver.errors import MachineError
from test_driver.logger import AbstractLogger
from test_driver.machine import QemuMachine, QemuStartCommand

with subtest("process, wrongly: none before the start"):
    t.assertIsNone(machine.process)
    t.assertIsNone(machine.pid)
    t.assertIsNone(machine.shell)

with subtest("connected: not before the start"):
    t.assertFalse(machine.connected)

machine.start(allow_reboot=True)
machine.succeed("echo mine >/dev/vda; sync; touch /run/before")

with subtest("connected: False waits for the next boot's shell"):
    t.assertTrue(machine.connected)
    machine.execute("(sleep 1; reboot -f) >&2 &", check_return=False)
    machine.connected = False
    machine.connect()
    machine.succeed("test ! -e /run/before; touch /run/before")

with subtest("connected: False does not wait where the next boot's shell is there already"):
    list(machine.qmp_client.events())
    machine.execute("(sleep 1; reboot -f) >&2 &", check_return=False)
    machine.wait_for_qmp_event(lambda event: event["event"] == "RESET")
    retry(lambda _: machine.is_up())
    machine.connected = False
    machine.succeed("test ! -e /run/before")

with subtest("connected, wrongly: True does not connect what is off"):
    other.connected = True
    t.assertFalse(other.connected or other.booted)

with subtest("hasattr: all that upstream's has, and it never raises"):
    names = """
        block booted callbacks cleanup_statedir connect connected console_interact copy_from_host
        copy_from_host_via_shell copy_from_machine copy_from_vm crash dump_tty_contents execute fail
        forward_port full_console_log get_console_log get_screen_text get_screen_text_variants
        get_tty_text get_unit_info get_unit_property get_window_names is_up keep_machine_state
        last_lines log log_serial logger monitor_path name nested out_dir pid process qmp_client
        qmp_path reboot release require_unit_state run_callbacks screenshot send_chars send_console
        send_key send_monitor_command shared_dir shell shell_interact shell_path shutdown sleep
        ssh_backdoor_command start start_command start_job state_dir stop_job succeed switch_root
        systemctl tmp_dir unblock vsock_guest vsock_host wait_for_closed_port wait_for_console_text
        wait_for_file wait_for_open_port wait_for_open_unix_socket wait_for_qmp_event
        wait_for_shutdown wait_for_text wait_for_unit wait_for_unit_active_state wait_for_window
        wait_for_x wait_until_fails wait_until_succeeds wait_until_tty_matches
    """
    for m in machines:
        t.assertEqual([name for name in names.split() if not hasattr(m, name)], [])

with subtest("hasattr, wrongly: of what nobody has"):
    t.assertFalse(hasattr(machine, "no_such_thing"))

with subtest("callbacks: called before each command"):
    calls = []
    machine.callbacks.append(lambda: calls.append(1))
    machine.succeed("true")
    machine.send_monitor_command("info name")
    t.assertEqual(len(calls), 2)

with subtest("run_callbacks: calls them"):
    machine.run_callbacks()
    t.assertEqual(len(calls), 3)

with subtest("callbacks, wrongly: what one raises ends the command"):
    machine.succeed("rm -f /tmp/never")
    machine.callbacks = [lambda: 1 / 0]
    with t.assertRaises(ZeroDivisionError):
        machine.succeed("touch /tmp/never")

with subtest("run_callbacks, wrongly: what one raises comes through"):
    with t.assertRaises(ZeroDivisionError):
        machine.run_callbacks()
    machine.callbacks = []
    machine.run_callbacks()
    machine.succeed("test ! -e /tmp/never")

with subtest("process: stands for a run of the machine"):
    process = machine.process
    assert process
    t.assertEqual((process.pid, process.poll()), (machine.pid, None))
    machine.execute("(head -n 1 /dev/ttyS0 >/tmp/typed) >&2 &")
    machine.succeed("sleep 1")
    process.stdin.write(b"by its input\n")
    process.stdin.flush()
    machine.wait_until_succeeds("grep 'by its input' /tmp/typed")

with subtest("process, wrongly: it has not ended yet"):
    with t.assertRaises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)

with subtest("pid: of what runs it"):
    t.assertTrue(machine.pid and Path(f"/proc/{machine.pid}").exists())

with subtest("pid, wrongly: of what is off"):
    t.assertIsNone(other.pid)

with subtest("full_console_log: its lines"):
    machine.succeed("echo one line >/dev/console; echo and two >/dev/console")
    retry(lambda _: "and two" in machine.full_console_log)
    t.assertIn("one line", machine.full_console_log)

with subtest("full_console_log, wrongly: nothing of the future"):
    t.assertNotIn("not printed", machine.full_console_log)

with subtest("last_lines: what no call has taken"):
    machine.succeed("echo first of all >/dev/console; echo and then >/dev/console")
    machine.wait_for_console_text("first of all")
    line = ""
    while "and then" not in line:
        line = machine.last_lines.get(timeout=60)
    t.assertNotIn("first of all", line)

with subtest("last_lines, wrongly: there are no more"):
    with t.assertRaises(queue.Empty):
        while True:
            machine.last_lines.get(block=False)
    t.assertTrue(machine.last_lines.empty())

with subtest("log_serial: as if the guest had printed it"):
    heard = MagicMock(spec=AbstractLogger)
    log.add_logger(heard)
    machine.log_serial("shown")
    t.assertIn(call("shown", machine.name), heard.log_serial.mock_calls)

with subtest("log_serial, wrongly: takes a line only"):
    with t.assertRaises(TypeError):
        machine.log_serial("shown", machine.name)  # type: ignore

with subtest("nested: with attributes"):
    entered = []
    with machine.nested("a step", {"image": "picture.png"}):
        entered.append("a step")
    with machine.nested(msg="another", attrs={}):
        entered.append("another")
    t.assertEqual(entered, ["a step", "another"])

with subtest("nested, wrongly: an exception comes through"):
    with t.assertRaisesRegex(ValueError, "^mine$"):
        with machine.nested("a step"):
            raise ValueError("mine")

with subtest("sleep: by either name of its argument"):
    began = float(machine.succeed("cut -d ' ' -f 1 /proc/uptime"))
    machine.sleep(duration=0.2)
    machine.sleep(secs=0.2)
    t.assertGreaterEqual(float(machine.succeed("cut -d ' ' -f 1 /proc/uptime")), began + 0.4)

with subtest("sleep, wrongly: how long?"):
    with t.assertRaises(TypeError):
        machine.sleep()
    with t.assertRaises(TypeError):
        machine.sleep(1, 1)

with subtest("tmp_dir: all machines' state is there"):
    t.assertEqual({m.state_dir.parent for m in machines}, {machine.tmp_dir})

with subtest("tmp_dir, wrongly: no machine's own"):
    t.assertNotEqual(machine.tmp_dir, machine.state_dir)

with subtest("monitor_path: in its state"):
    paths = {m.monitor_path for m in machines} | {machine.qmp_path, machine.shell_path}
    t.assertEqual(len(paths), 4)
    t.assertTrue(all(isinstance(path, Path) for path in paths))

with subtest("monitor_path, wrongly: nobody listens there"):
    t.assertFalse(any(path.exists() for path in paths))

with subtest("vsock_host: none without a vsock"):
    t.assertEqual((machine.vsock_host, machine.vsock_guest), (None, None))

with subtest("vsock_host, wrongly: no way to enter by it then"):
    with t.assertRaises(MachineError):
        machine.ssh_backdoor_command()

with subtest("keep_machine_state: as the run has it"):
    t.assertFalse(machine.keep_machine_state)
    machine.keep_machine_state = False

with subtest("keep_machine_state, wrongly: too late"):
    with t.assertRaisesRegex(MachineError, "--keep-machine-state"):
        machine.keep_machine_state = True

with subtest("start_command: knows the machine's name"):
    t.assertIsInstance(machine.start_command, QemuStartCommand)
    t.assertEqual(machine.start_command.machine_name, "machine")

with subtest("start_command, wrongly: there is no QEMU to run"):
    with t.assertRaisesRegex(MachineError, "no QEMU to run"):
        machine.start_command.run(machine.state_dir, machine.shared_dir)

with subtest("out_dir: may be another"):
    before = machine.out_dir
    machine.out_dir = before / "elsewhere"
    machine.succeed("echo kept >/tmp/kept")
    machine.copy_from_machine("/tmp/kept")
    t.assertEqual((before / "elsewhere/kept").read_text(), "kept\n")
    machine.out_dir = before

with subtest("out_dir, wrongly: a number is no directory"):
    with t.assertRaises(TypeError):
        machine.out_dir = 4  # type: ignore # ty: ignore


class Host(QemuMachine):
    """As a script of nixpkgs has it: without a word to the class that it is derived from."""

    def __init__(self, base):
        base.succeed("touch /tmp/taken-over")
        self._parent = base

    def __getattr__(self, name):
        return getattr(self._parent, name)

    def greet(self, whom: str) -> str:
        with super().nested(f"greeting {whom}"):
            return super().succeed(f"test -e /tmp/taken-over && echo hello {whom}")


with subtest("QemuMachine: may be derived from"):
    host = Host(machine)
    t.assertIsInstance(host, BaseMachine)
    t.assertEqual((host.greet("you"), host.name, host.booted), ("hello you\n", "machine", True))
    host.callbacks.append(lambda: calls.append(2))
    machine.succeed("true")
    t.assertEqual(calls.pop(), 2)
    host.callbacks.clear()

with subtest("QemuMachine, wrongly: of nothing there is no machine"):
    with t.assertRaisesRegex(MachineError, "made by create_machine"):
        QemuMachine(name="new")

with subtest("booted, wrongly: True starts nothing"):
    with t.assertRaisesRegex(MachineError, "start it"):
        other.booted = True

with subtest("cleanup_statedir, wrongly: of what runs"):
    with t.assertRaisesRegex(MachineError, "is running and needs its state"):
        machine.cleanup_statedir()

with subtest("booted: False ends it"):
    machine.booted = False
    t.assertFalse(machine.booted or machine.connected)
    t.assertEqual((process.poll(), process.wait()), (0, 0))

with subtest("state_dir: that of another machine, as it left it"):
    other.state_dir = machine.state_dir
    t.assertEqual(other.succeed("head -n 1 /dev/vda"), "mine\n")

with subtest("shared_dir: may be another"):
    other.shutdown()
    shared = other.tmp_dir / "other-shared"
    shared.mkdir()
    (shared / "note").write_text("from the host\n")
    other.shared_dir = shared
    t.assertEqual(other.succeed("cat /tmp/shared/note"), "from the host\n")

with subtest("process: may be ended"):
    process = other.process
    assert process
    process.terminate()
    t.assertEqual((process.wait(timeout=60), other.booted), (0, False))

with subtest("cleanup_statedir: its disks are new then"):
    other.cleanup_statedir()
    t.assertFalse(machine.state_dir.exists())
    t.assertEqual(other.succeed("head -c 4 /dev/vda | tr '\\0' -"), "----")
    other.crash()
