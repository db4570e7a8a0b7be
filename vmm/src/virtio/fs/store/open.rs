//! The files that are open: a bounded number, those used last.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::tree::ROOT;
use crate::virtio::file::in_memory;

/// Most files that are kept open, whatever the machine may have.
const MAX_OPEN: u64 = 512;

/// A directory, or a file open for reading.
pub(super) struct Open {
    pub(super) file: File,
    /// Reading it never waits for a disk.
    pub(super) in_memory: bool,
}

/// Open files by their nodes: the young ones and, when they have become too many, those that were young before. A file
/// that is used becomes young again.
pub(super) struct OpenFiles {
    root: Arc<Open>,
    /// Most of each.
    limit: usize,
    generations: Mutex<Generations>,
}

#[derive(Default)]
struct Generations {
    young: HashMap<u32, Arc<Open>>,
    old: HashMap<u32, Arc<Open>>,
}

impl OpenFiles {
    /// With `root`, which stays open, no more than `descriptors`.
    pub(super) fn new(root: File, descriptors: u64) -> OpenFiles {
        let limit = usize::try_from(descriptors.min(MAX_OPEN) / 2).unwrap_or(0).max(1);
        OpenFiles { root: Arc::new(open(root)), limit, generations: Mutex::default() }
    }

    /// The file of a node, if it is open.
    pub(super) fn get(&self, node: u32) -> Option<Arc<Open>> {
        if node == ROOT {
            return Some(Arc::clone(&self.root));
        }
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = generations.young.get(&node) {
            return Some(Arc::clone(open));
        }
        let open = generations.old.remove(&node)?;
        let closed = generations.insert(node, Arc::clone(&open), self.limit);
        drop(generations);
        drop(closed);
        Some(open)
    }

    /// Keeps a file that has just been opened.
    pub(super) fn keep(&self, node: u32, file: File) -> Arc<Open> {
        let file = Arc::new(open(file));
        let mut generations = self.generations.lock().unwrap_or_else(PoisonError::into_inner);
        let closed = generations.insert(node, Arc::clone(&file), self.limit);
        drop(generations);
        drop(closed);
        file
    }

    /// The root's file system.
    pub(super) fn statfs(&self) -> io::Result<libc::statvfs64> {
        // SAFETY: all zeros are a statvfs64.
        let mut stat = unsafe { std::mem::zeroed::<libc::statvfs64>() };
        // SAFETY: the call fills the struct it is given.
        match unsafe { libc::fstatvfs64(self.root.file.as_raw_fd(), &raw mut stat) } {
            0 => Ok(stat),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Generations {
    /// Gives back what is to be closed, for which nobody else need wait.
    fn insert(&mut self, node: u32, open: Arc<Open>, limit: usize) -> HashMap<u32, Arc<Open>> {
        let mut closed = HashMap::new();
        if self.young.len() >= limit {
            let young = std::mem::take(&mut self.young);
            closed = std::mem::replace(&mut self.old, young);
        }
        self.young.insert(node, open);
        closed
    }
}

fn open(file: File) -> Open {
    Open { in_memory: in_memory(&file), file }
}
