//! Kernel and initrd files on their way into guest memory.
//!
//! A distribution's kernel is tens of megabytes, and copying them is a fifth of the work of a
//! boot that `read` does page by page. So a file is copied from a mapping where that is safe, and
//! of pages without content, which guest memory starts with anyhow, nothing is copied.
//! (Mapping the file into the guest costs more: Linux patches nearly every page of its text.)

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::loader;
use thiserror::Error;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{MmapRegion, ReadVolatile, VolatileMemory, VolatileMemoryError, VolatileSlice};

use crate::file::map;

const PAGE: usize = 4096;
static ZEROS: [u8; PAGE] = [0; PAGE];

/// A kernel or initrd cannot be used.
#[derive(Debug, Error)]
pub enum LoadError {
    /// It cannot be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is no kernel: {detail}", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: &'static str,
    },
    /// It ends too early.
    #[error("{what} {} is truncated: {found} bytes of at least {expected}", path.display())]
    Truncated {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size that its header implies.
        expected: u64,
    },
    /// The loader could not place it.
    #[error("cannot load kernel {}: {problem}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: loader::Error,
    },
    /// It is empty.
    #[error("initrd {} is empty", .0.display())]
    EmptyInitrd(PathBuf),
    /// There is not enough memory for it.
    #[error(
        "{what} of {needed} MiB does not fit into {available} MiB of memory below the device hole"
    )]
    TooLarge {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Its size, rounded up.
        needed: u64,
        /// The room there is.
        available: u64,
    },
}

impl LoadError {
    /// For `needed` bytes where there are `available`.
    pub(crate) fn too_large(what: &'static str, needed: u64, available: u64) -> Self {
        Self::TooLarge { what, needed: needed.div_ceil(1 << 20), available: available >> 20 }
    }
}

/// A file whose content goes to fresh guest memory, by the loaders of linux-loader or directly.
pub struct ImageFile {
    file: File,
    metadata: Metadata,
    mapping: Option<MmapRegion>,
    position: u64,
}

impl ImageFile {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// It is missing, may not be read or is no regular file.
    pub fn open(path: &Path) -> io::Result<ImageFile> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mapping = map(&file, &metadata);
        Ok(ImageFile { file, metadata, mapping, position: 0 })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.metadata.len()
    }

    /// The mapping from the current position to the end.
    fn mapped_rest(&self) -> Option<VolatileSlice<'_>> {
        let position = usize::try_from(self.position).ok()?;
        let mapping = self.mapping.as_ref()?;
        mapping.get_slice(position, mapping.size().checked_sub(position)?).ok()
    }
}

impl Seek for ImageFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.size().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl Read for ImageFile {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(bytes, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl ReadVolatile for ImageFile {
    /// Fills `target`, which holds nothing but zeros.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        target: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let count = if let Some(rest) = self.mapped_rest() {
            let count = rest.len().min(target.len());
            copy_content(&rest.subslice(0, count)?, target)?;
            count
        } else {
            self.file.seek(SeekFrom::Start(self.position)).map_err(VolatileMemoryError::IOError)?;
            self.file.read_volatile(target)?
        };
        self.position += count as u64;
        Ok(count)
    }
}

/// Copies all but the pages of zeros.
fn copy_content<B: BitmapSlice>(
    source: &VolatileSlice<'_>,
    target: &VolatileSlice<'_, B>,
) -> Result<(), VolatileMemoryError> {
    let mut buffer = [0; PAGE];
    for offset in (0..source.len()).step_by(PAGE) {
        let page = &mut buffer[..PAGE.min(source.len() - offset)];
        source.subslice(offset, page.len())?.copy_to(page);
        if page != &ZEROS[..page.len()] {
            target.subslice(offset, page.len())?.copy_from(page);
        }
    }
    Ok(())
}
