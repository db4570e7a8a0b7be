//! Reads a test from a TOML file.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn_net_switch::gateway::Forward;
use firn_vmm::spec::{
    CachePolicy, DiskCreateSpec, DiskFormat, MAX_CORES, MIN_MEMORY_MIB, VsockSpec,
};
use firn_vmm::virtio::vsock::MIN_CID;
use serde::Deserialize;
use toml::Spanned;

use crate::kit::{KitName, STORE_TAG};

use super::machine_file::format_by_name;
use super::network::{RawForward, SenselessForward, UserNetwork};
use super::report::{ConfigError, Report};
use super::{
    DiskConfig, DiskImage, EXCHANGE_TAG, MAX_DISK_MIB, MAX_LABEL, MAX_MEMORY_MIB, MAX_NAME,
    MAX_NUMBER, MAX_SERIAL, MAX_TAG, NodeConfig, SHARED_TAG, Script, ShareConfig, TestConfig,
    is_name, is_tag, variable_name,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTest {
    name: Option<Spanned<String>>,
    test_script: Option<Spanned<String>>,
    test_script_file: Option<Spanned<PathBuf>>,
    global_timeout: Option<Spanned<f64>>,
    #[serde(default)]
    nodes: BTreeMap<Spanned<String>, RawNode>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    kit: Option<Spanned<String>>,
    kernel: Option<Spanned<PathBuf>>,
    initrd: Option<Spanned<PathBuf>>,
    cmdline: Option<String>,
    memory_size: Option<Spanned<u64>>,
    cores: Option<Spanned<u64>>,
    user_network: Option<Spanned<bool>>,
    restrict_network: Option<Spanned<bool>>,
    forward_ports: Option<Vec<Spanned<RawForward>>>,
    vlans: Option<Vec<Spanned<i64>>>,
    #[serde(default)]
    disks: Vec<RawDisk>,
    #[serde(default)]
    empty_disks: Vec<Spanned<u64>>,
    #[serde(default)]
    shared_directories: BTreeMap<Spanned<String>, RawShare>,
    #[serde(default)]
    balloon: bool,
    #[serde(default)]
    oem_strings: Vec<String>,
    vsock: Option<RawVsock>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVsock {
    cid: Spanned<u64>,
    socket: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawShare {
    source: Spanned<PathBuf>,
    target: Spanned<PathBuf>,
    #[serde(default)]
    read_only: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    path: Spanned<PathBuf>,
    format: Option<DiskFormat>,
    #[serde(default)]
    read_only: bool,
    serial: Option<Spanned<String>>,
    create_size: Option<Spanned<u64>>,
    ext4_label: Option<Spanned<String>>,
}

impl TestConfig {
    /// Reads a test from a TOML file. Relative paths in it start at the file's directory.
    ///
    /// # Errors
    /// If the file, or a file or directory it names, cannot be read, or if it makes no sense.
    pub fn from_toml_file(path: &Path) -> Result<Self, ConfigError> {
        let text = read(path)?;
        Self::from_toml(&text, path)
    }

    /// Reads a test from the text of a TOML file at `path`.
    ///
    /// # Errors
    /// As [`Self::from_toml_file`].
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: RawTest = toml::from_str(text)
            .map_err(|e| Report::new(path, text, e.span().unwrap_or(0..0), e.message()))?;
        Reader { path, text }.test(raw)
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// The file being read, for messages and for relative paths.
struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn bad(&self, span: Range<usize>, message: impl Into<String>) -> Report {
        Report::new(self.path, self.text, span, message)
    }

    fn test(&self, raw: RawTest) -> Result<TestConfig, ConfigError> {
        let script = self.script(raw.test_script, raw.test_script_file)?;
        let global_timeout = raw.global_timeout.map(|t| self.timeout(&t)).transpose()?;
        if raw.nodes.is_empty() {
            return Err(self
                .bad(0..0, "a test needs a machine")
                .help("add a table `[nodes.machine]`; it may be empty")
                .into());
        }
        let mut nodes: Vec<NodeConfig> = Vec::with_capacity(raw.nodes.len());
        // Sorted by name: a BTreeMap.
        for (at, (name, node)) in (1u32..).zip(raw.nodes) {
            let number = u8::try_from(at).ok().filter(|n| *n <= MAX_NUMBER);
            let Some(number) = number else {
                let message = format!("a test can have {MAX_NUMBER} machines, this is one more");
                return Err(self.bad(name.span(), message).into());
            };
            self.name(&name, &nodes)?;
            nodes.push(self.node(name.into_inner(), number, node)?);
        }
        let name = match raw.name {
            Some(name) => name.into_inner(),
            None => self
                .path
                .file_stem()
                .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned()),
        };
        Ok(TestConfig {
            name,
            script,
            global_timeout,
            nodes,
            files: Vec::new(),
            more_vlans: Vec::new(),
            vsock_offset: None,
        })
    }

    fn script(
        &self,
        inline: Option<Spanned<String>>,
        file: Option<Spanned<PathBuf>>,
    ) -> Result<Script, ConfigError> {
        match (inline, file) {
            (Some(inline), None) => Ok(Script {
                line: self.first_line(inline.span()),
                file: self.path.to_owned(),
                text: inline.into_inner(),
            }),
            (None, Some(file)) => {
                let span = file.span();
                let file = self.file("test_script_file", "script", file)?;
                let text = fs::read_to_string(&file)
                    .map_err(|e| self.bad(span, format!("`test_script_file` cannot be read: {}: {e}", file.display())))?;
                Ok(Script { text, file, line: 1 })
            }
            (Some(_), Some(file)) => Err(self
                .bad(file.span(), "`test_script` and `test_script_file` are both given")
                .help("keep one of them")
                .into()),
            (None, None) => Err(self
                .bad(0..0, "missing key `test_script`")
                .help("give the script as `test_script = '''…'''`, or its path as `test_script_file = \"…\"`")
                .into()),
        }
    }

    /// The line on which a string's text begins. TOML drops a line end right behind the quotes.
    fn first_line(&self, span: Range<usize>) -> usize {
        let before = self.text.get(..span.start).unwrap_or_default();
        let literal = self.text.get(span).unwrap_or_default();
        let body = ["'''", "\"\"\""].iter().find_map(|quotes| literal.strip_prefix(quotes));
        let skipped = body.is_some_and(|body| body.starts_with('\n') || body.starts_with("\r\n"));
        before.matches('\n').count() + 1 + usize::from(skipped)
    }

    fn timeout(&self, seconds: &Spanned<f64>) -> Result<Duration, Report> {
        Some(*seconds.get_ref())
            .filter(|s| *s > 0.0)
            .and_then(|s| Duration::try_from_secs_f64(s).ok())
            .ok_or_else(|| {
                self.bad(seconds.span(), format!("`global_timeout` is {}", seconds.get_ref()))
                    .help("allowed: a number of seconds above 0")
            })
    }

    fn name(&self, name: &Spanned<String>, others: &[NodeConfig]) -> Result<(), Report> {
        let text = name.get_ref();
        if !is_name(text) {
            return Err(self.bad(name.span(), format!("`{text}` cannot be a machine's name")).help(format!(
                "allowed: 1 to {MAX_NAME} of A-Z a-z 0-9 `-` `_`, not beginning with `-`: it becomes the host name"
            )));
        }
        let variable = variable_name(text);
        match others.iter().find(|other| other.variable() == variable) {
            None => Ok(()),
            Some(other) => {
                let message = format!(
                    "machines `{}` and `{text}` would both be `{variable}` in the script",
                    other.name
                );
                Err(self.bad(name.span(), message))
            }
        }
    }

    fn node(&self, name: String, number: u8, raw: RawNode) -> Result<NodeConfig, Report> {
        let kit = raw.kit.map_or(Ok(KitName::Micro), |name| self.kit(&name))?;
        let memory_mib = match raw.memory_size {
            Some(size) => {
                self.within("memory_size", &size, MIN_MEMORY_MIB..=MAX_MEMORY_MIB, "MiB")?
            }
            None => kit.default_memory_mib(),
        };
        let cores = match raw.cores {
            Some(cores) => self.within("cores", &cores, 1..=u64::from(MAX_CORES), "processors")?,
            None => 1,
        };
        Ok(NodeConfig {
            name,
            number,
            kit,
            kernel: raw.kernel.map(|p| self.file("kernel", "kernel image", p)).transpose()?,
            initrd: raw
                .initrd
                .map(|p| Ok::<_, Report>(vec![self.file("initrd", "cpio archive", p)?]))
                .transpose()?,
            cmdline: raw.cmdline,
            memory_mib,
            // `within` has checked the range.
            cores: u8::try_from(cores).unwrap_or(MAX_CORES),
            user_network: self.user_network(
                raw.user_network.is_none_or(Spanned::into_inner),
                raw.restrict_network,
                raw.forward_ports,
            )?,
            vlans: match raw.vlans {
                Some(vlans) => self.vlans(vlans)?,
                None => vec![1],
            },
            macs: BTreeMap::new(),
            disks: self.disks(raw.disks, raw.empty_disks)?,
            shares: self.shares(raw.shared_directories)?,
            exchange: true,
            rng: true,
            balloon: raw.balloon,
            vsock: raw.vsock.map(|vsock| self.vsock(&vsock)).transpose()?,
            credentials: BTreeMap::new(),
            oem_strings: raw.oem_strings,
        })
    }

    fn within(
        &self,
        key: &str,
        value: &Spanned<u64>,
        range: std::ops::RangeInclusive<u64>,
        unit: &str,
    ) -> Result<u64, Report> {
        let number = *value.get_ref();
        if range.contains(&number) {
            return Ok(number);
        }
        let (low, high) = range.into_inner();
        Err(self
            .bad(value.span(), format!("`{key}` is {number}"))
            .help(format!("allowed: {low} to {high} {unit}")))
    }

    fn user_network(
        &self,
        wanted: bool,
        restrict: Option<Spanned<bool>>,
        forwards: Option<Vec<Spanned<RawForward>>>,
    ) -> Result<Option<UserNetwork>, Report> {
        if wanted {
            let forwards = forwards.unwrap_or_default();
            return Ok(Some(UserNetwork {
                restrict: restrict.is_some_and(Spanned::into_inner),
                forwards: forwards.iter().map(|raw| self.forward(raw)).collect::<Result<_, _>>()?,
            }));
        }
        let forward = forwards.iter().flatten().next();
        let useless = restrict
            .map(|restrict| ("restrict_network", restrict.span()))
            .or(forward.map(|forward| ("forward_ports", forward.span())));
        match useless {
            None => Ok(None),
            Some((key, span)) => Err(self
                .bad(span, format!("`{key}` is for the user network"))
                .help("leave out `user_network = false`")),
        }
    }

    fn forward(&self, raw: &Spanned<RawForward>) -> Result<Forward, Report> {
        raw.get_ref().forward().map_err(|SenselessForward { key, problem }| {
            let message = format!("`{key}` of a forwarded port makes no sense");
            self.bad(raw.span(), message).help(problem)
        })
    }

    fn vlans(&self, raw: Vec<Spanned<i64>>) -> Result<Vec<u8>, Report> {
        let mut vlans = Vec::with_capacity(raw.len());
        for vlan in raw {
            let number = *vlan.get_ref();
            let fits = u8::try_from(number).ok().filter(|n| (1..=MAX_NUMBER).contains(n));
            let Some(fits) = fits else {
                return Err(self.bad(vlan.span(), format!("`vlans` has {number}")).help(format!(
                    "allowed: 1 to {MAX_NUMBER}: it is a byte of the machines' addresses"
                )));
            };
            if vlans.contains(&fits) {
                return Err(self.bad(vlan.span(), format!("`vlans` has {number} twice")));
            }
            vlans.push(fits);
        }
        Ok(vlans)
    }

    fn disks(
        &self,
        disks: Vec<RawDisk>,
        empty: Vec<Spanned<u64>>,
    ) -> Result<Vec<DiskConfig>, Report> {
        let images = disks.into_iter().map(|disk| self.disk(disk).map(DiskConfig::Image));
        let empty = empty.into_iter().map(|size| {
            self.within("empty_disks", &size, 1..=MAX_DISK_MIB, "MiB").map(DiskConfig::Empty)
        });
        images.chain(empty).collect()
    }

    fn disk(&self, raw: RawDisk) -> Result<DiskImage, Report> {
        let (at, path) = (raw.path.span(), self.resolve(raw.path.get_ref()));
        if let Some(serial) = &raw.serial {
            self.short("serial", serial, MAX_SERIAL)?;
        }
        if let Some(label) = &raw.ext4_label {
            self.short("ext4_label", label, MAX_LABEL)?;
        }
        let create = match (raw.create_size, raw.ext4_label) {
            (Some(size), label) => Some(DiskCreateSpec {
                size_mib: self.within("create_size", &size, 1..=MAX_DISK_MIB, "MiB")?,
                ext4_label: label.map(Spanned::into_inner),
            }),
            (None, Some(label)) => {
                return Err(self
                    .bad(label.span(), "`ext4_label` is for a disk that is to be made")
                    .help("give its size in MiB as `create_size`"));
            }
            (None, None) => None,
        };
        let format = raw.format.unwrap_or_else(|| format_by_name(&path));
        let path = match (&create, fs::metadata(&path)) {
            (Some(_), Err(error)) if error.kind() == ErrorKind::NotFound => path,
            _ => self.file("path", "disk image", Spanned::new(at, path))?,
        };
        let serial = raw.serial.map(Spanned::into_inner);
        Ok(DiskImage { path, format, read_only: raw.read_only, serial, create })
    }

    fn short(&self, key: &str, text: &Spanned<String>, max: usize) -> Result<(), Report> {
        let fits = |c: char| c.is_ascii_graphic();
        if text.get_ref().len() <= max && text.get_ref().chars().all(fits) {
            return Ok(());
        }
        Err(self
            .bad(text.span(), format!("`{key}` is {:?}", text.get_ref()))
            .help(format!("allowed: at most {max} ASCII characters, no blanks")))
    }

    fn vsock(&self, raw: &RawVsock) -> Result<VsockSpec, Report> {
        // The highest is VMADDR_CID_ANY (`man 7 vsock`).
        let (low, high) = (MIN_CID, u32::MAX - 1);
        let cid = *raw.cid.get_ref();
        let fits = u32::try_from(cid).ok().filter(|cid| (low..=high).contains(cid));
        let cid = fits.ok_or_else(|| {
            self.bad(raw.cid.span(), format!("`cid` is {cid}"))
                .help(format!("allowed: {low} to {high}"))
        })?;
        Ok(VsockSpec { cid, socket: self.resolve(&raw.socket) })
    }

    fn kit(&self, name: &Spanned<String>) -> Result<KitName, Report> {
        let kit = KitName::GUESTS.into_iter().find(|kit| kit.as_str() == name.get_ref());
        kit.ok_or_else(|| {
            let names = KitName::GUESTS.map(|kit| format!("{:?}", kit.as_str()));
            self.bad(name.span(), format!("`kit` is {:?}", name.get_ref()))
                .help(format!("allowed: {}", names.join(", ")))
        })
    }

    fn shares(&self, raw: BTreeMap<Spanned<String>, RawShare>) -> Result<Vec<ShareConfig>, Report> {
        raw.into_iter().map(|(tag, share)| self.share(tag, share)).collect()
    }

    fn share(&self, tag: Spanned<String>, raw: RawShare) -> Result<ShareConfig, Report> {
        let span = tag.span();
        let tag = tag.into_inner();
        if !is_tag(&tag) {
            return Err(self
                .bad(span, format!("`{tag}` cannot be a share's tag"))
                .help(format!("allowed: 1 to {MAX_TAG} of A-Z a-z 0-9 `.` `_` `-`")));
        }
        if [SHARED_TAG, EXCHANGE_TAG, STORE_TAG].contains(&tag.as_str()) {
            return Err(self.bad(span, format!("the tag `{tag}` is firn's own")));
        }
        let (at, source) = (raw.source.span(), self.resolve(raw.source.get_ref()));
        let source = source.canonicalize().map_err(|e| {
            self.bad(
                at.clone(),
                format!("the source of share `{tag}` cannot be used: {}: {e}", source.display()),
            )
        })?;
        if !source.is_dir() {
            return Err(self.bad(
                at,
                format!("the source of share `{tag}` is no directory: {}", source.display()),
            ));
        }
        let target = raw.target.get_ref();
        let clean =
            target.is_absolute() && !target.components().any(|part| part.as_os_str() == "..");
        let blank = |c: char| c.is_whitespace() || c.is_control();
        if !clean || target.to_string_lossy().contains(blank) {
            return Err(self
                .bad(
                    raw.target.span(),
                    format!("the target of share `{tag}` is {}", target.display()),
                )
                .help("allowed: an absolute path in the guest, without `..` and blanks"));
        }
        Ok(ShareConfig {
            tag,
            source,
            target: Some(raw.target.into_inner()),
            read_only: raw.read_only,
            // Others write to it, the host at least.
            cache: CachePolicy::Never,
            copies: BTreeMap::new(),
        })
    }

    /// The path of a file that exists.
    fn file(&self, key: &str, what: &str, path: Spanned<PathBuf>) -> Result<PathBuf, Report> {
        let span = path.span();
        let path = self.resolve(&path.into_inner());
        match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => Err(self
                .bad(span, format!("`{key}` is a directory: {}", path.display()))
                .help(format!("allowed: the path of a {what}"))),
            Ok(_) => Ok(path),
            Err(e) => Err(self
                .bad(span, format!("`{key}` cannot be used: {}: {e}", path.display()))
                .help(format!("allowed: the path of a {what}"))),
        }
    }

    fn resolve(&self, path: &Path) -> PathBuf {
        let base = self.path.parent().unwrap_or(Path::new(""));
        let joined = base.join(path);
        std::path::absolute(&joined).unwrap_or(joined)
    }
}
