# A machine file that nix/machine-spec.nix makes, under `nixos-test-driver`.
#: ways: agent qemu
#: nix: machine
import base64
import socket

from test_driver.errors import MachineError, RequestedAssertionFailed

with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
os.environ["QEMU_KERNEL_PARAMS"] = "said=later"
os.environ["QEMU_OPTS"] = "-m 768 -nographic"
os.environ["QEMU_NET_OPTS"] = f"hostfwd=tcp:127.0.0.1:{port}-:80"
certificates = machine.state_dir / "host.crt"
certificates.write_text("certificates of the host\n")
os.environ["NIX_SSL_CERT_FILE"] = str(certificates)
secret = bytes(range(256)) * 32
token = machine.state_dir / "token"
token.write_bytes(secret)

with subtest("start: boots the system"):
    machine.start()
    machine.wait_for_unit("sysinit.target")
    t.assertEqual(machine.succeed("readlink /run/current-system"), "/nix/store/toplevel\n")

with subtest("start: with the kernel arguments of system, node and environment"):
    arguments = machine.succeed("cat /proc/cmdline").split()
    of_system = arguments.index("net.ifnames=0")
    of_node = arguments.index("init=/nix/store/toplevel/init")
    own = ["regInfo=/nix/store/none/registration", "console=ttyS0,115200n8", "console=tty0"]
    t.assertEqual(arguments[of_node + 1 : of_node + 5], [*own, "said=later"])
    t.assertLess(of_system, of_node)

with subtest("start: with the memory that QEMU_OPTS wants"):
    total = int(machine.succeed("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
    t.assertTrue(600 << 10 < total <= 768 << 10, total)

with subtest("start: with credentials, from the store and from the state directory"):
    read = "systemd-creds --system cat --transcode=base64 --newline=no"
    t.assertEqual(base64.b64decode(machine.succeed(f"{read} test.token")), secret)
    parameters = base64.b64decode(machine.succeed(f"{read} parameters")).decode()
    t.assertIn(parameters.strip(), machine.succeed("cat /proc/cmdline"))
    machine.wait_for_unit("dbus.socket")
    service = "--pipe --quiet --property=ImportCredential=test.* --property=DynamicUser=yes"
    imported = machine.succeed(f"systemd-run {service} sh -c 'base64 $CREDENTIALS_DIRECTORY/*'")
    t.assertEqual(base64.b64decode(imported), secret)

with subtest("start: with the host's certificates in a share"):
    machine.succeed("mkdir -p /tmp/certs && mount -t virtiofs certs /tmp/certs")
    found = machine.succeed("cd /tmp/certs && stat -c '%n %a' * && cat ca-certificates.crt")
    t.assertEqual(found, "ca-certificates.crt 644\ncertificates of the host\n")

with subtest("start: with disks in their order"):
    disks = machine.succeed("cd /sys/block; grep . vd*/serial vd*/size")
    size = {mib: mib << 11 for mib in (64, 20)}
    wanted = f"vda/serial:root vdb/serial:data vda/size:{size[64]} vdb/size:{size[20]}"
    t.assertEqual(disks.split(), wanted.split())
    t.assertEqual(machine.succeed("blkid -o value -s LABEL /dev/vda"), "nixos\n")
    t.assertTrue((machine.state_dir / "empty0.qcow2").is_file())

with subtest("start: with the user network's card before those of vlans"):
    cards = machine.succeed("cd /sys/class/net; grep . eth*/address").split()
    user, two, one = (line.partition(":")[2] for line in cards)
    t.assertEqual((two, one), ("52:54:00:12:02:05", "52:54:00:12:01:05"))
    machine.wait_until_succeeds("ip -4 addr show eth0 | grep -w 10.0.2.15/24")

with subtest("start: with the port that QEMU_NET_OPTS forwards"):
    machine.succeed("systemd-run sh -c 'echo hello | nc -N -l 80'")
    machine.wait_until_succeeds("ss -H -l -t -n sport = :80 | grep .")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        t.assertEqual(connection.makefile().read(), "hello\n")

with subtest("shared_dir: is a share, and xchg another"):
    for tag in ("shared", "xchg"):
        machine.succeed(f"mkdir -p /tmp/{tag} && mount -t virtiofs {tag} /tmp/{tag}")
    machine.succeed("echo from the guest | tee /tmp/shared/note /tmp/xchg/note")
    for directory in (machine.shared_dir, machine.state_dir / "xchg"):
        t.assertEqual((directory / "note").read_text(), "from the guest\n")

with subtest("shared_dir, wrongly: the store is one that nobody writes to"):
    machine.fail("touch /nix/.ro-store/note")

with subtest("wait_for_console_text: of the journal, and of the root shell beside the agent"):
    machine.wait_for_console_text("connecting to host...")
    machine.succeed("logger --tag test from the journal")
    machine.wait_for_console_text("from the journal")
    t.assertIn("from the journal", machine.get_console_log())

with subtest("wait_for_console_text, wrongly: nothing says that"):
    with t.assertRaisesRegex(RequestedAssertionFailed, "action timed out after 1 seconds"):
        machine.wait_for_console_text("no such line", timeout=1)

machine.shutdown()

with subtest("start, wrongly: a credential is longer than what there is room for"):
    token.write_bytes(bytes(60_000))
    with t.assertRaisesRegex(MachineError, "too long"):
        machine.start()

with subtest("start, wrongly: the file of a credential is missing"):
    token.unlink()
    with t.assertRaisesRegex(MachineError, "/token: No such file"):
        machine.start()
    token.write_bytes(secret)

with subtest("start, wrongly: QEMU_OPTS wants what only QEMU has"):
    os.environ["QEMU_OPTS"] = "-vga qxl"
    with t.assertRaisesRegex(MachineError, "`-vga qxl` is not for firn"):
        machine.start()
    os.environ["QEMU_OPTS"] = ""

with subtest("start, wrongly: QEMU_NET_OPTS wants what only QEMU has"):
    os.environ["QEMU_NET_OPTS"] = "smb=/"
    with t.assertRaisesRegex(MachineError, "`smb=/` is not for firn"):
        machine.start()
