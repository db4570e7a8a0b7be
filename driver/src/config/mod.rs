//! What a test consists of: its script, machines and limits, as plain data.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn_vmm::spec::{CachePolicy, DiskCreateSpec, DiskFormat, VsockSpec};

use crate::kit::KitName;

mod driver_file;
mod expand;
mod file;
mod machine_file;
mod network;
pub(crate) mod qemu;
mod report;

pub use expand::Variables;
pub use machine_file::MachineFile;
pub use network::UserNetwork;
pub use report::ConfigError;

#[cfg(test)]
mod tests;

/// Highest number of a vlan and of a node: both become a byte of a MAC and of an IPv4 address.
pub const MAX_NUMBER: u8 = 254;
/// Longest machine name: it becomes a host name, which is one DNS label (RFC 1035, 2.3.4).
pub const MAX_NAME: usize = 63;
/// Longest tag of a share, in bytes (virtio 1.2, 5.11.4).
pub const MAX_TAG: usize = 36;
/// Longest serial number of a disk, in bytes (virtio 1.2, 5.2.6).
pub const MAX_SERIAL: usize = 20;
/// Longest label of an ext4 file system, in bytes.
pub const MAX_LABEL: usize = 16;
/// Most memory a machine may ask for, in MiB: 1 TiB, to catch a number meant as bytes or KiB.
const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Largest disk that can be made, in MiB: 64 TiB, for the same reason.
const MAX_DISK_MIB: u64 = 64 << 20;
/// [`TestConfig::vsock_offset`] unless another is asked for: CIDs below 3 are not for guests (`man 7 vsock`).
const VSOCK_OFFSET: u32 = 2;
/// Tag of the directory that all machines and the host share, at `/tmp/shared` in each guest.
pub const SHARED_TAG: &str = "shared";
/// Tag of the machine's own exchange directory, at `/tmp/xchg` in the guest.
pub const EXCHANGE_TAG: &str = "xchg";

/// A test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestConfig {
    /// What the test is called.
    pub name: String,
    /// The Python script that drives the machines.
    pub script: Script,
    /// The whole test may take this long.
    pub global_timeout: Option<Duration>,
    /// The machines, sorted by name; [`NodeConfig::number`] counts from 1 in this order.
    pub nodes: Vec<NodeConfig>,
    /// Machines that have files of their own.
    pub files: Vec<MachineFile>,
    /// Vlans that are there even if no machine is on them.
    pub more_vlans: Vec<u8>,
    /// Every machine has a vsock, so that ssh can enter it; a CID is this and the machine's number.
    pub vsock_offset: Option<u32>,
}

/// A test's script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// The Python source.
    pub text: String,
    /// The file that it was read from.
    pub file: PathBuf,
    /// The line of `file` on which `text` begins, from 1.
    pub line: usize,
}

/// A machine of a test. What is `None` comes from the guest kit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Its name and its host name.
    pub name: String,
    /// Its place among the sorted names, from 1.
    pub number: u8,
    /// The guest kit.
    pub kit: KitName,
    /// A bzImage or an ELF kernel.
    pub kernel: Option<PathBuf>,
    /// cpio archives, handed to the kernel as one initrd in this order.
    pub initrd: Option<Vec<PathBuf>>,
    /// The kernel command line.
    pub cmdline: Option<String>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub cores: u8,
    /// Its first card, eth0: the way to the host and beyond.
    pub user_network: Option<UserNetwork>,
    /// The vlans it is on; the guest's interface on the first is eth1, on the next eth2.
    pub vlans: Vec<u8>,
    /// The addresses of its cards by their vlans, where they are not made from the numbers of vlan and node.
    pub macs: BTreeMap<u8, [u8; 6]>,
    /// Disks, in the order in which the guest finds them: vda, vdb, …
    pub disks: Vec<DiskConfig>,
    /// Directories of the host.
    pub shares: Vec<ShareConfig>,
    /// It has the shares `shared` and `xchg` beside these.
    pub exchange: bool,
    /// It has a source of entropy.
    pub rng: bool,
    /// It has a memory balloon: memory that it does not use goes back to the host.
    pub balloon: bool,
    /// Sockets between programs of host and guest.
    pub vsock: Option<VsockSpec>,
    /// Files of the host that systemd in the guest has as credentials, by the credentials' names. They are read at
    /// each start.
    pub credentials: BTreeMap<String, PathBuf>,
    /// Free texts of its SMBIOS tables, in which systemd looks for credentials.
    pub oem_strings: Vec<String>,
}

/// A directory of the host that a machine mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareConfig {
    /// The name the guest mounts it by.
    pub tag: String,
    /// The directory on the host.
    pub source: PathBuf,
    /// Where a guest of the kit mounts it; others have their own ways to know.
    pub target: Option<PathBuf>,
    /// Refuse every change.
    pub read_only: bool,
    /// How long the guest may trust what it has read.
    pub cache: CachePolicy,
    /// Files of the host that are copied into it at each start, by their names in it. It is made if there are any.
    pub copies: BTreeMap<String, PathBuf>,
}

/// A disk of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskConfig {
    /// An image of the host.
    Image(DiskImage),
    /// An empty disk of so many MiB, made in the machine's state directory at its first start.
    Empty(u64),
}

/// A disk image of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskImage {
    /// Where it is.
    pub path: PathBuf,
    /// How it is laid out.
    pub format: DiskFormat,
    /// Refuse every change.
    pub read_only: bool,
    /// The serial number that the guest sees.
    pub serial: Option<String>,
    /// What to make if there is no such file.
    pub create: Option<DiskCreateSpec>,
}

impl TestConfig {
    /// All vlans that machines are on, each once, in order.
    #[must_use]
    pub fn vlans(&self) -> Vec<u8> {
        let nodes = self.nodes.iter().flat_map(|node| &node.vlans);
        let files = self.files.iter().flat_map(MachineFile::vlans);
        let all: std::collections::BTreeSet<u8> =
            nodes.chain(files).chain(&self.more_vlans).copied().collect();
        all.into_iter().collect()
    }

    /// The names of the script's variables for the machines.
    #[must_use]
    pub fn variables(&self) -> Vec<String> {
        let nodes = self.nodes.iter().map(NodeConfig::variable);
        nodes.chain(self.files.iter().map(|file| variable_name(file.name()))).collect()
    }

    /// The directories of the host that guests may write to, as far as they are there already; without those of
    /// devices and of the system.
    #[must_use]
    pub fn writable(&self) -> Vec<PathBuf> {
        let files = self.files.iter().filter_map(MachineFile::here);
        let nodes = self.nodes.iter().cloned().chain(files);
        let usual = |dir: &PathBuf| {
            let system = ["/dev", "/proc", "/sys", "/run"].iter().any(|own| dir.starts_with(own));
            !system && dir != Path::new("/") && dir.is_dir()
        };
        nodes.flat_map(|node| node.writable()).filter(usual).collect()
    }
}

impl NodeConfig {
    /// The hardware address of this node's card on a vlan.
    #[must_use]
    pub fn mac(&self, vlan: u8) -> [u8; 6] {
        let own = self.macs.get(&vlan).copied();
        own.unwrap_or([0x52, 0x54, 0x00, 0x12, vlan, self.number])
    }

    /// This node's IPv4 address on a vlan; the network is a /24.
    #[must_use]
    pub fn ipv4(&self, vlan: u8) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, vlan, self.number)
    }

    /// This node's IPv6 address on a vlan; the network is a /64. As in NixOS the decimal digits of the
    /// numbers are the hexadecimal digits of the groups: node 12 is `::12`.
    #[must_use]
    pub fn ipv6(&self, vlan: u8) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, decimal_as_hex(vlan), 0, 0, 0, 0, decimal_as_hex(self.number))
    }

    /// The directories that its shares and disks are in, those that it may not change left out.
    fn writable(&self) -> Vec<PathBuf> {
        let shares = self.shares.iter().filter(|share| !share.read_only);
        let images = self.disks.iter().filter_map(|disk| match disk {
            DiskConfig::Image(image) if !image.read_only => image.path.parent(),
            DiskConfig::Image(_) | DiskConfig::Empty(_) => None,
        });
        shares.map(|share| share.source.clone()).chain(images.map(PathBuf::from)).collect()
    }

    /// The name of the script's variable for this machine: what is no letter, digit or underscore
    /// becomes `_`, and so does a first character that is no letter.
    #[must_use]
    pub fn variable(&self) -> String {
        variable_name(&self.name)
    }
}

/// Whether a text can be a machine's name.
fn is_name(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=MAX_NAME).contains(&text.len()) && text.chars().all(fits) && !text.starts_with('-')
}

/// Whether a text can be a share's tag.
fn is_tag(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=MAX_TAG).contains(&text.len()) && text.chars().all(fits)
}

fn decimal_as_hex(number: u8) -> u16 {
    let number = u16::from(number);
    (number / 100) << 8 | (number / 10 % 10) << 4 | (number % 10)
}

fn variable_name(name: &str) -> String {
    name.char_indices()
        .map(|(at, c)| {
            let fits = if at == 0 {
                c.is_ascii_alphabetic() || c == '_'
            } else {
                c.is_ascii_alphanumeric() || c == '_'
            };
            if fits { c } else { '_' }
        })
        .collect()
}
