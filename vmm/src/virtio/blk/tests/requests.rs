//! The rules of 5.2.6, request by request.

use super::*;

#[test]
fn what_is_written_is_read_and_is_in_the_file() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 4);
    let mut rig = Rig::new(&spec);
    let data = pattern(9 * 512, 1);
    assert_eq!(rig.write(3, &data), OK);
    assert_eq!(rig.read(3, data.len()), data);
    assert_eq!(rig.read(2, 512), [0; 512]);
    let file = std::fs::read(&spec.image).unwrap();
    assert_eq!(file.len(), 4 << 20);
    assert_eq!(file[3 * 512..12 * 512], data);
}

#[test]
fn what_need_not_wait_is_done_at_once() {
    let (file, spec) = in_memory(4);
    let mut rig = Rig::new(&spec);
    let data = pattern(4096, 6);
    rig.offer(1, 8, &data, 0);
    rig.device.notify(0).unwrap();
    assert_eq!(rig.drivers[0].used().expect("no worker writes").data, [OK]);
    rig.offer(0, 8, &[], data.len());
    rig.device.notify(0).unwrap();
    let used = rig.drivers[0].used().expect("no worker reads");
    assert_eq!((&used.data[..4096], &used.data[4096..]), (&data[..], &[OK][..]));
    // The rest is as ever: what is long, what a file that was cut short no longer has, what is not on the disk.
    let long = pattern(256 << 10, 7);
    assert_eq!(rig.write(100, &long), OK);
    assert_eq!(rig.read(100, long.len()), long);
    file.set_len(1 << 20).unwrap();
    assert_eq!(rig.read(4096, 512), [0; 512]);
    assert_eq!(rig.request(0, 8192, &[], 512).0, IOERR);
    assert_eq!(rig.write(8192, &data), IOERR);
}

#[test]
fn the_framing_is_the_drivers_affair() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut rig = Rig::new(&spec);
    let data = pattern(1024, 2);
    // The header in three pieces, the last with data behind it; the rest in odd pieces.
    let header = header(1, 8);
    let third: Vec<u8> = header[9..].iter().chain(&data[..100]).copied().collect();
    let parts = [
        Part::Read(&header[..1]),
        Part::Read(&header[1..9]),
        Part::Read(&third),
        Part::Read(&[]),
        Part::Read(&data[100..101]),
        Part::Read(&data[101..]),
        Part::Write(1),
    ];
    rig.drivers[0].add(&parts);
    rig.device.notify(0).unwrap();
    assert_eq!(rig.wait(0).data, [OK]);
    // The status in one buffer with the data, and an empty one behind it.
    let header = super::header(0, 8);
    rig.drivers[0].add(&[Part::Read(&header), Part::Write(7), Part::Write(1018), Part::Write(0)]);
    rig.device.notify(0).unwrap();
    let used = rig.wait(0);
    assert_eq!(used.data[..1024], data);
    assert_eq!(used.data[1024..], [OK]);
}

#[test]
fn nothing_outside_the_disk_and_no_parts_of_sectors() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut rig = Rig::new(&spec);
    let end = 2048;
    assert_eq!(rig.read(end - 1, 512).len(), 512);
    for (sector, len) in
        [(end, 512), (end - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 513)]
    {
        assert_eq!(rig.request(0, sector, &[], len).0, IOERR, "read {len} at {sector}");
        assert_eq!(rig.write(sector, &vec![1; len]), IOERR, "write {len} at {sector}");
    }
    assert_eq!(std::fs::read(&spec.image).unwrap(), vec![0; 1 << 20], "nothing was written");
}

#[test]
fn a_request_without_data_does_nothing() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut rig = Rig::new(&spec);
    assert_eq!(rig.request(0, 5, &[], 0).0, OK);
    assert_eq!(rig.write(5, &[]), OK);
}

#[test]
fn the_guest_reads_the_serial_number() {
    for serial in ["", "root", "exactly-20-bytes-long"] {
        let (_dir, mut spec) = fresh(DiskFormat::Raw, 1);
        let serial = &serial[..serial.len().min(SERIAL_LEN)];
        spec.serial = Some(serial.try_into().unwrap());
        let mut rig = Rig::new(&spec);
        let (status, id) = rig.request(8, 0, &[], 20);
        assert_eq!(status, OK);
        assert_eq!(&id[..serial.len()], serial.as_bytes());
        assert!(id[serial.len()..].iter().all(|&byte| byte == 0));
        // While the disk is active, too, its saved state says whose it is.
        assert_eq!(rig.device.identity(), serial);
    }
}

#[test]
fn a_short_buffer_gets_the_beginning_of_the_serial_number() {
    let (_dir, mut spec) = fresh(DiskFormat::Raw, 1);
    spec.serial = Some("abcdef".try_into().unwrap());
    let mut rig = Rig::new(&spec);
    assert_eq!(rig.request(8, 0, &[], 3), (OK, b"abc".to_vec()));
}

#[test]
fn unknown_requests_are_not_supported() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut rig = Rig::new(&spec);
    // Among them a secure erase (14), which is not offered, and the types of zoned disks.
    for kind in [2, 3, 5, 10, 12, 14, 15, 17, 0x8000_0000, u32::MAX] {
        assert_eq!(rig.request(kind, 0, &[], 0).0, UNSUPP, "type {kind}");
    }
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let (_dir, mut spec) = fresh(DiskFormat::Raw, 1);
    drop(Rig::new(&spec));
    spec.read_only = true;
    let blk = Blk::new(&spec, 1).unwrap();
    assert_ne!(blk.features() & feature::RO, 0);
    assert_eq!(blk.features() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    let mut rig = Rig::around(blk, feature::FLUSH | feature::RO);
    assert_eq!(rig.write(0, &[1; 512]), IOERR);
    for kind in [11, 13] {
        assert_eq!(rig.request(kind, 0, &range(0, 8, 0), 0).0, IOERR);
    }
    assert_eq!(rig.read(0, 512), [0; 512]);
    assert_eq!(rig.flush(), OK);
}

#[test]
fn zeroes_are_written() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        for flags in [0, 1] {
            let (_dir, spec) = fresh(format, 4);
            let mut rig = Rig::new(&spec);
            let data = pattern(2 << 20, 3);
            assert_eq!(rig.write(0, &data), OK);
            let mut parts = range(1, 7, flags);
            parts.extend(range(100, 2000, flags));
            assert_eq!(rig.request(13, 0, &parts, 0).0, OK);
            let mut expected = data;
            expected[512..8 * 512].fill(0);
            expected[100 * 512..2100 * 512].fill(0);
            assert_eq!(rig.read(0, 2 << 20), expected, "{format}, flags {flags}");
        }
    }
}

#[test]
fn discarding_and_unmapping_give_space_back_but_plain_zeroes_keep_it() {
    use std::os::unix::fs::MetadataExt;
    for (kind, flags, shrinks) in [(11, 0, true), (13, 1, true), (13, 0, false)] {
        let (_dir, spec) = fresh(DiskFormat::Raw, 8);
        let mut rig = Rig::new(&spec);
        for at in 0..4 {
            assert_eq!(rig.write(at * 2048, &pattern(1 << 20, 4)), OK);
        }
        assert_eq!(rig.flush(), OK);
        let blocks = || std::fs::metadata(&spec.image).unwrap().blocks() * 512;
        let before = blocks();
        assert!(before >= 4 * MIB);
        assert_eq!(rig.request(kind, 0, &range(2048, 3 * 2048, flags), 0).0, OK);
        let after = blocks();
        assert_eq!(after <= before - 3 * MIB, shrinks, "type {kind}, {before} to {after}");
        assert_eq!(rig.read(0, 1 << 20), pattern(1 << 20, 4), "the rest stays");
    }
}

#[test]
fn ranges_that_cannot_be_are_refused_before_any_is_done() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut rig = Rig::new(&spec);
    let data = pattern(1 << 20, 5);
    assert_eq!(rig.write(0, &data), OK);
    let good = range(0, 8, 0);
    let bad = [
        (13, range(0, 8, 2), UNSUPP),
        (13, range(0, 8, 3), UNSUPP),
        (11, range(0, 8, 1), UNSUPP),
        (13, range(2041, 8, 0), IOERR),
        (13, range(u64::MAX, 8, 0), IOERR),
        (13, range(u64::MAX - 7, 8, 0), IOERR),
        (13, range(0, MAX_ZERO_SECTORS + 1, 0), IOERR),
        (11, range(0, MAX_DISCARD_SECTORS + 1, 0), IOERR),
        (13, vec![0; 15], IOERR),
    ];
    for (kind, part, status) in bad {
        let parts: Vec<u8> = good.iter().chain(&part).copied().collect();
        assert_eq!(rig.request(kind, 0, &parts, 0).0, status, "type {kind}, {part:?}");
    }
    assert_eq!(rig.request(13, 0, &[], 0).0, IOERR);
    assert_eq!(rig.request(13, 0, &good.repeat(33), 0).0, IOERR);
    assert_eq!(rig.read(0, 1 << 20), data, "nothing was zeroed");
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 3);
    for (cores, queues) in [(1, 1_u8), (3, 3), (32, 4)] {
        let blk = Blk::new(&spec, cores).unwrap();
        assert_eq!(blk.device_type(), 2);
        assert_eq!(blk.queue_sizes(), vec![QUEUE_SIZE; usize::from(queues)]);
        let mut config = [0xff; 64];
        blk.read_config(0, &mut config);
        let le = |at: usize, len: usize| {
            config[at..at + len].iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte))
        };
        assert_eq!(le(0, 8), 3 * 2048, "capacity");
        assert_eq!((le(8, 4), le(12, 4)), (1 << 20, 254), "size_max, seg_max");
        assert_eq!((le(20, 4), le(24, 1), le(26, 2)), (512, 3, 8), "blk_size, topology");
        assert_eq!(le(34, 2), u64::from(queues), "num_queues");
        assert_eq!((le(36, 4), le(40, 4), le(44, 4)), (4 << 20, 32, 8), "discard");
        assert_eq!((le(48, 4), le(52, 4), le(56, 1)), (64 << 10, 32, 1), "write zeroes");
        assert_eq!(le(60, 4), 0);
    }
}
