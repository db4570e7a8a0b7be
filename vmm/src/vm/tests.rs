use std::fs;
use std::path::Path;

use super::*;

fn spec(dir: &Path, disks: usize) -> MachineSpec {
    let disk = |n| crate::spec::DiskSpec {
        image: dir.join(format!("{n}.img")),
        size: Some(crate::spec::DiskMib::MIN),
        ..Default::default()
    };
    MachineSpec {
        name: "m".to_owned(),
        cores: crate::spec::Cores::MIN,
        memory: crate::spec::MemoryMib::MIN,
        kernel: "/nonexistent".into(),
        initrd: Vec::new(),
        cmdline: String::new(),
        console_ports: Vec::new(),
        nets: Vec::new(),
        shares: Vec::new(),
        disks: (0..disks).map(disk).collect(),
        rng: true,
        balloon: false,
        vsock: None,
        oem_strings: Vec::new(),
        screen: None,
        keyboard: false,
        tablet: false,
    }
}

/// Why a machine cannot be built; nothing may have been made for it.
fn refused(dir: &Path, spec: &MachineSpec) -> String {
    let host_side = HostSide {
        events: Box::new(|_| ()),
        serial: Box::new(io::sink()),
        connect: Box::new(()),
        descriptors: 1000,
        cancel: Cancel::default(),
    };
    let error = Vm::new(spec, host_side).err().expect("it cannot be built");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0, "{error}");
    error.to_string()
}

#[test]
fn what_cannot_be_built_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    assert!(refused(at, &spec(at, 130)).contains("131 virtio devices; allowed are at most 128"));
    let mut last = spec(at, 3);
    last.disks[2].size = None;
    last.disks[2].label = Some("x".try_into().unwrap());
    assert!(refused(at, &last).contains("`label` of a disk"));
    let mut strings = spec(at, 1);
    strings.oem_strings = vec!["x".repeat(70_000)];
    assert!(refused(at, &strings).contains("OEM strings are too long"));
    let mut port = spec(at, 1);
    port.console_ports = vec![crate::spec::ConsolePortSpec { name: Some("a/b".to_owned()) }];
    assert!(refused(at, &port).contains("port name"));
}
