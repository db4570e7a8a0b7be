//! Memory that a guest does not use goes back to the host.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use firn_tests::{micro, with_machines};
use firn_vmm::Cancel;
use firn_vmm::spec::{Cores, MachineSpec};
use firn_vmm::virtio::balloon::PAGE_SIZE;
use firn_vmm::vm::{HostSide, Vm};

/// Memory of this process, guests included, in MiB.
fn resident_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    let kib = line.split_whitespace().nth(1).expect("a number");
    kib.parse::<u64>().expect("a number") / 1024
}

#[test]
fn what_a_guest_frees_is_the_hosts_again() {
    const FILE: u64 = 200;
    with_machines("[nodes.m]\nballoon = true\nmemory = 768", async |driver| {
        let machine = &driver.machines()[0];
        machine.succeed(&["true"], None).await.unwrap();
        let before = resident_mib();
        let fill = format!("dd if=/dev/zero of=/tmp/fill bs=1M count={FILE} 2>/dev/null");
        machine.succeed(&[&fill], None).await.unwrap();
        let full = resident_mib();
        assert!(full >= before + FILE * 9 / 10, "{before} MiB, then {full} MiB");
        machine.succeed(&["rm /tmp/fill"], None).await.unwrap();
        // Linux reports two seconds after pages are freed, and then more every two seconds
        // (mm/page_reporting.c). No event tells that it is done.
        let deadline = Instant::now() + Duration::from_secs(60);
        while resident_mib() > full - FILE / 2 {
            assert!(Instant::now() < deadline, "still {} of {full} MiB", resident_mib());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        // What came back can be used again.
        machine.succeed(&[&fill], None).await.unwrap();
        assert!(resident_mib() >= before + FILE * 9 / 10);
    });
}

#[test]
fn the_host_sets_the_size_and_the_guest_follows() {
    let kit = micro();
    let spec = MachineSpec {
        name: "balloon".into(),
        cores: Cores::MIN,
        memory: 512_u64.try_into().unwrap(),
        kernel: kit.vmlinux(),
        initrd: vec![kit.initrd()],
        cmdline: kit.manifest.cmdline,
        console_ports: vec![],
        nets: vec![],
        disks: vec![],
        shares: vec![],
        rng: false,
        balloon: true,
        vsock: None,
        oem_strings: vec![],
        screen: None,
        keyboard: false,
        tablet: false,
    };
    let host_side = HostSide {
        events: Box::new(|_| {}),
        serial: Box::new(io::sink()),
        connect: Box::new(()),
        descriptors: 10_000,
        cancel: Cancel::default(),
    };
    let mut vm = Vm::new(&spec, host_side).unwrap();
    let balloon = vm.balloon().expect("the machine has one").clone();
    let pages = |mib: u32| mib * (1 << 20) / PAGE_SIZE;
    balloon.set_target(pages(100));
    vm.start().unwrap();
    for mib in [100, 150, 20, 0] {
        balloon.set_target(pages(mib));
        let reached = balloon.wait_for_size(Duration::from_secs(90), |size| size == pages(mib));
        assert!(reached, "{} of {} pages", balloon.size(), pages(mib));
    }
}
