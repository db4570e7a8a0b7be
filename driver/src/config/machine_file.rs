//! A machine file: an executable that is one machine.
//!
//! Its first line is `#!` with firn's path and `run`, so that running it boots the machine on the terminal. The rest
//! is the machine in JSON. Tools generate such files, so everything is explicit and nothing comes from a kit:
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
//!   "nets": [{ "vlan": 1, "mac": "52:54:00:12:01:01" }],
//!   "user_network": { "forward_ports": [{ "host": { "port": 8080 }, "guest": { "port": 80 } }] }
//! }
//! ```
//!
//! nix/machine-spec.nix writes such files for NixOS; what it writes is read here in a test.
//!
//! Paths and the command line may have variables in them ([`Variables`]), which are looked up at each start of the
//! machine. Under a driver TMPDIR is the machine's state directory, SHARED_DIR the directory that all machines share,
//! and relative paths start at the state directory; by hand they start where the file is run.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use firn_vmm::spec::{
    CachePolicy, DiskCreateSpec, DiskFormat, MAX_CORES, MIN_MEMORY_MIB, VsockSpec,
};
use firn_vmm::virtio::vsock::MIN_CID;
use serde::Deserialize;

use crate::kit::KitName;

use super::expand::Variables;
use super::network::{RawForward, SenselessForward, UserNetwork};
use super::qemu;
use super::report::{ConfigError, Report};
use super::{
    DiskConfig, DiskImage, MAX_DISK_MIB, MAX_LABEL, MAX_MEMORY_MIB, MAX_NAME, MAX_NUMBER,
    MAX_SERIAL, MAX_TAG, NodeConfig, ShareConfig, is_name, is_tag, variable_name,
};

/// The format's version, the value of the key `firn`.
pub const VERSION: u32 = 1;
/// A longer file is none.
const MAX_FILE: u64 = 4 << 20;
/// `NAME_MAX` of Linux.
const MAX_FILE_NAME: usize = 255;
/// Memory of a machine that does not say how much, in MiB: as NixOS has it.
const DEFAULT_MEMORY_MIB: u64 = 1024;

/// A machine file that was read and makes sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineFile {
    path: PathBuf,
    raw: RawMachine,
    cores: u8,
    vlans: Vec<u8>,
    macs: BTreeMap<u8, [u8; 6]>,
    user_network: Option<UserNetwork>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMachine {
    firn: u32,
    name: String,
    number: Option<u8>,
    #[serde(default = "one")]
    cores: u64,
    #[serde(default = "default_memory")]
    memory: u64,
    kernel: String,
    #[serde(default)]
    initrd: Vec<String>,
    #[serde(default)]
    cmdline: String,
    /// What it contains comes before `cmdline`.
    cmdline_file: Option<String>,
    /// Options of QEMU that change the machine; for QEMU_OPTS.
    #[serde(default)]
    qemu_opts: String,
    #[serde(default)]
    shares: Vec<RawShare>,
    #[serde(default)]
    disks: Vec<RawDisk>,
    #[serde(default)]
    nets: Vec<RawNet>,
    user_network: Option<RawUserNetwork>,
    vsock: Option<RawVsock>,
    #[serde(default = "yes")]
    rng: bool,
    #[serde(default)]
    balloon: bool,
    /// Files, by the names of the credentials that they are for systemd in the guest.
    #[serde(default)]
    credentials: BTreeMap<String, String>,
    #[serde(default)]
    oem_strings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawShare {
    tag: String,
    source: String,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    cache: CachePolicy,
    /// Files that are copied into the source at each start, by their names there; what is empty or no file is left out.
    #[serde(default)]
    copies: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    /// Without one it is an empty disk in TMPDIR.
    image: Option<String>,
    /// In MiB; the image is made with this size if it is not there.
    size: Option<u64>,
    /// Makes it with an ext4 file system of this label.
    label: Option<String>,
    serial: Option<String>,
    format: Option<DiskFormat>,
    #[serde(default)]
    read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNet {
    vlan: u8,
    mac: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUserNetwork {
    #[serde(default)]
    restrict: bool,
    #[serde(default)]
    forward_ports: Vec<RawForward>,
    /// Options of QEMU's user network that change it; for QEMU_NET_OPTS.
    #[serde(default)]
    qemu_net_opts: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVsock {
    cid: u32,
    socket: String,
}

const fn one() -> u64 {
    1
}

const fn default_memory() -> u64 {
    DEFAULT_MEMORY_MIB
}

const fn yes() -> bool {
    true
}

impl MachineFile {
    /// Reads a machine file.
    ///
    /// # Errors
    /// If it cannot be read, is something else, or makes no sense.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let io = |source| ConfigError::Read { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        fs::File::open(path)
            .and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes))
            .map_err(io)?;
        let other = |what| ConfigError::NotMachineFile { path: path.to_owned(), what };
        match std::str::from_utf8(&bytes) {
            Ok(text) if is_ours(text) => Self::parse(text, path),
            Ok(text) => Err(other(describe(text))),
            Err(_) if bytes.starts_with(b"\x7fELF") => Err(other("a program (ELF)")),
            Err(_) => Err(other("no text")),
        }
    }

    /// Reads a machine file's text; the first line may be missing.
    ///
    /// # Errors
    /// If it makes no sense.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        // The line stays, blank, so that positions in messages are those in the file.
        let body = match text.starts_with("#!") {
            true => {
                let end = text.find('\n').unwrap_or(text.len());
                " ".repeat(end) + &text[end..]
            }
            false => text.to_owned(),
        };
        let raw: RawMachine = serde_json::from_str(&body).map_err(|error| {
            let at = position(text, error.line(), error.column());
            let message = error.to_string();
            let message = message.rsplit_once(" at line ").map_or(&*message, |(text, _)| text);
            Report::new(path, text, at.saturating_sub(1)..at, message)
        })?;
        Checker { path }.machine(raw)
    }

    /// The machine's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.raw.name
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// If it cannot be a machine's name.
    pub fn rename(&mut self, name: &str) -> Result<(), ConfigError> {
        Checker { path: &self.path }.name("name", name)?;
        name.clone_into(&mut self.raw.name);
        Ok(())
    }

    /// Where it was read from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The vlans that it is on.
    #[must_use]
    pub fn vlans(&self) -> &[u8] {
        &self.vlans
    }

    /// The machine with its strings as they are written; `number` is its number if it does not say one.
    #[must_use]
    pub fn outline(&self, number: u8) -> NodeConfig {
        let as_written = |_: &str, text: &str| Ok::<_, Infallible>(text.to_owned());
        let Ok(node) = self.node_by(number, "", as_written);
        node
    }

    /// The machine by this process's environment, with the directories that are yet to be made in one that is never
    /// there; nothing if that cannot be expanded.
    pub(super) fn here(&self) -> Option<NodeConfig> {
        let none = "/nonexistent";
        let own = Variables::of_environment().with("TMPDIR", none).with("SHARED_DIR", none);
        self.node(1, &own, Path::new("")).ok()
    }

    /// The machine as it shall be started now: variables are replaced, and relative paths start at `base`.
    ///
    /// # Errors
    /// If a variable is not set, or the file with the command line cannot be read.
    pub fn node(
        &self,
        number: u8,
        variables: &Variables,
        base: &Path,
    ) -> Result<NodeConfig, ConfigError> {
        let expand = |key: &str, text: &str| self.expand(variables, key, text);
        let params = match &self.raw.cmdline_file {
            None => String::new(),
            Some(file) => {
                let file = base.join(expand("cmdline_file", file)?);
                fs::read_to_string(&file)
                    .map_err(|source| ConfigError::Read { path: file, source })?
            }
        };
        let mut node = self.node_by(number, params.trim(), expand)?;
        let places = node.kernel.iter_mut().chain(node.initrd.iter_mut().flatten());
        let sources = node.shares.iter_mut().flat_map(|share| {
            let copies = share.copies.values_mut().filter(|path| !path.as_os_str().is_empty());
            std::iter::once(&mut share.source).chain(copies)
        });
        let images = node.disks.iter_mut().filter_map(|disk| match disk {
            DiskConfig::Image(image) => Some(&mut image.path),
            DiskConfig::Empty(_) => None,
        });
        let sockets = node.vsock.iter_mut().map(|vsock| &mut vsock.socket);
        let credentials = node.credentials.values_mut();
        for path in places.chain(sources).chain(images).chain(sockets).chain(credentials) {
            *path = base.join(&*path);
        }
        let opts = expand("qemu_opts", &self.raw.qemu_opts)?;
        let overrides = qemu::options(&opts).map_err(|error| self.key_error("qemu_opts", error))?;
        let checker = Checker { path: &self.path };
        if let Some(memory) = overrides.memory_mib {
            checker.memory("qemu_opts: -m", memory)?;
            node.memory_mib = memory;
        }
        if let Some(cores) = overrides.cores {
            node.cores = checker.cores("qemu_opts: -smp", cores)?;
        }
        node.user_network = self.user_network(variables)?;
        Ok(node)
    }

    /// The user network as it shall be started now.
    ///
    /// # Errors
    /// If a variable is not set, or asks for what there is not.
    pub fn user_network(&self, variables: &Variables) -> Result<Option<UserNetwork>, ConfigError> {
        let key = "user_network.qemu_net_opts";
        let (Some(raw), Some(mut network)) = (&self.raw.user_network, self.user_network.clone())
        else {
            return Ok(None);
        };
        let opts = self.expand(variables, key, &raw.qemu_net_opts)?;
        let options = qemu::net_options(&opts).map_err(|error| self.key_error(key, error))?;
        network.restrict = options.restrict.unwrap_or(network.restrict);
        network.forwards.extend(options.forwards);
        Ok(Some(network))
    }

    fn expand(&self, variables: &Variables, key: &str, text: &str) -> Result<String, ConfigError> {
        variables.expand(text).map_err(|error| self.key_error(key, error))
    }

    fn key_error(&self, key: &str, error: impl std::fmt::Display) -> ConfigError {
        ConfigError::Key { path: self.path.clone(), message: format!("`{key}`: {error}") }
    }

    fn node_by<E>(
        &self,
        number: u8,
        params: &str,
        expand: impl Fn(&str, &str) -> Result<String, E>,
    ) -> Result<NodeConfig, E> {
        let raw = &self.raw;
        let cmdline = expand("cmdline", &raw.cmdline)?;
        let disks = raw.disks.iter().enumerate().map(|(at, disk)| {
            let image = disk.image.clone().unwrap_or_else(|| format!("${{TMPDIR}}/empty{at}.img"));
            let path = PathBuf::from(expand(&format!("disks[{at}].image"), &image)?);
            let create = disk
                .size
                .map(|size_mib| DiskCreateSpec { size_mib, ext4_label: disk.label.clone() });
            Ok(DiskConfig::Image(DiskImage {
                format: disk.format.unwrap_or_else(|| format_by_name(&path)),
                path,
                read_only: disk.read_only,
                serial: disk.serial.clone(),
                create,
            }))
        });
        let shares = raw.shares.iter().map(|share| {
            let key = format!("shares[{}].source", share.tag);
            let copies = share.copies.iter().map(|(name, file)| {
                let key = format!("shares[{}].copies.{name}", share.tag);
                Ok((name.clone(), expand(&key, file)?.into()))
            });
            Ok(ShareConfig {
                tag: share.tag.clone(),
                source: expand(&key, &share.source)?.into(),
                target: None,
                read_only: share.read_only,
                cache: share.cache,
                copies: copies.collect::<Result<_, _>>()?,
            })
        });
        let vsock = raw.vsock.as_ref().map(|vsock| {
            let socket = expand("vsock.socket", &vsock.socket)?.into();
            Ok(VsockSpec { cid: vsock.cid, socket })
        });
        let initrd = raw.initrd.iter().map(|path| Ok(expand("initrd", path)?.into()));
        let credentials = raw.credentials.iter().map(|(name, file)| {
            Ok((name.clone(), expand(&format!("credentials.{name}"), file)?.into()))
        });
        Ok(NodeConfig {
            name: raw.name.clone(),
            number: raw.number.unwrap_or(number),
            // It is whole: nothing comes from a kit.
            kit: KitName::Micro,
            kernel: Some(expand("kernel", &raw.kernel)?.into()),
            initrd: Some(initrd.collect::<Result<_, E>>()?),
            cmdline: Some(format!("{params} {cmdline}").trim().to_owned()),
            memory_mib: raw.memory,
            cores: self.cores,
            user_network: self.user_network.clone(),
            vlans: self.vlans.clone(),
            macs: self.macs.clone(),
            disks: disks.collect::<Result<_, E>>()?,
            shares: shares.collect::<Result<_, E>>()?,
            exchange: false,
            rng: raw.rng,
            balloon: raw.balloon,
            vsock: vsock.transpose()?,
            credentials: credentials.collect::<Result<_, _>>()?,
            oem_strings: raw.oem_strings.clone(),
        })
    }
}

/// The format of an image by its name only: the guest decides what is in the file.
pub(super) fn format_by_name(path: &Path) -> DiskFormat {
    let qcow2 = path.extension().is_some_and(|extension| extension == "qcow2");
    if qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw }
}

/// Whether a file can have this name.
fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= MAX_FILE_NAME && !name.contains(['/', '\0'])
}

/// Whether systemd takes it for a credential's name, and it ends before the `=` behind it.
fn is_credential(name: &str) -> bool {
    let fits = |c: char| (c == ' ' || c.is_ascii_graphic()) && !matches!(c, ':' | '=');
    is_file_name(name) && name.chars().all(fits)
}

/// Whether the first line names firn as the interpreter.
fn is_ours(text: &str) -> bool {
    let first = text.lines().next().unwrap_or_default();
    first.starts_with("#!")
        && first
            .split(|c: char| c.is_whitespace() || c == '/' || c == '!')
            .any(|word| word == "firn")
}

/// What a text is that is no machine file.
fn describe(text: &str) -> &'static str {
    let script = text.starts_with("#!");
    if script && text.contains("qemu") {
        "a start script for QEMU, whose machines are not there yet"
    } else if script {
        "a script that is not firn's"
    } else if text.trim().is_empty() {
        "empty"
    } else if text.trim_start().starts_with('{') {
        "JSON without the first line `#!… firn run`"
    } else {
        "some text"
    }
}

/// The byte of a line and column, both from 1.
fn position(text: &str, line: usize, column: usize) -> usize {
    let before: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    let mut at = (before + column).min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Checks what types cannot say.
struct Checker<'a> {
    path: &'a Path,
}

type Checked<T = ()> = Result<T, ConfigError>;

impl Checker<'_> {
    fn bad<T>(
        &self,
        key: &str,
        is: impl std::fmt::Display,
        allowed: impl std::fmt::Display,
    ) -> Checked<T> {
        let message = format!("`{key}` is {is}; allowed: {allowed}");
        Err(ConfigError::Key { path: self.path.to_owned(), message })
    }

    fn machine(&self, raw: RawMachine) -> Checked<MachineFile> {
        if raw.firn != VERSION {
            let allowed = format!("{VERSION}, the version of the format that this firn reads");
            return self.bad("firn", raw.firn, allowed);
        }
        self.name("name", &raw.name)?;
        if raw.number.is_some_and(|number| !(1..=MAX_NUMBER).contains(&number)) {
            return self.bad(
                "number",
                raw.number.unwrap_or_default(),
                format!("1 to {MAX_NUMBER}"),
            );
        }
        self.memory("memory", raw.memory)?;
        let cores = self.cores("cores", raw.cores)?;
        for (at, share) in raw.shares.iter().enumerate() {
            let key = format!("shares[{at}].tag");
            if !is_tag(&share.tag) {
                let allowed = format!("1 to {MAX_TAG} of A-Z a-z 0-9 `.` `_` `-`");
                return self.bad(&key, format_args!("{:?}", share.tag), allowed);
            }
            if raw.shares[..at].iter().any(|other| other.tag == share.tag) {
                return self.bad(
                    &key,
                    format_args!("{:?}", share.tag),
                    "a tag of its own for each share",
                );
            }
            if let Some(name) = share.copies.keys().find(|name| !is_file_name(name)) {
                let key = format!("shares[{at}].copies");
                return self.bad(&key, format_args!("{name:?}"), "names of files, without `/`");
            }
        }
        for (at, disk) in raw.disks.iter().enumerate() {
            self.disk(at, disk)?;
        }
        if let Some(vsock) = &raw.vsock {
            // The highest is VMADDR_CID_ANY (`man 7 vsock`).
            self.within(
                "vsock.cid",
                vsock.cid.into(),
                MIN_CID.into(),
                u64::from(u32::MAX) - 1,
                "",
            )?;
        }
        if let Some(name) = raw.credentials.keys().find(|name| !is_credential(name)) {
            let allowed = "names of credentials: ASCII without `/`, `:` and `=`";
            return self.bad("credentials", format_args!("{name:?}"), allowed);
        }
        let mut vlans = Vec::new();
        let mut macs = BTreeMap::new();
        for (at, net) in raw.nets.iter().enumerate() {
            let key = format!("nets[{at}].vlan");
            if !(1..=MAX_NUMBER).contains(&net.vlan) {
                return self.bad(&key, net.vlan, format!("1 to {MAX_NUMBER}"));
            }
            if vlans.contains(&net.vlan) {
                return self.bad(&key, net.vlan, "one card on each vlan");
            }
            vlans.push(net.vlan);
            if let Some(mac) = &net.mac {
                macs.insert(net.vlan, self.mac(&format!("nets[{at}].mac"), mac)?);
            }
        }
        let user_network =
            raw.user_network.as_ref().map(|net| self.user_network(net)).transpose()?;
        Ok(MachineFile { path: self.path.to_owned(), raw, cores, vlans, macs, user_network })
    }

    fn user_network(&self, raw: &RawUserNetwork) -> Checked<UserNetwork> {
        let forward = |(at, forward): (usize, &RawForward)| {
            forward.forward().map_err(|SenselessForward { key, problem }| {
                let message =
                    format!("`user_network.forward_ports[{at}].{key}` makes no sense: {problem}");
                ConfigError::Key { path: self.path.to_owned(), message }
            })
        };
        let forwards = raw.forward_ports.iter().enumerate().map(forward);
        Ok(UserNetwork { restrict: raw.restrict, forwards: forwards.collect::<Result<_, _>>()? })
    }

    fn name(&self, key: &str, name: &str) -> Checked {
        if is_name(name) && !variable_name(name).is_empty() {
            return Ok(());
        }
        let allowed = format!("1 to {MAX_NAME} of A-Z a-z 0-9 `-` `_`, not beginning with `-`");
        self.bad(key, format_args!("{name:?}"), allowed)
    }

    fn memory(&self, key: &str, mib: u64) -> Checked {
        self.within(key, mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB, "MiB")
    }

    fn cores(&self, key: &str, cores: u64) -> Checked<u8> {
        self.within(key, cores, 1, MAX_CORES.into(), "processors")?;
        // Just checked.
        Ok(u8::try_from(cores).unwrap_or(MAX_CORES))
    }

    fn within(&self, key: &str, value: u64, low: u64, high: u64, unit: &str) -> Checked {
        match (low..=high).contains(&value) {
            true => Ok(()),
            false => self.bad(key, value, format!("{low} to {high} {unit}").trim_end()),
        }
    }

    fn disk(&self, at: usize, disk: &RawDisk) -> Checked {
        if let Some(size) = disk.size {
            self.within(&format!("disks[{at}].size"), size, 1, MAX_DISK_MIB, "MiB")?;
        } else if disk.image.is_none() {
            return self.bad(
                &format!("disks[{at}]"),
                "neither an image nor empty",
                "`image`, `size`, or both",
            );
        } else if disk.label.is_some() {
            let allowed = "a label for a disk that is to be made: give its `size` in MiB";
            return self.bad(&format!("disks[{at}].label"), "of no use", allowed);
        }
        for (key, text, max) in
            [("serial", &disk.serial, MAX_SERIAL), ("label", &disk.label, MAX_LABEL)]
        {
            let fits =
                |text: &String| text.len() <= max && text.chars().all(|c| c.is_ascii_graphic());
            if let Some(text) = text.as_ref().filter(|text| !fits(text)) {
                let allowed = format!("at most {max} ASCII characters, no blanks");
                return self.bad(&format!("disks[{at}].{key}"), format_args!("{text:?}"), allowed);
            }
        }
        Ok(())
    }

    fn mac(&self, key: &str, text: &str) -> Checked<[u8; 6]> {
        let parts: Vec<&str> = text.split(':').collect();
        let byte = |part: &&str| match part.len() {
            2 => u8::from_str_radix(part, 16).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = parts.iter().map(byte).collect();
        match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            // The lowest bit of the first byte marks a group's address (IEEE 802).
            Some(mac) if mac[0] & 1 == 0 => Ok(mac),
            _ => self.bad(key, format_args!("{text:?}"), "an address such as 52:54:00:12:01:01"),
        }
    }
}

#[cfg(test)]
mod tests;
