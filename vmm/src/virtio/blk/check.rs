//! Finds out whether a qcow2 file is whole before a guest uses it.
//!
//! imago reads what lies past the end of a file as zeroes. So in a file that was cut off, tables would be empty and
//! data would vanish without an error. This checks where the tables are (QEMU's `docs/interop/qcow2.txt`) and whether
//! all that they refer to is there.
//!
//! The file is not trusted. No table is read twice and no hole is read at all, so the work is bounded by the space
//! that the file takes up, whatever its header claims.

use std::fs::File as HostFile;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::Cancel;

/// Length of the part of the header that all versions have.
const HEADER: usize = 72;
/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
/// Sizes of a cluster, as powers of two, that the format allows.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Largest first-level and reference count tables, as in QEMU, in bytes.
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNTS: u64 = 8 << 20;
/// Longest name of a backing file, in bytes.
const MAX_NAME: usize = 1023;
/// Bits of an entry of the first or second level that are an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an entry of the reference count table that are an offset in the file.
const REFCOUNT_OFFSET: u64 = !0x1ff;
/// Bit of an entry of the second level: its cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Incompatible features (version 3).
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;

/// What is in a header.
struct Header {
    cluster_bits: u32,
    l1: Table,
    refcounts: Table,
    /// The name of the image's backing file.
    backing: Option<String>,
}

/// A table of offsets in the file.
struct Table {
    name: &'static str,
    /// What it refers to.
    entries: &'static str,
    start: u64,
    len: u64,
    mask: u64,
}

/// Refuses an image that is incomplete, invalid, or needs unsupported features. Returns the
/// name of its backing file. What is large takes its time, unless `cancel` ends it.
pub(super) fn check(file: &HostFile, cancel: &Cancel) -> io::Result<Option<String>> {
    let header = Header::read(file)?;
    let file =
        Whole { file, len: file.metadata()?.len(), cluster: 1 << header.cluster_bits, cancel };
    let second_level = file.offsets(&header.l1)?;
    // The header itself is counted there.
    if file.offsets(&header.refcounts)?.first().is_none_or(|first| first.0 != 0) {
        return Err(bad("corrupt: it has no reference counts"));
    }
    file.check_data(second_level.into_iter().map(|(_, at)| at), header.cluster_bits)?;
    Ok(header.backing)
}

/// A file, and what all of it is measured by.
struct Whole<'a> {
    file: &'a HostFile,
    len: u64,
    /// In bytes.
    cluster: u64,
    cancel: &'a Cancel,
}

impl Whole<'_> {
    /// The offsets that a table has, with their places in it, sorted by offset but for the table's
    /// first entry, which stays first.
    fn offsets(&self, table: &Table) -> io::Result<Vec<(usize, u64)>> {
        let Table { name, entries, start, len, mask } = *table;
        self.inside(name, start, len)?;
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, start)?;
        let offsets = bytes.as_chunks().0.iter().map(|&entry| u64::from_be_bytes(entry) & mask);
        let mut offsets: Vec<_> = offsets.enumerate().filter(|(_, at)| *at != 0).collect();
        for (_, at) in &offsets {
            self.inside(entries, *at, self.cluster)?;
            self.aligned(entries, *at)?;
        }
        let rest = usize::from(offsets.first().is_some_and(|first| first.0 == 0));
        let mut sorted: Vec<_> = offsets.iter().map(|(_, at)| *at).collect();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(bad(format!("corrupt: {entries} at byte {} is used twice", twice[0])));
        }
        offsets[rest..].sort_unstable_by_key(|(_, at)| *at);
        Ok(offsets)
    }

    /// Checks all second-level tables, which are at `tables`.
    fn check_data(&self, tables: impl Iterator<Item = u64>, cluster_bits: u32) -> io::Result<()> {
        // Where the place of a compressed cluster ends and its length begins.
        let place = (1 << (62 - (cluster_bits - 8))) - 1;
        // The last cluster of a file may be incomplete.
        let end = self.len.next_multiple_of(self.cluster);
        let mut table = vec![0; usize::try_from(self.cluster).map_err(io::Error::other)?];
        let mut hole = 0..0;
        for at in tables {
            self.cancel.check()?;
            if hole.start <= at && at + self.cluster <= hole.end {
                continue;
            }
            hole = at..self.next_data(at)?;
            if at + self.cluster <= hole.end {
                continue;
            }
            self.file.read_exact_at(&mut table, at)?;
            for entry in table.as_chunks().0.iter().map(|&entry| u64::from_be_bytes(entry)) {
                if entry & COMPRESSED != 0 {
                    self.inside("compressed data", entry & place, 1)?;
                    continue;
                }
                let at = entry & OFFSET;
                self.aligned("data", at)?;
                if at.saturating_add(self.cluster) > end {
                    return Err(truncated("data", at, self.len));
                }
            }
        }
        Ok(())
    }

    /// Where from `at` on there is something in the file that is no hole.
    fn next_data(&self, at: u64) -> io::Result<u64> {
        let Ok(from) = i64::try_from(at) else { return Ok(at) };
        // SAFETY: lseek takes no pointers. The file's position means nothing: all reads have theirs.
        let found = unsafe { libc::lseek64(self.file.as_raw_fd(), from, libc::SEEK_DATA) };
        match u64::try_from(found) {
            Ok(found) => Ok(found),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(self.len),
                // A device, or a file system without holes.
                error if error.raw_os_error() == Some(libc::EINVAL) => Ok(at),
                error => Err(error),
            },
        }
    }

    fn inside(&self, what: &str, start: u64, len: u64) -> io::Result<()> {
        match start.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(truncated(what, start, self.len)),
        }
    }

    fn aligned(&self, what: &str, at: u64) -> io::Result<()> {
        if at.is_multiple_of(self.cluster) {
            return Ok(());
        }
        Err(bad(format!("corrupt: {what} at byte {at} does not begin at a cluster")))
    }
}

impl Header {
    fn read(file: &HostFile) -> io::Result<Header> {
        let mut header = [0; HEADER + 8];
        let read = file.read_at(&mut header, 0)?;
        let be32 = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|i| header[at + i]));
        let be64 = |at: usize| u64::from(be32(at)) << 32 | u64::from(be32(at + 4));
        if read < HEADER || be32(0) != MAGIC {
            return Err(bad("this is no qcow2 image"));
        }
        match be32(4) {
            2 => {}
            3 => check_features(be64(72))?,
            other => return Err(bad(format!("version {other} of the format; {CONVERT}"))),
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
        let refcounts = u64::from(be32(56)) * cluster;
        if refcounts > MAX_REFCOUNTS {
            return Err(bad(format!("a reference count table of {refcounts} bytes")));
        }
        Ok(Header {
            cluster_bits: bits,
            l1: Table {
                name: "the first-level table",
                entries: "a second-level table",
                start: be64(40),
                len: l1,
                mask: OFFSET,
            },
            refcounts: Table {
                name: "the reference count table",
                entries: "a block of reference counts",
                start: be64(48),
                len: refcounts,
                mask: REFCOUNT_OFFSET,
            },
            backing: match be64(8) {
                0 => None,
                at => {
                    let mut name = vec![0; MAX_NAME.min(usize::try_from(be32(16)).unwrap_or(0))];
                    file.read_exact_at(&mut name, at)?;
                    Some(String::from_utf8_lossy(&name).into_owned())
                }
            },
        })
    }
}

/// What helps against a feature.
const CONVERT: &str = "`qemu-img convert -O qcow2 IMAGE NEW` makes an image that firn can use";
const REPAIR: &str = "`qemu-img check -r all IMAGE` repairs it";

/// Says what is wrong with an image that has any feature that who does not know it must not ignore.
fn check_features(features: u64) -> io::Result<()> {
    if features & DIRTY != 0 {
        return Err(bad(format!(
            "the image is marked as dirty: whoever had it last did not close it; {REPAIR}"
        )));
    }
    if features & CORRUPT != 0 {
        return Err(bad(format!("the image is marked as corrupt; {REPAIR} as far as it can be")));
    }
    if features & DATA_FILE != 0 {
        return Err(bad(format!(
            "the image has its data in another file, which is not supported; {CONVERT}"
        )));
    }
    let name = |bit: u32| match bit {
        3 => "compression by zstd".to_owned(),
        4 => "subclusters (extended_l2)".to_owned(),
        bit => format!("a feature without a name here (bit {bit})"),
    };
    let names: Vec<_> = (0..64).filter(|bit| features & 1 << bit != 0).map(name).collect();
    if names.is_empty() {
        return Ok(());
    }
    let names = names.join(", ");
    Err(bad(format!("the image uses what is not supported: {names}; {CONVERT}")))
}

fn bad(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

fn truncated(what: &str, start: u64, len: u64) -> io::Error {
    bad(format!("truncated: {what} at byte {start} is not inside the file's {len} bytes"))
}
