# From systemd in the initrd to the system's own.
#: ways: agent backdoor qemu
#: arguments: init=/tmp/shared/init
#: [nodes.machine]
#: kit = "systemd"
from test_driver.errors import RequestedAssertionFailed

# Process 1 of both stages: systemd takes a system with /etc/initrd-release for an initrd, and goes
# on to what is at /sysroot. Both are made as the kit's own init makes a system.
INIT = r"""#!/nix/store/firn/busybox/sh
export PATH=/nix/store/firn/busybox
# The kit's, with something else in place of its last line, which starts systemd.
kits_init() {
  head -n -1 /nix/store/toplevel/init
  echo "$1"
}
if [ -e /etc/machine-id ]; then
  exec /usr/lib/systemd/systemd
fi
kits_init 'exit 0' >/run/second
kits_init '. /run/rest' >/run/first
cat >/run/rest <<'END'
touch /etc/initrd-release
cd /etc/systemd/system
mkdir -p initrd.target.wants
for unit in */firn-agent.service */backdoor.service; do
  cp -P "$unit" initrd.target.wants/
done
# The test says when to go on.
ln -s /dev/null initrd-parse-etc.service
exec /usr/lib/systemd/systemd
END

mkdir /sysroot
mount -t tmpfs -o mode=755 tmpfs /sysroot
for dir in dev nix proc run sys; do
  mkdir "/sysroot/$dir"
  mount -o rbind "/$dir" "/sysroot/$dir"
done
mkdir -p /sysroot/tmp/shared
mount -o bind /tmp/shared /sysroot/tmp/shared
chroot /sysroot /nix/store/firn/busybox/sh /run/second
# Both make these.
rm -r /dev/net /dev/loop-control /run/booted-system /run/current-system
# systemd brings its own along.
for dir in dev proc run sys; do
  umount -l "/sysroot/$dir"
done
exec /nix/store/firn/busybox/sh /run/first
"""
init = machine.shared_dir / "init"
init.write_text(INIT)
init.chmod(0o755)

with subtest("switch_root: from the initrd to the system"):
    machine.wait_for_unit("initrd.target")
    machine.succeed("touch /in-the-first; test -e /sysroot/usr")
    machine.switch_root()
    machine.wait_for_unit("multi-user.target")
    machine.succeed("test ! -e /in-the-first -a ! -e /etc/initrd-release")
    t.assertEqual(machine.succeed("systemctl is-system-running --wait"), "running\n")

with subtest("switch_root, wrongly: where no initrd is left"):
    with t.assertRaisesRegex(RequestedAssertionFailed, 'unit "initrd.target" is inactive'):
        machine.switch_root()
