//! Makes disk images that are not there yet.

use std::fs::{File as HostFile, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, StorageOpenOptions};
use thiserror::Error;

use crate::spec::{DiskFormat, DiskMib, Label};

/// The program, and where it is if that is not in PATH, as for users who are not root on Debian.
const MKFS: [&str; 3] = ["mkfs.ext4", "/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"];
/// How much is searched for data at a time.
const BLOCK: usize = 64 << 10;

/// Why an image could not be made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// The host refused.
    #[error("{operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// mkfs.ext4 is not installed.
    #[error("mkfs.ext4 is not installed; on Debian it is in the package e2fsprogs")]
    NoMkfs,
    /// mkfs.ext4 has failed.
    #[error("mkfs.ext4 has failed ({status}): {message}")]
    Mkfs {
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        message: String,
    },
}

fn host(operation: &'static str) -> impl Fn(io::Error) -> CreateError {
    move |source| CreateError::Host { operation, source }
}

/// Creates the image of a disk, if it is not there and has a size.
///
/// # Errors
/// If it cannot be made.
pub fn create_image(disk: &crate::spec::DiskSpec) -> Result<(), CreateError> {
    disk.size.map_or(Ok(()), |size| create(&disk.image, disk.format(), size, disk.label.as_ref()))
}

/// Creates the image at `path`, which appears once it is complete. An existing one is left alone.
pub(super) fn create(
    path: &Path,
    format: DiskFormat,
    size: DiskMib,
    label: Option<&Label>,
) -> Result<(), CreateError> {
    // A link to nowhere is there too: opening it will say what is wrong.
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let size = size.get() << 20;
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let fresh = || {
        tempfile::Builder::new()
            .prefix(".firn-disk-")
            // What guests keep is not for other users of the host.
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(directory)
            .map_err(host("make a file"))
    };
    let raw = fresh()?;
    if format == DiskFormat::Raw || label.is_some() {
        raw.as_file().set_len(size).map_err(host("set its size"))?;
    }
    if let Some(label) = label {
        make_ext4(raw.path(), label)?;
    }
    let image = match format {
        DiskFormat::Raw => raw,
        DiskFormat::Qcow2 => {
            let image = fresh()?;
            let content = label.is_some().then(|| raw.as_file());
            make_qcow2(image.path(), size, content).map_err(host("write the qcow2 image"))?;
            image
        }
    };
    match image.persist_noclobber(path) {
        Ok(_) => Ok(()),
        // Another machine that shares it has been faster.
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(host("give it its name")(error.error)),
    }
}

fn make_ext4(path: &Path, label: &str) -> Result<(), CreateError> {
    for program in MKFS {
        let output = Command::new(program)
            .args(["-q", "-F", "-L", label, "--"])
            .arg(path)
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                return Err(CreateError::Mkfs { status: output.status, message });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(host("run mkfs.ext4")(error)),
        }
    }
    Err(CreateError::NoMkfs)
}

/// Creates a qcow2 image at `path` with the non-zero parts of `content`.
fn make_qcow2(path: &Path, size: u64, content: Option<&HostFile>) -> io::Result<()> {
    let file = HostFile::options().read(true).write(true).open(path)?;
    let options = StorageOpenOptions::new().filename(path).write(true);
    let storage = File::from_open_file(file.try_clone()?, options.clone())?;
    Qcow2::<File>::create_builder(storage).size(size).create()?;
    if let Some(mut content) = content {
        let storage = File::from_open_file(file.try_clone()?, options)?;
        let image = FormatAccess::new(Qcow2::<File>::open_image(storage, true)?);
        let mut block = vec![0; BLOCK];
        let mut at = 0;
        while at < size {
            // mkfs wrote through another descriptor: this one still stands at the beginning.
            content.read_exact(&mut block)?;
            if block.iter().any(|&byte| byte != 0) {
                image.write(block.as_slice(), at)?;
            }
            at += u64::try_from(BLOCK).map_err(io::Error::other)?;
        }
        image.flush()?;
    }
    file.sync_data()
}
