//! Machines of start scripts, which run QEMU: what nixpkgs makes of nodes, with the kits in NixOS's place.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use firn::kit::{GuestConfig, HostsEntry, Interface, Kit, Mount, MountKind, machine_overlay};
use firn_gateway::CARD_MAC;

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
