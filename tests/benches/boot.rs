//! Counts what a boot costs, of a whole process from exec to exit: `make bench` runs this in a
//! carrier whose clock is the number of executed instructions, so that seconds here are billions
//! of instructions (1 ns each), the guest's and the monitor's as `user`, the host kernel's as
//! `sys`. Run elsewhere it shows processor time.

use std::fs::File;
use std::io::{self, Cursor, Write};
use std::process::{Command, ExitCode};
use std::sync::mpsc;

use firn::kit::Kit;
use firn_tests::{from_archive, micro, with_machines};
use firn_vmm::spec::MachineSpec;
use firn_vmm::vm::{Event, HostSide, Vm};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};

const RUNS: usize = 3;
/// Tells a child what to boot: a machine's spec as JSON, or nothing for the kit by the driver.
const SPEC: &str = "FIRN_BENCH_SPEC";

fn main() -> ExitCode {
    match std::env::var(SPEC) {
        Ok(spec) if spec.is_empty() => boot_kit(),
        Ok(spec) => boot_spec(&serde_json::from_str(&spec).expect("the parent wrote it")),
        Err(_) => return measure_all(),
    }
    ExitCode::SUCCESS
}

fn measure_all() -> ExitCode {
    let kit = micro();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, reference_initrd(&kit)).expect("the initrd can be written");
    // Files that a run reads are read before, so that no run pays for the disk.
    for path in [kit.vmlinux(), kit.initrd()] {
        io::copy(&mut File::open(path).expect("the kit is readable"), &mut io::sink()).ok();
    }
    let reference = serde_json::json!({
        "name": "m", "cores": 1, "memory_mib": 512, "kernel": kit.vmlinux(),
        "initrd": [initrd], "cmdline": kit.manifest.cmdline, "rng": false,
    });
    println!("1e9 instructions in an exact carrier, else seconds  user     sys   total");
    let all = [
        ("reference: a shell prints a line and restarts", reference.to_string()),
        ("micro kit: all devices, agent ready, power-off", String::new()),
    ];
    for (what, spec) in all {
        for run in 0..RUNS {
            let Some((user, sys)) = measure(&spec) else { return ExitCode::FAILURE };
            let what = if run == 0 { what } else { "" };
            println!("{what:<48} {user:>7.3} {sys:>7.3} {:>7.3}", user + sys);
        }
    }
    ExitCode::SUCCESS
}

/// Boots once in a process of its own: seconds as user and as system.
fn measure(spec: &str) -> Option<(f64, f64)> {
    let before = used();
    let this = std::env::current_exe().expect("this program has a path");
    let output = Command::new(this).env(SPEC, spec).output().expect("it can be run");
    if !output.status.success() {
        io::stderr().write_all(&output.stderr).ok();
        eprintln!("{}", output.status);
        return None;
    }
    let after = used();
    Some((after.0 - before.0, after.1 - before.1))
}

/// Processor time of all children so far, in seconds: user and system.
fn used() -> (f64, f64) {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage works");
    #[expect(clippy::cast_precision_loss, reason = "hours fit")]
    let seconds = |time: TimeVal| time.num_microseconds() as f64 / 1e6;
    (seconds(usage.user_time()), seconds(usage.system_time()))
}

fn boot_kit() {
    with_machines("[nodes.m]", async |driver| {
        let machine = &driver.machines()[0];
        machine.connect().await.expect("the agent answers");
        machine.shutdown().await.expect("it powers off");
    });
}

fn boot_spec(spec: &MachineSpec) {
    let (events, ended) = mpsc::channel();
    let host = HostSide {
        events: Box::new(move |event| drop(events.send(event))),
        serial: Box::new(io::stdout()),
        console_ports: Vec::new(),
        nets: Vec::new(),
    };
    let mut vm = Vm::new(spec, host).expect("the machine can be made");
    vm.start().expect("it starts");
    let end = ended.iter().find(|event| *event != Event::Booting);
    assert_eq!(end, Some(Event::Reset), "it restarts itself");
}

/// The busybox of the kit with a script that prints a line and restarts the machine.
fn reference_initrd(kit: &Kit) -> Vec<u8> {
    let busybox = from_archive(&kit.initrd(), "bin/busybox").expect("the kit has busybox");
    let script = b"#!/bin/busybox sh\n/bin/busybox echo up\n/bin/busybox reboot -f\n".to_vec();
    let entries = [
        ("bin", 0o040_755, Vec::new()),
        ("bin/busybox", 0o100_755, busybox),
        ("init", 0o100_755, script),
    ];
    let entries = entries.into_iter().map(|(name, mode, content)| {
        (cpio::NewcBuilder::new(name).mode(mode), Cursor::new(content))
    });
    cpio::write_cpio(entries, Vec::new()).expect("memory can be written")
}
