//! Finds the kernel modules that a kit needs, and their load order.
//!
//! Debian's packages contain no `modules.dep`: depmod creates it at installation. Its input is in the modules
//! themselves, so the names are read from there: section `.modinfo`, entries `depends=` (linux/scripts/mod/modpost.c,
//! `add_depends`). The modules of Debian's newer kernels are compressed with xz.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use lzma_rust2::XzReader;
use object::{Object, ObjectSection};
use thiserror::Error;

/// Why a module cannot be used.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// The kernel package has no such module.
    #[error("the kernel package has no module `{name}`{}", .needed_by.as_ref().map(|by| format!(", which `{by}` needs")).unwrap_or_default())]
    NotFound {
        /// The module.
        name: String,
        /// The module that depends on it.
        needed_by: Option<String>,
    },
    /// The file is not a kernel module.
    #[error("{path} is not a kernel module")]
    NoModule {
        /// The file.
        path: PathBuf,
    },
    /// The file or directory cannot be read.
    #[error("read {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// All modules of one kernel, by name.
pub(crate) struct ModuleTree {
    files: HashMap<String, PathBuf>,
    builtin: HashSet<String>,
}

impl ModuleTree {
    /// Reads `dir`, a kernel's `/lib/modules/RELEASE`.
    pub(crate) fn scan(dir: &Path) -> Result<Self, ModuleError> {
        let mut files = HashMap::new();
        let mut todo = vec![dir.to_owned()];
        while let Some(dir) = todo.pop() {
            let failed = |source| ModuleError::Io { path: dir.clone(), source };
            for entry in fs::read_dir(&dir).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let path = entry.path();
                if entry.file_type().map_err(failed)?.is_dir() {
                    todo.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        let list = dir.join("modules.builtin");
        let builtin = match fs::read_to_string(&list) {
            Ok(list) => list.lines().filter_map(|line| module_name(Path::new(line))).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => HashSet::new(),
            Err(source) => return Err(ModuleError::Io { path: list, source }),
        };
        Ok(Self { files, builtin })
    }

    /// Returns the names of the modules below `directories`, which are relative to the kernel's module directory `dir`.
    pub(crate) fn below(&self, dir: &Path, directories: &[&str]) -> Vec<String> {
        let wanted =
            |path: &Path| directories.iter().any(|below| path.starts_with(dir.join(below)));
        let found = self.files.iter().filter(|(_, path)| wanted(path));
        let mut names: Vec<_> = found.map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// Returns the files of `wanted` and all their dependencies, each after what it needs, without modules built into
    /// the kernel.
    pub(crate) fn load_order(
        &self,
        wanted: &[impl AsRef<str>],
    ) -> Result<Vec<(String, PathBuf)>, ModuleError> {
        let mut order = Vec::new();
        let mut seen = HashSet::new();
        for name in wanted {
            self.visit(&normal(name.as_ref()), None, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        needed_by: Option<&str>,
        seen: &mut HashSet<String>,
        order: &mut Vec<(String, PathBuf)>,
    ) -> Result<(), ModuleError> {
        // Marked before its dependencies are visited, so that cycles end.
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let not_found = || ModuleError::NotFound {
            name: name.to_owned(),
            needed_by: needed_by.map(str::to_owned),
        };
        let path = self.files.get(name).ok_or_else(not_found)?;
        let module = read(path)?;
        let dependencies =
            dependencies(&module).ok_or_else(|| ModuleError::NoModule { path: path.clone() })?;
        for dependency in dependencies {
            self.visit(&dependency, Some(name), seen, order)?;
        }
        order.push((name.to_owned(), path.clone()));
        Ok(())
    }
}

/// Reads and decompresses the module in the file `path`, without its signature.
///
/// The kernel checks a signature whenever it loads a module, and to do so hashes all of it: 0.7 giga-instructions of the
/// 3.3 until a systemd guest takes commands. It loads a module that has none just as well, and is marked as tainted by
/// it (`E`). NixOS's kernels sign no modules.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let io = |source| ModuleError::Io { path: path.to_owned(), source };
    let bytes = fs::read(path).map_err(io)?;
    let mut module = if path.extension().is_some_and(|extension| extension == "xz") {
        let mut module = Vec::new();
        XzReader::new(bytes.as_slice(), true).read_to_end(&mut module).map_err(io)?;
        module
    } else {
        bytes
    };
    let signed = module.len();
    module.truncate(unsigned_len(&module).unwrap_or(signed));
    Ok(module)
}

/// Returns the length of a signed `module` without its signature; `None` if it has none.
///
/// Behind the module come the signature, 12 bytes that end in its length, big-endian, and a mark
/// (linux/include/linux/module_signature.h).
fn unsigned_len(module: &[u8]) -> Option<usize> {
    let rest = module.strip_suffix(b"~Module signature appended~\n")?;
    let (rest, length) = rest.split_last_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    rest.len().checked_sub(8)?.checked_sub(length)
}

/// Returns the names of the modules that `module`, a whole file, depends on.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    let file = object::File::parse(module).ok()?;
    let modinfo = file.section_by_name(".modinfo")?.data().ok()?;
    let depends =
        modinfo.split(|&byte| byte == 0).find_map(|entry| entry.strip_prefix(b"depends="))?;
    let depends = std::str::from_utf8(depends).ok()?;
    Some(depends.split(',').filter(|name| !name.is_empty()).map(normal).collect())
}

/// Returns a file's module name: `virtio_rng` for `/a/virtio-rng.ko` and for `/a/virtio-rng.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(".xz").unwrap_or(name).strip_suffix(".ko").map(normal)
}

/// In module names, the kernel treats `-` and `_` alike.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
pub(crate) mod tests;
