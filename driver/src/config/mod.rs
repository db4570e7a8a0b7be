//! What a test consists of: its script, machines and limits, as plain data.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use firn_vmm::spec::{DiskCreateSpec, DiskFormat, VsockSpec};

mod file;
mod report;

pub use report::ConfigError;

#[cfg(test)]
mod tests;

/// Memory of a machine that does not say how much it wants, in MiB. The micro kit's root is a tmpfs, of
/// which the kernel lets files take half of the memory.
pub const DEFAULT_MEMORY_MIB: u64 = 512;
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
/// Tag of the directory that all machines and the host share, at `/tmp/shared` in each guest.
pub const SHARED_TAG: &str = "shared";
/// Tag of the machine's own exchange directory, at `/host` in the guest.
pub const HOST_TAG: &str = "host";

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
    /// A bzImage or an ELF kernel.
    pub kernel: Option<PathBuf>,
    /// A cpio archive.
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    pub cmdline: Option<String>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub cores: u8,
    /// The vlans it is on; the guest's interface on the first is eth1, on the next eth2.
    pub vlans: Vec<u8>,
    /// Disks, in the order in which the guest finds them: vda, vdb, …
    pub disks: Vec<DiskConfig>,
    /// Directories of the host, beside `shared` and `host`.
    pub shares: Vec<ShareConfig>,
    /// It has a memory balloon: memory that it does not use goes back to the host.
    pub balloon: bool,
    /// Sockets between programs of host and guest.
    pub vsock: Option<VsockSpec>,
}

/// A directory of the host that a machine mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareConfig {
    /// The name the guest mounts it by.
    pub tag: String,
    /// The directory on the host.
    pub source: PathBuf,
    /// Where the guest mounts it.
    pub target: PathBuf,
    /// Refuse every change.
    pub read_only: bool,
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
        let all: std::collections::BTreeSet<u8> =
            self.nodes.iter().flat_map(|node| node.vlans.iter().copied()).collect();
        all.into_iter().collect()
    }
}

impl NodeConfig {
    /// The hardware address of this node's card on a vlan.
    #[must_use]
    pub fn mac(&self, vlan: u8) -> [u8; 6] {
        [0x52, 0x54, 0x00, 0x12, vlan, self.number]
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

    /// The name of the script's variable for this machine: what is no letter, digit or underscore
    /// becomes `_`, and so does a first character that is no letter.
    #[must_use]
    pub fn variable(&self) -> String {
        variable_name(&self.name)
    }
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
