"""The script of a test with one machine, which times what it does."""

import json
import os
import time

steps = []


def step(name, work, since=None):
    """Times `work`, or all since then."""
    began = since or time.monotonic_ns()
    work()
    steps.append([name, time.monotonic_ns() - began])


# Since the exec of `firn test`.
step("first command", lambda: machine.succeed("true"), int(os.environ["FIRN_BENCH_BEGAN"]))
step("50 times true", lambda: [machine.succeed("true") for _ in range(50)])
step("4 MiB of output", lambda: machine.succeed("head -c 4194304 /dev/zero | tr '\\0' x"))
file = os.environ["FIRN_BENCH_FILE"]
step("copy 16 MiB to it", lambda: machine.copy_from_host(file, "/tmp/file"))
step("and from it", lambda: machine.copy_from_machine("/tmp/file"))
with open(os.environ["FIRN_BENCH_STEPS"], "w") as results:
    json.dump(steps, results)
