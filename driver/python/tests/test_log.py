"""The log of a run: its classes, its reports, and what of it reaches a terminal."""

import contextlib
import json
import os
import re
import signal
import subprocess
import unicodedata
import unittest
import xml.etree.ElementTree as ET

from .support import NODE, RunTest, runner


class Log(RunTest):
    """What comes out of runs."""

    def setUp(self) -> None:
        """Ask for no colours."""
        super().setUp()
        self.environment = {**os.environ, "TMPDIR": str(self.state), "NO_COLOR": ""}

    def command(self, script: str, node: str = NODE) -> list[str]:
        """Write a test, and give what runs it."""
        file = self.dir / "test.toml"
        file.write_text(f"test_script = {json.dumps(script)}\n{node.format(file=file)}")
        return runner(file, str(self.dir), junit="junit.xml")

    def spawn(self, command: list[str]) -> "subprocess.Popen[str]":
        """Start a run."""
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def run_test(self, script: str, node: str = NODE) -> tuple[int, str, str]:
        """Run a test to its end."""
        with self.spawn(self.command(script, node)) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def test_log_classes(self) -> None:
        """Loggers of upstream's names, and one that the script has written, hear of everything."""
        script = f"""
from contextlib import contextmanager
from test_driver.logger import *
heard = []
class Mine(AbstractLogger):
    @contextmanager
    def nested(self, message, attributes={{}}):
        heard.append(("begin", message, attributes))
        yield
        heard.append(("end", message))
    def subtest(self, name, attributes={{}}):
        return self.nested("subtest " + name)
    def log(self, *args): heard.append(args)
    debug = info = warning = error = log_test_error = log
    log_serial = print_serial_logs = set_log_level = log
log.add_logger(Mine())
log.add_logger(XMLLogger({str(self.dir / "own.xml")!r}))
log.add_logger(JunitXMLLogger({str(self.dir / "own-junit.xml")!r}))
with subtest("a"):
    with log.nested("b", {{"machine": "m"}}):
        log.warning({{"any": "thing"}})
    log.log_serial("line", "m")
t.assertEqual(heard, [
    ("begin", "subtest a", {{}}), ("begin", "b", {{"machine": "m"}}),
    ("{{'any': 'thing'}}", {{}}), ("end", "b"), ("line", "m"), ("end", "subtest a"),
])
heard.clear()
serial_stdout_off()
log.log_serial("hidden", "m")
log.set_log_level(LogLevel.WARNING)
log.info("not on the terminal")
machine.shutdown()
with t.assertRaises(Exception): machine.start()
t.assertEqual(heard[:3], [(False,), (LogLevel.WARNING,), ("not on the terminal", {{}})])
t.assertIn("starting vm", str(heard[3]))
with t.assertRaisesRegex(ValueError, "write to itself"): log.add_logger(log)
t.assertEqual(len(log.logger_list), 5)
CompositeLogger([]).info("nowhere")
TerminalLogger().error("this one does not end the run")
try:
    log.error("this one does")
finally:
    print("here")
print("never")
"""
        status, out, err = self.run_test(script)
        self.assertEqual((status, out), (1, "here\n"), err)
        self.assertIn("!!! this one does not end the run\n!!! this one does\n", err)
        self.assertNotIn("not on the terminal", err)
        self.assertIn("not on the terminal", (self.dir / "own.xml").read_text())
        case = ET.parse(self.dir / "own-junit.xml").getroot().find(".//testcase[@name='a']")
        assert case is not None

    def test_reports_of_what_ends_the_run(self) -> None:
        """A report says that a run fails whatever ends it; subtests of one name are one case."""
        failing = "import sys\nwith subtest('same'): pass\nwith subtest('same'): {}"
        for script, status, said in [
            (failing.format("sys.exit(3)"), 3, "the script ended by exit(3)\n"),
            (failing.format("sys.exit('no')"), 1, "the script ended by exit('no')\n"),
            (failing.format("log.error('enough')"), 1, "the script ended by exit(1)\n"),
            (failing.format("sys.exit(0)"), 0, None),
            (failing.format("exit()"), 0, None),
        ]:
            answer = self.run_test(script)
            self.assertEqual(answer[0], status, answer[2])
            self.assertEqual(self.failures(), {"main": said is not None, "same": said is not None})
            self.assertEqual(self.report("main").findtext("system-err"), said)
        waiting = "with subtest('same'):\n    print('here')\n    import time\n    time.sleep(60)"
        for number, said in [
            (signal.SIGINT, "interrupted\n"),
            (signal.SIGTERM, "ended by SIGTERM\n"),
            (signal.SIGHUP, "ended by SIGHUP\n"),
        ]:
            with self.spawn(self.command(waiting)) as process:
                assert process.stdout is not None
                process.stdout.readline()
                process.send_signal(number)
                process.communicate(timeout=60)
            self.assertEqual(process.returncode, 128 + number)
            self.assertEqual(self.failures(), {"main": True, "same": True})
            self.assertEqual(self.report("main").findtext("system-err"), said)
        # What cannot even begin has failed, too.
        self.assertEqual(self.run_test("pass", "[nodes.machine]\ncolour = 'red'")[0], 1)
        self.assertEqual(self.failures(), {"main": True})

    def report(self, case: str) -> ET.Element:
        """Give a case of the JUnit report."""
        found = ET.parse(self.dir / "junit.xml").getroot().find(f".//testcase[@name='{case}']")
        assert found is not None
        return found

    def failures(self) -> dict[str | None, bool]:
        """Give which cases of the JUnit report failed."""
        cases = ET.parse(self.dir / "junit.xml").getroot().iter("testcase")
        return {case.get("name"): case.find("failure") is not None for case in cases}

    def test_terminal(self) -> None:
        """What guests say does not drive the terminal, whoever prints it; colours stay."""
        script = """
import sys, threading
from test_driver.errors import MachineError
hostile = "<\\x1b[2J\\x1b]0;title\\x07\\r\\u009b3Jtext>"
print(hostile, "\\x1b[35mviolet\\x1b[0m")
log.info(hostile)
log.log_test_error(hostile)
machine.log(hostile)
thread = threading.Thread(target=lambda: machine.start(), name=hostile)
thread.start()
thread.join()
with subtest(hostile):
    raise MachineError(hostile)
"""
        status, shown = self.on_terminal(script)
        self.assertEqual(status, 1)
        self.assertEqual(shown.count("3Jtext>"), 10, shown)
        self.assertIn("\x1b[35mviolet\x1b[0m", shown)
        self.assertIn("\x1b[1m\x1b[32mrun the VM test script\x1b[0m", shown)
        left = re.sub(r"\x1b\[\d+m", "", shown.replace("\r\n", "\n"))
        odd = [c for c in left if unicodedata.category(c) == "Cc" and c not in "\t\n"]
        self.assertEqual(odd, [])
        # What goes elsewhere stays as it is.
        self.assertEqual(self.run_test("print('\\x1b[2J')")[1], "\x1b[2J\n")

    def on_terminal(self, script: str) -> tuple[int, str]:
        """Run a script on a terminal; give the status, and what is written there."""
        own, its = os.openpty()
        with subprocess.Popen(
            self.command(script),
            stdin=subprocess.DEVNULL,
            stdout=its,
            stderr=its,
            env=self.environment,
        ) as process:
            os.close(its)
            shown = b""
            # Ends with an error when nobody has the terminal any more.
            with contextlib.suppress(OSError):
                while piece := os.read(own, 65536):
                    shown += piece
            os.close(own)
            return process.wait(timeout=30), shown.decode()


if __name__ == "__main__":
    unittest.main()
