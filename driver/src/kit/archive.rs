//! Writes and reads initrds: cpio archives in the `newc` format
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs::{self, DirEntry, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use cpio::newc::{self, ModeFileType};

/// An archive built in memory. All files belong to root and date from 1970, so equal contents give equal bytes.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, whose parent must exist already.
    pub fn dir(&mut self, path: &str, mode: u32) {
        self.add(path, ModeFileType::Directory, mode, &[]);
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.add(path, ModeFileType::Regular, mode, contents);
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.add(path, ModeFileType::Symlink, 0o777, target.as_bytes());
    }

    /// Adds the contents of the directory `from` below `path`, which must exist already.
    ///
    /// # Errors
    /// If a file cannot be read, or a name is not UTF-8.
    pub fn tree(&mut self, path: &str, from: &Path) -> io::Result<()> {
        let mut entries = fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(DirEntry::file_name);
        for entry in entries {
            let (source, name) = (entry.path(), entry.file_name());
            let name = name.to_str().ok_or(io::ErrorKind::InvalidFilename)?;
            let path = if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
            let metadata = entry.metadata()?;
            let mode = metadata.permissions().mode() & 0o7777;
            if metadata.is_dir() {
                self.dir(&path, mode);
                self.tree(&path, &source)?;
            } else if metadata.is_symlink() {
                let target = fs::read_link(&source)?;
                self.symlink(&path, target.to_str().ok_or(io::ErrorKind::InvalidFilename)?);
            } else {
                self.file(&path, mode, &fs::read(&source)?);
            }
        }
        Ok(())
    }

    /// Returns the archive's bytes, padded so that another archive may follow.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        newc::trailer(&mut self.bytes).expect(IN_MEMORY);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn add(&mut self, path: &str, kind: ModeFileType, mode: u32, contents: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(contents.len()).expect("files of an initrd are far below 4 GiB");
        // Without the leading slash, as in all initrds: the kernel unpacks relative to the root.
        let entry =
            newc::Builder::new(path.trim_start_matches('/')).ino(self.inode).nlink(1).mode(mode);
        let mut writer = entry.set_mode_file_type(kind).write(&mut self.bytes, size);
        writer.write_all(contents).expect(IN_MEMORY);
        writer.finish().expect(IN_MEMORY);
    }
}

const IN_MEMORY: &str = "a vector takes every write";

/// Reads the file `name` in the archive at `path`.
///
/// # Errors
/// If it does not exist, or the archive cannot be read.
pub fn read(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    loop {
        let mut reader = newc::Reader::new(file)?;
        if reader.entry().is_trailer() {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no {name}")));
        }
        let mut content = Vec::new();
        io::copy(&mut reader, &mut content)?;
        if reader.entry().name() == name {
            return Ok(content);
        }
        file = reader.finish()?;
    }
}

/// An entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its path, without the leading slash.
    pub name: String,
    /// Its type and permissions.
    pub mode: u32,
    /// A file's contents, or a link's target.
    pub contents: Vec<u8>,
}

/// Returns all entries of the archive at the start of `bytes`.
///
/// # Errors
/// If it is not an archive.
pub fn entries(mut bytes: &[u8]) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    loop {
        let mut reader = newc::Reader::new(bytes)?;
        if reader.entry().is_trailer() {
            return Ok(entries);
        }
        let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
        let mut contents = Vec::new();
        io::copy(&mut reader, &mut contents)?;
        entries.push(Entry { name, mode, contents });
        bytes = reader.finish()?;
    }
}
