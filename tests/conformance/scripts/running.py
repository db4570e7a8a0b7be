# What groups, repeats and checks the parts of a script.
#: ways: agent qemu
#: none: machine
import datetime
import tempfile
import time
from collections.abc import Callable

from test_driver.errors import RequestedAssertionFailed
from test_driver.polling_condition import PollingConditionError


def logged(act: Callable[[], None]) -> str:
    """Give what is written to standard error meanwhile, which is where the log goes."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            act()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read().decode()


with subtest("subtest: nests"):
    order = ["outer"]
    with subtest("subtest: inner"):
        order.append("inner")
        t.assertEqual(order, ["outer", "inner"])

with subtest("subtest, wrongly: an exception comes through"):
    with t.assertRaisesRegex(ValueError, "^mine$"):
        with log.nested("not a case of its own"):
            raise ValueError("mine")

with subtest("retry: until true"):
    calls = []

    def third(last: bool) -> bool:
        calls.append(last)
        return len(calls) == 2

    retry(third, timeout=30)
    t.assertEqual(calls, [False, False])

with subtest("retry: a last call with True"):
    calls.clear()
    retry(lambda last: calls.append(last) or last, datetime.timedelta(milliseconds=100))
    t.assertEqual(calls, [False, True])

with subtest("retry: no time, one call"):
    calls.clear()
    retry(lambda last: calls.append(last) or True, timeout=0)
    t.assertEqual(calls, [True])

with subtest("retry, wrongly: an error after the time"):
    with t.assertRaisesRegex(RequestedAssertionFailed, r"after 0\.\d\d seconds \(timeout=0\.1\)$"):
        retry(lambda last: False, timeout=0.1)

with subtest("retry, wrongly: a bool is no duration"):
    with t.assertRaises(TypeError):
        retry(lambda last: True, timeout=True)

with subtest("t: asserts"):
    t.assertEqual(1, 1)
    t.assertIn("a", "abc")

with subtest("t, wrongly: failing raises the error that scripts know"):
    try:
        t.assertIn("x", "abc")
    except RequestedAssertionFailed as error:
        t.assertIsInstance(error, AssertionError)
    else:
        raise ValueError("it did not fail")

with subtest("polling_condition: holds, and counts None as true"):
    checks = []

    @polling_condition(seconds_interval=0)
    def none() -> None:
        checks.append(None)

    with none:
        machine.shutdown()
    t.assertTrue(checks)

with subtest("polling_condition: checked only within its block"):
    checks.clear()
    machine.shutdown()
    t.assertEqual(checks, [])

with subtest("polling_condition: its description"):

    @polling_condition
    def documented() -> bool:
        """so it is"""
        return True

    @polling_condition(description="given")
    def described() -> bool:
        """not this"""
        return True

    t.assertEqual(none.description, "none")
    t.assertEqual(documented.description, "so it is")
    t.assertEqual(described.description, "given")

with subtest("polling_condition: not entered again by what it calls"):
    depths = []
    depth = 0

    @polling_condition(seconds_interval=0)
    def calls_machine() -> bool:
        global depth
        depth += 1
        depths.append(depth)
        machine.shutdown()
        depth -= 1
        return True

    with calls_machine:
        machine.shutdown()
    t.assertEqual(set(depths), {1})

with subtest("polling_condition: wait"):
    there = time.monotonic() + 0.1

    @polling_condition
    def late() -> bool:
        return time.monotonic() > there

    late.wait(timeout=30)
    t.assertGreater(time.monotonic(), there)

with subtest("polling_condition, wrongly: a command within a block that fails"):

    @polling_condition(seconds_interval=0)
    def never() -> bool:
        return False

    with t.assertRaisesRegex(PollingConditionError, "Polling condition failed: never"):
        with never:
            machine.shutdown()

with subtest("polling_condition, wrongly: raising is failing"):

    @polling_condition(seconds_interval=0)
    def raises() -> bool:
        raise ValueError("no")

    with t.assertRaisesRegex(PollingConditionError, "Polling condition failed: raises"):
        with raises:
            machine.shutdown()

with subtest("polling_condition, wrongly: retry ends"):
    with t.assertRaisesRegex(PollingConditionError, "Polling condition failed: never"):
        with never:
            retry(lambda last: False)

with subtest("polling_condition, wrongly: wait ends after its time"):
    with t.assertRaisesRegex(RequestedAssertionFailed, r"after 0\.\d\d seconds \(timeout=0\.1\)$"):
        never.wait(timeout=0.1)

with subtest("create_machine: of a file's content"):
    made = create_machine({"firn": 1, "name": "made", "kernel": "/no/kernel"})
    t.assertEqual(made.name, "made")
    t.assertFalse(made.booted)

with subtest("create_machine, wrongly: it cannot start without a kernel"):
    with t.assertRaisesRegex(Exception, "/no/kernel"):
        made.start()

with subtest("create_machine, wrongly: a name that is taken"):
    with t.assertRaisesRegex(Exception, "there is a machine made already"):
        create_machine({"firn": 1, "name": "made", "kernel": "/no/kernel"})

with subtest("create_machine, wrongly: what is no machine file"):
    (driver.out_dir / "empty").write_text("\n")
    with t.assertRaisesRegex(ValueError, "is no machine file of firn, it is empty"):
        create_machine(str(driver.out_dir / "empty"))

with subtest("log: messages and steps"):

    def step() -> None:
        with log.nested("step"):
            log.info("told")
            log.warning("careful")
            log.debug("detail")
            log.log("about", {"machine": "machine"})

    t.assertRegex(
        logged(step),
        r"^step\ntold\nwarning: careful\nmachine: about\n\(finished: step, in [\d.]+ seconds\)\n$",
    )

with subtest("log: anything can be a message"):
    t.assertIsNone(log.info({"some": ["thing", 4]}))

with subtest("log, wrongly: there is no such level"):
    with t.assertRaisesRegex(ValueError, "allowed: debug, info, warning, error"):
        log.set_log_level("loud")  # type: ignore

with subtest("serial_stdout_on: shows guests' lines"):
    serial_stdout_on()
    t.assertEqual(logged(lambda: log.log_serial("shown", "machine")), "machine # shown\n")

with subtest("serial_stdout_on, wrongly: takes no arguments"):
    with t.assertRaises(TypeError):
        serial_stdout_on(True)  # type: ignore

with subtest("serial_stdout_off: hides them"):
    serial_stdout_off()
    t.assertEqual(logged(lambda: log.log_serial("hidden", "machine")), "")
    serial_stdout_on()

with subtest("serial_stdout_off, wrongly: takes no arguments"):
    with t.assertRaises(TypeError):
        serial_stdout_off(True)  # type: ignore
