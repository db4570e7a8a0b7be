//! What to build: plain data without behaviour.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

mod values;

pub use values::{
    Cid, Cores, CredentialName, DiskMib, FileName, Label, Mac, MachineName, MemoryMib, Number,
    Pixels, Serial, Tag, ValueError,
};

/// One machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Names the machine's threads and its log lines.
    pub name: String,
    /// Number of vCPUs.
    pub cores: Cores,
    /// Guest memory.
    pub memory: MemoryMib,
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
    /// A screen, of which the host can take pictures.
    #[serde(default)]
    pub screen: Option<ScreenSpec>,
    /// A keyboard.
    #[serde(default)]
    pub keyboard: bool,
    /// A pointer with places of its own on the screen.
    #[serde(default)]
    pub tablet: bool,
}

impl MachineSpec {
    /// The screen, if it is a plain one.
    #[must_use]
    pub fn plain_screen(&self) -> Option<&ScreenSpec> {
        self.screen.as_ref().filter(|screen| screen.kind == ScreenKind::Plain)
    }
}

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
    pub mac: Mac,
}

/// One screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScreenSpec {
    /// What the guest draws on.
    pub kind: ScreenKind,
    /// Its width; of a `gpu` the one that the guest is told to prefer.
    pub width: Pixels,
    /// Its height, likewise.
    pub height: Pixels,
}

impl Default for ScreenSpec {
    fn default() -> Self {
        Self { kind: ScreenKind::default(), width: Pixels::WIDTH, height: Pixels::HEIGHT }
    }
}

/// What a guest draws on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScreenKind {
    /// Memory that the firmware announces: every kernel draws its console on it, without a driver of its own.
    #[default]
    Plain,
    /// A virtio graphics card without 3D, for those who set modes and flip pages.
    Gpu,
}

/// Sockets between host and guest (`man 7 vsock`).
///
/// A program on the host connects to `socket` and sends `CONNECT port\n`; the answer is `OK port\n`, and what follows
/// goes to and from the program that listens on that port in the guest. A program in the guest that connects to a
/// port of the host (CID 2) reaches the program that listens on the host at `socket` with `_port` appended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's address. Machines that do not talk to each other may have the same.
    pub cid: Cid,
    /// Where the socket is made.
    pub socket: PathBuf,
}

/// One shared directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSpec {
    /// The name the guest mounts it by.
    pub tag: Tag,
    /// The directory on the host.
    pub source: PathBuf,
    /// Refuse every change.
    #[serde(default)]
    pub read_only: bool,
    /// How long the guest may trust what it has read.
    #[serde(default)]
    pub cache: CachePolicy,
    /// Let the guest give files set-uid and set-gid bits. Otherwise they are left out of each mode
    /// that it sets, without an error: what a guest wrote would run with the rights of firn's user,
    /// for anybody on the host who reaches the directory.
    #[serde(default)]
    pub allow_setuid: bool,
    /// A file that lists what of the directory's top the guest sees: on each line a name, or a path of which `source` is
    /// the directory, as in the `store-paths` of Nix's closureInfo. Only for a share that is read-only and trusted for
    /// ever.
    #[serde(default)]
    pub only: Option<PathBuf>,
    /// Give it to the guest as an image of a file system in its memory, with the tag as its label, which all machines of
    /// the process have in common. Only for a share that is read-only and trusted for ever.
    #[serde(default)]
    pub image: bool,
    /// Where the guest mounts it, for those who prepare the guest; the monitor does not need it.
    #[serde(default)]
    pub target: Option<PathBuf>,
    /// Files that are copied into the source at each start, by their names there, also for those who prepare the guest;
    /// what is empty or no file is left out.
    #[serde(default)]
    pub copies: BTreeMap<FileName, PathBuf>,
}

impl ShareSpec {
    /// A directory that the guest, and others, may change.
    #[must_use]
    pub fn new(tag: Tag, source: PathBuf) -> Self {
        Self {
            tag,
            source,
            read_only: false,
            cache: CachePolicy::Never,
            allow_setuid: false,
            only: None,
            image: false,
            target: None,
            copies: BTreeMap::new(),
        }
    }

    /// Longest tag of a share that is an image, in bytes: it is the image's label (`volume_name` of `struct
    /// erofs_super_block`), of whose 16 bytes Linux wanted one to be zero (`erofs_read_superblock` in fs/erofs/super.c).
    pub const MAX_LABEL: usize = 15;

    /// Whether it is a directory that nobody changes.
    #[must_use]
    pub fn is_store(&self) -> bool {
        self.read_only && self.cache == CachePolicy::Always
    }

    /// Checks that it can be an image, if it is to be one.
    ///
    /// # Errors
    /// The key that is in the way, and what is allowed.
    pub fn check_image(&self) -> Result<(), (&'static str, ValueError)> {
        if self.image && !self.is_store() {
            let allowed = "true for a share with `read_only = true` and `cache = \"always\"`";
            return Err(("image", ValueError::new(true, allowed)));
        }
        if self.image && self.tag.len() > Self::MAX_LABEL {
            let allowed = format!(
                "at most {} bytes for a share with `image = true`, of which it is the label",
                Self::MAX_LABEL
            );
            return Err(("tag", ValueError::new(&self.tag, allowed)));
        }
        Ok(())
    }
}

/// How long the guest may trust what it has read of a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CachePolicy {
    /// Ask the host each time: for directories that others write. Guests before Linux 6.6 cannot
    /// map such files shared (`MAP_SHARED`: ENODEV).
    #[default]
    Never,
    /// Trust metadata for a second, data while a file is open.
    Auto,
    /// Trust everything forever: for directories that never change, such as the Nix store.
    Always,
}

/// One disk: an image that is there, or one to make.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The image: a file or a block device. Without one, the path has to be chosen before the machine is built.
    #[serde(default)]
    pub image: PathBuf,
    /// The image's format; by default it follows from the name. It is not guessed from the content: a guest that
    /// writes to a raw disk could make it look like another format, and name any file of the host in it.
    #[serde(default)]
    pub format: Option<DiskFormat>,
    /// Refuse every change.
    #[serde(default)]
    pub read_only: bool,
    /// By this the guest finds the disk at `/dev/disk/by-id/virtio-SERIAL`.
    #[serde(default)]
    pub serial: Option<Serial>,
    /// If the image is not there, one of this size is made. The file takes up only what is written to it.
    #[serde(default)]
    pub size: Option<DiskMib>,
    /// An image that is made has an ext4 file system with this label; needs `mkfs.ext4`.
    #[serde(default)]
    pub label: Option<Label>,
    /// The backing files that the image may have below it, at any depth: files, and directories of files. The image
    /// names them, and may come from anyone, so by default none are allowed.
    #[serde(default)]
    pub backing: Vec<PathBuf>,
}

impl DiskSpec {
    /// How its image is laid out: as it says, or as the image's name ends.
    #[must_use]
    pub fn format(&self) -> DiskFormat {
        let by_name = || match self.image.extension() {
            Some(extension) if extension == "qcow2" => DiskFormat::Qcow2,
            _ => DiskFormat::Raw,
        };
        self.format.unwrap_or_else(by_name)
    }

    /// Checks what no key says alone.
    ///
    /// # Errors
    /// The key that is wrong, and how.
    pub fn check(&self) -> Result<(), (&'static str, ValueError)> {
        if self.image.as_os_str().is_empty() && self.size.is_none() {
            let allowed = "the path of an image, with `size` also one that is yet to be made";
            return Err(("image", ValueError::new("a disk without `image` and `size`", allowed)));
        }
        match &self.label {
            Some(label) if self.size.is_none() => {
                let allowed = "a label for a disk that is to be made: give its `size` in MiB";
                Err(("label", ValueError::new(format_args!("{:?}", &**label), allowed)))
            }
            _ => Ok(()),
        }
    }
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
