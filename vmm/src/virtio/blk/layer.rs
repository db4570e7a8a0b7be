//! What is written to a disk after a checkpoint: a layer over the image, and over the layers of earlier checkpoints.
//!
//! A layer is a sparse file without a name, with a bit for each cluster that it holds; whatever the image's format is.
//! It takes the space of what was written, and is gone when it is dropped.

use std::fs::File as HostFile;
use std::io::{self, BufWriter};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::raw::Raw;
use imago::{FormatAccess, Mapping, StorageOpenOptions};
use nix::fcntl::{FallocateFlags, fallocate};

use crate::extents::{Extents, Writer};

/// The unit in which a layer holds data, in bytes: small enough that copying the rest of one on its first write costs
/// little, large enough for a short bitmap.
const CLUSTER: u64 = 64 << 10;
/// How much of a disk is copied at once.
const CHUNK: usize = 1 << 20;

/// The clusters that were written since a checkpoint.
pub(super) struct Layer {
    access: FormatAccess<File>,
    /// The same open file.
    file: HostFile,
    size: u64,
    /// A bit for each cluster, set once the file holds all of it.
    held: Vec<AtomicU64>,
    /// Held while clusters become held.
    growing: Mutex<()>,
}

impl Layer {
    /// An empty layer for a disk of `size` bytes, in the directory for temporary files.
    pub(super) fn new(size: u64) -> io::Result<Self> {
        let file = tempfile::tempfile()?;
        file.set_len(size)?;
        let options = StorageOpenOptions::new().write(true);
        let storage = File::from_open_file(file.try_clone()?, options)?;
        let access = FormatAccess::new(Raw::open_image(storage, true)?);
        let words = size.div_ceil(CLUSTER).div_ceil(64);
        let held = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { access, file, size, held, growing: Mutex::default() })
    }

    #[cfg(test)]
    pub(super) fn blocks(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or(0, |meta| meta.blocks())
    }

    fn holds(&self, cluster: u64) -> bool {
        let word = usize::try_from(cluster / 64).ok().and_then(|word| self.held.get(word));
        word.is_some_and(|word| word.load(Ordering::Acquire) & 1 << (cluster % 64) != 0)
    }

    fn hold(&self, clusters: Range<u64>) {
        for cluster in clusters {
            if let Some(word) =
                usize::try_from(cluster / 64).ok().and_then(|word| self.held.get(word))
            {
                word.fetch_or(1 << (cluster % 64), Ordering::Release);
            }
        }
    }
}

/// An image with the layers over it, the newest last.
pub(super) struct Layered<'a, L> {
    pub(super) image: &'a FormatAccess<File>,
    pub(super) layers: &'a [L],
}

impl<L: AsRef<Layer>> Layered<'_, L> {
    /// Reads from `offset` on.
    pub(super) fn read(&self, mut buffers: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        while !buffers.is_empty() {
            let (holder, len) = self.run(offset, buffers.len());
            let (head, rest) = buffers.split_at(len);
            holder.readv(head, offset)?;
            (buffers, offset) = (rest, offset + len);
        }
        Ok(())
    }

    /// Writes to the newest layer from `offset` on.
    pub(super) fn write(&self, buffers: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.change(offset, buffers.len(), |layer| layer.access.writev(buffers, offset))
    }

    /// Makes a range zero. Whole clusters of it take no space.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, |layer| {
            let [offset, len] = [offset, len].map(libc::off_t::try_from);
            let (offset, len) = (offset.map_err(io::Error::other)?, len.map_err(io::Error::other)?);
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            Ok(fallocate(&layer.file, flags, offset, len)?)
        })
    }

    /// Writes all that the disk of `size` bytes holds to an empty file.
    pub(super) fn write_whole(&self, size: u64, to: &HostFile) -> io::Result<Extents> {
        let mut writer = Writer::new(BufWriter::with_capacity(CHUNK, to), size);
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < size {
            let (holder, len) = self.run(at, (size - at).min(CHUNK as u64));
            // Large disks are mostly empty.
            let (is_zero, len) = match holder.get_mapping(at, len)? {
                (Mapping::Zero { .. }, known) => (true, known.min(len)),
                (_, known) => (false, known.min(len)),
            };
            let len = usize::try_from(len).unwrap_or(CHUNK).min(CHUNK);
            if len == 0 {
                return Err(io::Error::other("the image is shorter than the disk"));
            }
            let chunk = &mut buffer[..len];
            if !is_zero {
                holder.read(&mut *chunk, at)?;
                writer.put(at, chunk)?;
            }
            at += len as u64;
        }
        writer.finish()
    }

    /// Writes everything that the layers hold to the image.
    pub(super) fn merge(&self) -> io::Result<()> {
        let Some(size) = self.layers.first().map(|layer| layer.as_ref().size) else {
            return Ok(());
        };
        let mut buffer = vec![0; usize::try_from(CLUSTER).map_err(io::Error::other)?];
        for cluster in 0..size.div_ceil(CLUSTER) {
            let layers = self.layers.iter().map(AsRef::as_ref);
            let Some(layer) = layers.rev().find(|layer| layer.holds(cluster)) else { continue };
            let offset = cluster * CLUSTER;
            let len = usize::try_from((size - offset).min(CLUSTER)).map_err(io::Error::other)?;
            layer.access.read(&mut buffer[..len], offset)?;
            self.image.write(&buffer[..len], offset)?;
        }
        Ok(())
    }

    /// What holds the newest data at `offset`, and for how many of `len` bytes.
    fn run(&self, offset: u64, len: u64) -> (&FormatAccess<File>, u64) {
        let holder = |cluster| {
            let layers = self.layers.iter().map(AsRef::as_ref);
            layers.rev().find(|layer: &&Layer| layer.holds(cluster))
        };
        let first = holder(offset / CLUSTER);
        let same = |cluster: &u64| match (first, holder(*cluster)) {
            (Some(first), Some(other)) => std::ptr::eq(first, other),
            (None, None) => true,
            _ => false,
        };
        let end = offset + len;
        let others = (offset / CLUSTER + 1..end.div_ceil(CLUSTER)).find(|cluster| !same(cluster));
        let end = others.map_or(end, |cluster| cluster * CLUSTER);
        (first.map_or(self.image, |layer| &layer.access), end - offset)
    }

    /// Calls `change` for a range of the newest layer, whose clusters it holds then, whatever `change` leaves of them.
    fn change(
        &self,
        offset: u64,
        len: u64,
        change: impl FnOnce(&Layer) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some((newest, older)) = self.layers.split_last() else {
            return Err(io::Error::other("there is no layer"));
        };
        let (newest, end) = (newest.as_ref(), offset + len);
        let clusters = offset / CLUSTER..end.div_ceil(CLUSTER);
        if clusters.clone().all(|cluster| newest.holds(cluster)) {
            return change(newest);
        }
        // So that nobody copies the rest of a cluster over what is written there meanwhile.
        let _growing = newest.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let partial = |cluster: u64| {
            let whole = cluster * CLUSTER..((cluster + 1) * CLUSTER).min(newest.size);
            (whole.start < offset || end < whole.end).then_some(whole)
        };
        let edges = [clusters.start, clusters.end.saturating_sub(1)];
        let edges = if edges[0] == edges[1] { &edges[..1] } else { &edges[..] };
        for &cluster in edges.iter().filter(|cluster| !newest.holds(**cluster)) {
            if let Some(whole) = partial(cluster) {
                let len = usize::try_from(whole.end - whole.start).map_err(io::Error::other)?;
                let mut content = vec![0; len];
                Layered { image: self.image, layers: older }
                    .read(IoVectorMut::from(&mut content[..]), whole.start)?;
                newest.access.write(&content[..], whole.start)?;
            }
        }
        change(newest)?;
        newest.hold(clusters);
        Ok(())
    }
}
