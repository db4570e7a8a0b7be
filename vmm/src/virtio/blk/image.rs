//! Disk images: raw and qcow2, through imago.

use std::fs::{self, File as HostFile, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use imago::file::File;
use imago::format::Format;
use imago::format::gate::ImplicitOpenGate;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};
use thiserror::Error;

use super::SECTOR;
use super::check::check;
use super::create::{CreateError, create};
use super::layer::{Layer, Layered};
use super::lock::{self, Outcome};
use crate::Cancel;
use crate::extents::Extents;
use crate::spec::{DiskFormat, DiskSpec};
use crate::virtio::file::{in_memory, read_at, write_at};
use crate::virtio::queue::GuestSlice;

/// Longest chain of backing files; a longer one is a loop.
const MAX_BACKING: usize = 16;
/// Zeroes written at once where the host's file must stay allocated.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// How often [`ZEROES`] goes into one call.
const ZEROES_AT_ONCE: usize = 16;

/// Why a disk's image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It did not exist and could not be made.
    #[error("cannot make disk image {}", path.display())]
    Create {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: CreateError,
    },
    /// It cannot be opened or read.
    #[error("cannot open disk image {}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is in use.
    #[error(
        "disk image {} is locked by another process or another disk; one that is written to can \
         have only one user",
        path.display()
    )]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// What is in it is no disk.
    #[error("disk image {} cannot be used as {format}", path.display())]
    Content {
        /// The image.
        path: PathBuf,
        /// What it should be.
        format: DiskFormat,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
}

/// A disk's contents: an open image, and layers over it. Its calls block, and may be made by several threads at once.
pub(super) struct Image {
    base: Arc<Base>,
    /// What was written since the first checkpoint, one for each checkpoint that counts; the image itself is not
    /// written to then.
    layers: RwLock<Vec<Arc<Layer>>>,
    /// Another disk owns the image; this one never writes to it.
    borrowed: bool,
}

/// An open image file.
struct Base {
    /// Discarding frees places that others may be reading or writing at, so it is done alone.
    access: RwLock<FormatAccess<File>>,
    /// The same open file, to sync without imago, which blocks reads and writes meanwhile.
    file: HostFile,
    shortcut: Shortcut,
    size: u64,
    path: PathBuf,
    /// How many disks borrow it.
    borrowers: AtomicUsize,
}

/// What can be done at once, on the file itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shortcut {
    /// Nothing: it takes the image's tables to know where in the file.
    None,
    /// Reads of what is in the host's page cache.
    CachedReads,
    /// Reads and writes, as the file is in memory.
    All,
}

impl Image {
    /// Opens, locks and checks the image; makes it first if the spec says so and it is not there.
    pub(super) fn open(spec: &DiskSpec, cancel: &Cancel) -> Result<Image, ImageError> {
        let (path, format) = (&spec.image, spec.format());
        if let Some(size) = spec.size {
            create(path, format, size, spec.label.as_ref())
                .map_err(|source| ImageError::Create { path: path.clone(), source })?;
        }
        let writable = !spec.read_only;
        let opened = |source| ImageError::Open { path: path.clone(), source };
        let file = open_locked(path, writable).map_err(opened)?;
        let Some(file) = file else {
            return Err(ImageError::Locked { path: path.clone() });
        };
        let content = |source| ImageError::Content { path: path.clone(), format, source };
        let options = StorageOpenOptions::new().filename(path).write(writable);
        let storage = file.try_clone().and_then(|file| File::from_open_file(file, options));
        let storage = storage.map_err(opened)?;
        let access = guard(|| match format {
            DiskFormat::Raw => Raw::open_image(storage, writable).map(FormatAccess::new),
            DiskFormat::Qcow2 => {
                open_qcow2(storage, &file, writable, &Backing::new(&spec.backing, cancel))
            }
        })
        .map_err(content)?;
        let size = access.size();
        if size == 0 || !size.is_multiple_of(SECTOR) {
            let problem = format!("its size of {size} bytes is no multiple of {SECTOR} above 0");
            return Err(content(io::Error::new(io::ErrorKind::InvalidData, problem)));
        }
        let shortcut = match format {
            DiskFormat::Qcow2 => Shortcut::None,
            DiskFormat::Raw if in_memory(&file) => Shortcut::All,
            DiskFormat::Raw => Shortcut::CachedReads,
        };
        let (access, path, borrowers) = (RwLock::new(access), path.clone(), AtomicUsize::new(0));
        let base = Arc::new(Base { access, file, shortcut, size, path, borrowers });
        Ok(Image { base, layers: RwLock::default(), borrowed: false })
    }

    /// A disk of its own that begins with what another one held.
    pub(super) fn borrow(frozen: &Frozen) -> io::Result<Image> {
        let base = Arc::clone(&frozen.base);
        let layer = Arc::new(Layer::new(base.size)?);
        let layers = frozen.layers.iter().cloned().chain([layer]).collect();
        base.borrowers.fetch_add(1, Ordering::AcqRel);
        Ok(Image { base, layers: RwLock::new(layers), borrowed: true })
    }

    /// Size of the disk in bytes, a multiple of [`SECTOR`].
    pub(super) fn size(&self) -> u64 {
        self.base.size
    }

    /// Where the image is.
    pub(super) fn path(&self) -> &Path {
        &self.base.path
    }

    fn layers(&self) -> RwLockReadGuard<'_, Vec<Arc<Layer>>> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what the disk holds now; what is written from now on goes to a layer of its own. Nothing is written
    /// meanwhile.
    pub(super) fn freeze(&self) -> io::Result<Frozen> {
        self.write_back()?;
        let layer = Arc::new(Layer::new(self.size())?);
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        let frozen = Frozen { base: Arc::clone(&self.base), layers: layers.clone() };
        layers.push(layer);
        Ok(frozen)
    }

    /// Undoes [`Self::freeze`], if nothing was written since.
    pub(super) fn unfreeze(&self, frozen: &Frozen) {
        if self.has(frozen) {
            let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
            layers.truncate(frozen.layers.len());
        }
    }

    /// How many blocks of 512 bytes all layers take.
    #[cfg(test)]
    pub(super) fn layer_blocks(&self) -> u64 {
        self.layers().iter().map(|layer| layer.blocks()).sum()
    }

    /// Whether the disk still has all that `frozen` consists of.
    pub(super) fn has(&self, frozen: &Frozen) -> bool {
        let layers = self.layers();
        let below = &frozen.layers;
        Arc::ptr_eq(&self.base, &frozen.base)
            && layers.len() > below.len()
            && below.iter().zip(&*layers).all(|(a, b)| Arc::ptr_eq(a, b))
    }

    /// Puts the disk back to what it held when it was frozen. Nothing uses it meanwhile.
    pub(super) fn thaw(&self, frozen: &Frozen) -> io::Result<()> {
        if !self.has(frozen) {
            return Err(io::Error::other("the disk went back to an earlier checkpoint"));
        }
        let layer = Arc::new(Layer::new(self.size())?);
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        layers.truncate(frozen.layers.len());
        layers.push(layer);
        Ok(())
    }

    /// Writes what the disk held when it was frozen to an empty file.
    pub(super) fn write_frozen(&self, frozen: &Frozen, to: &HostFile) -> io::Result<Extents> {
        let layered = Layered { image: &self.access(), layers: &frozen.layers };
        guard(|| layered.write_whole(self.size(), to))
    }

    /// Writes what another disk held to the image, which is new and empty.
    pub(super) fn fill(&self, extents: &Extents, from: &HostFile) -> io::Result<()> {
        if extents.size() != self.size() {
            let what = format!("it is of {} bytes, and held {}", self.size(), extents.size());
            return Err(io::Error::other(what));
        }
        guard(|| extents.read(from, |at, content| self.access().write(content, at)))?;
        self.write_back()
    }

    /// Writes all layers to the image, unless that is another disk's, and forgets them. Nothing uses the disk
    /// meanwhile.
    pub(super) fn merge(&self) -> io::Result<()> {
        let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
        if layers.is_empty() || self.borrowed {
            return Ok(());
        }
        if self.base.borrowers.load(Ordering::Acquire) > 0 {
            return Err(io::Error::other("a machine that began with its contents still reads it"));
        }
        guard(|| Layered { image: &self.access(), layers: &layers }.merge())?;
        layers.clear();
        self.write_back()
    }

    fn access(&self) -> RwLockReadGuard<'_, FormatAccess<File>> {
        self.base.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is worth trying to read or write at once: the newest is in the file, where the disk has it.
    pub(super) fn has_shortcut(&self) -> bool {
        self.base.shortcut != Shortcut::None
            && self.layers.try_read().is_ok_and(|layers| layers.is_empty())
    }

    /// Fills the guest's buffers, of `len` bytes in all, as [`Self::read`] does. False if that would have to wait for
    /// something, or has failed.
    pub(super) fn read_at_once(&self, buffers: &[GuestSlice<'_>], offset: u64, len: u64) -> bool {
        self.at_once(len, |file| {
            read_at(file, buffers, offset, self.base.shortcut == Shortcut::All)
        })
    }

    /// Writes the guest's buffers, of `len` bytes in all, as [`Self::write`] does. False if that would have to wait for
    /// something, or has failed: some of it may have been written.
    pub(super) fn write_at_once(&self, buffers: &[GuestSlice<'_>], offset: u64, len: u64) -> bool {
        self.base.shortcut == Shortcut::All
            && self.at_once(len, |file| write_at(file, buffers, offset))
    }

    /// Moves `len` bytes to or from the file, unless that is not where the newest are, or somebody discards.
    fn at_once(&self, len: u64, move_bytes: impl Fn(&HostFile) -> io::Result<usize>) -> bool {
        let (Ok(layers), Ok(_access)) = (self.layers.try_read(), self.base.access.try_read())
        else {
            return false;
        };
        self.base.shortcut != Shortcut::None
            && layers.is_empty()
            && move_bytes(&self.base.file).is_ok_and(|moved| u64::try_from(moved) == Ok(len))
    }

    /// Fills the guest's buffers from `offset` on, without a copy where the image stores the data unchanged.
    pub(super) fn read(&self, buffers: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        let (buffers, _mapped) = IoVectorMut::from_volatile_slice(buffers);
        match &**self.layers() {
            [] => self.access().readv(buffers, offset),
            layers => Layered { image: &self.access(), layers }.read(buffers, offset),
        }
    }

    /// Writes the guest's buffers from `offset` on. The guest may change them meanwhile: then it
    /// is the guest's affair what is written.
    pub(super) fn write(&self, buffers: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        let (buffers, _mapped) = IoVector::from_volatile_slice(buffers);
        match &**self.layers() {
            [] => self.access().writev(buffers, offset),
            layers => Layered { image: &self.access(), layers }.write(buffers, offset),
        }
    }

    /// On return all that was written before the call survives a failure of the host's power.
    pub(super) fn flush(&self) -> io::Result<()> {
        if !self.layers().is_empty() {
            // They are gone with the process, whatever is done for them.
            return Ok(());
        }
        self.write_back()?;
        self.base.file.sync_data()
    }

    /// On return all that was written before the call survives the end of the process.
    pub(super) fn write_back(&self) -> io::Result<()> {
        self.access().flush()
    }

    /// Gives the space of a range back to the host where it can; what is read there is undefined.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.layers().is_empty() {
            return Ok(());
        }
        let mut access = self.base.access.write().unwrap_or_else(PoisonError::into_inner);
        match access.discard_to_any(offset, len) {
            // It is advice.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    /// Makes a range read as zeroes. With `unmap` its space may go back to the host.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if let layers @ [_, ..] = &**self.layers() {
            return Layered { image: &self.access(), layers }.write_zeroes(offset, len);
        }
        if unmap {
            let mut access = self.base.access.write().unwrap_or_else(PoisonError::into_inner);
            return access.discard_to_zero(offset, len);
        }
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let mut vector = IoVector::with_capacity(ZEROES_AT_ONCE);
            for _ in 0..ZEROES_AT_ONCE {
                let left = usize::try_from(len - done).unwrap_or(usize::MAX);
                let part = &ZEROES[..ZEROES.len().min(left)];
                if part.is_empty() {
                    break;
                }
                vector.push(part);
                done += u64::try_from(part.len()).map_err(io::Error::other)?;
            }
            self.access().writev(vector, at)?;
        }
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.borrowed {
            self.base.borrowers.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// What a disk held at a checkpoint.
pub(super) struct Frozen {
    base: Arc<Base>,
    layers: Vec<Arc<Layer>>,
}

/// Opens and locks `path`; `None` if it is locked already.
fn open_locked(path: &Path, writable: bool) -> io::Result<Option<HostFile>> {
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        // A FIFO would wait for its other end.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a block device"));
    }
    match lock::lock(&file, writable)? {
        Outcome::Locked => Ok(Some(file)),
        Outcome::Taken => Ok(None),
        Outcome::Unsupported => {
            tracing::warn!(path = %path.display(), "the file system has no locks for disk images");
            Ok(Some(file))
        }
    }
}

fn open_qcow2(
    storage: File,
    file: &HostFile,
    writable: bool,
    backing: &Backing<'_>,
) -> io::Result<FormatAccess<File>> {
    if let Some(name) = check(file, backing.cancel)?
        && backing.allowed.is_empty()
    {
        return Err(backing.refused(&name));
    }
    let image = Qcow2::<File>::builder(storage).write(writable).open(backing.clone())?;
    Ok(FormatAccess::new(image))
}

/// Opens the backing files that images name: only those that the machine's description allows,
/// read-only, locked as such, and not without end. What an image says is not to be trusted: it
/// could name any file of the host.
#[derive(Clone)]
struct Backing<'a> {
    /// Files, and directories of files.
    allowed: &'a [PathBuf],
    cancel: &'a Cancel,
    depth: usize,
    /// The file that was opened last, whose format is yet to be.
    opened: Option<Arc<HostFile>>,
}

impl<'a> Backing<'a> {
    fn new(allowed: &'a [PathBuf], cancel: &'a Cancel) -> Backing<'a> {
        Backing { allowed, cancel, depth: 0, opened: None }
    }

    fn refused(&self, name: &str) -> io::Error {
        io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "its backing file {name:?} is not allowed: the machine's description has to name \
                 it, or a directory it is in, in the disk's `backing`"
            ),
        )
    }

    /// The file at `path`, where no link leads elsewhere.
    fn find(&self, path: &Path) -> io::Result<PathBuf> {
        let found = fs::canonicalize(path)?;
        // One that is not there allows nothing.
        let mut allowed = self.allowed.iter().filter_map(|path| fs::canonicalize(path).ok());
        match allowed.any(|allowed| found.starts_with(allowed)) {
            true => Ok(found),
            false => Err(self.refused(&found.to_string_lossy())),
        }
    }
}

impl ImplicitOpenGate<File> for Backing<'_> {
    fn open_format<F: FormatDriverBuilder<File>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<File>> {
        match (F::FORMAT, &self.opened) {
            (Format::Raw, _) => {}
            (Format::Qcow2, Some(file)) => {
                check(file, self.cancel)?;
            }
            (other, _) => {
                return Err(io::Error::other(format!("a backing file of format {other:?}")));
            }
        }
        if builder.get_writable() {
            return Err(io::Error::other("a backing file that can be written"));
        }
        let next = Backing { depth: self.depth + 1, opened: None, ..self.clone() };
        Ok(FormatAccess::new(builder.open(next)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<File> {
        if self.depth >= MAX_BACKING {
            return Err(io::Error::other(format!("more than {MAX_BACKING} backing files")));
        }
        if options.get_writable() {
            return Err(io::Error::other("external data files are not supported"));
        }
        let path = self.find(options.get_filename().unwrap_or(Path::new("")))?;
        let file = open_locked(&path, false)?
            .ok_or_else(|| io::Error::other("it is locked by another process or another disk"))?;
        // To read a device may do something, or never end.
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        self.opened = Some(Arc::new(file.try_clone()?));
        File::from_open_file(file, options)
    }
}

/// imago may panic on invalid metadata.
pub(super) fn guard<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::InvalidData, "the image is corrupt")))
}
