# Machine files under `nixos-test-driver`.
#: ways: agent qemu
#: file: a
#: file: b
import resource
import threading

from test_driver.errors import MachineError, RequestedAssertionFailed

os.environ["QEMU_KERNEL_PARAMS"] = "said=later"
start_all()

with subtest("start_all: boots all machines"):
    for m in machines:
        m.connect()
        t.assertTrue(m.booted and m.is_up())

with subtest("start_all: variables are looked up at the start"):
    a.succeed("grep -w said=later /proc/cmdline")

with subtest("start_all, wrongly: what runs is not started again"):
    a.succeed("touch /run/mark")
    start_all()
    a.succeed("test -e /run/mark")

with subtest("succeed: from two threads at once"):
    answers = {}

    def ask(m: BaseMachine) -> None:
        answers[m.name] = m.succeed("sleep 1; uname -n; echo $$")

    threads = [threading.Thread(target=ask, args=[m]) for m in (a, b, a)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    t.assertEqual(sorted(answers), ["a", "b"])

with subtest("succeed, wrongly: a thread has its own error"):
    errors = []

    def fail(m: BaseMachine) -> None:
        try:
            m.succeed("exit 3")
        except RequestedAssertionFailed as error:
            errors.append(str(error))

    thread = threading.Thread(target=fail, args=[a])
    thread.start()
    thread.join()
    t.assertEqual(errors, ["command `exit 3` failed (exit code 3)"])

with subtest("shared_dir: the same for all machines and the host"):
    for m in machines:
        m.succeed("mkdir -p /tmp/shared && mount -t virtiofs shared /tmp/shared")
    a.succeed("echo from a >/tmp/shared/note")
    t.assertEqual(b.succeed("cat /tmp/shared/note"), "from a\n")
    t.assertEqual((b.shared_dir / "note").read_text(), "from a\n")

with subtest("shared_dir, wrongly: xchg is a machine's own"):
    for m in machines:
        m.succeed("mkdir -p /tmp/xchg && mount -t virtiofs xchg /tmp/xchg")
    a.succeed("touch /tmp/xchg/own")
    b.fail("test -e /tmp/xchg/own")
    t.assertTrue((a.state_dir / "xchg/own").exists())

with subtest("state_dir: disks are made there"):
    t.assertEqual((a.state_dir / "made.img").stat().st_size, 16 << 20)
    a.succeed("test -b /dev/vda")

with subtest("state_dir, wrongly: no two machines have the same"):
    t.assertNotEqual(a.state_dir, b.state_dir)

with subtest("copy_from_machine: to the output directory"):
    a.succeed("mkdir /tmp/results && echo good >/tmp/results/one")
    a.copy_from_machine("/tmp/results", "kept")
    t.assertEqual((a.out_dir / "kept/results/one").read_text(), "good\n")

with subtest("copy_from_machine, wrongly: the host cannot take all of it"):
    a.succeed("head -c 100000 /dev/zero >/tmp/big")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with t.assertRaisesRegex(MachineError, "File too large"):
            a.copy_from_machine("/tmp/big")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    a.copy_from_machine("/tmp/big")
    t.assertEqual((a.out_dir / "big").stat().st_size, 100_000)

with subtest("copy_from_machine, wrongly: there is no such file"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "No such file"):
        a.copy_from_machine("/tmp/no-such")

with subtest("join_all: waits until all are off"):
    for m in machines:
        m.execute("poweroff", check_output=False)
    join_all()
    t.assertFalse(a.booted or b.booted)

with subtest("join_all: a machine that panicked is off"):
    a.start()
    a.execute("echo c >/proc/sysrq-trigger", check_output=False)
    join_all()
    t.assertFalse(a.booted)

with subtest("join_all, wrongly: a machine that stands still"):
    a.start()
    a.execute("halt -f", check_output=False)
    with t.assertRaisesRegex(MachineError, "a halted"):
        join_all()
