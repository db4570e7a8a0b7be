"""What machines get because their script needs it."""

import ast
import tempfile
import unittest
from pathlib import Path

from firn._firn import Test
from firn.check import check_needs
from firn.needs import Need, needs
from firn.parts import needs_of, parts_of, supplied

NODES = """
[nodes.server]
[nodes.client-1]
[nodes.blind]
screen = false
keyboard = false
"""


def found(script: str) -> list[tuple[str, str | None]]:
    """Give what a script needs, and of which machine."""
    return [(n.part, n.variable) for n in needs(ast.parse(script), ["server", "client_1"])]


class Needs(unittest.TestCase):
    """What is seen in a script."""

    def test_calls(self) -> None:
        """Calls need a part of the machine that they are of, or of any machine."""
        self.assertEqual(found("server.screenshot('a')"), [("screen", "server")])
        self.assertEqual(found("client_1.send_key('a')"), [("keyboard", "client_1")])
        self.assertEqual(found("machines[0].send_chars('a')"), [("keyboard", None)])
        self.assertEqual(found("read = server.get_screen_text"), [("screen", "server")])
        self.assertEqual(found("def f(m): m.wait_for_text('a')"), [("screen", None)])
        self.assertEqual(found("for server in machines: server.wait_for_x()"), [("screen", None)])
        self.assertEqual(found("def f(server): server.wait_for_x()"), [("screen", None)])

    def test_commands(self) -> None:
        """Commands to QEMU's monitors are seen wherever they stand."""
        self.assertEqual(found("server.send_monitor_command(f'sendkey {k}')"), [("keyboard", None)])
        self.assertEqual(found("run('screendump', {})"), [("screen", None)])
        parts = [("keyboard", None), ("tablet", None)]
        self.assertEqual(found("qmp.send('input-send-event', {})"), parts)

    def test_others(self) -> None:
        """Other names, and texts that name calls, need nothing."""
        self.assertEqual(found("server.succeed('screenshot')\nsubtest('send_key')"), [])
        self.assertEqual(found("getattr(server, 'screen' + 'shot')"), [])
        need = next(needs(ast.parse("1\n  \nx.screenshot(y)"), []))
        self.assertEqual(need, Need(3, 1, "screenshot", "screen", None))


class Supply(unittest.TestCase):
    """What machines have then."""

    def read(self, script: str) -> Test:
        """Read a test with this script."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "test.toml")
            path.write_text(f"test_script = '''{script}'''\n{NODES}")
            return Test.from_toml_file(path)

    def test_supplied(self) -> None:
        """A machine gets what is not seen to be needed by none."""
        test = self.read("server.screenshot('a')\nmachines[0].send_key('a')")
        self.assertEqual(parts_of(test), ["keyboard", "screen"])
        self.assertEqual(parts_of(test, everything=True), ["screen", "keyboard", "tablet"])
        self.assertEqual(test.without("screen"), ["blind"])
        # What a description says stays.
        for everything in (False, True):
            self.assertEqual(supplied(test, everything).without("keyboard"), ["blind"])
        with self.assertRaisesRegex(ValueError, 'unknown part "mouse" of a machine'):
            test.supplied(["mouse"])

    def test_unparsable(self) -> None:
        """A script that is none needs nothing: running it says what is wrong."""
        self.assertEqual(needs_of(self.read(""), "if"), [])

    def test_check(self) -> None:
        """`firn check` tells of calls that cannot work."""
        script = "\nblind.screenshot('a')\nserver.screenshot('b')\nmachines[0].send_key('a')\n"
        self.assertEqual(
            list(check_needs(script, "s.py", self.read(script))),
            [
                "s.py:2:1: error[no-screen] `screenshot` needs a screen, and `blind` has "
                "`screen = false`"
            ],
        )


if __name__ == "__main__":
    unittest.main()
