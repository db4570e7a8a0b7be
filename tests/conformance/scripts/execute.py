# Running commands.
#: ways: agent backdoor qemu
#: [nodes.machine]
#: kit = "systemd"
import threading
import time
from datetime import timedelta

from test_driver.errors import MachineError, RequestedAssertionFailed

with subtest("execute: the first command finds what every service waits for"):
    machine.start()
    machine.require_unit_state("basic.target")
    machine.require_unit_state("systemd-tmpfiles-clean.timer")
    t.assertEqual(machine.get_unit_property("basic.target", "ActiveState"), "active")

machine.wait_for_unit("multi-user.target")

with subtest("execute: status and output, and no standard error"):
    t.assertEqual(machine.execute("echo out; echo err >&2; exit 3"), (3, "out\n"))

with subtest("execute: bash, with errexit, nounset and pipefail"):
    t.assertEqual(machine.execute("[[ -n $BASH_VERSION ]] && echo {1..3}"), (0, "1 2 3\n"))
    t.assertEqual(machine.execute("false; echo on"), (1, ""))
    t.assertEqual(machine.execute("false | true")[0], 1)
    t.assertNotEqual(machine.execute("echo $nothing")[0], 0)

with subtest("execute: root's login environment, in /tmp"):
    _, out = machine.execute('echo "$USER $HOME $DISPLAY $(pwd) <$PAGER> $(id -u)"')
    t.assertEqual(out, "root /root :0.0 /tmp <> 0\n")

with subtest("execute: several lines, quotes, many bytes, bytes that are no text"):
    t.assertEqual(machine.execute("echo \"it's\"\necho '$x'"), (0, "it's\n$x\n"))
    status, out = machine.execute("head -c 3000000 /dev/zero | tr '\\0' x")
    t.assertEqual((status, len(out)), (0, 3_000_000))
    t.assertEqual(machine.execute("printf 'a\\377b'"), (0, "a\ufffdb"))

with subtest("execute: without its status, or without waiting"):
    t.assertEqual(machine.execute("exit 4", check_return=False), (-1, ""))
    began = time.monotonic()
    t.assertEqual(machine.execute("sleep 100; echo late", check_output=False), (-2, ""))
    t.assertLess(time.monotonic() - began, 50)

with subtest("execute: waits until the output is closed"):
    began = time.monotonic()
    t.assertEqual(machine.execute("(sleep 3; echo late) & echo now"), (0, "now\nlate\n"))
    t.assertGreater(time.monotonic() - began, 2.5)

with subtest("execute: bytes that no command has, and more of them than an argument"):
    t.assertEqual(machine.execute("echo a\0b"), (0, "ab\n"))
    long = "x" * 300_000
    script = f"word={long}; echo ${{#word}} $0; readlink /proc/$$/exe; cat; false; echo on"
    t.assertEqual(machine.execute(script), (1, "300000 bash\n/usr/bin/bash\n"))
    t.assertEqual(machine.execute("echo $0"), (0, "bash\n"))
    t.assertEqual(machine.execute(f"exit 5 # {long}"), (5, ""))
    t.assertEqual(machine.execute("ls /run | grep firn-script"), (1, ""))

with subtest("execute: what it says of itself is on the console, without a journal too"):
    machine.succeed("systemctl stop systemd-journald.socket systemd-journald-dev-log.socket")
    machine.succeed("systemctl stop systemd-journald-audit.socket systemd-journald")
    machine.fail("ping -c 1 there.is.no.such.name.invalid; echo words of its own >&2; false")
    machine.wait_for_console_text("there.is.no.such.name.invalid: .+", timeout=60)
    machine.fail("systemctl is-active systemd-journald")
    machine.succeed("systemctl start systemd-journald.socket systemd-journald-dev-log.socket")
    machine.succeed("systemctl start systemd-journald")

with subtest("execute: out of memory it alone is ended"):
    t.assertEqual(machine.execute("tail /dev/zero"), (137, ""))
    t.assertEqual(machine.execute("cat /proc/self/oom_score_adj"), (0, "0\n"))
    t.assertEqual(machine.execute("systemctl show -P TasksMax backdoor"), (0, "infinity\n"))
    way = "cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/pids.max"
    t.assertEqual(machine.execute(way), (0, "max\n"))
    t.assertEqual(machine.execute("ulimit -Sn; ulimit -Hn"), (0, "1024\n524288\n"))

with subtest("execute: reads nothing"):
    t.assertEqual(machine.execute("cat"), (0, ""))

with subtest("execute, wrongly: past its time it is killed"):
    t.assertEqual(machine.execute("echo a; sleep 1000", timeout=1), (124, "a\n"))
    t.assertEqual(machine.execute("sleep 1000", timeout=timedelta(seconds=0.5))[0], 124)
    t.assertEqual(machine.execute("echo on", timeout=None), (0, "on\n"))
    t.assertEqual(machine.execute("sleep 1; echo on", timeout=0), (0, "on\n"))

with subtest("execute, wrongly: killed by a signal"):
    t.assertEqual(machine.execute("kill -9 $$")[0], 137)
    t.assertEqual(machine.execute("echo on"), (0, "on\n"))

with subtest("execute, wrongly: killed together with what runs it"):
    with t.assertRaisesRegex(MachineError, "started again"):
        machine.execute(
            "pkill -9 '^firn-agent$' || pkill -9 -f '^bash --norc /dev/hvc0$'; sleep 99"
        )
    t.assertEqual(machine.execute("echo on"), (0, "on\n"))

with subtest("execute, wrongly: a bool is no duration"):
    with t.assertRaises(TypeError):
        machine.execute("true", timeout=True)

with subtest("succeed: the outputs of all commands"):
    t.assertEqual(machine.succeed("echo a", "echo b"), "a\nb\n")
    t.assertEqual(machine.succeed("echo c", timeout=60), "c\n")

with subtest("succeed, wrongly: says which command failed, and how"):
    with t.assertRaisesRegex(
        RequestedAssertionFailed, r"^command `exit 7` failed \(exit code 7\)$"
    ):
        machine.succeed("true", "exit 7", "touch /tmp/not-reached")
    machine.fail("test -e /tmp/not-reached")
    with t.assertRaisesRegex(RequestedAssertionFailed, r"exit code 124"):
        machine.succeed("sleep 1000", timeout=1)

with subtest("succeed, wrongly: a long command is shown in part"):
    with t.assertRaisesRegex(
        RequestedAssertionFailed, r"^command `false # x+… .*200008 bytes"
    ) as caught:
        machine.succeed("false # " + "x" * 200_000)
    t.assertLess(len(str(caught.exception)), 2000)

with subtest("fail: the output of what fails"):
    t.assertEqual(machine.fail("echo a; false", "echo b; exit 9"), "a\nb\n")

with subtest("fail, wrongly: says which command succeeded"):
    with t.assertRaisesRegex(
        RequestedAssertionFailed, r"^command `echo fine` unexpectedly succeeded$"
    ):
        machine.fail("echo fine")

with subtest("wait_until_succeeds: the output when it does"):
    machine.succeed("rm -f /tmp/count")
    out = machine.wait_until_succeeds("echo x >> /tmp/count; wc -l < /tmp/count | grep 3")
    t.assertEqual(out, "3\n")

with subtest("wait_until_succeeds: gives a try up that takes too long"):
    machine.succeed("rm -f /tmp/tried")
    began = time.monotonic()
    machine.wait_until_succeeds(
        "test -e /tmp/tried || { touch /tmp/tried; sleep 1000; }", attempt_timeout=1
    )
    t.assertLess(time.monotonic() - began, 500)

with subtest("wait_until_succeeds, wrongly: within its time only"):
    with t.assertRaisesRegex(
        RequestedAssertionFailed, r"timed out after 2\S* seconds \(timeout=2\)$"
    ):
        machine.wait_until_succeeds("false", timeout=2)

with subtest("wait_until_succeeds, wrongly: with a command that takes longer"):
    began = time.monotonic()
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 3 seconds"):
        machine.wait_until_succeeds("sleep 1000", timeout=3)
    t.assertLess(time.monotonic() - began, 12)

with subtest("wait_until_fails: the output when it does"):
    machine.succeed("touch /tmp/there; (sleep 1; rm /tmp/there) >/dev/null 2>&1 &")
    out = machine.wait_until_fails("test -e /tmp/there || { echo gone; false; }")
    t.assertEqual(out, "gone\n")

with subtest("wait_until_fails, wrongly: within its time only"):
    with t.assertRaisesRegex(
        RequestedAssertionFailed, r"timed out after 0\S* seconds \(timeout=0\)$"
    ):
        machine.wait_until_fails("true", timeout=0)

with subtest("sleep: in the guest's time"):
    before = float(machine.succeed("cut -d' ' -f1 /proc/uptime"))
    machine.sleep(2)
    t.assertGreater(float(machine.succeed("cut -d' ' -f1 /proc/uptime")) - before, 1.9)

with subtest("sleep, wrongly: a text is no duration"):
    with t.assertRaises(TypeError):
        machine.sleep("2")  # type: ignore[arg-type] # ty: ignore[invalid-argument-type]

with subtest("execute: from two threads"):
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(machine.succeed(f"sleep 0.2; echo {n}")))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    t.assertEqual(sorted(found), ["0\n", "1\n", "2\n"])

with subtest("is_up: after a command it is"):
    t.assertTrue(machine.is_up() and machine.booted and machine.connected)

with subtest("connect: again is nothing"):
    boot_id = machine.succeed("cat /proc/sys/kernel/random/boot_id")
    machine.connect()
    t.assertEqual(machine.succeed("cat /proc/sys/kernel/random/boot_id"), boot_id)

with subtest("execute: nobody asks for the status of what ends the machine"):
    t.assertEqual(machine.execute("poweroff -f; sleep 100", check_return=False), (-1, ""))
    machine.wait_for_shutdown()
    machine.start()
    with t.assertRaisesRegex(MachineError, "powered off"):
        machine.execute("poweroff -f; sleep 100")
    machine.wait_for_shutdown()

machine.start()
machine.connect()

with subtest("crash: at once"):
    machine.crash()
    t.assertFalse(machine.booted)

with subtest("is_up, wrongly: not once it has crashed"):
    t.assertFalse(machine.is_up() or machine.connected)

with subtest("connect, wrongly: a machine that does not run takes no console input"):
    with t.assertRaisesRegex(MachineError, "is not running"):
        machine.send_console("x")

with subtest("crash, wrongly: what is off stays off"):
    machine.crash()
    t.assertFalse(machine.booted or machine.is_up())
