# The script of a test with one machine; `began` is when `firn test` was executed.
import json
import os
import time

steps = []


def step(name, work):
    since = time.monotonic_ns()
    work()
    steps.append([name, time.monotonic_ns() - since])


machine.succeed("true")
steps.append(["first command", time.monotonic_ns() - int(os.environ["FIRN_BENCH_BEGAN"])])
step("50 times true", lambda: [machine.succeed("true") for _ in range(50)])
step("4 MiB of output", lambda: machine.succeed("head -c 3145728 /dev/urandom | base64 -w 0"))
step("copy 16 MiB to it", lambda: machine.copy_from_host(os.environ["FIRN_BENCH_FILE"], "/tmp/file"))
step("copy them from it", lambda: machine.copy_from_machine("/tmp/file"))
with open(os.environ["FIRN_BENCH_STEPS"], "w") as file:
    json.dump(steps, file)
