//! The description of a machine, with the same keys in TOML and in machine files.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use firn_gateway::Side;
use firn_vmm::spec::{
    Cores, CredentialName, DiskSpec, Mac, MemoryMib, Number, ScreenSpec, ShareSpec, Tag,
    ValueError, VsockSpec,
};
use serde::Deserialize;

use crate::kit::{KitName, STORE_TAG};

use super::document::{Key, Problem};
use super::network::{PortForward, UserNetwork, user_network};
use super::qemu_options::{self, BadOption};
use super::screen::{Needs, ScreenChoice};
use super::start_command;
use super::{EXCHANGE_TAG, SHARED_TAG, variable_name};

/// A machine of a test. Fields that are `None` come from the guest kit.
///
/// The keys are those of `[nodes.NAME]` in a test's TOML file, and of a machine file. The defaults here are those of
/// TOML; a machine file has minimal ones ([`super::machine_file`]).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// Its name and its host name.
    #[serde(skip)]
    pub name: String,
    /// Its position among the sorted names, from 1.
    #[serde(skip)]
    pub number: u8,
    /// What runs it: firn's own monitor or QEMU; by default QEMU if it has a start command.
    pub backend: Option<BackendKind>,
    /// A shell command that starts QEMU; the driver adds arguments. Without one firn builds QEMU's command line itself.
    pub start_command: Option<String>,
    /// Why it runs under QEMU, for the log.
    pub because: Vec<String>,
    /// The guest kit.
    #[serde(deserialize_with = "guest_kit")]
    pub kit: KitName,
    /// A bzImage or an ELF kernel.
    pub kernel: Option<PathBuf>,
    /// cpio archives, passed to the kernel as one initrd in this order.
    pub initrd: Option<Vec<PathBuf>>,
    /// The kernel command line.
    pub cmdline: Option<String>,
    /// Memory in MiB.
    pub memory: Option<MemoryMib>,
    /// Number of vCPUs.
    pub cores: Cores,
    /// Its first card, eth0: the user network. `false` leaves it out.
    #[serde(deserialize_with = "user_network")]
    pub user_network: Option<UserNetwork>,
    /// The vlans it is on; the guest's interface on the first is eth1, on the second eth2.
    pub vlans: Vec<Number>,
    /// The hardware addresses of its cards by vlan, where they are not derived from the numbers of vlan and node.
    pub macs: BTreeMap<Number, Mac>,
    /// Disks in the guest's order: vda, vdb, … A disk without an image is created in the machine's state directory at
    /// the first start.
    pub disks: Vec<DiskSpec>,
    /// Shared directories of the host.
    pub shares: Vec<ShareSpec>,
    /// Adds the shares `shared` and `xchg`.
    pub exchange: bool,
    /// An entropy source.
    pub rng: bool,
    /// A memory balloon, which returns unused memory to the host.
    pub balloon: bool,
    /// A screen; by default, one if the test's script needs it.
    pub screen: ScreenChoice,
    /// Whether it has a keyboard; likewise.
    pub keyboard: Option<bool>,
    /// An absolute pointer; likewise.
    pub tablet: Option<bool>,
    /// Sockets between host and guest programs.
    pub vsock: Option<VsockSpec>,
    /// SMBIOS OEM strings, in which systemd looks for credentials.
    pub oem_strings: Vec<String>,
    /// Files of the host that systemd in the guest gets as credentials, by name. They are read at each start.
    pub credentials: BTreeMap<CredentialName, PathBuf>,
    /// QEMU options that change it, as in `QEMU_OPTS`.
    pub qemu_opts: String,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            number: 1,
            backend: None,
            start_command: None,
            because: Vec::new(),
            kit: KitName::Micro,
            kernel: None,
            initrd: None,
            cmdline: None,
            memory: None,
            cores: Cores::MIN,
            user_network: Some(UserNetwork::default()),
            vlans: vec![Number::MIN],
            macs: BTreeMap::new(),
            disks: Vec::new(),
            shares: Vec::new(),
            exchange: true,
            rng: true,
            balloon: false,
            screen: ScreenChoice::default(),
            keyboard: None,
            tablet: None,
            vsock: None,
            oem_strings: Vec::new(),
            credentials: BTreeMap::new(),
            qemu_opts: String::new(),
        }
    }
}

/// What runs a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    /// firn's own monitor.
    Firn,
    /// QEMU.
    Qemu,
}

impl NodeConfig {
    /// What runs it.
    #[must_use]
    pub fn backend(&self) -> BackendKind {
        let unsaid = match self.start_command {
            Some(_) => BackendKind::Qemu,
            None => BackendKind::Firn,
        };
        self.backend.unwrap_or(unsaid)
    }

    /// Memory in MiB: its own, or the kit's default.
    #[must_use]
    pub fn memory(&self) -> MemoryMib {
        self.memory.unwrap_or_else(|| self.kit.default_memory())
    }

    /// Returns the hardware address of this node's card on a vlan.
    #[must_use]
    pub fn mac(&self, vlan: Number) -> Mac {
        let own = self.macs.get(&vlan).copied();
        own.unwrap_or(Mac([0x52, 0x54, 0x00, 0x12, vlan.get(), self.number]))
    }

    /// Returns this node's IPv4 address on a vlan; the network is a /24.
    #[must_use]
    pub fn ipv4(&self, vlan: Number) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, vlan.get(), self.number)
    }

    /// Returns this node's IPv6 address on a vlan; the network is a /64. As in NixOS, the decimal digits of the numbers
    /// are used as the hexadecimal digits of the groups: node 12 is `::12`.
    #[must_use]
    pub fn ipv6(&self, vlan: Number) -> Ipv6Addr {
        let (vlan, node) = (decimal_as_hex(vlan.get()), decimal_as_hex(self.number));
        Ipv6Addr::new(0x2001, 0xdb8, vlan, 0, 0, 0, 0, node)
    }

    /// Returns the name of the script's variable for this machine: characters other than letters, digits and
    /// underscores become `_`, and so does a leading digit.
    #[must_use]
    pub fn variable(&self) -> String {
        variable_name(&self.name)
    }

    /// The directories of its shares and disks that it may write to.
    pub(super) fn writable(&self) -> Vec<PathBuf> {
        let shares = self.shares.iter().filter(|share| !share.read_only);
        let images = self.disks.iter().filter(|disk| !disk.read_only);
        let images = images.filter_map(|disk| disk.image.parent());
        shares.map(|share| share.source.clone()).chain(images.map(PathBuf::from)).collect()
    }

    /// Makes the host's relative paths start at `base`.
    pub(super) fn rebase(&mut self, base: &Path) {
        let files = self.kernel.iter_mut().chain(self.initrd.iter_mut().flatten());
        let sources = self.shares.iter_mut().flat_map(|share| {
            let copies = share.copies.values_mut().filter(|path| !path.as_os_str().is_empty());
            std::iter::once(&mut share.source).chain(&mut share.only).chain(copies)
        });
        let images = self.disks.iter_mut().flat_map(|disk| {
            let image = Some(&mut disk.image).filter(|image| !image.as_os_str().is_empty());
            image.into_iter().chain(&mut disk.backing)
        });
        let sockets = self.vsock.iter_mut().map(|vsock| &mut vsock.socket);
        let credentials = self.credentials.values_mut();
        for path in files.chain(sources).chain(images).chain(sockets).chain(credentials) {
            *path = base.join(&*path);
        }
    }

    /// Applies its QEMU options.
    pub(super) fn apply_qemu_options(&mut self) -> Result<(), (&'static str, BadOption)> {
        let changes = qemu_options::options(&std::mem::take(&mut self.qemu_opts))
            .map_err(|error| ("qemu_opts", error))?;
        self.memory = changes.memory.or(self.memory);
        self.cores = changes.cores.unwrap_or(self.cores);
        self.screen = changes.screen.or(self.screen);
        self.keyboard = changes.keyboard.then_some(true).or(self.keyboard);
        self.tablet = changes.tablet.then_some(true).or(self.tablet);
        if let Some(network) = &mut self.user_network {
            let changes = qemu_options::net_options(&std::mem::take(&mut network.qemu_net_opts))
                .map_err(|error| ("user_network.qemu_net_opts", error))?;
            network.restrict = changes.restrict.unwrap_or(network.restrict);
            network.forward_ports.extend(changes.forwards.into_iter().map(PortForward));
        }
        Ok(())
    }

    /// Adds the parts that its script needs, unless the description sets them.
    pub(super) fn supply(&mut self, needs: Needs) {
        if needs.screen {
            self.screen = self.screen.or(ScreenChoice::Yes(ScreenSpec::default()));
        }
        self.keyboard = self.keyboard.or(needs.keyboard.then_some(true));
        self.tablet = self.tablet.or(needs.tablet.then_some(true));
    }

    /// Checks what involves several values; `at` is the key of the machine.
    pub(super) fn check(&self, at: &Key) -> Result<(), Problem> {
        self.check_backend(at)?;
        for (index, disk) in self.disks.iter().enumerate() {
            let place = || at.name("disks").index(index);
            disk.check().map_err(|(key, error)| Problem::new(place().name(key), error))?;
        }
        let mut tags: BTreeSet<&Tag> = BTreeSet::new();
        for (index, share) in self.shares.iter().enumerate() {
            let bad = |key: &str, value: &dyn std::fmt::Display, allowed: &str| {
                let error = ValueError::new(value, allowed);
                Err(Problem::new(at.name("shares").index(index).name(key), error))
            };
            let own = [SHARED_TAG, EXCHANGE_TAG, STORE_TAG];
            if self.exchange && own.contains(&&*share.tag) {
                return bad(
                    "tag",
                    &share.tag,
                    &format!("a tag that is not one of firn's own: {}", own.join(", ")),
                );
            }
            if !tags.insert(&share.tag) {
                return bad("tag", &share.tag, "a unique tag for each share");
            }
            if let Some(list) = share.only.as_ref().filter(|_| !share.is_store()) {
                let allowed = "a list for a share with `read_only = true` and `cache = \"always\"`";
                return bad("only", &list.display(), allowed);
            }
            if let Some(list) = share.only.as_ref().filter(|_| self.backend() == BackendKind::Qemu)
            {
                return bad(
                    "only",
                    &list.display(),
                    "a list for a machine of firn, not under QEMU",
                );
            }
            if let Err((key, error)) = share.check_image() {
                return Err(Problem::new(at.name("shares").index(index).name(key), error));
            }
            if share.image && self.backend() == BackendKind::Qemu {
                let allowed = "true for a machine of firn: one under QEMU has no memory in common \
                               with firn";
                return bad("image", &true, allowed);
            }
            if let Some(target) = share.target.as_ref().filter(|target| !is_target(target)) {
                let allowed = "an absolute path in the guest, without `..` and blanks";
                return bad("target", &target.display(), allowed);
            }
        }
        for (index, vlan) in self.vlans.iter().enumerate() {
            if self.vlans[..index].contains(vlan) {
                let error = ValueError::new(vlan, "each vlan once");
                return Err(Problem::new(at.name("vlans").index(index), error));
            }
        }
        match self.macs.keys().find(|vlan| !self.vlans.contains(vlan)) {
            None => Ok(()),
            Some(vlan) => {
                let error = ValueError::new(format_args!("vlan {vlan}"), "those in `vlans`");
                Err(Problem::new(at.name("macs").name(vlan.to_string()), error))
            }
        }
    }
}

impl NodeConfig {
    /// The address of the vsock that its start command gives it, which is the host's kernel's.
    pub(crate) fn own_vsock(&self) -> Option<u32> {
        start_command::vsock_of(self.start_command.as_deref()?)
    }

    /// Checks that its backend supports its description.
    fn check_backend(&self, at: &Key) -> Result<(), Problem> {
        let bad = |key: &str, value: &str, allowed: &str| {
            Err(Problem::new(at.name(key), ValueError::new(value, allowed)))
        };
        if self.backend() == BackendKind::Firn {
            return match self.start_command {
                Some(_) => bad("backend", "\"firn\"", "\"qemu\", with a `start_command`"),
                None => Ok(()),
            };
        }
        let network = self.user_network.iter().filter(|_| self.start_command.is_none());
        for network in network {
            let bad = |key: &str, value: &str, allowed: &str| {
                let key = at.name("user_network").name(key);
                Err(Problem::new(key, ValueError::new(value, allowed)))
            };
            if !network.host_loopback {
                return bad("host_loopback", "false", "true under QEMU, whose user network has it");
            }
            let from_guest = |PortForward(forward): &PortForward| forward.from == Side::Guest;
            if network.forward_ports.iter().any(from_guest) {
                let allowed = "`from = \"host\"` under QEMU";
                return bad("forward_ports", "`from = \"guest\"`", allowed);
            }
        }
        Ok(())
    }
}

fn is_target(target: &Path) -> bool {
    let up = target.components().any(|part| part.as_os_str() == "..");
    let blank = |c: char| c.is_whitespace() || c.is_control();
    target.is_absolute() && !up && !target.to_string_lossy().contains(blank)
}

fn guest_kit<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<KitName, D::Error> {
    let name = String::deserialize(deserializer)?;
    KitName::GUESTS.into_iter().find(|kit| kit.as_str() == name).ok_or_else(|| {
        let names = KitName::GUESTS.map(|kit| format!("{:?}", kit.as_str()));
        serde::de::Error::custom(ValueError::new(format_args!("{name:?}"), names.join(", ")))
    })
}

fn decimal_as_hex(number: u8) -> u16 {
    let number = u16::from(number);
    (number / 100) << 8 | (number / 10 % 10) << 4 | (number % 10)
}
