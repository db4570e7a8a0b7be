//! Several requests at once, hosts that refuse, guests that break the rules, pause and restore.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::Command;

use proptest::arbitrary::any;
use proptest::proptest;

use super::*;
use crate::virtio::testing::{HOSTILE_MEMORY, hostile_ring};

#[test]
fn many_requests_on_several_queues() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (_dir, spec) = fresh(format, 64);
        let mut rig = Rig::with(&spec, 4, FEATURES);
        assert_eq!(rig.drivers.len(), 4);
        // Each queue has its own quarter of the disk, of which each write is followed by a read.
        for round in 0..6_u8 {
            for queue in 0..4_usize {
                for at in 0..20_u64 {
                    let sector = u64::try_from(queue).unwrap() * 32768 + at * 200;
                    let seed = round.wrapping_mul(31).wrapping_add(u8::try_from(at).unwrap());
                    rig.offer_on(queue, 1, sector, &pattern(100 * 512, seed), 0);
                }
                rig.offer_on(queue, 4, 0, &[], 0);
                let spare = u64::try_from(queue).unwrap() * 32768 + 8000;
                rig.offer_on(queue, 11, 0, &range(spare, 512, 0), 0);
            }
            for queue in 0..4 {
                rig.device.notify(queue).unwrap();
            }
            for queue in 0..4 {
                for _ in 0..22 {
                    assert_eq!(rig.wait(queue).data, [OK]);
                }
            }
            for queue in 0..4_u64 {
                for at in 0..20_u64 {
                    let seed = round.wrapping_mul(31).wrapping_add(u8::try_from(at).unwrap());
                    let read = rig.read(queue * 32768 + at * 200, 100 * 512);
                    assert_eq!(read, pattern(100 * 512, seed), "{format} {queue} {at}");
                }
            }
        }
    }
}

#[test]
fn a_queue_that_is_not_there_does_not_matter() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let blk = Blk::new(&spec, 4).unwrap();
    let guest = Guest::new();
    let (drivers, mut activation) = guest.activation(&blk.queue_sizes(), FEATURES);
    activation.queues[2] = None;
    activation.queues[3] = None;
    let device = Box::new(blk).activate(activation).ok().unwrap();
    let mut rig = Rig { guest, drivers, device };
    for queue in [2, 3, 17, 0] {
        rig.device.notify(queue).unwrap();
    }
    assert_eq!(rig.write(0, &[1; 512]), OK);
    assert_eq!(rig.device.queue_positions()[2], None);
}

#[test]
fn a_full_host_is_an_error_for_the_guest() {
    // A limit on the size of files stands for a full file system; it is the process's own.
    const CHILD: &str = "FIRN_TEST_FULL_HOST";
    if std::env::var_os(CHILD).is_none() {
        let name = "virtio::blk::tests::trouble::a_full_host_is_an_error_for_the_guest";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([name, "--exact", "--nocapture"]).env(CHILD, "1");
        // SAFETY: both calls are async-signal-safe, and the closure touches no memory of others.
        unsafe {
            child.pre_exec(|| {
                let limit = libc::rlimit { rlim_cur: 4 << 20, rlim_max: 4 << 20 };
                libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit);
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                Ok(())
            });
        }
        let output = child.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        return;
    }
    let (_dir, spec) = fresh(DiskFormat::Qcow2, 64);
    let mut rig = Rig::new(&spec);
    let mut written = 0;
    while rig.write(written * 1024, &pattern(512 << 10, 9)) == OK {
        written += 1;
        assert!(written < 16, "the limit does not hold");
    }
    assert!(written > 2, "{written}");
    // What was there stays readable, and the disk goes on.
    assert_eq!(rig.flush(), OK);
    for at in 0..written {
        assert_eq!(rig.read(at * 1024, 512 << 10), pattern(512 << 10, 9));
    }
    assert_eq!(rig.write(0, &[1; 512]), OK);
}

#[test]
fn a_killed_process_loses_nothing_that_was_flushed() {
    const CHILD: &str = "FIRN_TEST_KILLED";
    let Some(path) = std::env::var_os(CHILD) else {
        for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
            killed_with(format, CHILD);
        }
        return;
    };
    let (path, format) = match path.to_str().unwrap().rsplit_once(':').unwrap() {
        (path, "raw") => (path.to_owned(), DiskFormat::Raw),
        (path, _) => (path.to_owned(), DiskFormat::Qcow2),
    };
    let mut spec = spec(Path::new(&path), format);
    spec.size = Some(256_u64.try_into().unwrap());
    let mut rig = Rig::new(&spec);
    for at in 0.. {
        let data = pattern(64 << 10, u8::try_from(at % 256).unwrap());
        assert_eq!(rig.write(at * 256 % 500_000, &data), OK);
        assert_eq!(rig.flush(), OK);
        println!("flushed {at}");
        // The next is under way when the end comes.
        rig.offer(1, (at + 1) * 256 % 500_000, &data, 0);
        rig.device.notify(0).unwrap();
        rig.wait(0);
    }
}

fn killed_with(format: DiskFormat, variable: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let name = "virtio::blk::tests::trouble::a_killed_process_loses_nothing_that_was_flushed";
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(variable, format!("{}:{format}", path.display()))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut last = None;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(at) = line.rsplit_once("flushed ").and_then(|(_, at)| at.parse::<u64>().ok()) {
            last = Some(at);
            if at == 40 {
                child.kill().unwrap();
            }
        }
    }
    child.wait().unwrap();
    let last = last.expect("it has flushed something");
    assert!(last >= 40, "it ended before it was killed, after {last}");
    let mut rig = Rig::new(&spec(&path, format));
    for at in 0..=last {
        let data = pattern(64 << 10, u8::try_from(at % 256).unwrap());
        assert_eq!(rig.read(at * 256, 64 << 10), data, "{format}: write {at} of {last}");
    }
}

#[test]
fn it_goes_on_after_a_restore_and_works_after_a_reset() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (_dir, spec) = fresh(format, 16);
        let mut rig = Rig::with(&spec, 2, FEATURES);
        for at in 0..40_u64 {
            rig.offer_on(usize::from(at % 2 == 0), 1, at * 8, &pattern(4096, 1), 0);
        }
        rig.device.notify(0).unwrap();
        rig.device.notify(1).unwrap();
        rig.device.pause();
        let done: usize = rig.drivers.iter_mut().map(|driver| driver.all_used().len()).sum();
        assert_eq!(done, 40, "what was taken is finished");
        rig.offer(1, 999, &[8; 512], 0);
        let (state, positions) = (rig.device.save(), rig.device.queue_positions());
        drop(rig.device);

        let mut blk = Box::new(Blk::new(&spec, 2).unwrap());
        blk.restore(&state).unwrap();
        let activation = rig.guest.reactivation(&rig.drivers, FEATURES, &positions);
        rig.device = blk.activate(activation).ok().unwrap();
        rig.device.host_event().unwrap();
        assert_eq!(rig.wait(0).data, [OK], "what waited is done");
        assert_eq!(rig.read(999, 512), [8; 512]);
        assert_eq!(rig.read(39 * 8, 4096), pattern(4096, 1));

        let inactive = rig.device.reset();
        let (drivers, activation) = rig.guest.activation(&inactive.queue_sizes(), FEATURES);
        let device = inactive.activate(activation).ok().unwrap();
        let mut rig = Rig { guest: rig.guest, drivers, device };
        assert_eq!(rig.read(999, 512), [8; 512]);
    }
}

#[test]
fn a_paused_disk_takes_nothing() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut rig = Rig::new(&spec);
    assert_eq!(rig.flush(), OK);
    rig.device.pause();
    let before = rig.device.queue_positions();
    rig.offer(1, 0, &[1; 512], 0);
    assert_eq!(rig.device.queue_positions(), before);
    rig.device.pause();
    assert!(rig.drivers[0].used().is_none());
    rig.device.host_event().unwrap();
    assert_eq!(rig.wait(0).data, [OK]);
}

#[test]
fn states_of_other_disks_and_versions_are_refused() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut blk = Blk::new(&spec, 1).unwrap();
    let mut state = blk.save();
    blk.restore(&state).unwrap();
    let (_dir, larger) = fresh(DiskFormat::Raw, 2);
    let mut other = Blk::new(&larger, 1).unwrap();
    assert!(matches!(other.restore(&state), Err(RestoreError::OtherDevice { .. })));
    state.version += 1;
    assert!(matches!(blk.restore(&state), Err(RestoreError::Version { found: 2, .. })));
}

/// What becomes of a device after something that it cannot answer.
fn failure_of(rig: &mut Rig) -> String {
    let first = rig.device.notify(0);
    rig.device.pause();
    let failure = first.and_then(|()| rig.device.host_event());
    failure.expect_err("the device must fail").to_string()
}

#[test]
fn chains_without_header_or_status_cost_the_device() {
    let chains: [(&[Part<'_>], &str); 4] = [
        (&[Part::Read(&[0; 15]), Part::Write(1)], "no header"),
        (&[Part::Write(512)], "no header"),
        (&[Part::Read(&[0; 16])], "no place for a status"),
        (&[Part::Read(&[0; 16]), Part::Write(0)], "no place for a status"),
    ];
    for (chain, problem) in chains {
        let (_dir, spec) = fresh(DiskFormat::Raw, 1);
        let mut rig = Rig::new(&spec);
        rig.drivers[0].add(chain);
        let failure = failure_of(&mut rig);
        assert!(failure.contains(problem), "{failure}");
        assert_eq!(rig.drivers[0].used(), None, "it must not look done");
        let inactive = rig.device.reset();
        let (drivers, activation) = rig.guest.activation(&inactive.queue_sizes(), FEATURES);
        let device = inactive.activate(activation).ok().unwrap();
        let mut rig = Rig { guest: rig.guest, drivers, device };
        assert_eq!(rig.write(0, &[1; 512]), OK, "a reset brings it back");
    }
}

#[test]
fn a_buffer_outside_memory_costs_the_device() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut rig = Rig::new(&spec);
    let offered = rig.offer(1, 0, &[1; 512], 0);
    rig.drivers[0].set_descriptor(offered.head, u64::MAX - 8, 16, 1, offered.head);
    assert!(failure_of(&mut rig).contains("outside memory"));
}

#[test]
fn data_outside_memory_costs_the_request() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut rig = Rig::new(&spec);
    let (at, status) = (rig.guest.alloc(16), rig.guest.alloc(1));
    // Reads and writes, with what a guest may have mapped there of an image.
    for (kind, flags) in [(0, 3), (1, 1)] {
        rig.guest.write(at, &header(kind, 0));
        rig.guest.write(status, &[0xee]);
        rig.drivers[0].set_descriptor(0, at, 16, 1, 1);
        rig.drivers[0].set_descriptor(1, 4 << 30, 512, flags, 2);
        rig.drivers[0].set_descriptor(2, status, 1, 2, 0);
        rig.drivers[0].offer(0);
        rig.device.notify(0).unwrap();
        rig.device.pause();
        assert_eq!(rig.guest.read(status, 1), [IOERR]);
    }
    assert_eq!(rig.drivers[0].used_index(), 2, "the disk goes on");
}

#[test]
fn a_request_that_is_too_large_fails() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1024);
    let mut rig = Rig::new(&spec);
    let status = rig.guest.alloc(1);
    let at = rig.guest.alloc(16);
    rig.guest.write(at, &header(0, 0));
    // Twenty times the same 16 MiB.
    rig.drivers[0].set_descriptor(0, at, 16, 1, 1);
    for index in 1..=20 {
        rig.drivers[0].set_descriptor(index, 0x10_0000, 16 << 20, 3, index + 1);
    }
    rig.drivers[0].set_descriptor(21, status, 1, 2, 0);
    rig.guest.write(status, &[0xee]);
    rig.drivers[0].offer(0);
    rig.device.notify(0).unwrap();
    rig.device.pause();
    assert_eq!(rig.guest.read(status, 1), [IOERR]);
}

proptest! {
    #[test]
    fn hostile_chains_do_no_harm(
        ring in hostile_ring(), kind in 0..16_u32, sector in 0..4096_u64, at_once in any::<bool>(),
    ) {
        let (_dir, qcow2) = fresh(DiskFormat::Qcow2, 1);
        let (_file, raw) = in_memory(1);
        let blk = Blk::new(if at_once { &raw } else { &qcow2 }, 1).unwrap();
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        // So that many chains begin with a header that makes sense.
        guest.write(0, &header(kind, sector).repeat(HOSTILE_MEMORY / 16));
        let mut driver = guest.driver(0, 16);
        guest.write(driver.avail, &[0; 6 + 32]);
        guest.write(driver.used, &[0; 6 + 128]);
        let activation = guest.reactivation(
            std::slice::from_ref(&driver), FEATURES, &[Some(Default::default())],
        );
        let mut device = Box::new(blk).activate(activation).ok().unwrap();
        driver.corrupt(&ring);
        let _ = device.notify(0);
        device.pause();
        let _ = device.host_event();
        let device = device.reset();
        assert_eq!(device.device_type(), 2);
    }
}
