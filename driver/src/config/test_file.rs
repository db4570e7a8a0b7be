//! Reads a test from a TOML file.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn_vmm::spec::{MachineName, Number, ValueError};
use serde::Deserialize;
use serde_json::Value;

use super::document::{Document, Key, Part, Problem};
use super::report::{ConfigError, Report};
use super::{NodeConfig, Script, TestConfig, read};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TestKeys {
    name: Option<String>,
    test_script: Option<String>,
    test_script_file: Option<PathBuf>,
    global_timeout: Option<f64>,
    #[serde(default)]
    from_boot: bool,
    #[serde(default)]
    nodes: BTreeMap<String, Value>,
}

impl TestConfig {
    /// Reads a test from a TOML file. Relative paths in it are relative to the file's directory.
    ///
    /// # Errors
    /// If the file, or a file or directory it names, cannot be read or is invalid.
    pub fn from_toml_file(path: &Path) -> Result<Self, ConfigError> {
        let text = read(path)?;
        Self::from_toml(&text, path)
    }

    /// Reads a test from the text of a TOML file at `path`.
    ///
    /// # Errors
    /// Those of [`Self::from_toml_file`].
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let (document, value) = Document::toml(path, text)?;
        let keys: TestKeys = document.typed(&Key::default(), value)?;
        let base = path.parent().unwrap_or(Path::new(""));
        let base = std::path::absolute(base).unwrap_or_else(|_| base.to_owned());
        let reader = Reader { document, path, base };
        reader.test(keys).map_err(ConfigError::from)
    }
}

/// The file being read, for messages and for relative paths.
struct Reader<'a> {
    document: Document<'a>,
    path: &'a Path,
    base: PathBuf,
}

impl Reader<'_> {
    fn bad(&self, key: &Key, message: impl std::fmt::Display) -> Report {
        self.document.report(&Problem::new(key.clone(), message))
    }

    fn test(&self, keys: TestKeys) -> Result<TestConfig, Report> {
        let script = self.script(keys.test_script, keys.test_script_file)?;
        let global_timeout = keys.global_timeout.map(|t| self.timeout(t)).transpose()?;
        if keys.nodes.is_empty() {
            return Err(self
                .bad(&Key::default(), "a test needs a machine")
                .help("add a table `[nodes.machine]`; it may be empty"));
        }
        let mut nodes: Vec<NodeConfig> = Vec::with_capacity(keys.nodes.len());
        // Sorted by name: a BTreeMap.
        for (at, (name, value)) in (1u64..).zip(keys.nodes) {
            let key = Key::from("nodes").name(name.as_str());
            let number = Number::try_from(at).map_err(|_| {
                let message = format!("a test can have at most {} machines", Number::MAX);
                self.bad(&key, message)
            })?;
            let node = NodeConfig {
                name: self.name(&key, name, &nodes)?,
                number: number.get(),
                ..self.node(&key, value)?
            };
            nodes.push(node);
        }
        let stem = || self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(TestConfig {
            name: keys.name.unwrap_or_else(stem),
            script,
            global_timeout,
            nodes,
            files: Vec::new(),
            more_vlans: Vec::new(),
            vsock_offset: None,
            from_boot: keys.from_boot,
        })
    }

    fn script(&self, inline: Option<String>, file: Option<PathBuf>) -> Result<Script, Report> {
        match (inline, file) {
            (Some(text), None) => {
                Ok(Script { line: self.first_line(), file: self.path.to_owned(), text })
            }
            (None, Some(file)) => {
                let key = Key::from("test_script_file");
                let file = self.base.join(file);
                self.file(&key, "script", &file)?;
                let text = fs::read_to_string(&file)
                    .map_err(|e| self.bad(&key, format_args!("cannot read {}: {e}", file.display())))?;
                Ok(Script { text, file, line: 1 })
            }
            (Some(_), Some(_)) => Err(self
                .bad(&"test_script_file".into(), "this and `test_script` are both given")
                .help("keep one of them")),
            (None, None) => Err(self
                .bad(&Key::default(), "missing key `test_script`")
                .help("give the script as `test_script = '''…'''`, or its path as `test_script_file = \"…\"`")),
        }
    }

    /// The line on which the script's text begins. TOML drops a line end right after the quotes.
    fn first_line(&self) -> usize {
        let key = Key::from("test_script");
        let literal = self.document.literal(&key);
        let body = ["'''", "\"\"\""].iter().find_map(|quotes| literal.strip_prefix(quotes));
        let skipped = body.is_some_and(|body| body.starts_with('\n') || body.starts_with("\r\n"));
        self.document.line(self.document.locate(&key, Part::Value).start) + usize::from(skipped)
    }

    fn timeout(&self, seconds: f64) -> Result<Duration, Report> {
        let duration = Some(seconds)
            .filter(|seconds| *seconds > 0.0)
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        duration.ok_or_else(|| {
            self.bad(
                &"global_timeout".into(),
                ValueError::new(seconds, "a number of seconds above 0"),
            )
        })
    }

    fn name(&self, key: &Key, name: String, others: &[NodeConfig]) -> Result<String, Report> {
        let name = MachineName::try_from(name).map_err(|error| self.bad(key, error))?;
        let variable = super::variable_name(&name);
        match others.iter().find(|other| other.variable() == variable) {
            None => Ok(name.into()),
            Some(other) => {
                let message = format!(
                    "machines `{}` and `{name}` would both be `{variable}` in the script",
                    other.name
                );
                Err(self.bad(key, message))
            }
        }
    }

    fn node(&self, key: &Key, value: Value) -> Result<NodeConfig, Report> {
        let mut node: NodeConfig = self.document.typed(key, value)?;
        node.check(key).map_err(|problem| self.document.report(&problem))?;
        node.apply_qemu_options().map_err(|(name, error)| self.bad(&key.name(name), error))?;
        node.rebase(&self.base);
        if let Some(kernel) = &node.kernel {
            self.file(&key.name("kernel"), "kernel image", kernel)?;
        }
        for (at, path) in node.initrd.iter().flatten().enumerate() {
            self.file(&key.name("initrd").index(at), "cpio archive", path)?;
        }
        for (at, disk) in node.disks.iter().enumerate() {
            let absent =
                || fs::metadata(&disk.image).is_err_and(|e| e.kind() == ErrorKind::NotFound);
            if disk.size.is_none() || !absent() {
                self.file(&key.name("disks").index(at).name("image"), "disk image", &disk.image)?;
            }
        }
        for (at, share) in node.shares.iter_mut().enumerate() {
            let key = key.name("shares").index(at).name("source");
            share.source = self.directory(&key, &share.source)?;
        }
        Ok(node)
    }

    /// Checks that the file exists.
    fn file(&self, key: &Key, what: &str, path: &Path) -> Result<(), Report> {
        let problem = match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => "is a directory".to_owned(),
            Ok(_) => return Ok(()),
            Err(error) => error.to_string(),
        };
        let message = format!("{}: {problem}; allowed: the path of a {what}", path.display());
        Err(self.bad(key, message))
    }

    /// The directory with symbolic links resolved.
    fn directory(&self, key: &Key, path: &Path) -> Result<PathBuf, Report> {
        let problem = match path.canonicalize() {
            Ok(path) if path.is_dir() => return Ok(path),
            Ok(_) => "is not a directory".to_owned(),
            Err(error) => error.to_string(),
        };
        let message = format!("{}: {problem}; allowed: the path of a directory", path.display());
        Err(self.bad(key, message))
    }
}
