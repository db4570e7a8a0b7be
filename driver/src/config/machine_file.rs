//! A machine file: an executable that is one machine.
//!
//! Its first line is `#!` with firn's path and `run`, so that running it boots the machine on the terminal. The rest
//! is the machine in JSON, with the keys of a [`NodeConfig`] and those of its [`Head`]. Tools generate such files, so
//! everything is explicit and nothing comes from a kit:
//!
//! ```text
//! #!/usr/bin/firn run
//! {
//!   "firn": 1,
//!   "name": "server",
//!   "memory": 1024,
//!   "kernel": "/boot/vmlinuz",
//!   "initrd": ["/boot/initrd.img"],
//!   "cmdline": "console=ttyS0 ${KERNEL_PARAMS:-}",
//!   "disks": [{ "image": "${NIX_DISK_IMAGE:-server.qcow2}", "size": 1024, "label": "nixos" }],
//!   "shares": [{ "tag": "xchg", "source": "${TMPDIR}/xchg" }],
//!   "vlans": [1],
//!   "user_network": { "forward_ports": [{ "host": { "port": 8080 }, "guest": { "port": 80 } }] }
//! }
//! ```
//!
//! nix/machine-spec.nix writes such files for NixOS; what it writes is read here in a test.
//!
//! Strings may have variables in them ([`Variables`]), which are looked up at each start of the machine. Under a driver
//! TMPDIR is the machine's state directory, SHARED_DIR the directory that all machines share, and relative paths start
//! at the state directory; by hand they start where the file is run.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use firn_vmm::spec::{MachineName, Number, ValueError};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::document::{Document, Key, Problem};
use super::expand::Variables;
use super::report::ConfigError;
use super::screen::Needs;
use super::{NodeConfig, read};
use crate::machine::quote;

/// The format's version, the value of the key `firn`.
pub const VERSION: u32 = 1;
/// Longer files are rejected.
const MAX_FILE: u64 = 4 << 20;

/// A valid machine file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineFile {
    path: PathBuf,
    /// Without its first line.
    text: String,
    keys: Map<String, Value>,
    name: MachineName,
    vlans: Vec<Number>,
    /// The parts that its test's script needs.
    needs: Vec<Needs>,
}

/// The keys of a machine file besides the machine's.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    firn: u32,
    name: MachineName,
    number: Option<Number>,
    /// Its contents come before `cmdline`.
    cmdline_file: Option<PathBuf>,
}

impl Head {
    const KEYS: [&str; 4] = ["firn", "name", "number", "cmdline_file"];
}

/// The defaults of a machine file: as much memory as in NixOS, and nothing else.
fn defaults() -> Value {
    json!({
        "memory": 1024, "initrd": [], "cmdline": "", "user_network": false, "vlans": [], "exchange": false,
    })
}

impl MachineFile {
    /// Reads a machine file.
    ///
    /// # Errors
    /// If it cannot be read, is something else, or is invalid.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let io = |source| ConfigError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        fs::File::open(path)
            .and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes))
            .map_err(io)?;
        let other = |what| ConfigError::NotMachineFile { path: path.to_owned(), what };
        match std::str::from_utf8(&bytes) {
            Ok(text) if is_ours(text) => Self::parse(text, path),
            Ok(text) if text.starts_with("#!") => Self::start_script(path),
            Ok(text) => Err(other(describe(text))),
            Err(_) if bytes.starts_with(b"\x7fELF") => Self::start_script(path),
            Err(_) => Err(other("no text")),
        }
    }

    /// A machine that a program starts: a start script for QEMU.
    fn start_script(path: &Path) -> Result<Self, ConfigError> {
        let file = std::path::absolute(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let executable =
            fs::metadata(&file).is_ok_and(|file| file.permissions().mode() & 0o111 != 0);
        let Some(word) = file.to_str().filter(|_| executable) else {
            let what = "a program that nobody may execute";
            return Err(ConfigError::NotMachineFile { path: path.to_owned(), what });
        };
        Self::start_command(&quote(word), path)
    }

    /// A machine that a command of the shell starts, which ends in QEMU. Its name is that of the NixOS start script
    /// `run-NAME-vm` if the command ends in one, else `machine`.
    ///
    /// # Errors
    /// If the machine's name cannot be one.
    pub fn start_command(command: &str, path: &Path) -> Result<Self, ConfigError> {
        let first = command.split_whitespace().next().unwrap_or_default();
        if MachineFile::read(Path::new(first)).is_ok_and(|file| file.command().is_none()) {
            let message = format!("{first} is a machine file of firn, which takes no arguments");
            return Err(ConfigError::Key { path: path.to_owned(), message });
        }
        let program = command.trim_end_matches('\'').rsplit('/').next().unwrap_or_default();
        let name = program.strip_prefix("run-").and_then(|rest| rest.strip_suffix("-vm"));
        // Variables are the shell's.
        let command = command.replace('$', "$$");
        let text =
            json!({"firn": VERSION, "name": name.unwrap_or("machine"), "start_command": command});
        Self::parse(&text.to_string(), path)
    }

    /// Reads a machine file's text; the first line may be missing.
    ///
    /// # Errors
    /// If it is invalid.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        // The line stays, blank, so that positions in messages are those in the file.
        let text = match text.starts_with("#!") {
            true => {
                let end = text.find('\n').unwrap_or(text.len());
                " ".repeat(end) + &text[end..]
            }
            false => text.to_owned(),
        };
        let (document, value) = Document::json(path, &text)?;
        let keys = document.typed(&Key::default(), value)?;
        let head = head(&document, &keys)?;
        if head.firn != VERSION {
            let allowed = format!("{VERSION}, the version of the format that this firn reads");
            let error = ValueError::new(head.firn, allowed);
            return Err(document.report(&Problem::new("firn".into(), error)).into());
        }
        let mut file = Self {
            path: path.to_owned(),
            text: text.clone(),
            keys,
            name: head.name,
            vlans: Vec::new(),
            needs: Vec::new(),
        };
        file.vlans = file.outline(1)?.vlans;
        Ok(file)
    }

    /// The machine's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Renames the machine.
    ///
    /// # Errors
    /// If it is not a valid machine name.
    pub fn rename(&mut self, name: &str) -> Result<(), ConfigError> {
        self.name = name.try_into().map_err(|error| self.bad("name", error))?;
        Ok(())
    }

    /// Adds the parts that a test's script needs, unless the file sets them.
    pub fn supply(&mut self, needs: Needs) {
        self.needs.push(needs);
    }

    /// The command of the shell that starts it, if there is one.
    #[must_use]
    pub fn command(&self) -> Option<String> {
        self.outline(1).ok()?.start_command
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The vlans that it is on.
    #[must_use]
    pub fn vlans(&self) -> &[Number] {
        &self.vlans
    }

    /// The machine before its start is known: unset variables stay as they are written.
    ///
    /// # Errors
    /// If the values of variables are invalid.
    pub fn outline(&self, number: u8) -> Result<NodeConfig, ConfigError> {
        self.node_by(number, &Variables::of_environment().lenient(), Path::new(""), false)
    }

    /// The machine by this process's environment, with placeholders for directories that do not exist yet.
    pub(super) fn here(&self) -> Option<NodeConfig> {
        let none = "/nonexistent";
        let own = Variables::of_environment().with("TMPDIR", none).with("SHARED_DIR", none);
        self.node_by(1, &own.lenient(), Path::new(""), false).ok()
    }

    /// The machine as far as it is known before its start: its command line may be incomplete, and unset variables stay
    /// as they are written. `number` is used if the file has none.
    ///
    /// # Errors
    /// If the values of variables are invalid.
    pub fn preview(
        &self,
        number: u8,
        variables: &Variables,
        base: &Path,
    ) -> Result<NodeConfig, ConfigError> {
        self.node_by(number, &variables.clone().lenient(), base, false)
    }

    /// The machine to start now: variables are expanded, and relative paths start at `base`.
    ///
    /// # Errors
    /// If a variable is not set, or the file with the command line cannot be read.
    pub fn node(
        &self,
        number: u8,
        variables: &Variables,
        base: &Path,
    ) -> Result<NodeConfig, ConfigError> {
        self.node_by(number, variables, base, true)
    }

    fn node_by(
        &self,
        number: u8,
        variables: &Variables,
        base: &Path,
        whole: bool,
    ) -> Result<NodeConfig, ConfigError> {
        let document = Document::of_json(&self.path, &self.text);
        let at = Key::default();
        let mut value = Value::Object(self.keys.clone());
        variables
            .expand_all(&mut value, &at)
            .map_err(|(key, error)| document.report(&Problem::new(key, error)))?;
        let Value::Object(mut keys) = value else { unreachable!("it stays an object") };
        let head = head(&document, &keys)?;
        keys.retain(|key, _| !Head::KEYS.contains(&&**key));
        let Value::Object(defaults) = defaults() else { unreachable!("it is an object") };
        for (key, value) in defaults {
            keys.entry(key).or_insert(value);
        }
        let mut node: NodeConfig = document.typed(&at, Value::Object(keys))?;
        node.check(&at).map_err(|problem| document.report(&problem))?;
        if self.keys.contains_key("kit") {
            return Err(self.bad("kit", "a machine file is whole: nothing comes from a kit"));
        }
        if node.kernel.is_none() && node.start_command.is_none() {
            return Err(self.bad("kernel", "missing; allowed: the path of a kernel image"));
        }
        // Options of QEMU that lack the value of a variable are not looked at.
        if let Err((key, error)) = node.apply_qemu_options()
            && whole
        {
            return Err(self.bad(key, error));
        }
        self.needs.iter().for_each(|needs| node.supply(*needs));
        node.name = self.name.to_string();
        node.number = head.number.map_or(number, Number::get);
        node.rebase(base);
        if let Some(file) = head.cmdline_file.filter(|_| whole) {
            let params = read(&base.join(file))?;
            let cmdline = node.cmdline.unwrap_or_default();
            node.cmdline = Some(format!("{} {cmdline}", params.trim()));
        }
        node.cmdline = node.cmdline.map(|cmdline| cmdline.trim().to_owned());
        Ok(node)
    }

    fn bad(&self, key: &str, message: impl std::fmt::Display) -> ConfigError {
        let document = Document::of_json(&self.path, &self.text);
        document.report(&Problem::new(key.into(), message)).into()
    }
}

fn head(document: &Document<'_>, keys: &Map<String, Value>) -> Result<Head, ConfigError> {
    let own = keys.iter().filter(|(key, _)| Head::KEYS.contains(&key.as_str()));
    let own = own.map(|(key, value)| (key.clone(), value.clone())).collect();
    Ok(document.typed(&Key::default(), Value::Object(own))?)
}

/// Whether the first line names firn as the interpreter.
fn is_ours(text: &str) -> bool {
    let first = text.lines().next().unwrap_or_default();
    first.starts_with("#!")
        && first
            .split(|c: char| c.is_whitespace() || c == '/' || c == '!')
            .any(|word| word == "firn")
}

/// What a text is that is not a machine file.
fn describe(text: &str) -> &'static str {
    if text.trim().is_empty() {
        "empty"
    } else if text.trim_start().starts_with('{') {
        "JSON without the first line `#!… firn run`"
    } else {
        "some text"
    }
}

#[cfg(test)]
mod tests;
