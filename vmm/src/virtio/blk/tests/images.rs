//! Images: formats, backing files, creation, locks, damage.

use std::error::Error;
use std::fs::{self, File as HostFile};
use std::os::unix::fs::FileExt;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, StorageOpenOptions};

use super::*;

/// An error and all its causes.
#[track_caller]
fn refused(spec: &DiskSpec) -> String {
    let error = Blk::new(spec, 1).err().expect("the image must be refused");
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    assert!(text.contains(spec.path.to_str().unwrap()), "the path is named: {text}");
    text
}

/// A qcow2 image on top of another image.
fn overlay(path: &Path, size: u64, backing: &Path, format: &str) {
    let file = HostFile::options().read(true).write(true).create_new(true).open(path).unwrap();
    let options = StorageOpenOptions::new().filename(path).write(true);
    let storage = File::from_open_file(file, options).unwrap();
    Qcow2::<File>::create_builder(storage)
        .size(size)
        .backing(backing.to_str().unwrap().to_owned(), format.to_owned())
        .create()
        .unwrap();
}

#[test]
fn a_qcow2_image_keeps_what_was_flushed() {
    let (_dir, spec) = fresh(DiskFormat::Qcow2, 64);
    let data = pattern(300 * 512, 6);
    let mut rig = Rig::new(&spec);
    assert_eq!(rig.write(1000, &data), OK);
    assert_eq!(rig.flush(), OK);
    assert!(fs::metadata(&spec.path).unwrap().len() < 2 * MIB, "it holds what is written only");
    // A copy taken now is what a killed process leaves.
    let copy = spec.path.with_extension("copy");
    fs::copy(&spec.path, &copy).unwrap();
    let left = super::spec(&copy, DiskFormat::Qcow2);
    assert_eq!(Rig::new(&left).read(1000, data.len()), data);
    drop(rig);
    assert_eq!(Rig::new(&spec).read(1000, data.len()), data);
}

#[test]
fn without_flush_negotiated_each_write_stays() {
    let (_dir, spec) = fresh(DiskFormat::Qcow2, 16);
    let mut rig = Rig::with(&spec, 1, 0);
    assert_eq!(rig.write(7, &[9; 512]), OK);
    let copy = spec.path.with_extension("copy");
    fs::copy(&spec.path, &copy).unwrap();
    assert_eq!(Rig::new(&super::spec(&copy, DiskFormat::Qcow2)).read(7, 512), [9; 512]);
}

#[test]
fn pause_and_reset_leave_the_file_complete() {
    for paused in [true, false] {
        let (_dir, spec) = fresh(DiskFormat::Qcow2, 16);
        let mut rig = Rig::new(&spec);
        assert_eq!(rig.write(7, &[9; 512]), OK);
        let mut inactive = None;
        if paused {
            rig.device.pause();
        } else {
            inactive = Some(rig.device.reset());
        }
        let copy = spec.path.with_extension("copy");
        fs::copy(&spec.path, &copy).unwrap();
        let left = super::spec(&copy, DiskFormat::Qcow2);
        assert_eq!(Rig::new(&left).read(7, 512), [9; 512]);
        drop(inactive);
    }
}

#[test]
fn writes_go_to_the_overlay_and_reads_to_the_backing_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let base = pattern(4 << 20, 7);
    fs::write(at("base"), &base).unwrap();
    overlay(&at("middle"), 4 * MIB, Path::new("base"), "raw");
    overlay(&at("top"), 8 * MIB, Path::new("middle"), "qcow2");
    {
        let mut rig = Rig::new(&spec(&at("middle"), DiskFormat::Qcow2));
        assert_eq!(rig.write(100, &[1; 512]), OK);
    }
    let mut rig = Rig::new(&spec(&at("top"), DiskFormat::Qcow2));
    assert_eq!(rig.write(200, &[2; 512]), OK);
    let mut expected = base.clone();
    expected[100 * 512..101 * 512].fill(1);
    expected[200 * 512..201 * 512].fill(2);
    for part in 0..4 {
        let from = part << 20;
        let sector = u64::try_from(from / 512).unwrap();
        assert_eq!(rig.read(sector, 1 << 20), expected[from..from + (1 << 20)]);
    }
    assert_eq!(rig.read(2 * 8192 - 8, 8 * 512), [0; 4096], "past the backing file");
    drop(rig);
    assert_eq!(fs::read(at("base")).unwrap(), base);
}

#[test]
fn backing_files_can_be_shared_but_not_written_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("base"), vec![5; 1 << 20]).unwrap();
    overlay(&at("a"), MIB, Path::new("base"), "raw");
    overlay(&at("b"), MIB, Path::new("base"), "raw");
    let a = Rig::new(&spec(&at("a"), DiskFormat::Qcow2));
    let b = Rig::new(&spec(&at("b"), DiskFormat::Qcow2));
    assert!(refused(&spec(&at("base"), DiskFormat::Raw)).contains("locked"));
    drop((a, b));
    let _base = Rig::new(&spec(&at("base"), DiskFormat::Raw));
    let text = refused(&spec(&at("a"), DiskFormat::Qcow2));
    assert!(text.contains("locked") && text.contains("base"), "{text}");
}

#[test]
fn a_loop_of_backing_files_ends() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    overlay(&at("a"), MIB, Path::new("b"), "qcow2");
    overlay(&at("b"), MIB, Path::new("a"), "qcow2");
    let mut spec = spec(&at("a"), DiskFormat::Qcow2);
    spec.read_only = true;
    let text = refused(&spec);
    assert!(text.contains("more than 16 backing files"), "{text}");
}

#[test]
fn a_backing_file_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    overlay(&dir.path().join("a"), MIB, Path::new("gone.img"), "raw");
    let text = refused(&spec(&dir.path().join("a"), DiskFormat::Qcow2));
    assert!(text.contains("gone.img"), "{text}");
}

#[test]
fn one_writer_or_many_readers() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    let mut reader = spec.clone();
    reader.read_only = true;
    let writing = Rig::new(&spec);
    assert!(refused(&spec).contains("locked by another process"));
    assert!(refused(&reader).contains("locked by another process"));
    drop(writing);
    let _one = Rig::new(&reader);
    let _two = Rig::new(&reader);
    assert!(refused(&spec).contains("locked by another process"));
}

#[test]
fn a_writer_that_locks_as_qemu_does_is_seen() {
    let (_dir, spec) = fresh(DiskFormat::Raw, 1);
    drop(Rig::new(&spec));
    let mut reader = spec.clone();
    reader.read_only = true;
    let qemu = HostFile::options().read(true).write(true).open(&spec.path).unwrap();
    // Reads, writes, and does not bear that others write.
    for byte in [100, 101, 103, 201, 203] {
        assert!(lock::set(&qemu, libc::F_RDLCK, byte, 1).unwrap());
    }
    assert!(refused(&spec).contains("locked by another process"));
    assert!(refused(&reader).contains("locked by another process"));
}

#[test]
fn what_is_no_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let raw = spec(&path, DiskFormat::Raw);
    let qcow2 = spec(&path, DiskFormat::Qcow2);
    assert!(refused(&raw).contains("No such file"));
    fs::write(&path, b"").unwrap();
    assert!(refused(&raw).contains("size of 0 bytes"));
    assert!(refused(&qcow2).contains("no qcow2 image"));
    fs::write(&path, [1; 1000]).unwrap();
    assert!(refused(&raw).contains("size of 1000 bytes"));
    assert!(refused(&qcow2).contains("no qcow2 image"));
    assert!(refused(&spec(dir.path(), DiskFormat::Raw)).contains("cannot open"));
}

/// A qcow2 image with tables and data, as bytes.
fn filled() -> Vec<u8> {
    let (_dir, spec) = fresh(DiskFormat::Qcow2, 64);
    let mut rig = Rig::new(&spec);
    for at in 0..8 {
        assert_eq!(rig.write(at * 8192, &pattern(64 << 10, 8)), OK);
    }
    drop(rig);
    fs::read(&spec.path).unwrap()
}

#[test]
fn a_qcow2_image_that_was_cut_off_anywhere_is_refused() {
    let whole = filled();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut");
    let spec = spec(&path, DiskFormat::Qcow2);
    // The last cluster may be incomplete, as the format allows.
    let last = whole.len().next_multiple_of(64 << 10) - (64 << 10);
    for len in (0..=last).step_by(16 << 10).chain([1, 71, 72, 103, 104, 4095]) {
        fs::write(&path, &whole[..len]).unwrap();
        let text = refused(&spec);
        assert!(text.contains("truncated") || text.contains("qcow2"), "{len}: {text}");
    }
    fs::write(&path, &whole).unwrap();
    drop(Rig::new(&spec));
}

#[test]
fn damaged_qcow2_images_do_no_harm() {
    let whole = filled();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged");
    let mut refusals = 0;
    // The header byte by byte, then a byte in each of the tables.
    for at in (0..112).chain((112..whole.len()).step_by(16411)) {
        for value in [0xff, 0x80, 0x01] {
            fs::write(&path, &whole).unwrap();
            let file = HostFile::options().write(true).open(&path).unwrap();
            file.write_all_at(&[whole[at] ^ value], u64::try_from(at).unwrap()).unwrap();
            let mut spec = spec(&path, DiskFormat::Qcow2);
            spec.read_only = at % 2 == 0;
            match Blk::new(&spec, 1) {
                Err(_) => refusals += 1,
                Ok(blk) => {
                    let size = blk.image.size();
                    let mut rig = Rig::around(blk, FEATURES);
                    for sector in [0, 8192, 65536, size / 512 - 1] {
                        rig.request(0, sector, &[], 512);
                        rig.request(1, sector, &[3; 512], 0);
                    }
                    rig.flush();
                }
            }
        }
    }
    assert!(refusals > 100, "{refusals}");
}

#[test]
fn an_image_marked_as_corrupt_is_refused() {
    let mut image = filled();
    image[79] |= 2;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("corrupt");
    fs::write(&path, image).unwrap();
    assert!(refused(&spec(&path, DiskFormat::Qcow2)).contains("marked as corrupt"));
}

#[test]
fn an_image_is_made_once_and_sparse() {
    use std::os::unix::fs::MetadataExt;
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (dir, spec) = fresh(format, 1024);
        let mut rig = Rig::new(&spec);
        assert!(fs::metadata(&spec.path).unwrap().blocks() * 512 < 2 * MIB, "{format}");
        assert_eq!(rig.write(0, &[7; 512]), OK);
        drop(rig);
        assert_eq!(Rig::new(&spec).read(0, 512), [7; 512], "it is kept");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }
}

#[test]
fn ext4_is_made_with_its_label() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (_dir, mut spec) = fresh(format, 64);
        spec.create.as_mut().unwrap().ext4_label = Some("nixos".into());
        let mut rig = Rig::around(Blk::new(&spec, 1).unwrap(), FEATURES);
        let superblock = rig.read(2, 1024);
        assert_eq!(superblock[0x38..0x3a], [0x53, 0xef], "{format}: s_magic");
        assert_eq!(&superblock[0x78..0x7e], b"nixos\0");
    }
}

#[test]
fn images_that_cannot_be_made_are_refused_and_leave_nothing() {
    let (dir, mut spec) = fresh(DiskFormat::Raw, 0);
    assert!(refused(&spec).contains("0 MiB"));
    spec.create.as_mut().unwrap().size_mib = u64::MAX;
    assert!(refused(&spec).contains("MiB; allowed are"));
    spec.create =
        Some(DiskCreateSpec { size_mib: 8, ext4_label: Some("longer than sixteen".into()) });
    assert!(refused(&spec).contains("16 bytes"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    spec.path = dir.path().join("no/such/directory/disk");
    assert!(refused(&spec).contains("cannot make disk image"));
}
