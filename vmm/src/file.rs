//! Files of the host whose content is used in place where that is safe.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;

use vm_memory::{FileOffset, MmapRegion};

/// Write permission bits of a file.
const WRITABLE: u32 = 0o222;
/// How much is read at once of what is not mapped.
const CHUNK: usize = 256 << 10;

/// Maps a file that cannot change, for reading: one that shrinks under a mapping would end this process by SIGBUS, so
/// only files that nobody may write, as in the Nix store and in kits, are mapped. That they are removed does no harm.
pub(crate) fn map(file: &File, metadata: &Metadata) -> Option<MmapRegion> {
    let size = usize::try_from(metadata.len()).ok()?;
    if metadata.mode() & WRITABLE != 0 || size == 0 {
        return None;
    }
    let file = FileOffset::new(file.try_clone().ok()?, 0);
    // Only some of it may be wanted: no MAP_POPULATE.
    let flags = libc::MAP_PRIVATE;
    // Where it cannot be mapped it can still be read.
    MmapRegion::build(Some(file), size, libc::PROT_READ, flags).ok()
}

/// Calls `each` with all that a file holds, one part after the other, without a copy if it cannot change.
///
/// # Errors
/// It cannot be read.
pub fn read(mut file: &File, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    if let Some(mapping) = map(file, &file.metadata()?) {
        // SAFETY: the region is mapped for reading, as long as `mapping` lives, and nobody writes to the file.
        each(unsafe { std::slice::from_raw_parts(mapping.as_ptr(), mapping.size()) });
        return Ok(());
    }
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => each(&buffer[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_read_whether_they_can_change_or_not() {
        let all: Vec<u8> = (0..251).cycle().take(CHUNK + 5000).collect();
        for content in [&all[..], &all[..3], &[]] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(content).unwrap();
            for (mode, parts) in [(0o600, content.len().div_ceil(CHUNK)), (0o444, 1)] {
                file.as_file().set_permissions(Permissions::from_mode(mode)).unwrap();
                let (mut found, mut calls) = (Vec::<u8>::new(), 0);
                read(&File::open(file.path()).unwrap(), |part| {
                    found.extend(part);
                    calls += 1;
                })
                .unwrap();
                assert!(found == content);
                assert_eq!(calls, parts.min(content.len()), "mode {mode:o}");
            }
        }
    }
}
