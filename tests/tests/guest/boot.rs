//! Kernels, processors and memory.

use std::collections::BTreeMap;
use std::fs;

use firn_tests::{micro, only, output, with_machines};
use firn_vmm::device::boot_timer::stage::{INIT, KERNEL, READY, RUN};

/// As /proc has it (include/uapi/linux/sched.h).
const SCHED_BATCH: &str = "3";

#[test]
fn a_bzimage_and_its_elf_payload_boot_alike() {
    for kernel in [micro().kernel(), micro().vmlinux()] {
        let nodes = format!("[nodes.m]\nkernel = {:?}", kernel.to_str().unwrap());
        with_machines(&nodes, async |driver| {
            assert!(output(only(driver), "uname -r").await.ends_with("-cloud-amd64"));
        });
    }
}

#[test]
fn one_and_four_cores() {
    for cores in [1, 4] {
        with_machines(&format!("[nodes.m]\ncores = {cores}"), async |driver| {
            assert_eq!(output(only(driver), "nproc").await, cores.to_string());
            let online = output(only(driver), "cat /sys/devices/system/cpu/online").await;
            assert_eq!(online, if cores == 1 { "0" } else { "0-3" });
        });
    }
}

#[test]
fn threads_that_are_woken_wait_for_their_turn() {
    with_machines("[nodes.m]\ncores = 2", async |driver| {
        output(only(driver), "true").await;
        let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let policies = tasks.filter_map(|task| {
            let name = fs::read_to_string(task.join("comm")).ok()?;
            // Field 41 (proc_pid_stat(5)); the second is the name.
            let stat = fs::read_to_string(task.join("stat")).ok()?;
            let policy = stat.split_whitespace().nth(40).map(str::to_owned);
            name.starts_with("m-").then(|| (name.trim_end().to_owned(), policy))
        });
        let batch = |name: &str| (name.to_owned(), Some(SCHED_BATCH.to_owned()));
        let expected = ["m-cpu0", "m-cpu1", "m-dev"].map(batch);
        assert_eq!(policies.collect::<BTreeMap<_, _>>(), BTreeMap::from(expected));
    });
}

#[test]
fn memory_below_and_above_the_hole() {
    for (mib, least, most) in [(256, 180, 256), (6144, 5800, 6144)] {
        with_machines(&format!("[nodes.m]\nmemory = {mib}"), async |driver| {
            let kib = output(only(driver), "awk '/^MemTotal/ { print $2 }' /proc/meminfo").await;
            let total = kib.parse::<u64>().unwrap() / 1024;
            assert!((least..=most).contains(&total), "{total} of {mib} MiB");
        });
    }
}

#[test]
fn memory_above_the_hole_keeps_what_is_written_there() {
    with_machines("[nodes.m]\nmemory = 6144", async |driver| {
        // More than lies below the hole.
        let command = "mount -o remount,size=5G /tmp; \
            dd if=/dev/zero bs=1M count=3500 of=/tmp/fill 2>/dev/null; \
            head -c 20000000 /dev/urandom > /tmp/a; cp /tmp/a /tmp/b; rm /tmp/fill; \
            cmp /tmp/a /tmp/b && echo same";
        assert_eq!(output(only(driver), command).await, "same");
    });
}

#[test]
fn twenty_boots_in_a_row() {
    with_machines("[nodes.m]", async |driver| {
        let machine = &driver.machines()[0];
        for round in 0..20 {
            machine.succeed(&[&format!("echo {round}")], None).await.unwrap();
            if round % 2 == 0 {
                machine.shutdown().await.unwrap();
            } else {
                machine.crash().await;
            }
            assert!(!machine.booted());
        }
    });
}

#[test]
fn stages_of_the_boot_are_marked() {
    with_machines("[nodes.m]\n[nodes.s]\nkit = 'systemd'", async |driver| {
        // The micro kit's kernel lets no program write to ports.
        let stages = [&[RUN, KERNEL][..], &[RUN, KERNEL, INIT, READY]];
        for (machine, stages) in driver.machines().iter().zip(stages) {
            machine.connect().await.unwrap();
            machine.shutdown().await.unwrap();
            let marks = machine.boot_marks();
            assert_eq!(marks.iter().map(|mark| mark.code).collect::<Vec<_>>(), stages);
            assert!(marks.is_sorted_by_key(|mark| mark.at_ns));
        }
    });
}

#[test]
fn nothing_is_fatal_and_smbios_says_what_the_machine_is() {
    const CREDENTIAL: &str = "io.systemd.credential.binary:greeting=aGVsbG8=";
    let nodes = format!(
        "[nodes.m]\noem_strings = [{CREDENTIAL:?}]\n\
         [nodes.s]\nkit = 'systemd'\noem_strings = ['second', {CREDENTIAL:?}]"
    );
    with_machines(&nodes, async |driver| {
        let mut ids = Vec::new();
        for machine in driver.machines() {
            let output = async |command: &str| {
                machine.succeed(&[command], None).await.unwrap().trim().to_owned()
            };
            assert_eq!(output("dmesg | grep -i fatal || echo none").await, "none");
            let id = "cd /sys/class/dmi/id; cat sys_vendor product_name product_serial bios_vendor";
            let said = format!("firn\nfirn virtual machine\n{}\nfirn", machine.name());
            assert_eq!(output(id).await, said);
            ids.push(output("cat /sys/class/dmi/id/product_uuid").await);
            let texts = output("tr '\\0' '\\n' </sys/firmware/dmi/tables/DMI").await;
            // Fields come before the first string.
            assert!(texts.lines().any(|text| text.ends_with(CREDENTIAL)));
        }
        assert_ne!(ids[0], ids[1]);
        let [_, s] = driver.machines() else { panic!("two machines") };
        let output = async |command: &str| s.succeed(&[command], None).await.unwrap();
        assert_eq!(output("cat /run/credentials/@system/greeting").await, "hello");
        assert_eq!(output("systemd-detect-virt").await, "kvm\n");
    });
}
