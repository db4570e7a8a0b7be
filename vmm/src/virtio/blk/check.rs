//! Finds out whether a qcow2 file is whole before a guest uses it.
//!
//! imago reads what lies past the end of a file as zeroes. So in a file that was cut off, tables
//! would be empty and data would be gone without a word. This looks where the tables are (QEMU's
//! `docs/interop/qcow2.txt`) and whether all that they refer to is there.

use std::fs::File as HostFile;
use std::io;
use std::os::unix::fs::FileExt;

use imago::file::File;
use imago::{FormatAccess, ShallowMapping, Storage};

/// Length of the part of the header that all versions have.
const HEADER: usize = 72;
/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
/// Sizes of a cluster, as powers of two, that the format allows.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Largest first-level and reference count tables, as in QEMU, in bytes.
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNTS: u64 = 8 << 20;
/// Bits of a first-level entry that are an offset in the file.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an entry of the reference count table that are an offset in the file.
const REFCOUNT_OFFSET: u64 = !0x1ff;
/// Incompatible features (version 3): the image is known to be corrupt.
const CORRUPT: u64 = 1 << 1;

/// The tables of an image.
struct Tables {
    cluster: u64,
    l1: (u64, u64),
    refcounts: (u64, u64),
}

/// Refuses an image whose header makes no sense or whose tables are not all in the file. Gives the
/// size of its clusters in bytes.
pub(super) fn check_tables(file: &HostFile) -> io::Result<u64> {
    let len = file.metadata()?.len();
    let tables = Tables::read(file)?;
    let inside = |what, (start, size): (u64, u64)| match start.checked_add(size) {
        Some(end) if end <= len => Ok(()),
        _ => Err(truncated(what, start, len)),
    };
    let table = |what, entries, (start, size): (u64, u64), mask: u64| -> io::Result<bool> {
        inside(what, (start, size))?;
        let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, start)?;
        let mut starts = bytes.as_chunks().0.iter().map(|&entry| u64::from_be_bytes(entry) & mask);
        for at in starts.clone().filter(|&at| at != 0) {
            inside(entries, (at, tables.cluster))?;
        }
        Ok(starts.next().is_some_and(|first| first != 0))
    };
    table("the first-level table", "a second-level table", tables.l1, L1_OFFSET)?;
    let refcounts = "a block of reference counts";
    match table("the reference count table", refcounts, tables.refcounts, REFCOUNT_OFFSET)? {
        true => Ok(tables.cluster),
        // The header itself is counted there.
        false => Err(bad("corrupt: it has no reference counts")),
    }
}

/// Refuses an image whose own data, in clusters of `cluster` bytes, is past the end of the file.
pub(super) fn check_data(image: &FormatAccess<File>, cluster: u64) -> io::Result<()> {
    let mut at = 0;
    while at < image.size() {
        let (mapping, len) = image.get_shallow_mapping(at, image.size() - at)?;
        if len == 0 {
            break;
        }
        if let ShallowMapping::Raw { storage, offset, .. } = mapping {
            let size = storage.size()?;
            // The last cluster of a file may be incomplete.
            if offset.saturating_add(len) > size.next_multiple_of(cluster) {
                return Err(truncated("data", offset, size));
            }
        }
        at += len;
    }
    Ok(())
}

impl Tables {
    fn read(file: &HostFile) -> io::Result<Tables> {
        let mut header = [0; HEADER + 8];
        let read = file.read_at(&mut header, 0)?;
        let be32 = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|i| header[at + i]));
        let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));
        if read < HEADER || be32(0) != MAGIC {
            return Err(bad("this is no qcow2 image"));
        }
        if be32(4) >= 3 && be64(72) & CORRUPT != 0 {
            return Err(bad("the image is marked as corrupt; see qemu-img check"));
        }
        let bits = be32(20);
        if !CLUSTER_BITS.contains(&bits) {
            return Err(bad(format!("clusters of 2^{bits} bytes; the header is corrupt")));
        }
        if be32(32) != 0 {
            return Err(bad("the image is encrypted, which is not supported"));
        }
        let cluster = 1 << bits;
        let l1 = 8 * u64::from(be32(36));
        let needed = be64(24).div_ceil(cluster * (cluster / 8));
        if l1 > MAX_L1 || l1 / 8 < needed {
            let size = be64(24);
            return Err(bad(format!("a first-level table of {l1} bytes for {size} bytes of disk")));
        }
        let refcounts = (be64(48), u64::from(be32(56)) * cluster);
        if refcounts.1 > MAX_REFCOUNTS {
            return Err(bad(format!("a reference count table of {} bytes", refcounts.1)));
        }
        Ok(Tables { cluster, l1: (be64(40), l1), refcounts })
    }
}

fn bad(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

fn truncated(what: &str, start: u64, len: u64) -> io::Error {
    bad(format!("truncated: {what} at byte {start} is not inside the file's {len} bytes"))
}
