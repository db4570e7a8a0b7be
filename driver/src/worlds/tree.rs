//! What is in a directory, in one file.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde::{Deserialize, Serialize};

/// How deep directories may lie in each other.
const MAX_DEPTH: usize = 64;
/// How much files may hold altogether, in bytes: after a boot there is next to nothing.
const MAX_CONTENT: u64 = 64 << 20;

/// What is in a directory, by its names: directories, files, symbolic links and pipes. What else there may be, and
/// times and owners, is left out.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Tree(BTreeMap<String, Entry>);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Entry {
    Dir { mode: u32, tree: Tree },
    File { mode: u32, base64: String },
    Link { to: PathBuf },
    Pipe { mode: u32 },
}

impl Tree {
    /// Reads a directory that nobody changes meanwhile.
    pub(super) fn read(dir: &Path) -> io::Result<Self> {
        Self::read_at(dir, 0, &mut 0)
    }

    fn read_at(dir: &Path, depth: usize, content: &mut u64) -> io::Result<Self> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other("its directories lie too deep"));
        }
        let mut entries = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let (path, meta) = (entry.path(), fs::symlink_metadata(entry.path())?);
            let name = entry
                .file_name()
                .into_string()
                .map_err(|name| io::Error::other(format!("the name of {name:?} is not UTF-8")))?;
            let (kind, mode) = (meta.file_type(), meta.mode() & 0o7777);
            let entry = if kind.is_dir() {
                Entry::Dir { mode, tree: Self::read_at(&path, depth + 1, content)? }
            } else if kind.is_symlink() {
                Entry::Link { to: fs::read_link(&path)? }
            } else if kind.is_fifo() {
                Entry::Pipe { mode }
            } else if kind.is_file() {
                *content = content.saturating_add(meta.len());
                if *content > MAX_CONTENT {
                    let mib = MAX_CONTENT >> 20;
                    return Err(io::Error::other(format!("its files hold more than {mib} MiB")));
                }
                Entry::File { mode, base64: BASE64.encode(fs::read(&path)?) }
            } else {
                continue;
            };
            entries.insert(name, entry);
        }
        Ok(Self(entries))
    }

    /// Puts all of it into a directory. What is there of the same name is replaced.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        for (name, entry) in &self.0 {
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name.as_str())
            {
                return Err(io::Error::other(format!("{name:?} is no name of a file")));
            }
            let path = dir.join(name);
            if let (Ok(meta), false) = (path.symlink_metadata(), matches!(entry, Entry::Dir { .. }))
            {
                match meta.is_dir() {
                    true => crate::private::remove_tree(&path)?,
                    false => fs::remove_file(&path)?,
                }
            }
            let mode = match entry {
                Entry::Dir { mode, tree } => {
                    fs::create_dir_all(&path)?;
                    tree.write(&path)?;
                    mode
                }
                Entry::File { mode, base64 } => {
                    fs::write(&path, BASE64.decode(base64).map_err(io::Error::other)?)?;
                    mode
                }
                Entry::Pipe { mode } => {
                    mkfifo(&path, Mode::S_IRWXU)?;
                    mode
                }
                Entry::Link { to } => {
                    symlink(to, &path)?;
                    continue;
                }
            };
            fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let [work, other] = ["work", "other"].map(|name| dir.path().join(name));
        fs::create_dir_all(work.join("a/b")).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(work.join("a/b/file"), b"one\xff\0").unwrap();
        fs::set_permissions(work.join("a/b/file"), Permissions::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", work.join("link")).unwrap();
        mkfifo(&work.join("pipe"), Mode::S_IRWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(work.join("socket")).unwrap();
        let tree = Tree::read(&work).unwrap();
        let tree: Tree = serde_json::from_slice(&serde_json::to_vec(&tree).unwrap()).unwrap();
        // What leads elsewhere is replaced, not followed.
        fs::write(dir.path().join("mine"), "mine").unwrap();
        symlink(dir.path().join("mine"), other.join("link")).unwrap();
        for _ in 0..2 {
            tree.write(&other).unwrap();
            assert_eq!(Tree::read(&other).unwrap(), tree);
        }
        assert_eq!(fs::read(other.join("a/b/file")).unwrap(), b"one\xff\0");
        assert_eq!(fs::metadata(other.join("a/b/file")).unwrap().mode() & 0o777, 0o640);
        assert_eq!(fs::read_to_string(dir.path().join("mine")).unwrap(), "mine");

        for name in ["..", "/tmp/x", "a/b", ""] {
            let text = format!("{{{name:?}: {{\"file\": {{\"mode\": 420, \"base64\": \"\"}}}}}}");
            let tree: Tree = serde_json::from_str(&text).unwrap();
            tree.write(&other).expect_err(name);
        }
        fs::File::create(work.join("large")).unwrap().set_len(MAX_CONTENT).unwrap();
        let error = Tree::read(&work).unwrap_err().to_string();
        assert_eq!(error, "its files hold more than 64 MiB");
    }
}
