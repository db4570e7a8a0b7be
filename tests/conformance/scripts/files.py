# Files, links and power.
#: ways: agent backdoor qemu
#: [nodes.machine]
#: kit = "systemd"
#: [nodes.peer]
#: [nodes.idle]
import os
import tempfile
import urllib.request
import warnings
from pathlib import Path

from test_driver.errors import MachineError, RequestedAssertionFailed

machine.start(allow_reboot=True)
machine.wait_for_unit("multi-user.target")
here = Path(tempfile.mkdtemp())
(here / "dir/inner").mkdir(parents=True)
(here / "dir/inner/bytes").write_bytes(bytes(range(256)) * 1000)
(here / "run.sh").write_text("#!/bin/sh\necho ran\n")
(here / "run.sh").chmod(0o755)
(here / "dir/link").symlink_to("inner/bytes")

with subtest("copy_from_host: a file with its mode, owned by root"):
    machine.copy_from_host(here / "run.sh", "/tmp/made/for/it/run.sh")
    t.assertEqual(machine.succeed("/tmp/made/for/it/run.sh"), "ran\n")
    t.assertEqual(machine.succeed("stat -c %U:%a /tmp/made/for/it/run.sh"), "root:755\n")

with subtest("copy_from_host: a directory"):
    machine.copy_from_host(str(here / "dir"), "/tmp/copied")
    machine.succeed("cmp /tmp/copied/link /tmp/copied/inner/bytes; test ! -L /tmp/copied/link")
    machine.succeed("ln -sf inner/bytes /tmp/copied/link")

with subtest("copy_from_host: what links to directories lead to"):
    (here / "linked").mkdir()
    (here / "linked/dir").symlink_to(here / "dir")
    machine.copy_from_host(here / "linked", "/tmp/linked")
    machine.succeed("test ! -L /tmp/linked/dir; cmp /tmp/linked/dir/inner/bytes /tmp/copied/link")

with subtest("copy_from_host: a relative target starts where commands do"):
    machine.copy_from_host(here / "run.sh", "rel/run.sh")
    t.assertEqual(machine.succeed("rel/run.sh; /tmp/rel/run.sh"), "ran\nran\n")

with subtest("copy_from_host, wrongly: what is not there"):
    with t.assertRaisesRegex(FileNotFoundError, "No such file or directory: '.*/nothing'"):
        machine.copy_from_host(here / "nothing", "/tmp/x")
    (here / "dangling").mkdir()
    (here / "dangling/link").symlink_to("nowhere")
    with t.assertRaises(OSError):
        machine.copy_from_host(here / "dangling", "/tmp/x")

with subtest("copy_from_host_via_shell: a file"):
    machine.copy_from_host_via_shell(here / "dir/inner/bytes", "/tmp/shell/bytes")
    machine.succeed("cmp /tmp/shell/bytes /tmp/copied/inner/bytes")

with subtest("copy_from_host_via_shell: a target that the guest's shell expands"):
    machine.copy_from_host_via_shell(here / "run.sh", "$HOME/by-shell")
    machine.copy_from_host_via_shell(here / "run.sh", "'/tmp/a space'")
    machine.copy_from_host_via_shell(here / "run.sh", "~/$(echo by)-tilde")
    t.assertEqual(machine.succeed("ls /root"), "by-shell\nby-tilde\n")
    machine.succeed("test -e '/tmp/a space'")

with subtest("copy_from_host_via_shell, wrongly: where nothing can be"):
    with t.assertRaises(RequestedAssertionFailed):
        machine.copy_from_host_via_shell(here / "run.sh", "/proc/nothing/run.sh")
    with t.assertRaisesRegex(RequestedAssertionFailed, "is not one path"):
        machine.copy_from_host_via_shell(here / "run.sh", "/tmp/one /tmp/two")
    with t.assertRaises(FileNotFoundError):
        machine.copy_from_host_via_shell(here / "nothing", "/tmp/x")

with subtest("copy_from_machine: to the output directory"):
    machine.copy_from_machine("/tmp/copied", "results")
    copied = Path(machine.out_dir) / "results/copied"
    t.assertEqual((copied / "inner/bytes").read_bytes(), (here / "dir/inner/bytes").read_bytes())
    t.assertEqual(os.readlink(copied / "link"), "inner/bytes")

with subtest("copy_from_machine: of a path that starts where commands do"):
    machine.succeed("echo hi > f")
    machine.copy_from_machine("f")
    t.assertEqual((Path(machine.out_dir) / "f").read_text(), "hi\n")

with subtest("copy_from_machine: to other directories of the host"):
    machine.copy_from_machine("f", str(here / "absolute/new"))
    t.assertEqual((here / "absolute/new/f").read_text(), "hi\n")
    machine.copy_from_machine("f", "results/../up")
    t.assertEqual((Path(machine.out_dir) / "up/f").read_text(), "hi\n")
    beside = os.path.relpath(here / "beside", machine.out_dir)
    machine.copy_from_machine("f", beside)
    t.assertEqual((here / "beside/f").read_text(), "hi\n")

with subtest("copy_from_machine, wrongly: what is not there"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "/tmp/nothing"):
        machine.copy_from_machine("/tmp/nothing")

with subtest("copy_from_machine, wrongly: through a link that the guest has made"):
    machine.succeed(f"mkdir -p out; ln -s {here} out/link")
    machine.copy_from_machine("out")
    with t.assertRaisesRegex(MachineError, "outside of the output directory"):
        machine.copy_from_machine("f", "out/link/made")
    t.assertFalse((here / "made").exists())

with subtest("copy_from_vm: the old name"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        machine.copy_from_vm("/tmp/shell/bytes")
    t.assertTrue((Path(machine.out_dir) / "bytes").exists() and caught)

with subtest("copy_from_vm, wrongly: what is not there"):
    with t.assertRaises(RequestedAssertionFailed):
        machine.copy_from_vm("/tmp/nothing")

with subtest("shared_dir: one directory of all machines and the host"):
    machine.succeed("echo hello > /tmp/shared/greeting")
    t.assertEqual((machine.shared_dir / "greeting").read_text(), "hello\n")
    t.assertEqual(peer.succeed("cat /tmp/shared/greeting"), "hello\n")

with subtest("shared_dir, wrongly: the exchange directory is the machine's own"):
    machine.succeed("touch /tmp/xchg/mine")
    peer.fail("test -e /tmp/xchg/mine")

with subtest("block: the first vlan's cable"):
    machine.wait_until_succeeds("ping -c 1 -W 5 peer")
    machine.block()
    machine.wait_until_succeeds("grep 0 /sys/class/net/eth1/carrier")

with subtest("block, wrongly: nothing comes through"):
    machine.fail("ping -c 1 -W 2 peer")

with subtest("unblock: it is plugged in again"):
    machine.unblock()
    machine.wait_until_succeeds("ping -c 1 -W 5 peer")

with subtest("unblock, wrongly: a second time is nothing"):
    machine.unblock()
    machine.wait_until_succeeds("grep 1 /sys/class/net/eth1/carrier")

with subtest("forward_port: to the host, while it runs"):
    machine.succeed("cd /tmp/copied/inner && (python3 -m http.server 80 >/dev/null 2>&1 &)")
    machine.wait_for_open_port(80)
    forwarded = machine.forward_port(host_port=0)
    with urllib.request.urlopen(f"http://127.0.0.1:{forwarded}/bytes", timeout=120) as answer:
        t.assertEqual(answer.read(), (here / "dir/inner/bytes").read_bytes())

with subtest("forward_port, wrongly: a port that somebody has"):
    with t.assertRaisesRegex(MachineError, str(forwarded)):
        peer.forward_port(host_port=str(forwarded))

with subtest("send_console: types"):
    peer.execute("(read line < /dev/ttyS0; echo $line > /tmp/typed) &", check_output=False)
    peer.succeed("sleep 1")
    peer.send_console("typed text\n")
    t.assertEqual(peer.wait_until_succeeds("grep . /tmp/typed"), "typed text\n")

with subtest("send_console, wrongly: to what does not run"):
    with t.assertRaisesRegex(MachineError, "is not running"):
        idle.send_console("x")

with subtest("shell, wrongly: of what does not run"):
    t.assertIsNone(idle.shell)

with subtest("shell: the backdoor's own socket"):
    shell = machine.shell
    assert shell
    shell.sendall(b"echo by $((40 + 2))\n")
    got = b""
    while b"by 42" not in got and (more := shell.recv(4096)):
        got += more
    t.assertIn(b"by 42", got)

with subtest("send_monitor_command: pulls and plugs a cable"):
    machine.send_monitor_command("set_link virtio-net-pci.1 off")
    machine.fail("ping -c 1 -W 2 peer")
    machine.send_monitor_command("set_link virtio-net-pci.1 on")
    machine.wait_until_succeeds("ping -c 1 -W 2 peer")

with subtest("send_monitor_command, wrongly: what firn does not know"):
    with t.assertRaisesRegex(MachineError, "firn has no QEMU monitor"):
        machine.send_monitor_command("no_such_command")

with subtest("reboot: comes up again"):
    machine.succeed("touch /run/before")
    machine.reboot()
    machine.wait_for_unit("multi-user.target")
    machine.fail("test -e /run/before")

with subtest("wait_for_qmp_event: of the reboot"):
    event = machine.wait_for_qmp_event(lambda event: event["event"] == "RESET", timeout=10)
    t.assertTrue(event["data"]["guest"])

with subtest("connected: False waits for the next boot's shell"):
    machine.succeed("touch /run/before")
    machine.execute("systemctl reboot >&2 &", check_return=False)
    machine.connected = False
    machine.connect()
    machine.fail("test -e /run/before")

with subtest("reboot, wrongly: without allow_reboot"):
    with t.assertRaisesRegex(MachineError, "allow_reboot=True"):
        peer.reboot()

with subtest("shutdown: powers off"):
    machine.shutdown()
    t.assertFalse(machine.booted)

with subtest("shutdown, wrongly: what is off stays off"):
    machine.shutdown()
    t.assertFalse(machine.booted or machine.is_up())

with subtest("wait_for_shutdown: of a guest that does so by itself"):
    peer.execute("poweroff", check_output=False)
    peer.wait_for_shutdown()
    t.assertFalse(peer.booted)

with subtest("wait_for_shutdown: of a guest that panics"):
    peer.start()
    peer.connect()
    peer.execute("sleep 1; echo c > /proc/sysrq-trigger", check_output=False)
    peer.wait_for_shutdown()
    t.assertFalse(peer.booted)

with subtest("wait_for_shutdown, wrongly: of a guest that halts and stands still"):
    peer.start()
    peer.connect()
    peer.execute("sleep 1; halt -f", check_output=False)
    with t.assertRaisesRegex(MachineError, "peer halted"):
        peer.wait_for_shutdown()

with subtest("release: removes its state"):
    machine.release()
    t.assertFalse(machine.state_dir.exists())

with subtest("release, wrongly: a second time is nothing"):
    machine.release()
    t.assertFalse(machine.state_dir.exists() or machine.booted)
