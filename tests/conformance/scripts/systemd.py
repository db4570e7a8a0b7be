# systemd, and waiting for things.
#: ways: agent backdoor
#: [nodes.machine]
#: kit = "systemd"

from test_driver.errors import RequestedAssertionFailed

machine.start()


def later(seconds: float, command: str) -> None:
    machine.succeed(f"(sleep {seconds}; {command}) >/dev/null 2>&1 &")


with subtest("wait_for_unit: while the system comes up"):
    machine.wait_for_unit("multi-user.target")

with subtest("wait_for_unit: that becomes active later"):
    machine.succeed(
        "systemd-run --no-block --unit=slow --property=Type=notify --property=NotifyAccess=all"
        " sh -c 'sleep 2; systemd-notify --ready; exec sleep 1000'"
    )
    machine.wait_for_unit("slow.service")

with subtest("wait_for_unit: a service without its type"):
    machine.wait_for_unit("slow")

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

with subtest("wait_for_file: expanded by the guest's shell"):
    machine.wait_for_file("/tmp/new/*/fil?")

with subtest("wait_for_file, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_file("/tmp/never", timeout=1)

with subtest("wait_for_closed_port: before anybody listens"):
    machine.wait_for_closed_port(8000)

with subtest("wait_for_open_port: that opens later"):
    later(1, "exec python3 -m http.server 8000")
    machine.wait_for_open_port(8000)
    machine.wait_for_open_port(8000, "127.0.0.1", timeout=60)

with subtest("wait_for_open_port, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_open_port(8001, timeout=1)

with subtest("wait_for_closed_port, wrongly: while somebody listens"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_closed_port(8000, timeout=1)

with subtest("wait_for_closed_port: that closes later"):
    later(1, "pkill -f http.server")
    machine.wait_for_closed_port(8000)

with subtest("wait_for_open_unix_socket: of streams"):
    machine.wait_for_open_unix_socket("/run/dbus/system_bus_socket")

with subtest("wait_for_open_unix_socket: of datagrams"):
    machine.wait_for_open_unix_socket("/run/systemd/journal/socket", is_datagram=True)

with subtest("wait_for_open_unix_socket: of a path that starts where commands do"):
    later(1, "exec nc -lU sub.socket")
    machine.wait_for_open_unix_socket("sub.socket", timeout=60)

with subtest("wait_for_open_unix_socket, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_open_unix_socket("/run/nobody", timeout=1)

with subtest("wait_for_console_text: that comes later"):
    later(1, "echo the needle is 42 > /dev/console")
    machine.wait_for_console_text(r"needle is \d+")

with subtest("wait_for_console_text, wrongly: consumed already"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_console_text(r"needle is \d+", timeout=1)

with subtest("get_console_log: has it"):
    t.assertIn("the needle is 42", machine.get_console_log())

with subtest("get_console_log, wrongly: has nothing of the future"):
    t.assertNotIn("not printed", machine.get_console_log())

with subtest("wait_until_tty_matches: what getty says"):
    machine.wait_until_tty_matches("1", "machine login: ")

with subtest("wait_until_tty_matches, wrongly: within its time only"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_until_tty_matches("1", "nobody says this", timeout=1)

with subtest("get_tty_text: the whole screen"):
    t.assertIn("machine login:", machine.get_tty_text("1"))

with subtest("get_tty_text, wrongly: of no such terminal"):
    with t.assertRaises(RequestedAssertionFailed):
        machine.get_tty_text("99")

with subtest("dump_tty_contents: to the console"):
    machine.dump_tty_contents("1")
    machine.wait_for_console_text("machine login:", timeout=60)

with subtest("dump_tty_contents, wrongly: of no such terminal"):
    machine.dump_tty_contents("99")

machine.crash()
