//! Disks that go back to earlier contents.

use std::fs;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::*;

/// The disk's handle, beside the rig that drives it.
fn disk(spec: &DiskSpec) -> (DiskHandle, Rig) {
    let blk = Blk::new(spec, 1).unwrap();
    (DiskHandle(Arc::clone(&blk.image)), Rig::around(blk, FEATURES))
}

#[test]
fn a_disk_goes_back_to_each_checkpoint_of_the_stack() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (_dir, spec) = fresh(format, 16);
        let (handle, mut rig) = disk(&spec);
        assert_eq!(rig.write(100, &[1; 512]), OK);
        let first = handle.checkpoint().unwrap();
        let image = fs::read(&spec.image).unwrap();
        assert_eq!(rig.write(100, &[2; 1024]), OK);
        let second = handle.checkpoint().unwrap();
        for _ in 0..3 {
            assert_eq!(rig.write(101, &[3; 512]), OK);
            assert_eq!(rig.read(100, 1024), [[2; 512], [3; 512]].concat());
            handle.roll_back(&second).unwrap();
            assert_eq!(rig.read(100, 1024), [2; 1024]);
        }
        assert_eq!(fs::read(&spec.image).unwrap(), image, "the image stays as it is");
        handle.roll_back(&first).unwrap();
        assert_eq!(rig.read(100, 1024), [[1; 512], [0; 512]].concat());
        assert!(!handle.has(&second));
        handle.roll_back(&second).expect_err("it is gone");
        assert_eq!(rig.write(100, &[4; 512]), OK);
        handle.merge().unwrap();
        assert!(!handle.has(&first));
        drop((rig, handle, first, second));
        assert_eq!(Rig::new(&spec).read(100, 1024), [[4; 512], [0; 512]].concat());
    }
}

#[test]
fn another_disk_begins_with_a_checkpoint_and_neither_sees_what_the_other_writes() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (_dir, spec) = fresh(format, 16);
        let (handle, mut rig) = disk(&spec);
        assert_eq!(rig.write(100, &[1; 1024]), OK);
        let first = handle.checkpoint().unwrap();
        assert_eq!(rig.write(101, &[2; 512]), OK);
        let then = handle.checkpoint().unwrap();
        assert_eq!(rig.write(100, &[3; 512]), OK);
        let image = fs::read(&spec.image).unwrap();

        let fork = || {
            let image = Image::borrow(&then.0).unwrap();
            let disk = Blk::with_image(&spec, 1, image).unwrap();
            (DiskHandle(Arc::clone(&disk.image)), Rig::around(disk, FEATURES))
        };
        let (mut one, mut two) = (fork(), fork());
        assert_eq!(one.1.write(100, &[4; 512]), OK);
        assert_eq!(one.1.read(100, 1024), [[4; 512], [2; 512]].concat());
        assert_eq!(two.1.read(100, 1024), [[1; 512], [2; 512]].concat());
        assert_eq!(rig.read(100, 1024), [[3; 512], [2; 512]].concat());
        // It can go back to where it began, and its end leaves nothing in the image.
        one.0.roll_back(&then).unwrap();
        assert_eq!(one.1.read(100, 1024), [[1; 512], [2; 512]].concat());
        assert_eq!(one.1.write(100, &[5; 512]), OK);
        one.0.merge().unwrap();
        let refused = handle.merge().expect_err("others read the image").to_string();
        assert!(refused.contains("still reads it"), "{refused}");
        assert_eq!(fs::read(&spec.image).unwrap(), image);
        drop((one, two));
        handle.merge().unwrap();
        drop((rig, handle, first, then));
        assert_eq!(Rig::new(&spec).read(100, 1024), [[3; 512], [2; 512]].concat());
    }
}

#[test]
fn a_layer_takes_what_was_written_and_zeroes_take_nothing() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1024);
    let (handle, mut rig) = disk(&spec);
    assert_eq!(rig.write(0, &[1; 4096]), OK);
    let frozen = handle.checkpoint().unwrap();
    let used = || handle.0.layer_blocks() * 512;
    assert_eq!(rig.write(9, &[2; 512]), OK);
    assert!(used() <= 128 << 10, "{}", used());
    assert_eq!(rig.zero(0, 2 * 1024 * 1024 / 512 * 16), OK);
    assert!(used() <= 128 << 10, "{}", used());
    assert_eq!(rig.read(0, 8192), [0; 8192]);
    handle.roll_back(&frozen).unwrap();
    assert_eq!(rig.read(8, 1024), [[0; 512], [0; 512]].concat());
    assert_eq!(rig.read(0, 512), [1; 512]);
    assert!(fs::metadata(&spec.image).unwrap().blocks() * 512 < 1 << 20);
}

/// What a checkpoint has when it was written to a file, and another image filled from that.
fn in_a_file(handle: &DiskHandle, checkpoint: &DiskCheckpoint) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    let extents = handle.write(checkpoint, &file).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other");
    File::create(&path).unwrap().set_len(handle.0.size()).unwrap();
    let image = Image::open(&spec(&path, DiskFormat::Raw), &Cancel::default()).unwrap();
    image.fill(&extents, &file).unwrap();
    fs::read(&path).unwrap()
}

#[test]
fn a_checkpoint_in_a_file_takes_what_is_not_zero() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (_dir, spec) = fresh(format, 1024);
        let (handle, mut rig) = disk(&spec);
        assert_eq!(rig.write(8, &[1; 4096]), OK);
        handle.checkpoint().unwrap();
        assert_eq!(rig.write(1_000_000, &[2; 512]), OK);
        let checkpoint = handle.checkpoint().unwrap();
        assert_eq!(rig.write(8, &[3; 4096]), OK);
        let file = tempfile::tempfile().unwrap();
        let extents = handle.write(&checkpoint, &file).unwrap();
        assert_eq!((extents.size(), file.metadata().unwrap().len()), (1 << 30, 8192));
        let mut found = Vec::new();
        extents
            .read(&file, |at, content| {
                found.push((at, content[0]));
                Ok(())
            })
            .unwrap();
        assert_eq!(found, [(4096, 1), (512_000_000, 2)]);
        let other = DiskSpec { image: spec.image.with_extension("other"), ..spec.clone() };
        make_image(&other, &extents, &file).unwrap();
        assert_eq!(Rig::new(&other).read(999_999, 1536), [[0; 512], [2; 512], [0; 512]].concat());
        assert_eq!(Rig::new(&other).read(7, 1024), [[0; 512], [1; 512]].concat());
        make_image(&other, &extents, &file).expect_err("it is there");
        fs::remove_file(&other.image).unwrap();
        let smaller = DiskSpec { size: Some(16_u64.try_into().unwrap()), ..other.clone() };
        let error = make_image(&smaller, &extents, &file).expect_err("another size");
        assert!(crate::error::chain(&error).contains("it is of 16777216 bytes"), "{error}");
        fs::remove_file(&other.image).unwrap();
        file.set_len(8191).unwrap();
        let error = make_image(&other, &extents, &file).expect_err("it was cut short");
        assert!(crate::error::chain(&error).contains("another length"), "{error}");
    }
}

/// What is done to a disk.
#[derive(Clone, Debug)]
enum Act {
    Write(u64, usize, u8),
    Zero(u64, u32),
    Checkpoint,
    RollBack(usize),
    Merge,
}

fn act() -> impl Strategy<Value = Act> {
    // A disk of 5 clusters and a half, in sectors.
    let sector = 0..704_u64;
    prop_oneof![
        4 => (sector.clone(), 1..300_usize, any::<u8>()).prop_map(|(at, len, byte)| Act::Write(at, len, byte)),
        1 => (sector, 1..300_u32).prop_map(|(at, len)| Act::Zero(at, len)),
        2 => Just(Act::Checkpoint),
        2 => any::<usize>().prop_map(Act::RollBack),
        1 => Just(Act::Merge),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn layers_hold_what_a_plain_copy_would(acts in proptest::collection::vec(act(), 1..40)) {
        const SECTORS: usize = 704;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, vec![7; SECTORS * 512]).unwrap();
        let (handle, mut rig) = disk(&spec(&path, DiskFormat::Raw));
        let mut model = vec![7; SECTORS * 512];
        let mut stack: Vec<(DiskCheckpoint, Vec<u8>)> = Vec::new();
        for act in acts {
            match act {
                Act::Write(at, len, byte) => {
                    let start = usize::try_from(at).unwrap();
                    let len = len.min(SECTORS - start);
                    prop_assert_eq!(rig.write(at, &vec![byte; len * 512]), OK);
                    model[start * 512..(start + len) * 512].fill(byte);
                }
                Act::Zero(at, len) => {
                    let start = usize::try_from(at).unwrap();
                    let len = usize::try_from(len).unwrap().min(SECTORS - start);
                    prop_assert_eq!(rig.zero(at, u32::try_from(len).unwrap()), OK);
                    model[start * 512..(start + len) * 512].fill(0);
                }
                Act::Checkpoint => {
                    let checkpoint = handle.checkpoint().unwrap();
                    prop_assert!(in_a_file(&handle, &checkpoint) == model);
                    stack.push((checkpoint, model.clone()));
                }
                Act::RollBack(to) if !stack.is_empty() => {
                    stack.truncate(to % stack.len() + 1);
                    let (checkpoint, then) = stack.last().unwrap();
                    handle.roll_back(checkpoint).unwrap();
                    model.clone_from(then);
                }
                Act::RollBack(_) => {}
                Act::Merge => {
                    handle.merge().unwrap();
                    stack.clear();
                }
            }
            let mut found = Vec::new();
            for sector in (0..SECTORS).step_by(64) {
                found.extend(rig.read(u64::try_from(sector).unwrap(), 64 * 512));
            }
            prop_assert!(found == model);
        }
        handle.merge().unwrap();
        prop_assert!(fs::read(&path).unwrap() == model);
    }
}
