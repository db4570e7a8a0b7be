//! What to build: plain data without behaviour.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Names the machine's threads and its log lines.
    pub name: String,
    /// Number of vCPUs, 1 to [`MAX_CORES`].
    pub cores: u8,
    /// Guest memory in MiB, at least [`MIN_MEMORY_MIB`].
    pub memory_mib: u64,
    /// A Linux bzImage or an ELF vmlinux.
    pub kernel: PathBuf,
    /// cpio archives, handed to the kernel as one initrd in this order.
    #[serde(default)]
    pub initrd: Vec<PathBuf>,
    /// The kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Ports of the virtio console; port 0 is `/dev/hvc0` in the guest.
    #[serde(default)]
    pub console_ports: Vec<ConsolePortSpec>,
    /// Network cards, in the order the guest finds them.
    #[serde(default)]
    pub nets: Vec<NetSpec>,
    /// Directories of the host that the guest can mount.
    #[serde(default)]
    pub shares: Vec<ShareSpec>,
    /// Disks; the guest calls them vda, vdb, … in this order.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// An entropy source.
    #[serde(default = "yes")]
    pub rng: bool,
    /// A memory balloon: memory that the guest does not use goes back to the host.
    #[serde(default)]
    pub balloon: bool,
    /// Sockets between programs of host and guest.
    #[serde(default)]
    pub vsock: Option<VsockSpec>,
    /// Free texts of the SMBIOS tables (type 11), at most 60,000 bytes in all. systemd takes
    /// `io.systemd.credential:NAME=TEXT` and `io.systemd.credential.binary:NAME=BASE64` for
    /// credentials.
    #[serde(default)]
    pub oem_strings: Vec<String>,
}

/// Most vCPUs a machine can have.
pub const MAX_CORES: u8 = 32;
/// Least memory a machine can have, in MiB: a distribution kernel unpacks itself in less.
pub const MIN_MEMORY_MIB: u64 = 64;

const fn yes() -> bool {
    true
}

/// One port of the virtio console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsolePortSpec {
    /// With a name the guest sees `/dev/virtio-ports/NAME`; without, a console `/dev/hvcN`.
    #[serde(default)]
    pub name: Option<String>,
}

/// One network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// The card's address.
    pub mac: [u8; 6],
}

/// Sockets between host and guest (`man 7 vsock`).
///
/// Who connects to `socket` and sends `CONNECT port\n` is answered `OK port\n` and then talks to
/// who listens on that port in the guest. Who connects to a port of the host (CID 2) in the guest
/// talks to who listens on `socket` with `_port` behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's address, 3 or higher. Machines that do not talk to each other may have the same.
    pub cid: u32,
    /// Where the socket is made.
    pub socket: PathBuf,
}

/// One shared directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSpec {
    /// The name the guest mounts it by, 1 to 36 bytes (virtio 1.2, 5.11.4).
    pub tag: String,
    /// The directory on the host.
    pub source: PathBuf,
    /// Refuse every change.
    #[serde(default)]
    pub read_only: bool,
    /// How long the guest may trust what it has read.
    #[serde(default)]
    pub cache: CachePolicy,
}

/// How long the guest may trust what it has read of a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CachePolicy {
    /// Ask the host each time: for directories that others write.
    #[default]
    Never,
    /// Trust metadata for a second, data while a file is open.
    Auto,
    /// Trust everything for ever: for directories that nobody changes, such as the Nix store.
    Always,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The image: a file or a block device.
    pub path: PathBuf,
    /// How the image is laid out. It is not guessed from the image: a guest that writes to a raw
    /// disk could make it look like another format, and name any file of the host in it.
    #[serde(default)]
    pub format: DiskFormat,
    /// Refuse every change.
    #[serde(default)]
    pub read_only: bool,
    /// At most 20 bytes (virtio 1.2, 5.2.6); the guest finds the disk at
    /// `/dev/disk/by-id/virtio-SERIAL`.
    #[serde(default)]
    pub serial: Option<String>,
    /// Make the image if it is not there.
    #[serde(default)]
    pub create: Option<DiskCreateSpec>,
}

/// How a disk's image is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// As the guest sees it.
    #[default]
    Raw,
    /// QEMU's format, with backing files.
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        })
    }
}

/// A disk image to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskCreateSpec {
    /// Size of the disk in MiB, at least 1. The file takes up only what is written to it.
    pub size_mib: u64,
    /// Puts an ext4 file system with this label, at most 16 bytes, on it; needs `mkfs.ext4`.
    #[serde(default)]
    pub ext4_label: Option<String>,
}
