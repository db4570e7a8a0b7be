//! Machines of start scripts, which run QEMU: what nixpkgs makes of nodes, with the kits in NixOS's place.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use firn::kit::{GuestConfig, HostsEntry, Interface, Kit, Mount, MountKind, machine_overlay};
use firn_gateway::CARD_MAC;

use crate::systemd;

/// The options of QEMU for the user network's card, and for that of machine `number` on vlan 1.
#[must_use]
pub fn cards(number: u8) -> String {
    format!(
        r#"-net nic,netdev=user.0,model=virtio -netdev user,id=user.0,"$QEMU_NET_OPTS" \
  -device virtio-net-pci,netdev=vlan1,mac=52:54:00:12:01:{number:02x} \
  -netdev vde,id=vlan1,sock="$QEMU_VDE_SOCKET_1""#
    )
}

/// What a kit boots as one of the machines of `names`, on vlan 1 and with these shares: tags and mount points.
///
/// # Panics
/// If the kit cannot be read.
#[must_use]
pub fn initrd(kit: &Kit, name: &str, names: &[&str], shares: &[(&str, &str)]) -> Vec<u8> {
    let addresses = |number: u8| -> [IpAddr; 2] {
        let segments = [0x2001, 0xdb8, 1, 0, 0, 0, 0, number.into()];
        [Ipv4Addr::new(192, 168, 1, number).into(), Ipv6Addr::from(segments).into()]
    };
    let hosts = (1..).zip(names).flat_map(|(number, name)| {
        addresses(number).map(|address| HostsEntry { address, names: vec![(*name).to_owned()] })
    });
    let number = number_of(name, names);
    let card = |name: &str, mac, addresses| Interface {
        name: name.to_owned(),
        mac,
        addresses,
        gateway: None,
    };
    let own = addresses(number).into_iter().zip([24, 64]).collect();
    let mounts = shares.iter().map(|(tag, mount_point)| Mount {
        tag: (*tag).to_owned(),
        mount_point: (*mount_point).to_owned(),
        kind: MountKind::Virtiofs,
        options: "rw".to_owned(),
    });
    let overlay = machine_overlay(&GuestConfig {
        hostname: name.to_owned(),
        hosts: hosts.collect(),
        interfaces: vec![
            card("eth0", CARD_MAC, vec![]),
            card("eth1", [0x52, 0x54, 0, 0x12, 1, number], own),
        ],
        dns: vec![],
        mounts: mounts.collect(),
    });
    let mut initrd = fs::read(kit.initrd()).expect("the kit has it");
    // The kernel looks for the next archive at a multiple of four.
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend(overlay.expect("it can be made"));
    initrd
}

/// The number of a machine among those of its test.
///
/// # Panics
/// If it is none of them.
#[must_use]
pub fn number_of(name: &str, names: &[&str]) -> u8 {
    let at = names.iter().position(|other| *other == name).expect("it is one of them");
    u8::try_from(at + 1).expect("they are few")
}

/// The start script of a machine with the kit that is like NixOS. Its shares have a server each, as nixpkgs gives them.
///
/// # Panics
/// If the kit cannot be read, or a file not written.
#[must_use]
pub fn like_nixos(dir: &Path, name: &str, names: &[&str]) -> PathBuf {
    let kit = systemd();
    let file = dir.join(format!("initrd-{name}"));
    let shares = [("shared", "/tmp/shared"), ("xchg", "/tmp/xchg")];
    fs::write(&file, initrd(&kit, name, names, &shares)).expect("it can be written");
    // As in NixOS there is the backdoor's shell, and no agent. In a carrier each line on the console takes a while, and
    // a kernel that has to unpack itself takes minutes where another one has run before.
    let cmdline = format!(
        "{} systemd.mask=firn-agent.service systemd.log_level=notice console=ttyS0,115200n8 console=tty0",
        kit.manifest.cmdline
    );
    let prepare = format!(
        r#"export PATH=$PATH:/usr/libexec:/usr/lib/qemu
test "$(id -u)" = 0 && sandbox=chroot || sandbox=none
share() {{ # TAG DIRECTORY CACHE
  virtiofsd -f --socket-path="$1.sock" -o "source=$2,cache=$3,sandbox=$sandbox,log_level=err" &
  until test -S "$1.sock"; do sleep 0.02; done
}}
mkdir -p xchg
share nix-store {store} always
share shared "$SHARED_DIR" none
share xchg "$TMPDIR"/xchg none
NIX_DISK_IMAGE=${{NIX_DISK_IMAGE:-root.img}}
test -e "$NIX_DISK_IMAGE" || mkfs.ext4 -q -L nixos "$NIX_DISK_IMAGE" 20M"#,
        store = kit.store().expect("it has one").display(),
    );
    let shares = ["nix-store", "shared", "xchg"].map(|tag| {
        format!(
            "-chardev socket,id={tag},path={tag}.sock \\\n  \
             -device vhost-user-fs-pci,chardev={tag},tag={tag} \\\n  "
        )
    });
    let options = format!(
        r#"-machine accel=kvm:tcg -m 768 -smp 1 -device virtio-rng-pci \
  -object memory-backend-memfd,id=mem0,size=768M,share=on -machine memory-backend=mem0 \
  {cards} \
  -global virtio-net-pci.romfile="" \
  {shares}-drive cache=writeback,file="$NIX_DISK_IMAGE",format=raw,id=drive1,if=none,index=1,werror=report \
  -device virtio-blk-pci,bootindex=1,drive=drive1,serial=root \
  -device virtio-keyboard -usb -device usb-tablet,bus=usb-bus.0 \
  -kernel {kernel} -initrd {initrd} -append "{cmdline} $QEMU_KERNEL_PARAMS""#,
        cards = cards(number_of(name, names)),
        shares = shares.concat(),
        kernel = kit.vmlinux().display(),
        initrd = file.display(),
    );
    write(dir, name, &prepare, &options)
}

/// Writes `run-NAME-vm`: shell lines that prepare what it needs in its state directory, then QEMU with `options`.
///
/// # Panics
/// If it cannot be written.
#[must_use]
pub fn write(dir: &Path, name: &str, prepare: &str, options: &str) -> PathBuf {
    let path = dir.join(format!("run-{name}-vm"));
    let script = format!(
        "#!/bin/bash\nset -e\ncd \"$TMPDIR\"\n{prepare}\n\
         exec qemu-system-x86_64 -name {name} -cpu max {options} $QEMU_OPTS \"$@\"\n"
    );
    fs::write(&path, script).expect("it can be written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is ours");
    path
}
