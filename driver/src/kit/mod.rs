//! Guest kits: the kernel, initrd and userland that machines boot.
//!
//! A kit is a directory with a `kernel` (bzImage), the same kernel as `vmlinux` (ELF), an `initrd` and a [`Manifest`];
//! some also have a store. Here a kit is only data: the crate `firn-kits` builds kits, in the user's cache. When a kit
//! is opened, the files that it boots are checked against its manifest, by sizes and times.
//!
//! Everything here blocks; async callers use `spawn_blocking`.

pub mod archive;
pub mod integrity;
pub mod json;
mod overlay;

use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::SystemTime;

use firn_vmm::spec::MemoryMib;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::private::Place;

pub use overlay::{
    GuestConfig, HostsEntry, Interface, Mount, MountKind, OverlayError, machine_overlay,
};

use integrity::{Check, Stamps};

/// The tag of the share that holds the store.
pub const STORE_TAG: &str = "nix-store";

/// The image of the store, in a kit's directory.
pub const STORE_IMAGE: &str = "store.img";
/// The file with what is added to the initrd of machines that have images.
pub const IMAGE_DRIVERS: &str = "image-drivers";

/// The available kits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KitName {
    /// Debian's cloud kernel, busybox and the agent: the default.
    Micro,
    /// Debian with systemd, laid out like a NixOS test machine.
    Systemd,
    /// The same with an X server, a Wayland compositor, and a terminal for each.
    Desktop,
    /// The carrier's: a kernel with 9p and KVM.
    Carrier,
}

impl KitName {
    /// The kits that a test's machines can boot.
    pub const GUESTS: [Self; 3] = [Self::Micro, Self::Systemd, Self::Desktop];

    /// The name that users type.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Micro => "micro",
            Self::Systemd => "systemd",
            Self::Desktop => "desktop",
            Self::Carrier => "carrier",
        }
    }

    /// The default memory of a machine. The roots of all kits are a tmpfs, in which files may take half of the memory.
    #[must_use]
    pub fn default_memory(self) -> MemoryMib {
        let mib = match self {
            Self::Micro | Self::Carrier => 512_u64,
            Self::Systemd | Self::Desktop => 1024,
        };
        mib.try_into().unwrap_or(MemoryMib::MIN)
    }
}

impl FromStr for KitName {
    type Err = KitError;

    fn from_str(name: &str) -> Result<Self, KitError> {
        Self::GUESTS
            .into_iter()
            .chain([Self::Carrier])
            .find(|kit| kit.as_str() == name)
            .ok_or_else(|| KitError::Unknown(name.to_owned()))
    }
}

/// A complete kit.
#[derive(Clone, Debug)]
pub struct Kit {
    /// Its directory.
    pub dir: PathBuf,
    /// What it was built from.
    pub manifest: Manifest,
}

impl Kit {
    /// Opens the kit in a directory.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    pub fn open(dir: PathBuf) -> Result<Self, KitError> {
        let manifest = dir.join("manifest.json");
        let missing = KitError::io("read", manifest)(io::ErrorKind::NotFound.into());
        Self::find(dir, Check::Quick)?.ok_or(missing)
    }

    /// Opens the kit in a directory, if there is one. A quick check covers what it boots, which takes a few
    /// microseconds; nothing else of it can be left half written. Opening it sets its manifest's time, which records
    /// its last use.
    ///
    /// # Errors
    /// If its own files are damaged.
    pub fn find(dir: PathBuf, look: Check) -> Result<Option<Self>, KitError> {
        let path = dir.join("manifest.json");
        let Some(mut manifest) = json::read::<Manifest>(&path)? else {
            return Ok(None);
        };
        let files = manifest.files.iter_mut();
        let looked_at = files.filter(|(name, _)| look == Check::Full || !name.contains('/'));
        if integrity::check(&dir, looked_at, look)? {
            // On failure the files are merely read again the next time.
            let _ = json::replace(&path, &manifest);
        }
        // In the carrier the cache is read-only; a kit that is not marked as used is merely pruned early.
        let _ = File::options()
            .write(true)
            .open(path)
            .and_then(|file| file.set_modified(SystemTime::now()));
        Ok(Some(Self { dir, manifest }))
    }

    /// The path of the kernel as Debian packs it, a bzImage.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("kernel")
    }

    /// The path of the same kernel unpacked, an ELF file: it boots faster.
    #[must_use]
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The path of the initrd, an uncompressed cpio archive. A machine's [`machine_overlay`] is appended to it.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.dir.join("initrd")
    }

    /// The path of another such archive, for machines that have shares as images.
    #[must_use]
    pub fn image_drivers(&self) -> PathBuf {
        self.dir.join(IMAGE_DRIVERS)
    }

    /// Reads a file of the initrd, by its path without the leading slash.
    ///
    /// # Errors
    /// If it does not exist, or the initrd cannot be read.
    pub fn initrd_file(&self, name: &str) -> io::Result<Vec<u8>> {
        archive::read(&self.initrd(), name)
    }

    /// The path of an ext4 image of the store, for machines that read a disk faster than a directory of the host.
    #[must_use]
    pub fn store_image(&self) -> Option<PathBuf> {
        self.manifest.store.then(|| self.dir.join(STORE_IMAGE))
    }

    /// The directory to share as [`STORE_TAG`], if the kit has a store.
    #[must_use]
    pub fn store(&self) -> Option<PathBuf> {
        self.manifest.store.then(|| self.dir.join("store"))
    }
}

/// What a kit was built from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The kit's name.
    pub kit: String,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel_release: String,
    /// Debian packages and their versions.
    pub packages: BTreeMap<String, String>,
    /// The kernel modules, in load order.
    pub modules: Vec<String>,
    /// SHA-256 of the agent, in hexadecimal.
    pub agent: String,
    /// The kit's kernel arguments.
    pub cmdline: String,
    /// Whether it has a store.
    #[serde(default)]
    pub store: bool,
    /// The stamps of its files, by their paths in its directory; without Debian's files.
    pub files: Stamps,
}

/// Why a kit cannot be used.
#[derive(Debug, Error)]
pub enum KitError {
    /// No kit has this name.
    #[error("there is no kit `{0}`; kits are: micro, systemd, desktop, carrier")]
    Unknown(String),
    /// Neither `XDG_CACHE_HOME` nor `HOME` is usable.
    #[error("no place for the cache: set XDG_CACHE_HOME or HOME to an absolute path")]
    NoCache,
    /// The cache is accessible to other users.
    #[error(
        "cannot use the cache {path}: {reason}; set XDG_CACHE_HOME to another directory of yours"
    )]
    Cache {
        /// The cache.
        path: PathBuf,
        /// Why not.
        reason: io::Error,
    },
    /// A file of a kit is damaged.
    #[error("{path} is damaged: {what}; `firn kit build` makes its kit anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file operation failed.
    #[error("{action} {path}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl KitError {
    /// For `map_err`: adds what was attempted with which file.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

/// Returns the user's cache, `$XDG_CACHE_HOME/firn`, by the XDG base directory specification: a relative
/// `XDG_CACHE_HOME` is ignored. It need not exist; if it does, this removes all other users' access.
///
/// # Errors
/// If no path for it is set, or others can write to it.
pub fn cache_dir() -> Result<PathBuf, KitError> {
    let absolute =
        |variable| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    let home = || absolute("HOME").map(|home| home.join(".cache"));
    let base = absolute("XDG_CACHE_HOME").or_else(home).ok_or(KitError::NoCache)?;
    let root = base.join("firn");
    match Place::closed(&root).and_then(|place| place.close()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(KitError::Cache { path: root, reason: error })
        }
        _ => Ok(root),
    }
}

/// The directory of unpacked kernels in the user's cache, if there is a cache.
pub(crate) fn kernels_dir() -> Option<PathBuf> {
    cache_dir().ok().map(|cache| cache.join("vmlinux"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!("micro".parse::<KitName>().unwrap(), KitName::Micro);
        let error = "mikro".parse::<KitName>().unwrap_err().to_string();
        assert_eq!(error, "there is no kit `mikro`; kits are: micro, systemd, desktop, carrier");
    }
}
