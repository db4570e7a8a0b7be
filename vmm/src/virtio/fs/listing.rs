//! Directory entries that were read from the host and not yet returned to the guest.
//!
//! A reply to READDIR has room for fewer entries than the host gives at once. `virtiofsd` forgets the rest and seeks
//! back to it for the next reply. But there are file systems (tmpfs before Linux 6.6) where a position counts the
//! entries before it: deleting listed entries moves the others to lower positions, and a seek skips them. So the last
//! entries read of each open directory are kept, and the host continues from its current position.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtiofsd::filesystem::{DirEntry, DirectoryIterator};

/// How much is read of a directory at once, in bytes of the host's entries: as much as the C
/// library does.
pub(super) const BATCH: u32 = 32 << 10;
/// Most directories of a share of which entries are kept, so that a guest that opens many does not
/// fill memory. For others it is as if there were no batch.
const MAX_KEPT: usize = 256;

struct Entry {
    ino: libc::ino64_t,
    offset: u64,
    kind: u32,
    name: CString,
}

/// Entries that follow each other.
pub(super) struct Batch {
    /// The position of the first.
    start: u64,
    entries: Vec<Entry>,
}

impl Batch {
    /// Takes all that the host gave for a read at position `start`.
    pub(super) fn new(start: u64, mut from: impl DirectoryIterator) -> Batch {
        let mut entries = Vec::new();
        while let Some(DirEntry { ino, offset, type_, name }) = from.next() {
            entries.push(Entry { ino, offset, kind: type_, name: name.to_owned() });
        }
        Batch { start, entries }
    }

    /// Which entry is at a position; none if it is not here.
    fn find(&self, position: u64) -> Option<usize> {
        if position == self.start {
            return Some(0);
        }
        // The last one, so that entries at one position end.
        let before = self.entries.iter().rposition(|entry| entry.offset == position)?;
        Some(before + 1).filter(|&index| index < self.entries.len())
    }
}

/// The rest of a batch.
pub(super) struct Listing {
    batch: Arc<Batch>,
    next: usize,
}

impl DirectoryIterator for Listing {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        let entry = self.batch.entries.get(self.next)?;
        self.next += 1;
        let name: &CStr = &entry.name;
        Some(DirEntry { ino: entry.ino, offset: entry.offset, type_: entry.kind, name })
    }
}

/// The last batch of each open directory: by handle, with its inode.
#[derive(Default)]
pub(super) struct Listings(Mutex<HashMap<u64, (u64, Arc<Batch>)>>);

impl Listings {
    /// What has been read of a directory from `position` on.
    pub(super) fn find(&self, inode: u64, handle: u64, position: u64) -> Option<Listing> {
        // Who begins anew wants to see what has changed.
        if position == 0 {
            return None;
        }
        let kept = self.lock();
        let (_, batch) = kept.get(&handle).filter(|(of, _)| *of == inode)?;
        Some(Listing { batch: Arc::clone(batch), next: batch.find(position)? })
    }

    /// Keeps a batch instead of the previous one.
    pub(super) fn keep(&self, inode: u64, handle: u64, batch: Batch) -> Listing {
        let batch = Arc::new(batch);
        let mut kept = self.lock();
        if kept.len() >= MAX_KEPT && !kept.contains_key(&handle) {
            kept.clear();
        }
        kept.insert(handle, (inode, Arc::clone(&batch)));
        Listing { batch, next: 0 }
    }

    /// The directory has been closed.
    pub(super) fn forget(&self, handle: u64) {
        self.lock().remove(&handle);
    }

    /// All have been closed.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (u64, Arc<Batch>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
