# systemd, and waiting for things.
#: ways: agent backdoor qemu
#: [nodes.machine]
#: kit = "systemd"

import re
from pathlib import Path

from test_driver.errors import RequestedAssertionFailed

# TCP sockets that listen, without a heading.
LISTENERS = "ss -H -l -t -n"

machine.start()


def later(seconds: float, command: str) -> None:
    machine.succeed(f"(sleep {seconds}; {command}) >/dev/null 2>&1 &")


with subtest("wait_for_unit: while the system comes up"):
    machine.wait_for_unit("multi-user.target")
    machine.succeed("systemctl is-active multi-user.target")

with subtest("wait_for_unit: that becomes active later"):
    machine.succeed(
        "systemd-run --no-block --unit=slow --property=Type=notify --property=NotifyAccess=all"
        " sh -c 'sleep 2; systemd-notify --ready; exec sleep 1000'"
    )
    machine.wait_for_unit("slow.service")
    machine.succeed("systemctl is-active slow.service")

with subtest("wait_for_unit: a service without its type"):
    machine.wait_for_unit("slow")
    machine.succeed("systemctl is-active slow.service")

with subtest("wait_for_unit: of a user"):
    machine.succeed(
        "echo 'alice:x:1000:1000::/home/alice:/bin/bash' >> /etc/passwd",
        "echo 'alice:x:1000:' >> /etc/group",
        "echo 'alice:*:1::::::' >> /etc/shadow",
        "install -d -o 1000 -g 1000 /home/alice",
        "loginctl enable-linger alice",
    )
    machine.wait_for_unit("user@1000.service")
    machine.wait_for_unit("default.target", user="alice")
    machine.succeed("systemctl --user --machine=alice@ is-active default.target")

with subtest("wait_for_unit, wrongly: of a user, nothing will start it"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "is inactive and there are no pending jobs"):
        machine.wait_for_unit("nonsense.service", user="alice")

with subtest("wait_for_unit, wrongly: failed"):
    machine.succeed(
        "systemd-run --no-block --unit=bad --property=Type=oneshot sh -c 'sleep 1; exit 3'"
    )
    with t.assertRaisesRegex(
        RequestedAssertionFailed, r'^unit "bad.service" reached state "failed"$'
    ):
        machine.wait_for_unit("bad.service")

with subtest("wait_for_unit, wrongly: nothing will start it"):
    machine.wait_until_succeeds("systemctl list-jobs | grep 'No jobs'")
    for unit in ["nonsense.service", "rescue.target"]:
        with t.assertRaisesRegex(
            RequestedAssertionFailed, f'^unit "{unit}" is inactive and there are no pending jobs$'
        ):
            machine.wait_for_unit(unit)

with subtest("wait_for_unit, wrongly: within its time only"):
    machine.succeed(
        "systemd-run --no-block --unit=never --property=Type=notify sleep 1000",
    )
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_unit("never.service", timeout=1)
    machine.execute("systemctl stop never")

with subtest("wait_for_unit_active_state: whatever comes before"):
    machine.wait_for_unit_active_state("later.service", "inactive")
    machine.succeed(
        "systemd-run --no-block --unit=later --property=Type=notify --property=NotifyAccess=all"
        " --property=TimeoutStopSec=60 sh -c"
        ' \'trap "sleep 5; exit 1" TERM; sleep 5; systemd-notify --ready;'
        " while :; do sleep 1; done'"
    )
    machine.wait_for_unit_active_state("later.service", "activating")
    machine.wait_for_unit_active_state("later.service", "active", timeout=120)
    machine.succeed("systemctl stop --no-block later")
    machine.wait_for_unit_active_state("later.service", "deactivating")
    machine.wait_for_unit_active_state("later", "failed")
    t.assertEqual(machine.get_unit_property("later", "ActiveState"), "failed")
    machine.wait_for_unit_active_state("default.target", "active", user="alice")

with subtest("wait_for_unit_active_state, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_unit_active_state("later.service", "active", timeout=1)

with subtest("systemctl: status and output"):
    t.assertEqual(machine.systemctl("is-active slow"), (0, "active\n"))

with subtest("systemctl: of a user"):
    t.assertEqual(machine.systemctl("is-active default.target", "alice"), (0, "active\n"))

with subtest("systemctl, wrongly: what does not exist"):
    status, _ = machine.systemctl("cat nonsense.service")
    t.assertNotEqual(status, 0)

with subtest("get_unit_info: all properties"):
    info = machine.get_unit_info("slow.service")
    t.assertEqual((info["Id"], info["ActiveState"]), ("slow.service", "active"))
    t.assertIn("=", info["ExecStart"])

with subtest("get_unit_info, wrongly: of no unit"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "failed with exit code"):
        machine.get_unit_info("slow.service", user="who-is-not-there")

with subtest("get_unit_property: one property"):
    t.assertEqual(machine.get_unit_property("slow", "Type"), "notify")

with subtest("get_unit_property, wrongly: of no such name"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "produced unexpected output"):
        machine.get_unit_property("slow", "Nonsense")

with subtest("require_unit_state: what it is"):
    machine.require_unit_state("slow")
    machine.require_unit_state("bad", "failed")
    t.assertEqual(machine.get_unit_property("bad", "ActiveState"), "failed")

with subtest("require_unit_state, wrongly: what it is not"):
    with t.assertRaisesRegex(
        RequestedAssertionFailed,
        "^Expected unit 'bad' to to be in state 'active' but it is in state 'failed'$",
    ):
        machine.require_unit_state("bad")

with subtest("stop_job: stops"):
    t.assertEqual(machine.stop_job("slow.service")[0], 0)
    machine.require_unit_state("slow", "inactive")

with subtest("stop_job: several, with options"):
    run = "systemd-run --unit={} sleep 1000"
    machine.succeed(run.format("one"), run.format("two"))
    t.assertEqual(machine.stop_job("--no-block one.service two.service")[0], 0)
    machine.wait_until_fails("systemctl is-active one two")

with subtest("stop_job, wrongly: what does not exist"):
    t.assertNotEqual(machine.stop_job("nonsense.service")[0], 0)

with subtest("start_job: starts"):
    t.assertEqual(machine.start_job("systemd-tmpfiles-clean.service")[0], 0)

with subtest("start_job: several, with options"):
    machine.succeed(
        "printf '[Service]\\nExecStart=/bin/sleep 1000\\n' >/run/systemd/system/three.service",
        "cp /run/systemd/system/{three,four}.service",
        "systemctl daemon-reload",
    )
    t.assertEqual(machine.start_job("--no-block three four")[0], 0)
    machine.wait_for_unit("three")
    machine.wait_for_unit("four")

with subtest("start_job, wrongly: what does not exist"):
    t.assertNotEqual(machine.start_job("nonsense.service")[0], 0)

with subtest("wait_for_file: that comes later"):
    later(1, "mkdir -p /tmp/new/dir; touch /tmp/new/dir/file")
    machine.wait_for_file("/tmp/new/dir/file")
    machine.succeed("test -e /tmp/new/dir/file")

with subtest("wait_for_file: expanded by the guest's shell"):
    later(1, "touch /tmp/new/dir/other")
    machine.wait_for_file("/tmp/new/*/oth?r")
    machine.succeed("test -e /tmp/new/dir/other")

with subtest("wait_for_file: a path"):
    later(1, "touch /tmp/new/dir/path")
    machine.wait_for_file(Path("/tmp/new/dir/path"))
    machine.succeed("test -e /tmp/new/dir/path")

with subtest("wait_for_file, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_file("/tmp/never", timeout=1)

with subtest("wait_for_closed_port: before anybody listens"):
    machine.wait_for_closed_port(8000)
    machine.fail(f"{LISTENERS} sport = :8000 | grep .")

with subtest("wait_for_open_port: that opens later"):
    later(1, "exec python3 -m http.server 8000")
    machine.wait_for_open_port(8000)
    machine.wait_for_open_port("8000", "127.0.0.1", timeout=60)
    machine.succeed(f"{LISTENERS} sport = :8000 | grep .")

with subtest("wait_for_open_port, wrongly: what is no port"):
    for port in ["http", "", "70000"]:
        with t.assertRaises(ValueError):
            machine.wait_for_open_port(port)

with subtest("wait_for_open_port, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_open_port(8001, timeout=1)

with subtest("wait_for_closed_port, wrongly: while somebody listens"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_closed_port(8000, timeout=1)

with subtest("wait_for_closed_port: that closes later"):
    later(1, "pkill -f http.server")
    machine.wait_for_closed_port("8000")
    machine.fail(f"{LISTENERS} sport = :8000 | grep .")

with subtest("wait_for_open_unix_socket: of streams"):
    machine.wait_for_open_unix_socket("/run/dbus/system_bus_socket")
    later(1, "exec nc -l -k -U /run/late")
    machine.wait_for_open_unix_socket("/run/late")
    machine.succeed("test -S /run/late")

with subtest("wait_for_open_unix_socket: a path, and what the guest's shell makes of a text"):
    machine.wait_for_open_unix_socket(Path("/run/dbus/system_bus_socket"))
    machine.wait_for_open_unix_socket("/run/db?s/system_bus_socket")
    machine.succeed("nc -z -U /run/dbus/system_bus_socket")

with subtest("wait_for_open_unix_socket: of datagrams"):
    machine.wait_for_open_unix_socket("/run/systemd/journal/socket", is_datagram=True)
    later(1, "exec nc -l -k -u -U /run/late-datagrams")
    machine.wait_for_open_unix_socket("/run/late-datagrams", is_datagram=True)
    machine.succeed("test -S /run/late-datagrams")

with subtest("wait_for_open_unix_socket: of a path that starts where commands do"):
    later(1, "exec nc -lU sub.socket")
    machine.wait_for_open_unix_socket("sub.socket", timeout=60)
    machine.succeed("test -S /tmp/sub.socket")

with subtest("wait_for_open_unix_socket, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_open_unix_socket("/run/nobody", timeout=1)

with subtest("wait_for_console_text: that comes later"):
    later(1, "echo the needle is 42 > /dev/console")
    machine.wait_for_console_text(r"needle is \d+")
    t.assertIn("the needle is 42", machine.get_console_log())

with subtest("wait_for_console_text: across lines"):
    later(1, "for word in eins zwei drei; do echo $word > /dev/console; done")
    machine.wait_for_console_text("eins.*drei", timeout=60)
    t.assertIn("zwei", machine.get_console_log())

with subtest("wait_for_console_text: as much as is left"):
    later(1, "printf 'vier\\nfuenf\\nsechs\\n' > /dev/console")
    machine.wait_for_console_text("vierfuenf", timeout=60)
    machine.wait_for_console_text("sechs", timeout=60)
    t.assertIn("fuenf", machine.get_console_log())

with subtest("wait_for_console_text, wrongly: consumed already"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_console_text(r"needle is \d+", timeout=1)

with subtest("get_console_log: has it"):
    t.assertIn("the needle is 42", machine.get_console_log())

with subtest("get_console_log, wrongly: has nothing of the future"):
    t.assertNotIn("not printed", machine.get_console_log())

with subtest("wait_until_tty_matches: what getty says"):
    machine.wait_until_tty_matches("1", "machine login: ")
    machine.wait_until_tty_matches(1, re.compile("machine login: "))
    t.assertIn("machine login: ", machine.get_tty_text("1"))

with subtest("wait_until_tty_matches, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_until_tty_matches("1", "nobody says this", timeout=1)

with subtest("get_tty_text: the whole screen"):
    t.assertIn("machine login:", machine.get_tty_text("1"))
    t.assertIn("machine login:", machine.get_tty_text(1))

with subtest("get_tty_text, wrongly: of no such terminal"):
    t.assertEqual(machine.get_tty_text("99"), "")
    with t.assertRaises(TypeError):
        machine.get_tty_text(None)  # type: ignore # ty: ignore

with subtest("dump_tty_contents: to the console"):
    before = machine.get_console_log().count("machine login:")
    machine.dump_tty_contents(1)
    machine.wait_for_console_text("machine login:", timeout=60)
    t.assertGreater(machine.get_console_log().count("machine login:"), before)

with subtest("dump_tty_contents, wrongly: of no such terminal"):
    machine.dump_tty_contents("99")
    t.assertEqual(machine.execute("echo on"), (0, "on\n"))

machine.crash()
