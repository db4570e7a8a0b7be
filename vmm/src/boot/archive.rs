//! Finds out whether an initrd was cut off. Linux unpacks what there is of one and says nothing, and
//! what is missing shows much later as something else.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::MemoryMap;

/// Header of an entry (Documentation/driver-api/early-userspace/buffer-format.rst): a magic number
/// and thirteen fields of eight hexadecimal digits.
const HEADER: usize = 110;
const MAGICS: [&[u8]; 2] = [b"070701", b"070702"];
const FILE_SIZE: usize = 54;
const NAME_SIZE: usize = 94;
/// The name of an archive's last entry, with its final zero.
const TRAILER: &[u8] = b"TRAILER!!!\0";
/// Headers, names and contents each begin at a multiple of this.
const ALIGN: u64 = 4;

/// How many bytes the uncompressed cpio archives at `start` have at least, if that is more than
/// `len`. Compressed archives, and everything behind one, are left to the kernel.
pub fn missing_end(memory: &MemoryMap, start: u64, len: u64) -> Option<u64> {
    let mut at = 0;
    let mut inside = false;
    while at < len {
        if !inside {
            let zeros = leading_zeros(memory, start + at, len - at)?;
            if zeros > 0 {
                at += zeros;
                continue;
            }
        }
        let header_end = at + HEADER as u64;
        if header_end > len {
            // Too short for a header: cut off if it should be one.
            return inside.then_some(header_end);
        }
        let mut header = [0; HEADER];
        memory.read_slice(&mut header, GuestAddress(start + at)).ok()?;
        if !MAGICS.contains(&&header[..6]) {
            return None;
        }
        let (name, file) = (field(&header, NAME_SIZE)?, field(&header, FILE_SIZE)?);
        let name_end = header_end + name;
        let end = if file == 0 { name_end } else { name_end.next_multiple_of(ALIGN) + file };
        if end > len {
            return Some(end);
        }
        inside = !is_trailer(memory, start + header_end, name);
        at = end.next_multiple_of(ALIGN);
    }
    inside.then_some(at + HEADER as u64)
}

/// How many of the next bytes, a page at most, are padding between two archives.
fn leading_zeros(memory: &MemoryMap, at: u64, len: u64) -> Option<u64> {
    let mut bytes = [0; 4096];
    let count = usize::try_from(len).map_or(bytes.len(), |len| len.min(bytes.len()));
    memory.read_slice(&mut bytes[..count], GuestAddress(at)).ok()?;
    Some(bytes[..count].iter().take_while(|byte| **byte == 0).count() as u64)
}

fn is_trailer(memory: &MemoryMap, at: u64, length: u64) -> bool {
    let mut name = [0; TRAILER.len()];
    length == TRAILER.len() as u64
        && memory.read_slice(&mut name, GuestAddress(at)).is_ok()
        && name == TRAILER
}

fn field(header: &[u8; HEADER], at: usize) -> Option<u64> {
    let digits = std::str::from_utf8(&header[at..at + 8]).ok()?;
    u32::from_str_radix(digits, 16).ok().map(u64::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn entry(name: &str, content: &[u8]) -> Vec<u8> {
        let mut bytes = format!(
            "070701{:048x}{:08x}{:032x}{:08x}{:08x}{name}\0",
            1,
            content.len(),
            0,
            name.len() + 1,
            0
        );
        assert_eq!(bytes.len(), HEADER + name.len() + 1);
        while bytes.len() % 4 != 0 {
            bytes.push('\0');
        }
        let mut bytes = bytes.into_bytes();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn missing(bytes: &[u8]) -> Option<u64> {
        let memory = memory::allocate(2).unwrap();
        memory.write_slice(bytes, GuestAddress(4096)).unwrap();
        missing_end(&memory, 4096, bytes.len() as u64)
    }

    #[test]
    fn whole_archives_and_what_is_no_archive_pass() {
        let trailer = entry("TRAILER!!!", b"");
        let archive = [entry("etc", b""), entry("etc/x", b"some text"), trailer].concat();
        let padded = [archive.as_slice(), &[0; 400]].concat();
        assert_eq!(missing(&archive), None);
        assert_eq!(missing(&padded), None);
        assert_eq!(missing(&[padded.as_slice(), &archive].concat()), None);
        let compressed =
            [archive.as_slice(), b"\x1f\x8b and so on, more than a header".repeat(9).as_slice()]
                .concat();
        assert_eq!(missing(&compressed), None);
        for other in [&b""[..], b"\x1f\x8b\x08", &[0; 200], &[0xff; 200], &b"070701zz".repeat(40)] {
            assert_eq!(missing(other), None, "{other:?}");
        }
    }

    #[test]
    fn an_archive_cut_anywhere_is_noticed() {
        let whole = [entry("etc", b""), entry("etc/x", b"some text")].concat();
        let archive = [whole.as_slice(), &entry("TRAILER!!!", b"")].concat();
        for length in HEADER..whole.len() + HEADER + TRAILER.len() {
            let needed = missing(&archive[..length]);
            assert!(needed.is_some_and(|needed| needed > length as u64), "{length}: {needed:?}");
        }
        // A second archive after a complete one.
        let two = [archive.as_slice(), &archive].concat();
        assert!(missing(&two[..two.len() - 60]).is_some());
    }

    #[test]
    fn sizes_beyond_all_memory_do_no_harm() {
        let mut archive = entry("x", b"");
        archive[FILE_SIZE..FILE_SIZE + 8].copy_from_slice(b"ffffffff");
        archive[NAME_SIZE..NAME_SIZE + 8].copy_from_slice(b"ffffffff");
        assert!(missing(&archive).is_some_and(|needed| needed > u64::from(u32::MAX)));
    }
}
