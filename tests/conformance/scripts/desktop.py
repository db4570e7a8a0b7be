# Windows: an X server and a Wayland compositor, with a terminal in each.
#: [nodes.machine]
#: kit = "desktop"
#: screen = "gpu"
#: tablet = true
#: [nodes.plain]
#: kit = "desktop"
#: tablet = true
import re

from test_driver.errors import RequestedAssertionFailed
from test_driver.machine import QemuMachine

# NixOS's display managers start such a target.
TARGET = "[Unit]\nBindsTo=graphical-session.target\n"
XORG = """\
export DISPLAY=:0
Xorg :0 vt7 -keeptty -noreset &
until [ -e /tmp/.X11-unix/X0 ]; do sleep 0.1; done
systemctl --user start desktop.target
xterm -geometry 80x24+100+100 -T 'A terminal' -bg '#123456' &
wait
"""
SWAY = """\
export LANG=C.UTF-8 WLR_RENDERER=pixman
loginctl activate "$XDG_SESSION_ID"
echo 'exec foot -o colors.background=234567' >/run/sway.config
exec sway -c /run/sway.config
"""
STRIPE = "printf '\\033[48;2;171;205;239m%80s'"
STRIPE_COLOUR = 0xABCDEF


def session(m: QemuMachine, name: str, script: str) -> None:
    m.succeed(
        f"mkdir -p /etc/systemd/user; cat >/etc/systemd/user/desktop.target <<'E'\n{TARGET}E",
        f"cat >/run/{name} <<'E'\n{script}E",
        f"systemd-run --unit={name} -p PAMName=login -p TTYPath=/dev/tty7 -p StandardInput=tty "
        f"-p StandardOutput=journal sh /run/{name}",
    )


def pixels(m: QemuMachine, colour: int) -> int:
    file = m.out_dir / f"{m.name}.ppm"
    m.send_monitor_command(f"screendump {file}")
    head, _, picture = file.read_bytes().partition(b"\n255\n")
    t.assertEqual((head, len(picture)), (b"P6\n1024 768", 3 * 1024 * 768))
    return picture.count(colour.to_bytes(3, "big"))


def shows(m: QemuMachine, colour: int, least: int) -> None:
    retry(lambda _last: pixels(m, colour) >= least, timeout=240)


def point(m: QemuMachine, x: int, y: int) -> None:
    axes = {"x": x * 32768 // 1024, "y": y * 32768 // 768}
    events = [{"type": "abs", "data": {"axis": a, "value": v}} for a, v in axes.items()]
    m.qmp_client.send("input-send-event", {"events": events})


def type_into(m: QemuMachine, file: str) -> str:
    m.send_chars(f"echo 'Typed: ~!' >{file}; {STRIPE}\n")
    m.wait_until_succeeds(f"test -s {file}", timeout=120)
    shows(m, STRIPE_COLOUR, 1000)
    return m.succeed(f"cat {file}")


start_all()

with subtest("wait_for_x, wrongly: without an X server"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "timed out after"):
        machine.wait_for_x(timeout=1)

with subtest("get_window_names, wrongly: where nobody can be asked"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "xwininfo.*failed"):
        machine.get_window_names()

with subtest("wait_for_x: once its session is there"):
    for m in (machine, plain):
        session(m, "xserver", XORG)
    machine.wait_for_x(timeout=240)
    t.assertIn("1024x768 pixels", machine.succeed("xdpyinfo"))

with subtest("wait_for_window: by a part of its name"):
    machine.wait_for_window("A term.*", timeout=240)
    machine.wait_for_window(re.compile("a TERM", re.IGNORECASE))
    t.assertEqual(machine.get_window_names(), ["A terminal"])

with subtest("get_window_names: of all that have one"):
    machine.execute("xterm -T other -geometry 20x5-0-0", check_output=False)
    machine.wait_for_window("^other$", timeout=240)
    t.assertEqual(sorted(machine.get_window_names()), ["A terminal", "other"])

with subtest("wait_for_window, wrongly: one that does not come"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "timed out after"):
        machine.wait_for_window("Browser", timeout=1)

with subtest("send_chars: into the window under the pointer"):
    shows(machine, 0x123456, 100_000)
    t.assertEqual(pixels(machine, STRIPE_COLOUR), 0)
    point(machine, 200, 200)
    t.assertEqual(type_into(machine, "/tmp/typed"), "Typed: ~!\n")

with subtest("wait_for_x: on a plain screen"):
    plain.wait_for_x(timeout=240)
    shows(plain, 0x123456, 100_000)
    point(plain, 200, 200)
    t.assertEqual(type_into(plain, "/tmp/typed"), "Typed: ~!\n")
    plain.shutdown()

with subtest("send_chars: into a terminal of a Wayland compositor"):
    machine.succeed("pkill -x Xorg")
    machine.wait_until_fails("systemctl is-active xserver", timeout=120)
    session(machine, "sway", SWAY)
    shows(machine, 0x234567, 100_000)
    t.assertEqual(pixels(machine, 0x123456), 0)
    t.assertEqual(type_into(machine, "/tmp/typed-again"), "Typed: ~!\n")
