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
    assert!(text.contains(spec.image.to_str().unwrap()), "the path is named: {text}");
    text
}

/// A qcow2 image that may have what is in its directory below it.
fn with_backing(path: &Path) -> DiskSpec {
    let backing = vec![path.parent().unwrap().to_owned()];
    DiskSpec { backing, ..spec(path, DiskFormat::Qcow2) }
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
    assert!(fs::metadata(&spec.image).unwrap().len() < 2 * MIB, "it holds what is written only");
    // A copy taken now is what a killed process leaves.
    let copy = spec.image.with_extension("copy");
    fs::copy(&spec.image, &copy).unwrap();
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
    let copy = spec.image.with_extension("copy");
    fs::copy(&spec.image, &copy).unwrap();
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
        let copy = spec.image.with_extension("copy");
        fs::copy(&spec.image, &copy).unwrap();
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
        let mut rig = Rig::new(&with_backing(&at("middle")));
        assert_eq!(rig.write(100, &[1; 512]), OK);
    }
    let mut rig = Rig::new(&with_backing(&at("top")));
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
    let a = Rig::new(&with_backing(&at("a")));
    let b = Rig::new(&with_backing(&at("b")));
    assert!(refused(&spec(&at("base"), DiskFormat::Raw)).contains("locked"));
    drop((a, b));
    let _base = Rig::new(&spec(&at("base"), DiskFormat::Raw));
    let text = refused(&with_backing(&at("a")));
    assert!(text.contains("locked") && text.contains("base"), "{text}");
}

#[test]
fn a_loop_of_backing_files_ends() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    overlay(&at("a"), MIB, Path::new("b"), "qcow2");
    overlay(&at("b"), MIB, Path::new("a"), "qcow2");
    let mut spec = with_backing(&at("a"));
    spec.read_only = true;
    let text = refused(&spec);
    assert!(text.contains("more than 16 backing files"), "{text}");
}

#[test]
fn a_backing_file_that_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    overlay(&dir.path().join("a"), MIB, Path::new("gone.img"), "raw");
    let text = refused(&with_backing(&dir.path().join("a")));
    assert!(text.contains("gone.img"), "{text}");
}

#[test]
fn a_backing_file_has_to_be_allowed_at_every_level() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let outside = tempfile::NamedTempFile::new().unwrap();
    outside.as_file().set_len(MIB).unwrap();
    fs::write(at("base"), vec![5; 1 << 20]).unwrap();
    overlay(&at("middle"), MIB, Path::new("base"), "raw");
    overlay(&at("top"), MIB, Path::new("middle"), "qcow2");
    overlay(&at("thief"), MIB, outside.path(), "raw");
    overlay(&at("above"), MIB, Path::new("thief"), "qcow2");
    std::os::unix::fs::symlink(outside.path(), at("link")).unwrap();
    overlay(&at("by-link"), MIB, Path::new("link"), "raw");
    overlay(&at("by-dots"), MIB, Path::new("../../etc/passwd"), "raw");
    let disk = |name: &str, backing: &[&str]| DiskSpec {
        backing: backing.iter().map(|name| at(name)).collect(),
        ..spec(&at(name), DiskFormat::Qcow2)
    };
    // By default none, and each has to be named.
    for (name, backing, missing) in [
        ("top", &[][..], "middle"),
        ("top", &["middle"], "base"),
        ("top", &["base"], "middle"),
        ("thief", &["."], outside.path().to_str().unwrap()),
        ("above", &["."], outside.path().to_str().unwrap()),
        ("by-link", &["."], outside.path().to_str().unwrap()),
        ("by-link", &["link-to-nowhere"], outside.path().to_str().unwrap()),
        ("by-dots", &["."], "etc/passwd"),
    ] {
        let text = refused(&disk(name, backing));
        let told = text.contains("the disk's `backing`") || text.contains("No such file");
        assert!(told && text.contains(missing), "{name} {backing:?}: {text}");
    }
    for backing in [&["middle", "base"][..], &["."]] {
        assert_eq!(Rig::new(&disk("top", backing)).read(0, 512), [5; 512]);
    }
    // What the description calls by a link is what the link leads to.
    Rig::new(&disk("by-link", &["link"]));
}

#[test]
fn only_files_are_backing_files() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let fifo = std::ffi::CString::new(at("fifo").to_str().unwrap()).unwrap();
    // SAFETY: the path ends with a zero byte.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    fs::create_dir(at("dir")).unwrap();
    for (number, backing) in ["fifo", "dir", "/dev/zero", "/dev/null"].into_iter().enumerate() {
        for format in ["raw", "qcow2"] {
            let path = at(&format!("{number}-{format}"));
            overlay(&path, MIB, Path::new(backing), format);
            let spec = DiskSpec { backing: vec!["/".into()], ..spec(&path, DiskFormat::Qcow2) };
            let text = refused(&spec);
            assert!(text.contains("neither a file") || text.contains("is no file"), "{text}");
        }
    }
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
    let qemu = HostFile::options().read(true).write(true).open(&spec.image).unwrap();
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
    fs::read(&spec.image).unwrap()
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
fn what_an_image_needs_in_vain_is_named_with_what_helps() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd");
    for (at, value, says) in [
        (79, 1, &["marked as dirty", "qemu-img check -r all"][..]),
        (79, 2, &["marked as corrupt", "qemu-img check -r all"]),
        (79, 4, &["data in another file", "qemu-img convert"]),
        (79, 8, &["zstd", "qemu-img convert"]),
        (79, 16, &["extended_l2", "qemu-img convert"]),
        (72, 1, &["bit 56", "qemu-img convert"]),
        (7, 1, &["version 1", "qemu-img convert"]),
    ] {
        let mut image = filled();
        image[at] = value;
        fs::write(&path, image).unwrap();
        let text = refused(&spec(&path, DiskFormat::Qcow2));
        assert!(says.iter().all(|part| text.contains(part)), "{text}");
    }
}

#[test]
fn a_start_that_is_cancelled_looks_no_further() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, filled()).unwrap();
    let spec = spec(&path, DiskFormat::Qcow2);
    let cancel = Cancel::default();
    drop(Image::open(&spec, &cancel).unwrap());
    cancel.cancel();
    let error = Image::open(&spec, &cancel).err().expect("it is cancelled");
    let text = crate::error::chain(&error);
    assert!(text.ends_with("cannot be used as qcow2: the start was cancelled"), "{text}");
}

/// A file of 1.3 MB that says of itself that it is a large image: its first-level table refers to
/// what `entry` says, and all of it is at the end of what [`filled`] gives.
fn hostile(path: &Path, entries: u32, entry: impl Fn(u64) -> u64) -> HostFile {
    let image = filled();
    let end = u64::try_from(image.len()).unwrap().next_multiple_of(64 << 10);
    fs::write(path, image).unwrap();
    let file = HostFile::options().write(true).open(path).unwrap();
    let table: Vec<u8> = (0..entries.into()).flat_map(|at| entry(at).to_be_bytes()).collect();
    file.write_all_at(&table, end).unwrap();
    // Size, entries of the first-level table, and its place.
    file.write_all_at(&(u64::from(entries) << 29).to_be_bytes(), 24).unwrap();
    file.write_all_at(&entries.to_be_bytes(), 36).unwrap();
    file.write_all_at(&end.to_be_bytes(), 40).unwrap();
    file
}

#[test]
fn a_small_file_is_looked_at_quickly_whatever_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile");
    let spec = spec(&path, DiskFormat::Qcow2);
    // Looked at one by one each of these takes minutes.
    let began = Instant::now();
    let whole = filled();
    let second_level = u64::from_be_bytes(whole[40..48].try_into().unwrap());
    let second_level = usize::try_from(second_level).unwrap();
    let used: [u8; 8] = whole[second_level..second_level + 8].try_into().unwrap();
    let used = u64::from_be_bytes(used);
    hostile(&path, 131_072, |_| used);
    let text = refused(&spec);
    assert!(text.contains("used twice"), "{text}");
    // Tables that differ, in a hole of 256 GiB.
    let file = hostile(&path, 4 << 20, |at| (at + 1024) << 16);
    file.set_len(((4 << 20) + 1024) << 16).unwrap();
    drop(Blk::new(&spec, 1));
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn an_image_is_made_once_and_sparse() {
    use std::os::unix::fs::MetadataExt;
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let (dir, spec) = fresh(format, 1024);
        let mut rig = Rig::new(&spec);
        assert!(fs::metadata(&spec.image).unwrap().blocks() * 512 < 2 * MIB, "{format}");
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
        spec.label = Some("nixos".try_into().unwrap());
        let mut rig = Rig::around(Blk::new(&spec, 1).unwrap(), FEATURES);
        let superblock = rig.read(2, 1024);
        assert_eq!(superblock[0x38..0x3a], [0x53, 0xef], "{format}: s_magic");
        assert_eq!(&superblock[0x78..0x7e], b"nixos\0");
    }
}

#[test]
fn images_that_cannot_be_made_are_refused_and_leave_nothing() {
    let (dir, mut spec) = fresh(DiskFormat::Raw, 8);
    spec.image = dir.path().join("no/such/directory/disk");
    assert!(refused(&spec).contains("cannot make disk image"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
