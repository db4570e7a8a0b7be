# The screen, the keyboard, and what is read.
#: ways: agent qemu
#: [nodes.machine]
#: memory = 256
#: screen = { width = 320, height = 200 }
#: [nodes.bare]
#: memory = 256
#: screen = false
#: keyboard = false
import re
import time
from pathlib import Path

from test_driver.errors import MachineError, RequestedAssertionFailed
from test_driver.machine import ocr

# Under QEMU there is another one.
NAMED = "grep -iElm1 '(firn|virtio) keyboard' /sys/class/input/event*/device/name"
KEYBOARD = f"/dev/input/$({NAMED} | cut -d/ -f5)"
EVENTS = "od -An -v -tu2 -w24 /tmp/events | awk '$9 == 1 {print $10, $11}'"


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    t.assertEqual(head[:8], b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def show(text: str) -> None:
    machine.succeed(f"printf '\\033[2J\\033[H\\033[?25l{text}' >/dev/tty1")


with subtest("screenshot, wrongly: of what does not run"):
    with t.assertRaisesRegex(MachineError, "is not running"):
        machine.screenshot("early")

machine.start(allow_reboot=True)

with subtest("screenshot: black before anything is shown"):
    machine.screenshot("early")
    t.assertEqual(png_size(machine.out_dir / "early.png"), (1024, 768))

with subtest("wait_for_text: as soon as there is an agent, what a text console shows"):
    show("The disk is locked: passphrase please")
    machine.wait_for_text(r"disk is locked:\s+pass", timeout=300)
    machine.wait_for_text(re.compile("PLEASE", re.IGNORECASE), timeout=300)
    t.assertTrue(machine.connected)

with subtest("get_screen_text: exact on a text console"):
    t.assertEqual(machine.get_screen_text().rstrip(), "The disk is locked: passphrase please")

with subtest("get_screen_text_variants: that, and what is read"):
    show("hello")
    exact, *read = machine.get_screen_text_variants()
    t.assertEqual((exact.strip(), len(read)), ("hello", 3))

with subtest("screenshot: the name as it is, or in the output directory"):
    machine.screenshot("shown")
    machine.screenshot(str(machine.out_dir / "shown.here"))
    t.assertEqual(
        (machine.out_dir / "shown.png").read_bytes(), (machine.out_dir / "shown.here").read_bytes()
    )

with subtest("screenshot: of the size that the screen has"):
    t.assertEqual(png_size(machine.out_dir / "shown.png"), (320, 200))

with subtest("perform_ocr_on_screenshot: of a file"):
    texts = ocr.perform_ocr_variants_on_screenshot(machine.out_dir / "shown.png")
    t.assertEqual(len(texts), 3)
    t.assertIn(ocr.perform_ocr_on_screenshot(machine.out_dir / "shown.png"), texts)
    t.assertTrue(any("hello" in text for text in texts), texts)

with subtest("perform_ocr_on_screenshot, wrongly: of what is no picture"):
    with t.assertRaisesRegex(OSError, "not a PNG or PPM"):
        ocr.perform_ocr_on_screenshot(Path(__file__))

with subtest("screenshot, wrongly: into a directory that is not there"):
    with t.assertRaisesRegex(MachineError, "there is no directory /nonexistent"):
        machine.screenshot("/nonexistent/picture")

with subtest("wait_for_text, wrongly: what is not there"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "timed out after 1 seconds"):
        machine.wait_for_text("nothing like that", timeout=1)

with subtest("wait_for_text, wrongly: a regular expression that is none"):
    with t.assertRaises(re.error):
        machine.wait_for_text("(")

with subtest("send_chars: all that an American keyboard types"):
    machine.execute("head -n 1 </dev/tty1 >/tmp/typed 2>/dev/null", check_output=False)
    machine.wait_until_succeeds("pidof head", timeout=60)
    typed = "the Quick BROWN fox: 0123456789 `-=[]\\;',./~!@#$%^&*()_+{}|\"<>?"
    machine.send_chars(typed + "\n")
    machine.wait_until_succeeds("test -s /tmp/typed", timeout=60)
    t.assertEqual(machine.succeed("cat /tmp/typed"), typed + "\n")

with subtest("send_chars, wrongly: what no key types"):
    with t.assertRaisesRegex(MachineError, "no key for 'é'"):
        machine.send_chars("caffé")

with subtest("send_key: names, chords, scan codes and characters, as Linux numbers them"):
    machine.execute(f"exec dd bs=24 if={KEYBOARD} of=/tmp/events", check_output=False)
    machine.wait_until_succeeds("test -e /tmp/events", timeout=60)
    for key in ("f1", "ctrl-alt_r-a", "0x2b", "0xc8", "A"):
        machine.send_key(key)
    wanted = "59+ 59- 29+ 100+ 30+ 30- 100- 29- 43+ 43- 103+ 103- 42+ 30+ 30- 42-"
    lines = "\n".join(f"{key[:-1]} {int(key[-1] == '+')}" for key in wanted.split()) + "\n"
    retry(lambda _last: machine.succeed(EVENTS) == lines, timeout=60)
    t.assertEqual(machine.succeed(EVENTS), lines)

with subtest("send_key: waits for as long as it is told"):
    began = time.monotonic()
    machine.send_key("shift", delay=1, log=False)
    t.assertGreater(time.monotonic() - began, 1)
    machine.send_key("shift", delay=None)

with subtest("send_key, wrongly: a key that is none, and others near it"):
    with t.assertRaisesRegex(MachineError, "no key `delet`; close to it: delete"):
        machine.send_key("ctrl-alt-delet")
    with t.assertRaisesRegex(MachineError, "the key itself is `minus`"):
        machine.send_key("ctrl--")

with subtest("send_monitor_command: sendkey and screendump"):
    machine.succeed("rm /tmp/events; kill $(pidof dd)")
    machine.execute(f"exec dd bs=24 if={KEYBOARD} of=/tmp/events", check_output=False)
    machine.wait_until_succeeds("test -e /tmp/events", timeout=60)
    machine.send_monitor_command("sendkey ret 20")
    keys = [{"type": "qcode", "data": "a"}, {"type": "number", "data": 0x1D}]
    machine.qmp_client.send("send-key", {"keys": keys, "hold-time": 20})
    lines = "28 1\n28 0\n30 1\n29 1\n29 0\n30 0\n"
    # What is held for a time may be overtaken by what is not.
    retry(lambda _last: machine.succeed(EVENTS) == lines, timeout=60)
    for down in (True, False):
        event = {"type": "key", "data": {"down": down, "key": {"type": "qcode", "data": "b"}}}
        machine.qmp_client.send("input-send-event", {"events": [event]})
    lines += "48 1\n48 0\n"
    retry(lambda _last: machine.succeed(EVENTS) == lines, timeout=60)
    t.assertEqual(machine.succeed(EVENTS), lines)
    machine.send_monitor_command(f"screendump {machine.out_dir}/shown.ppm")
    width, height = png_size(machine.out_dir / "shown.png")
    head = f"P6\n{width} {height}\n255\n".encode()
    t.assertEqual((machine.out_dir / "shown.ppm").read_bytes()[: len(head)], head)

with subtest("send_monitor_command, wrongly: no such key"):
    with t.assertRaisesRegex(
        MachineError, "sendkey: there is no key `ent`; close to it: .*kp_enter"
    ):
        machine.send_monitor_command("sendkey ent")

with subtest("reboot: by Ctrl+Alt+Delete, where there is a keyboard"):
    machine.succeed("touch /run/before")
    machine.reboot()
    machine.fail("test -e /run/before")

with subtest("wait_for_text, wrongly: of a guest that powers off"):
    machine.execute("(sleep 1; poweroff -f) >&2 &", check_return=False)
    with t.assertRaisesRegex(MachineError, "powered off"):
        machine.wait_for_text("nothing like that", timeout=300)

# The names of the calls are hidden from what looks at scripts before they run.
bare.start()


def hidden(name: str, *arguments: object) -> None:
    part = "keyboard = true" if name.startswith("send") else 'screen = "plain"'
    with t.assertRaisesRegex(MachineError, f"bare has no .* its description says `{part}`"):
        getattr(bare, name)(*arguments)


with subtest("get_screen_text, wrongly: of a machine that has none"):
    hidden("get_screen_" + "text")

with subtest("get_screen_text_variants, wrongly: of a machine that has none"):
    hidden("get_screen_text_" + "variants")

with subtest("screenshot, wrongly: of a machine that has none"):
    hidden("screen" + "shot", "picture")

with subtest("send_key, wrongly: to a machine that has none"):
    hidden("send_" + "key", "ret")
    hidden("send_" + "chars", "text")
