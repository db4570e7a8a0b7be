//! Copies files between the host and the guest.

use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use crate::agent::{FileInfo, FileKind};
use tokio::fs;

use super::Machine;
use super::session::{Session, SessionError};
use crate::error::{MachineError, Result};

/// One step of copying a tree.
struct Job {
    from: PathBuf,
    to: PathBuf,
}

impl Machine {
    /// Copies a file or directory of the host into the guest, with its modes, owned by root: to `target`, or into it
    /// if that is a directory. Makes missing parents. A symbolic link inside a directory stays one; `source` itself may
    /// be one and is followed.
    ///
    /// # Errors
    /// If something cannot be read here or written there, or is neither file, directory nor link.
    pub async fn copy_from_host(&self, source: &Path, target: &Path) -> Result<()> {
        let file = fs::canonicalize(source).await.map_err(MachineError::file("copy", source))?;
        let session = self.session().await?;
        let send = async {
            let target = match (session.stat(target, true).await, source.file_name()) {
                (Ok(FileInfo { kind: FileKind::Directory, .. }), Some(name)) => target.join(name),
                _ => target.to_owned(),
            };
            self.send_tree(&session, file, target).await
        };
        self.unless_ended(send).await
    }

    /// Copies a file or directory of the guest to [`Machine::out_dir`]`/target_dir/`basename.
    ///
    /// # Errors
    /// If something cannot be read there or written here, or is neither file, directory nor link.
    pub async fn copy_from_machine(&self, source: &Path, target_dir: &Path) -> Result<()> {
        let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
        let name = source.file_name().filter(|_| target_dir.components().all(inside));
        let Some(name) = name else {
            let (source, target_dir) = (source.display(), target_dir.display());
            return Err(MachineError::Usage(format!(
                "{}: cannot copy {source} to `{target_dir}`: the source needs a name, and the target must lie in \
                 the output directory",
                self.name()
            ))
            .into());
        };
        let parent = self.out_dir().join(target_dir);
        fs::create_dir_all(&parent).await.map_err(MachineError::file("make", &parent))?;
        self.check_inside(&parent).await?;
        let session = self.session().await?;
        self.unless_ended(self.fetch_tree(&session, source.to_owned(), parent.join(name))).await
    }

    async fn send_tree(&self, session: &Session, source: PathBuf, target: PathBuf) -> Result<()> {
        let mut jobs = vec![Job { from: source, to: target }];
        while let Some(Job { from, to }) = jobs.pop() {
            let meta =
                fs::symlink_metadata(&from).await.map_err(MachineError::file("copy", &from))?;
            let mode = meta.permissions().mode() & 0o7777;
            let done = if meta.is_symlink() {
                let link = fs::read_link(&from).await.map_err(MachineError::file("read", &from))?;
                session.symlink(&to, &link).await
            } else if meta.is_dir() {
                let mut entries =
                    fs::read_dir(&from).await.map_err(MachineError::file("read", &from))?;
                while let Some(entry) =
                    entries.next_entry().await.map_err(MachineError::file("read", &from))?
                {
                    let to = to.join(entry.file_name());
                    jobs.push(Job { from: entry.path(), to });
                }
                session.make_directory(&to, mode).await
            } else if meta.is_file() {
                let mut file =
                    fs::File::open(&from).await.map_err(MachineError::file("read", &from))?;
                session.write_file(&to, mode, &mut file).await
            } else {
                return Err(special(&from));
            };
            if let Err(error) = done {
                return Err(self
                    .session_error(format!("cannot write {}", to.display()), error)
                    .await);
            }
        }
        Ok(())
    }

    async fn fetch_tree(&self, session: &Session, source: PathBuf, target: PathBuf) -> Result<()> {
        let info = match session.stat(&source, true).await {
            Ok(info) => info,
            Err(error) => return Err(self.cannot_read(&source, error).await),
        };
        let mut jobs = vec![(Job { from: source, to: target }, info)];
        // Set last: a directory that nobody may write to takes no files.
        let mut modes = Vec::new();
        while let Some((Job { from, to }, info)) = jobs.pop() {
            match (info.kind, &info.target) {
                (FileKind::Directory, _) => {
                    make_dir(&to).await?;
                    jobs.extend(self.fetch_entries(session, &from, &to).await?);
                    modes.push((to, info.mode));
                }
                (FileKind::Symlink, Some(link)) => {
                    make_way(&to).await?;
                    fs::symlink(link.as_path(), &to)
                        .await
                        .map_err(MachineError::file("write", &to))?;
                }
                (FileKind::File, _) => {
                    make_way(&to).await?;
                    let mut file = fs::File::create_new(&to)
                        .await
                        .map_err(MachineError::file("write", &to))?;
                    if let Err(error) = session.read_file(&from, &mut file).await {
                        // Half a file would pass for a whole one.
                        let _ = fs::remove_file(&to).await;
                        return Err(self.cannot_read(&from, error).await);
                    }
                    set_mode(&to, info.mode).await?;
                }
                (FileKind::Symlink | FileKind::Other, _) => return Err(special(&from)),
            }
        }
        for (dir, mode) in modes.into_iter().rev() {
            set_mode(&dir, mode).await?;
        }
        Ok(())
    }

    async fn fetch_entries(
        &self,
        session: &Session,
        from: &Path,
        to: &Path,
    ) -> Result<Vec<(Job, FileInfo)>> {
        if to.components().count() > MAX_DEPTH {
            return Err(special(from));
        }
        let entries = match session.list(from).await {
            Ok(entries) => entries,
            Err(error) => return Err(self.cannot_read(from, error).await),
        };
        let jobs = entries.into_iter().map(|entry| {
            let name = entry.name.as_path();
            // A hostile agent must not lead out of the target.
            if name.file_name() != Some(name.as_os_str()) {
                return Err(special(&from.join(name)));
            }
            Ok((Job { from: from.join(name), to: to.join(name) }, entry.info))
        });
        jobs.collect()
    }

    /// An earlier copy may have brought symbolic links that lead out of the output directory.
    async fn check_inside(&self, dir: &Path) -> Result<()> {
        let real = |path: PathBuf| async move {
            fs::canonicalize(&path).await.map_err(MachineError::file("find", path))
        };
        let (inner, outer) = (real(dir.to_owned()).await?, real(self.out_dir().to_owned()).await?);
        if inner.starts_with(&outer) {
            return Ok(());
        }
        let (dir, inner) = (dir.display(), inner.display());
        Err(MachineError::Usage(format!("{dir} is {inner}, outside of the output directory"))
            .into())
    }

    async fn cannot_read(&self, path: &Path, error: SessionError) -> crate::error::Error {
        self.session_error(format!("cannot copy {}", path.display()), error).await
    }
}

/// Most components of a path that is copied to: more is a guest's trick.
const MAX_DEPTH: usize = 256;

/// Removes what is where a file shall be. In particular a symbolic link that an earlier copy of the guest's
/// made: it must not be written through.
async fn make_way(path: &Path) -> Result<()> {
    match fs::remove_file(path).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(MachineError::file("replace", path)(e).into())
        }
        _ => Ok(()),
    }
}

/// Makes a directory, in place of anything but one: see [`make_way`].
async fn make_dir(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path).await {
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(_) => {
            make_way(path).await?;
            fs::create_dir(path).await.map_err(|e| MachineError::file("make", path)(e).into())
        }
        Err(_) => {
            fs::create_dir(path).await.map_err(|e| MachineError::file("make", path)(e).into())
        }
    }
}

/// Without set-user-id and the like: what a guest marks so must not be so on the host.
async fn set_mode(path: &Path, mode: u32) -> Result<()> {
    let permissions = std::fs::Permissions::from_mode(mode & 0o777 | 0o200);
    fs::set_permissions(path, permissions)
        .await
        .map_err(|e| MachineError::file("set the mode of", path)(e).into())
}

fn special(path: &Path) -> crate::error::Error {
    MachineError::Usage(format!("cannot copy {}: it is no file, directory or link", path.display()))
        .into()
}
