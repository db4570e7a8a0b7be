# QEMU's monitors.
#: ways: agent qemu
#: [nodes.machine]
#: memory = 256
#: disks = [{ size = 5 }]
#: balloon = true
import time

from test_driver.errors import MachineError
from test_driver.machine import CHAR_TO_KEY, make_command
from test_driver.machine.qmp import QMPAPIError, QMPSession

machine.connect()

with subtest("send_monitor_command: help is long, and ends with the prompt"):
    help_text = machine.send_monitor_command("help")
    t.assertGreater(help_text.count("\r\n"), 60)
    t.assertIn("balloon target -- ", help_text)
    t.assertTrue(help_text.endswith("(qemu) "))
    t.assertIn("set_link name on|off", machine.send_monitor_command("help set_link"))


def info(what: str) -> str:
    return machine.send_monitor_command(f"info {what}")


with subtest("send_monitor_command: info"):
    t.assertEqual(info("status"), "info status\r\nVM status: running\r\n(qemu) ")
    t.assertIn("machine\r\n", info("name"))
    t.assertIn("* CPU #0", info("cpus"))
    t.assertRegex(info("block"), r"virtio0.*: .*/disk0.img \(raw\)")
    network = info("network")
    for card, mac in [("virtio-net-pci.0", "52:54:00:12:34:56"), ("virtio-net-pci.1", "52:54:00:")]:
        t.assertRegex(network, f"{card}: .*macaddr={mac}")
    t.assertRegex(machine.send_monitor_command("info"), "info status +-- ")

with subtest("send_monitor_command: info about firn itself"):
    t.assertRegex(info("version"), r"\d+\.\d+\.\d+ \(firn\)")
    t.assertIn("kvm support: enabled", info("kvm"))
    kvm = machine.qmp_client.send("query-kvm")
    t.assertEqual(kvm, {"return": {"enabled": True, "present": True}})

with subtest("send_monitor_command: the balloon"):
    total = int(machine.succeed("awk '/MemFree/ {print $2}' /proc/meminfo"))
    t.assertIn("balloon: actual=256", info("balloon"))
    machine.send_monitor_command("balloon 200")
    retry(lambda _: "actual=200" in info("balloon"))
    machine.send_monitor_command("balloon 256")
    retry(lambda _: "actual=256" in info("balloon"))

with subtest("send_monitor_command, wrongly: what a machine has nothing for"):
    for command, why in {
        "device_add usb-storage,id=stick,drive=stick": "has the devices that its description says",
        "device_del stick": "has the devices that its description says",
        "drive_add 0 id=stick,if=none,file=stick,format=raw": "has the devices that its",
        "mouse_move 10 10": "input-send-event moves",
        "info registers": "does not know what `info registers` would do",
    }.items():
        with t.assertRaisesRegex(MachineError, why):
            machine.send_monitor_command(command)
    with t.assertRaisesRegex(QMPAPIError, "CommandNotFound"):
        machine.qmp_client.send("device_add", {"driver": "usb-storage"})

qmp = machine.qmp_client


def told(command: str, **arguments: object):
    return qmp.send(command, arguments)["return"]


with subtest("qmp_client: the whole reply"):
    t.assertIsInstance(qmp, QMPSession)
    t.assertEqual(list(qmp.send("query-status")), ["return"])
    t.assertLessEqual({"status": "running", "running": True}.items(), told("query-status").items())
    t.assertEqual(told("query-name"), {"name": "machine"})
    t.assertEqual(set(told("query-version")["qemu"]), {"major", "minor", "micro"})
    t.assertEqual([cpu["cpu-index"] for cpu in told("query-cpus-fast")], [0])
    t.assertEqual(told("query-block")[0]["inserted"]["drv"], "raw")
    t.assertEqual(told("query-balloon"), {"actual": 256 << 20})
    t.assertIn({"name": "query-block"}, told("query-commands"))
    name = {"command-line": "info name"}
    t.assertEqual(told("human-monitor-command", **name), "machine\r\n")

with subtest("qmp_client: events, each once"):
    list(qmp.events())
    t.assertEqual(told("stop"), {})
    t.assertEqual(told("query-status")["status"], "paused")
    event = qmp.wait_for_event(timeout=60)
    t.assertEqual((event["event"], set(event["timestamp"])), ("STOP", {"seconds", "microseconds"}))
    machine.qmp_client.send("cont")
    t.assertEqual([event["event"] for event in qmp.events()], ["RESUME"])
    t.assertEqual(list(qmp.events()), [])

with subtest("qmp_client, wrongly: an error reply is raised"):
    for command, class_name in {
        "no-such-command": "CommandNotFound",
        "set_link": "GenericError",
        "balloon": "GenericError",
    }.items():
        try:
            qmp.send(command, {"up": "yes"})
        except QMPAPIError as error:
            t.assertEqual((error.class_name, error.transaction_id), (class_name, None))
            t.assertTrue(error.description)
        else:
            raise ValueError(f"{command} was taken")

with subtest("qmp_client, wrongly: no event in time"):
    with t.assertRaises(TimeoutError):
        qmp.wait_for_event(timeout=0.2)

with subtest("qmp_client, wrongly: closed"):
    qmp.close()
    with t.assertRaisesRegex(ValueError, "closed"):
        qmp.send("query-status")
    machine.qmp_client.send("query-status")

with subtest("wait_for_qmp_event: the first that the filter takes"):
    machine.send_monitor_command("stop")
    machine.send_monitor_command("cont")
    event = machine.wait_for_qmp_event(lambda event: event["event"] == "RESUME", timeout=60)
    t.assertEqual(event["event"], "RESUME")

with subtest("wait_for_qmp_event, wrongly: within its time only"):
    began = time.monotonic()
    with t.assertRaises(TimeoutError):
        machine.wait_for_qmp_event(lambda event: event["event"] == "RESUME", timeout=1)
    t.assertGreaterEqual(time.monotonic(), began + 1)

with subtest("wait_for_qmp_event, wrongly: what the filter raises comes through"):
    machine.send_monitor_command("stop")
    machine.send_monitor_command("cont")
    with t.assertRaises(KeyError):
        machine.wait_for_qmp_event(lambda event: event["no such key"])

with subtest("send_monitor_command, wrongly: what has stopped is stopped once"):
    list(machine.qmp_client.events())
    for command, status in [("stop", "paused"), ("stop", "paused"), ("cont", "running")]:
        machine.send_monitor_command(command)
        t.assertIn(f"VM status: {status}", info("status"))
    machine.send_monitor_command("cont")
    seen = [event["event"] for event in machine.qmp_client.events()]
    t.assertEqual(seen, ["STOP", "RESUME"])

with subtest("make_command: words as they are"):
    t.assertEqual(machine.succeed(make_command(["echo", "a  b", 3, "$HOME"])), "a  b 3 $HOME\n")

with subtest("make_command, wrongly: what is no list of words"):
    with t.assertRaises(TypeError):
        make_command(4)  # type: ignore # ty: ignore

with subtest("CHAR_TO_KEY: what types a character"):
    keys = [CHAR_TO_KEY[char] for char in "A!_;\n "]
    t.assertEqual(keys, ["shift-a", "shift-0x02", "shift-0x0C", "0x27", "ret", "spc"])
    t.assertEqual(len(CHAR_TO_KEY), 60)

with subtest("CHAR_TO_KEY, wrongly: those that are their own key"):
    t.assertFalse(set("abcxyz0189") & set(CHAR_TO_KEY))

with subtest("wait_for_shutdown: a kernel that panicked is off"):
    machine.execute("echo c >/proc/sysrq-trigger", check_output=False)
    machine.wait_for_shutdown()
    t.assertFalse(machine.booted)
    t.assertIn("sysrq triggered crash", machine.get_console_log())

with subtest("wait_for_shutdown, wrongly: one that stands still is not"):
    machine.execute("halt -f", check_output=False)
    with t.assertRaisesRegex(MachineError, "machine halted"):
        machine.wait_for_shutdown()

with subtest("send_monitor_command, wrongly: a machine that is off can neither stop nor go on"):
    for command in ("stop", "cont"):
        with t.assertRaisesRegex(MachineError, "machine is not running"):
            machine.send_monitor_command(command)
