# Polling conditions while a guest runs.
#: ways: agent qemu
#: [nodes.machine]
import time

from test_driver.errors import RequestedAssertionFailed
from test_driver.polling_condition import PollingConditionError

machine.connect()
limit = 0.0


@polling_condition(seconds_interval=0.5)
def in_time() -> bool:
    return time.monotonic() < limit


def ended_by_condition(wait) -> None:
    global limit
    limit = time.monotonic() + 1
    with t.assertRaisesRegex(PollingConditionError, "Polling condition failed: in_time"):
        with in_time:
            wait()
    # What was waited for would have taken much longer.
    t.assertLess(time.monotonic() - limit, 20)


with subtest("polling_condition: holds while a command runs"):
    limit = time.monotonic() + 60
    with in_time:
        t.assertEqual(machine.succeed("sleep 1; echo done"), "done\n")

with subtest("polling_condition: may call the machine"):

    @polling_condition(seconds_interval=0)
    def responds() -> None:
        machine.succeed("true")

    with responds:
        machine.succeed("sleep 2")

with subtest("polling_condition: both names of the interval, and the description"):

    @polling_condition(interval=60, description="is up")
    def up() -> bool:
        return machine.is_up()

    with up:
        t.assertEqual([c.description for c in driver.polling_conditions], ["is up"])
        driver.check_polling_conditions()
    t.assertEqual((up.description, up.condition.description), ("is up", "is up"))
    for more in ({}, {"timeout_seconds": 60}, {"timeout": 60}):
        up.wait(**more)
    up.wait(60)

with subtest("polling_condition, wrongly: one name of the interval only"):
    with t.assertRaises(TypeError):
        polling_condition(interval=1, seconds_interval=1)

with subtest("retry: both names of the timeout"):
    tries = []
    for more in ({}, {"timeout_seconds": 60}, {"timeout": 60}):
        retry(lambda last: tries.append(last) or True, **more)
    retry(lambda last: tries.append(last) or True, 60)
    t.assertEqual(tries, [False] * 4)

with subtest("retry, wrongly: says how long it took, and the limit"):
    said = r"^action timed out after 1\.\d\d seconds \(timeout=1\)$"
    with t.assertRaisesRegex(RequestedAssertionFailed, said):
        retry(lambda last: False, timeout=1)

with subtest("polling_condition, wrongly: ends a command"):
    ended_by_condition(lambda: machine.succeed("sleep 60"))

with subtest("polling_condition, wrongly: ends wait_until_succeeds"):
    ended_by_condition(lambda: machine.wait_until_succeeds("false"))

with subtest("polling_condition, wrongly: ends wait_until_fails"):
    ended_by_condition(lambda: machine.wait_until_fails("true"))

with subtest("polling_condition, wrongly: ends wait_for_console_text"):
    ended_by_condition(lambda: machine.wait_for_console_text("never printed"))

with subtest("polling_condition, wrongly: ends wait_for_shutdown"):
    ended_by_condition(machine.wait_for_shutdown)

with subtest("polling_condition: the machine still works"):
    machine.succeed("true")
