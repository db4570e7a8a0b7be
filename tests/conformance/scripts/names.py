# The names in a script.
#: none: a-b
#: none: c

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

    with t.assertRaisesRegex(MachineError, "not there yet"):
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

with subtest("join_all, wrongly: takes no arguments"):
    with t.assertRaises(TypeError):
        join_all(1)  # type: ignore

with subtest("debug.breakpoint: nothing without the hook"):
    debug.breakpoint()
    debug.breakpoint(host="127.0.0.1", port=4444)

with subtest("debug.breakpoint, wrongly: unknown arguments"):
    with t.assertRaises(TypeError):
        debug.breakpoint(prot=1)  # type: ignore
