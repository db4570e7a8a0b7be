//! A cache of unpacked kernels: the ELF files of bzImages.
//!
//! A bzImage unpacks itself in the guest at every boot, which is more work than all the rest of one. So it is unpacked
//! on the host and kept, named by the SHA-256 of the bzImage and its own size. Beside it stands a link for each file
//! with that content, named by what tells files and their changes apart, so that a known bzImage is not read again. An
//! entry appears whole, by a rename, is never written again, and may be removed at any time: a kernel that is not
//! there, or has another size than its name says, is unpacked anew. If that fails, machines boot the bzImage.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use firn_vmm::boot::unpack::{self, UnpackError};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::kit::integrity::hex;
use crate::private;

/// Larger files are not taken for bzImages; in bytes.
const MAX_IMAGE: u64 = 256 << 20;
/// How long an unused entry is kept.
const KEEP: Duration = Duration::from_secs(14 * 24 * 3600);

/// Why a kernel could not be unpacked.
#[derive(Debug, Error)]
enum KernelError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Unpack(#[from] UnpackError),
}

/// The directory.
pub(crate) struct Kernels {
    dir: PathBuf,
}

impl Kernels {
    pub(crate) const fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// What to boot for `kernel`: its ELF file, or itself if it is not a bzImage or cannot be unpacked.
    pub(crate) fn unpacked(&self, kernel: &Path) -> PathBuf {
        let entry = self.entry(kernel).unwrap_or_else(|error| {
            let (kernel, dir) = (kernel.display(), self.dir.display());
            tracing::debug!(%kernel, %dir, %error, "booting the bzImage: it cannot be cached unpacked");
            None
        });
        entry.unwrap_or_else(|| kernel.to_owned())
    }

    fn entry(&self, kernel: &Path) -> Result<Option<PathBuf>, KernelError> {
        let metadata = fs::metadata(kernel)?;
        // Opening anything else may block.
        if !metadata.is_file() || metadata.len() > MAX_IMAGE {
            return Ok(None);
        }
        let known = self.dir.join(identity(&metadata));
        if let Ok(entry) = fs::canonicalize(&known)
            && use_entry(&entry)
        {
            return Ok(Some(entry));
        }
        let Some(image) = read_bzimage(kernel)? else { return Ok(None) };
        let hash = hex(&Sha256::digest(&image));
        let path = match self.unpacked_before(&hash) {
            Some(path) => path,
            None => self.unpack(&image, &hash)?,
        };
        // In the carrier the cache is read-only.
        if let Err(error) = self.link(path.file_name().unwrap_or_default(), &known) {
            tracing::debug!(kernel = %kernel.display(), %error, "cannot link a kernel to its cache entry");
        }
        Ok(Some(path))
    }

    /// The entry of the bzImage with this hash, if it exists.
    fn unpacked_before(&self, hash: &str) -> Option<PathBuf> {
        let mut entries = fs::read_dir(&self.dir).ok()?.filter_map(Result::ok);
        let of_image = |name: &OsStr| name.as_encoded_bytes().starts_with(hash.as_bytes());
        entries.find_map(|entry| {
            Some(entry.path()).filter(|path| of_image(&entry.file_name()) && use_entry(path))
        })
    }

    fn unpack(&self, image: &[u8], hash: &str) -> Result<PathBuf, KernelError> {
        // Before unpacking, which is pointless if the result cannot be kept.
        private::make(&self.dir)?;
        let mut file = tempfile::Builder::new().prefix(".").tempfile_in(&self.dir)?;
        let kernel = unpack::vmlinux(image)?;
        file.write_all(&kernel)?;
        // The monitor maps only files that nobody may write to.
        file.as_file().set_permissions(Permissions::from_mode(0o400))?;
        file.as_file().sync_all()?;
        let path = self.dir.join(format!("{hash}-{}", kernel.len()));
        file.persist(&path).map_err(|error| error.error)?;
        self.prune(&path)?;
        Ok(path)
    }

    /// Records that the file `known` has the content `name`.
    fn link(&self, name: &OsStr, known: &Path) -> io::Result<()> {
        let made =
            tempfile::Builder::new().prefix(".").make_in(&self.dir, |path| symlink(name, path))?;
        made.persist(known).map_err(|error| error.error)
    }

    /// Removes entries not used for [`KEEP`], links of that age, and what killed processes left behind.
    fn prune(&self, current: &Path) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)?.filter_map(Result::ok) {
            let used = entry.metadata().and_then(|metadata| metadata.modified());
            let age = used.map(|used| SystemTime::now().duration_since(used).unwrap_or_default());
            if age.is_ok_and(|age| age > KEEP) && entry.path() != current {
                // Another process may have been faster.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }
}

/// Identifies a file and, as each change sets its ctime, its contents.
fn identity(file: &Metadata) -> String {
    let (dev, ino, size) = (file.dev(), file.ino(), file.size());
    format!("file-{dev:x}-{ino:x}-{size:x}-{:x}-{:x}", file.ctime(), file.ctime_nsec())
}

/// Returns the content of `path` if it looks like a bzImage.
fn read_bzimage(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = File::open(path)?;
    let mut image = Vec::new();
    (&file).take(unpack::HEAD as u64).read_to_end(&mut image)?;
    if !unpack::is_packed(&image) {
        return Ok(None);
    }
    file.take(MAX_IMAGE).read_to_end(&mut image)?;
    Ok(Some(image))
}

/// Marks an entry as used; false if it is missing or damaged.
fn use_entry(entry: &Path) -> bool {
    let Ok(file) = File::open(entry) else { return false };
    let name = entry.file_name().unwrap_or_default().to_string_lossy();
    let size = name.rsplit_once('-').and_then(|(_, size)| size.parse().ok());
    // One owned by root is merely pruned early.
    let _ = file.set_modified(SystemTime::now());
    file.metadata().is_ok_and(|meta| Some(meta.len()) == size)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with `kernel` as uncompressed payload: setup sectors, then the payload and its size.
    fn bzimage(kernel: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20c_u16.to_le_bytes());
        let length = u32::try_from(kernel.len()).expect("it is small");
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(kernel);
        image
    }

    struct Place {
        dir: tempfile::TempDir,
        kernels: Kernels,
        image: PathBuf,
    }

    const ELF: &[u8] = b"\x7fELF and the rest of a kernel";

    fn place() -> Place {
        let dir = tempfile::tempdir().expect("a directory");
        let (kernels, image) = (Kernels::at(dir.path().join("cache")), dir.path().join("bzImage"));
        fs::write(&image, bzimage(ELF)).expect("it is writable");
        Place { dir, kernels, image }
    }

    /// Counts the kernels and the unfinished files.
    fn entries(dir: &tempfile::TempDir) -> usize {
        let cache = fs::read_dir(dir.path().join("cache")).expect("it is there");
        let names = cache.map(|entry| entry.expect("it can be read").file_name());
        names.filter(|name| !name.to_string_lossy().starts_with("file-")).count()
    }

    fn starts_with_elf(entry: &Path) -> bool {
        fs::read(entry).expect("it is there").starts_with(ELF)
    }

    #[test]
    fn a_kernel_is_unpacked_once_whatever_its_name() {
        let Place { dir, kernels, image } = place();
        let entry = kernels.unpacked(&image);
        assert!(entry.starts_with(dir.path().join("cache")) && starts_with_elf(&entry));
        assert_eq!(fs::metadata(&entry).expect("it is there").permissions().mode() & 0o222, 0);
        let copy = dir.path().join("copy");
        fs::copy(&image, &copy).expect("it is writable");
        let written = |entry| fs::metadata(entry).map(|is| is.ino());
        let before = written(&entry).expect("it is there");
        assert_eq!(kernels.unpacked(&copy), entry);
        assert_eq!(written(&entry).expect("it is there"), before, "it was written again");
        fs::write(&copy, bzimage(b"\x7fELF another")).expect("it is writable");
        assert_ne!(kernels.unpacked(&copy), entry);
        assert_eq!(entries(&dir), 2);
    }

    #[test]
    fn a_known_kernel_is_not_read_again_and_a_changed_one_is() {
        let Place { dir, kernels, image } = place();
        let entry = kernels.unpacked(&image);
        let accessed =
            |path: &Path| fs::metadata(path).and_then(|is| is.accessed()).expect("it is there");
        let (long_ago, file) = (SystemTime::UNIX_EPOCH, File::open(&image).expect("it is there"));
        let times = fs::FileTimes::new().set_accessed(long_ago);
        file.set_times(times).expect("it is ours");
        // That changed the ctime.
        assert_eq!(kernels.unpacked(&image), entry);
        file.set_times(times).expect("it is ours");
        let link =
            dir.path().join("cache").join(identity(&fs::metadata(&image).expect("it is there")));
        symlink(entry.file_name().expect("it has one"), link).expect("it is writable");
        assert_eq!(kernels.unpacked(&image), entry);
        assert_eq!(accessed(&image), long_ago, "it was read");
        // With the same length and mtime.
        fs::write(&image, bzimage(b"\x7fELF and the rest of a KERNEL")).expect("it is writable");
        file.set_times(times.set_modified(long_ago)).expect("it is ours");
        assert_ne!(kernels.unpacked(&image), entry);
    }

    #[test]
    fn what_is_removed_comes_back() {
        let Place { dir: _dir, kernels, image } = place();
        let entry = kernels.unpacked(&image);
        fs::remove_file(&entry).expect("it is there");
        assert_eq!(kernels.unpacked(&image), entry);
        assert!(starts_with_elf(&entry));
    }

    #[test]
    fn a_damaged_one_is_unpacked_anew() {
        let Place { dir: _dir, kernels, image } = place();
        let entry = kernels.unpacked(&image);
        fs::set_permissions(&entry, Permissions::from_mode(0o600)).expect("it is ours");
        fs::write(&entry, &ELF[..5]).expect("it is ours");
        assert_eq!(kernels.unpacked(&image), entry);
        assert!(starts_with_elf(&entry));
    }

    #[test]
    fn without_a_cache_the_bzimage_boots() {
        let Place { dir, image, .. } = place();
        // Not even root can make a directory in a file.
        assert_eq!(Kernels::at(image.join("cache")).unpacked(&image), image);
        let broken = dir.path().join("broken");
        fs::write(&broken, &bzimage(ELF)[..1030]).expect("it is writable");
        let kernels = Kernels::at(dir.path().join("cache"));
        for other in [&broken, &dir.path().join("none"), &dir.path().to_owned()] {
            assert_eq!(kernels.unpacked(other), **other);
        }
        assert_eq!(entries(&dir), 0);
    }

    #[test]
    fn what_nobody_uses_goes() {
        let Place { dir, kernels, image } = place();
        let old = kernels.unpacked(&image);
        let left = dir.path().join("cache/.killed");
        fs::write(&left, b"half a kernel").expect("it is writable");
        let age = |path: &Path| {
            let long_ago = SystemTime::now() - KEEP - Duration::from_secs(60);
            File::open(path).and_then(|file| file.set_modified(long_ago)).expect("it is ours");
        };
        [&old, &left].into_iter().for_each(|path| age(path));
        // Using it resets its age.
        assert_eq!(kernels.unpacked(&image), old);
        let other = dir.path().join("other");
        fs::write(&other, bzimage(b"\x7fELF other")).expect("it is writable");
        let new = kernels.unpacked(&other);
        assert!(old.exists() && new.exists() && !left.exists());
        age(&old);
        fs::write(&other, bzimage(b"\x7fELF third")).expect("it is writable");
        kernels.unpacked(&other);
        assert!(!old.exists() && new.exists());
    }

    #[test]
    fn several_at_once_end_with_one_entry() {
        let Place { dir, kernels, image } = place();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert!(starts_with_elf(&kernels.unpacked(&image))));
            }
        });
        assert_eq!(entries(&dir), 1);
    }
}
