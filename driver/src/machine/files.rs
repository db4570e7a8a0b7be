//! Copies files between the host and the guest.

use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use firn_agent_client::{Entry, FileInfo, FileKind};
use tokio::fs;

use super::Machine;
use super::exec::ExecOptions;
use super::session::{Session, SessionError};
use crate::error::{Error, MachineError, Result, chain};

/// One step of copying a tree.
struct Job {
    from: PathBuf,
    to: PathBuf,
}

impl Machine {
    /// Copies a file or directory from the host to the guest, with its modes, owned by root: to `target`, or into it if
    /// that is a directory. Creates missing parents. A relative target starts at `/tmp`, as commands do. Symbolic links
    /// are followed.
    ///
    /// # Errors
    /// [`MachineError::Missing`] if the source does not exist; [`Error::Assertion`] if the guest cannot write
    /// something; and if something cannot be read on the host, or is neither a file nor a directory.
    pub async fn copy_from_host(&self, source: &Path, target: &Path) -> Result<()> {
        let file = fs::canonicalize(source).await.map_err(unreadable(source))?;
        let target = in_guest(target);
        let session = self.session().await?;
        let send = async {
            let target = match (session.stat(&target, true).await, source.file_name()) {
                (Ok(FileInfo { kind: FileKind::Directory, .. }), Some(name)) => target.join(name),
                _ => target,
            };
            self.send_tree(&session, file, target).await
        };
        self.unless_ended(send).await
    }

    /// The same for a target that the guest's shell expands.
    ///
    /// # Errors
    /// [`Error::Assertion`] if the target does not expand to one path; otherwise those of [`Self::copy_from_host`].
    pub async fn copy_from_host_via_shell(&self, source: &Path, target: &str) -> Result<()> {
        let expand = format!("set -- {target}\n[ $# = 1 ] && printf %s \"$1\"");
        let (status, expanded) = self.execute(&expand, ExecOptions::default()).await?;
        if status != 0 {
            let name = self.name();
            return Err(Error::Assertion(format!(
                "{name}: `{target}` is not one path of the guest"
            )));
        }
        self.copy_from_host(source, Path::new(&expanded)).await
    }

    /// Copies a file or directory from the guest to [`Machine::out_dir`]`/target_dir/`basename. A relative source
    /// starts at
    /// `/tmp`, as commands do; an absolute target directory is used as it is.
    ///
    /// # Errors
    /// [`Error::Assertion`] if the guest cannot read something or it does not exist; and if something cannot be written
    /// on the host, or is neither a file, a directory nor a link.
    pub async fn copy_from_machine(&self, source: &Path, target_dir: &Path) -> Result<()> {
        let Some(name) = source.file_name() else {
            let (machine, source) = (self.name(), source.display());
            let why = format!("{machine}: cannot copy {source}: it has no name");
            return Err(MachineError::Usage(why).into());
        };
        let session = self.session().await?;
        let fetch = async {
            let source = in_guest(source);
            let info = match session.stat(&source, true).await {
                Ok(info) => info,
                Err(error) => return Err(self.cannot_read(&source, error).await),
            };
            let out = self.out_dir();
            let parent = without_dots(&out.join(target_dir));
            if parent.starts_with(without_dots(&out)) {
                // A script may have set another directory, which need not exist yet.
                fs::create_dir_all(&out).await.map_err(MachineError::file("make", &out))?;
                self.check_inside(&parent).await?;
            }
            fs::create_dir_all(&parent).await.map_err(MachineError::file("make", &parent))?;
            self.fetch_tree(&session, Job { from: source, to: parent.join(name) }, info).await
        };
        self.unless_ended(fetch).await
    }

    async fn send_tree(&self, session: &Session, source: PathBuf, target: PathBuf) -> Result<()> {
        let mut jobs = vec![Job { from: source, to: target }];
        while let Some(Job { from, to }) = jobs.pop() {
            // The kernel's limit on links ends a loop.
            let meta = fs::metadata(&from).await.map_err(unreadable(&from))?;
            let mode = meta.permissions().mode() & 0o7777;
            let done = if meta.is_dir() {
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
                return Err(self.refused(format!("cannot write {}", to.display()), error).await);
            }
        }
        Ok(())
    }

    async fn fetch_tree(&self, session: &Session, job: Job, info: FileInfo) -> Result<()> {
        let mut jobs = vec![(job, info)];
        let mut room = MAX_TREE;
        // Set last: nothing can be created in a read-only directory.
        let mut modes = Vec::new();
        while let Some((Job { from, to }, info)) = jobs.pop() {
            match (info.kind, &info.target) {
                (FileKind::Directory, _) => {
                    make_dir(&to).await?;
                    jobs.extend(self.fetch_entries(session, &from, &to, &mut room).await?);
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
                        // A partial file could be taken for a complete one.
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
        room: &mut usize,
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
            // A hostile agent must not lead out of the target, nor fill the host's memory.
            if name.file_name() != Some(name.as_os_str()) {
                return Err(special(&from.join(name)));
            }
            let size = Entry::cost(&entry) + from.as_os_str().len() + to.as_os_str().len();
            *room = room.checked_sub(size).ok_or_else(|| too_large(from))?;
            Ok((Job { from: from.join(name), to: to.join(name) }, entry.info))
        });
        jobs.collect()
    }

    /// An earlier copy may have created symbolic links that lead out of the output directory.
    async fn check_inside(&self, dir: &Path) -> Result<()> {
        let dir = dir.ancestors().find(|dir| dir.symlink_metadata().is_ok()).unwrap_or(dir);
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

    async fn cannot_read(&self, path: &Path, error: SessionError) -> Error {
        self.refused(format!("cannot copy {}", path.display()), error).await
    }

    /// Converts an error of a session to one of the machine, or to an assertion if the guest refused.
    async fn refused(&self, what: String, error: SessionError) -> Error {
        if !error.refused() {
            return self.session_error(what, error).await;
        }
        Error::Assertion(format!("{}: {what}: {}", self.name(), chain(&error)))
    }
}

/// Limit for the names and links of a copied tree, in bytes: enough for some hundred thousand files.
const MAX_TREE: usize = 256 << 20;

/// Most components of a target path: more is a guest's trick.
const MAX_DEPTH: usize = 256;

/// Removes what is in the place of a file to write, in particular a symbolic link that an earlier copy created: it must
/// not be written through.
async fn make_way(path: &Path) -> Result<()> {
    match fs::remove_file(path).await {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(MachineError::file("replace", path)(e).into())
        }
        _ => Ok(()),
    }
}

/// Creates a directory, replacing anything else: see [`make_way`].
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

/// Without set-user-id and the like: a guest must not create such files on the host.
async fn set_mode(path: &Path, mode: u32) -> Result<()> {
    let permissions = std::fs::Permissions::from_mode(mode & 0o777 | 0o200);
    fs::set_permissions(path, permissions)
        .await
        .map_err(|e| MachineError::file("set the mode of", path)(e).into())
}

/// A path in the guest; relative ones start where commands do.
pub(super) fn in_guest(path: &Path) -> PathBuf {
    Path::new("/tmp").join(path)
}

/// The path with each `..` resolved lexically.
fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

/// The error for a source on the host.
fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> MachineError {
    let path = path.to_owned();
    move |error| match error.kind() {
        std::io::ErrorKind::NotFound => MachineError::Missing { path },
        _ => MachineError::file("copy", path)(error),
    }
}

fn too_large(path: &Path) -> Error {
    MachineError::Usage(format!("cannot copy {}: the tree is too large", path.display())).into()
}

fn special(path: &Path) -> Error {
    MachineError::Usage(format!("cannot copy {}: it is no file, directory or link", path.display()))
        .into()
}
