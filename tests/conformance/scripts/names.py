# The names in a script.
#: ways: agent qemu
#: none: a-b
#: none: c
import socket

with subtest("machines: a variable for each, other characters replaced"):
    t.assertEqual([m.name for m in machines], ["a-b", "c"])
    t.assertEqual([a_b.name, c.name], ["a-b", "c"])

with subtest("pythonize_name: as the variables are called"):
    from test_driver.driver import pythonize_name

    t.assertEqual([pythonize_name(m.name) for m in machines], [m.variable for m in machines])

with subtest("pythonize_name, wrongly: what cannot begin a name"):
    t.assertEqual(pythonize_name("1-a.b"), "__a_b")

with subtest("machines, wrongly: no alias where there are several"):
    t.assertNotIn("machine", globals())

with subtest("machines_qemu: all of them"):
    t.assertEqual(machines_qemu, machines)

with subtest("machines_qemu, wrongly: none is a container"):
    t.assertFalse(any(m in machines_nspawn for m in machines_qemu))

with subtest("machines_nspawn: none yet"):
    t.assertEqual(machines_nspawn, [])

with subtest("machines_nspawn, wrongly: containers say that they are not there"):
    from test_driver.errors import MachineError
    from test_driver.machine import NspawnMachine

    with t.assertRaisesRegex(MachineError, "not supported yet"):
        NspawnMachine()

with subtest("vlans: by number"):
    t.assertEqual([vlan.nr for vlan in vlans], [1])
    t.assertEqual(vlan1.nr, 1)

with subtest("vlans, wrongly: no others"):
    t.assertNotIn("vlan2", globals())

with subtest("driver: the lists and the log"):
    t.assertEqual(driver.machines, machines)
    t.assertEqual(driver.vlans, vlans)

with subtest("driver, wrongly: it does not make what it does not know"):
    with t.assertRaises(AttributeError):
        driver.no_such_thing  # type: ignore

with subtest("BaseMachine: for annotations"):

    def named(m: BaseMachine) -> str:
        return m.name

    t.assertEqual(named(c), "c")
    t.assertIsInstance(c, BaseMachine)

with subtest("BaseMachine, wrongly: a vlan is none"):
    t.assertNotIsInstance(vlan1, BaseMachine)

with subtest("QemuMachine: the class of machines"):
    t.assertIsInstance(c, QemuMachine)

with subtest("QemuMachine, wrongly: no list of machines is one"):
    t.assertNotIsInstance(machines, QemuMachine)

with subtest("NspawnMachine: no machine is one yet"):
    t.assertFalse(any(isinstance(m, NspawnMachine) for m in machines))

with subtest("NspawnMachine, wrongly: says when it is used that it is not there"):
    with t.assertRaisesRegex(MachineError, "not supported yet"):
        NspawnMachine()

with subtest("dump_machine_ssh: nothing without the backdoor"):
    t.assertIsNone(dump_machine_ssh())

with subtest("dump_machine_ssh, wrongly: takes no arguments"):
    with t.assertRaises(TypeError):
        dump_machine_ssh(1)  # type: ignore

with subtest("VLan: its number, its process, and stop"):
    from test_driver.vlan import VLan

    t.assertIsInstance(vlan1, VLan)
    t.assertEqual(vlan1.pid, os.getpid())
    t.assertTrue((vlan1.socket_dir / "ctl").is_socket())
    vlan1.stop()

with subtest("VLan, wrongly: no process of its own"):
    t.assertFalse(hasattr(vlan1, "process"))
    with t.assertRaisesRegex(MachineError, "vlan1 has no"):
        _ = vlan1.process

with subtest("driver.config: what the framework has written"):
    t.assertEqual(sorted(driver.config.vms), ["a-b", "c"])
    t.assertEqual(driver.config.vlans, [1])
    t.assertEqual(driver.config.test_script.read_text(), driver.tests)

with subtest("driver.config, wrongly: containers are not there"):
    t.assertEqual(driver.config.containers, {})

with subtest("test_driver.driver: pythonize_name and load_driver_configuration"):
    from test_driver.driver import load_driver_configuration, pythonize_name

    t.assertEqual([pythonize_name(m.name) for m in machines], ["a_b", "c"])

with subtest("test_driver.driver, wrongly: a file that is none"):
    with t.assertRaisesRegex(ValueError, "/no/such"):
        load_driver_configuration("/no/such")

with subtest("test_driver.duration: and test_driver.config can be imported"):
    from test_driver import config, duration

    t.assertEqual(duration.seconds(1.5), 1.5)
    t.assertIs(config.load_driver_configuration, load_driver_configuration)

with subtest("test_driver.duration, wrongly: a text is none"):
    with t.assertRaises(TypeError):
        duration.seconds("1")  # type: ignore

with subtest("test_driver.efi: can be imported"):
    from test_driver.efi import anything

    t.assertNotIsInstance(c, anything)

with subtest("test_driver.efi, wrongly: says when it is used that there is no firmware"):
    with t.assertRaisesRegex(MachineError, "no UEFI firmware"):
        anything()

with subtest("log: goes to loggers that are added"):
    from test_driver.logger import AbstractLogger, CompositeLogger, LogLevel

    t.assertIsInstance(log, CompositeLogger)
    t.assertIsInstance(log, AbstractLogger)
    before = len(log.logger_list)
    log.add_logger(CompositeLogger([]))
    t.assertEqual(len(log.logger_list), before + 1)
    log.set_log_level(LogLevel.INFO)
    with log.nested("step", {"machine": "c"}):
        log.log("hello", {"machine": "c"})
        log.log_serial("line", "c")

with subtest("log, wrongly: an error ends the run"):
    with t.assertRaises(SystemExit) as ended:
        CompositeLogger([]).error("no")
    t.assertEqual(ended.exception.code, 1)

with subtest("os: the module"):
    t.assertTrue(os.path.isdir(a_b.state_dir))

with subtest("os, wrongly: other modules are not there by themselves"):
    t.assertNotIn("sys", globals())

with subtest("start_all: fails if a machine cannot start"):
    with t.assertRaisesRegex(MachineError, "a-b cannot start"):
        start_all()

with subtest("start_all, wrongly: what failed is not up"):
    t.assertFalse(a_b.is_up() or a_b.booted)

with subtest("join_all: nothing to wait for when all are off"):
    join_all()
    t.assertFalse(a_b.booted or c.booted)

with subtest("join_all, wrongly: takes no arguments"):
    with t.assertRaises(TypeError):
        join_all(1)  # type: ignore

with subtest("debug.breakpoint: nothing without the hook"):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        debug.breakpoint(host="127.0.0.1", port=taken.getsockname()[1])
        debug.breakpoint()
        # Nobody has come to listen, or to be listened to.
        taken.settimeout(0)
        with t.assertRaises(BlockingIOError):
            taken.accept()

with subtest("debug.breakpoint, wrongly: unknown arguments"):
    with t.assertRaises(TypeError):
        debug.breakpoint(prot=1)  # type: ignore
