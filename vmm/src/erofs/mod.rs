//! A read-only EROFS image, in memory, of a directory that nobody changes.
//!
//! Inodes, directories and small files are written to memory; large files are mapped in place, so they are neither
//! read nor copied. Everything is at whole pages: a guest that has the image as its memory and mounts it with
//! `dax=always` reads files where they are, keeps no copies of them, and shares them with all others.
//!
//! Files belong to root and are as old as in a Nix store. Their extended attributes are left out.

mod fill;
mod format;
mod mapping;
mod plan;
#[cfg(test)]
mod tests;
mod walk;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use thiserror::Error;
use twox_hash::XxHash3_128;

use crate::Cancel;
use crate::common::Common;
use crate::spec::ShareSpec;
use crate::virtio::fs::Filter;
use fill::{fetch_files, index, write_metadata};
use format::{BLOCK, SLOT, SUPER_AT, Super};
use mapping::{Mapping, Sealed};
use plan::Plan;
use walk::{Kind, ROOT, Tree};

/// Why there is no image.
#[derive(Debug, Error)]
pub(crate) enum ComposeError {
    /// It cannot have this label.
    #[error(
        "{0:?} is no label for an image; allowed: at most {max} bytes, none of them 0",
        max = ShareSpec::MAX_LABEL
    )]
    Label(String),
    /// The host refuses something about a file.
    #[error("cannot make an image with {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is not what it was before.
    #[error("cannot make an image with {}: it has changed meanwhile", .0.display())]
    Changed(PathBuf),
    /// Its directory has too many files.
    #[error("cannot make an image with {}: it would have more than {} files", .0.display(), walk::MAX_NODES)]
    TooMany(PathBuf),
    /// It is larger than an image may be.
    #[error("cannot make an image with {}: it would have more than {} TiB", .0.display(), plan::MAX_END.div_ceil(1 << 40))]
    TooLarge(PathBuf),
    /// No memory or addresses.
    #[error("cannot make an image of {}: no {mib} MiB of memory", path.display())]
    Memory {
        /// The directory.
        path: PathBuf,
        /// The image's size.
        mib: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An image.
pub(crate) struct Image {
    memory: Sealed,
    digest: u128,
    /// The files that are mapped, and where each one's last byte is.
    files: Vec<(usize, PathBuf)>,
}

impl Image {
    /// Makes an image with this label of what `filter` shows in the directory `root`, which is called `source`.
    ///
    /// # Errors
    /// A file cannot be read or changes, there is too much of it, or too little memory; it is cancelled.
    pub(crate) fn compose(
        root: &File,
        source: &Path,
        label: &str,
        filter: &Filter,
        cancel: &Cancel,
    ) -> Result<Image, ComposeError> {
        if label.len() > ShareSpec::MAX_LABEL || label.contains('\0') {
            return Err(ComposeError::Label(label.to_owned()));
        }
        let tree = Tree::walk(root, source, filter, cancel)?;
        let plan = Plan::new(&tree)?;
        let no_memory = |problem| ComposeError::Memory {
            path: source.to_owned(),
            mib: plan.end.div_ceil(1 << 20),
            source: problem,
        };
        let mut image = Mapping::new(index(plan.end), index(plan.written)).map_err(no_memory)?;
        write_metadata(&tree, &plan, image.memory_mut())?;
        fetch_files(&tree, &plan, &mut image)?;

        let mut superblock = Super {
            label,
            root: u16::try_from(plan.places[ROOT as usize].inode / SLOT).unwrap_or_default(),
            inodes: tree.nodes.len() as u64,
            blocks: u32::try_from(plan.end / BLOCK).map_err(|_| tree.too_large(ROOT))?,
            uuid: [0; 16],
        };
        superblock.write(&mut image.memory_mut()[index(SUPER_AT)..]);
        let digest = digest(&tree, &plan, image.memory());
        superblock.uuid = uuid(digest);
        superblock.write(&mut image.memory_mut()[index(SUPER_AT)..]);

        let last = |node: u32| {
            let place = &plan.places[node as usize];
            (index(place.data + place.size - 1), tree.path(node))
        };
        let files = plan.large.iter().map(|node| last(*node)).collect();
        Ok(Image { memory: image.seal().map_err(no_memory)?, digest, files })
    }

    /// Where it is in this process: at a multiple of 2 MiB.
    pub(crate) fn host_address(&self) -> NonNull<u8> {
        self.memory.address()
    }

    /// Its length in bytes, a multiple of 2 MiB.
    pub(crate) fn len(&self) -> u64 {
        self.memory.len() as u64
    }

    /// The same for images that hold the same. Of large files, it is their names, sizes and times that count.
    pub(crate) fn digest(&self) -> u128 {
        self.digest
    }

    /// A file that has become shorter since, or cannot be read any more: whoever reads its end fails.
    /// Before Linux 5.14 none is found.
    pub(crate) fn changed_file(&self) -> Option<PathBuf> {
        let changed = self.files.iter().find(|(last, _)| !self.memory.readable(*last));
        changed.map(|(_, path)| path.clone())
    }
}

fn digest(tree: &Tree, plan: &Plan, memory: &[u8]) -> u128 {
    let mut hash = XxHash3_128::with_seed(0);
    hash.write(memory);
    for node in &plan.large {
        let (place, path) = (&plan.places[*node as usize], tree.relative(*node));
        for number in [place.data, place.size, path.len() as u64] {
            hash.write(&number.to_le_bytes());
        }
        hash.write(&path);
        if let Kind::File(contents) = &tree.nodes[*node as usize].kind {
            let (seconds, nanoseconds) = contents.modified;
            hash.write(&seconds.to_le_bytes());
            hash.write(&nanoseconds.to_le_bytes());
        }
    }
    hash.finish_128()
}

/// One of version 8, which is for whatever one likes (RFC 9562, 5.8).
fn uuid(digest: u128) -> [u8; 16] {
    let mut uuid = digest.to_be_bytes();
    uuid[6] = uuid[6] & 0xf | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// What makes two images the same. The time is that of the directory's last change, which is of no matter where only
/// certain names are seen.
type Key = (u64, u64, PathBuf, String, Filter, Option<(i64, i64)>);

/// The images of the process.
static IMAGES: Common<Key, Image> = Common::new();

/// As [`Image::compose`], but if a machine of the process has this image already, it is that one.
///
/// # Errors
/// As there.
pub(crate) fn common_image(
    root: &File,
    source: &Path,
    label: &str,
    filter: &Filter,
    cancel: &Cancel,
) -> Result<Arc<Image>, ComposeError> {
    let metadata = root.metadata().map_err(|error| ComposeError::file(source, error))?;
    let changed = filter.names().is_none().then(|| (metadata.mtime(), metadata.mtime_nsec()));
    let place = (metadata.dev(), metadata.ino());
    let key = (place.0, place.1, source.to_owned(), label.to_owned(), filter.clone(), changed);
    IMAGES.get(key, || Image::compose(root, source, label, filter, cancel))
}

impl ComposeError {
    /// Whether there is no room for it: not what the directory holds is in the way, but how much, or what the host has.
    pub(crate) fn is_no_room(&self) -> bool {
        match self {
            Self::TooMany(_) | Self::TooLarge(_) | Self::Memory { .. } => true,
            Self::File { source, .. } => source.kind() == ErrorKind::OutOfMemory,
            Self::Label(_) | Self::Changed(_) => false,
        }
    }

    fn file(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::File { path: path.into(), source }
    }
}
