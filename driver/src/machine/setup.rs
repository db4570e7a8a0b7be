//! From a node of a test to the monitor's spec.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use firn_gateway::{CARD_MAC, DNS_V4, GATEWAY_V4, GUEST_V4};
use firn_guest_agent::protocol::PORT_NAME;
use firn_vmm::spec::{
    CachePolicy, ConsolePortSpec, DiskSpec, Mac, MachineSpec, NetSpec, Number, ShareSpec,
    ValueError,
};

use super::{Dirs, Machine, inputs};
use crate::config::{BackendKind, EXCHANGE_TAG, MachineFile, NodeConfig, SHARED_TAG, UserNetwork};
use crate::error::{MachineError, Result, chain};
use crate::kernels::Kernels;
use crate::kit::{
    self, GuestConfig, HostsEntry, Interface, Kit, KitName, Mount, MountKind, STORE_TAG,
};
use crate::log::Logger;
use crate::private;

/// Shares, by their tags.
pub(super) type Tags = BTreeSet<String>;

/// Where a machine's description comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A test's file, which is complete.
    Node { node: Box<NodeConfig>, boot: Boot },
    /// A machine file, whose variables are expanded at each start. `number` is used if the file has none.
    File { file: Box<MachineFile>, number: u8 },
}

impl Source {
    /// The machine's name.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Node { node, .. } => &node.name,
            Self::File { file, .. } => file.name(),
        }
    }

    /// The machine as far as it is known before its start.
    pub(crate) fn describe(&self, dirs: &Dirs) -> Result<NodeConfig> {
        match self {
            Self::Node { node, .. } => Ok(NodeConfig::clone(node)),
            Self::File { file, number } => {
                let node = file.preview(*number, &dirs.variables(), &dirs.base);
                node.map_err(|error| MachineError::Usage(chain(&error)).into())
            }
        }
    }

    /// The machine as it would be started now.
    fn resolve(&self, known: &NodeConfig, dirs: &Dirs) -> Result<Box<(NodeConfig, Boot)>> {
        let start_error = |source| start_error(known, source);
        let (file, number) = match self {
            Self::Node { boot, .. } => return Ok(Box::new((known.clone(), boot.clone()))),
            Self::File { file, number } => (file, *number),
        };
        let mut node = file
            .node(number, &dirs.variables(), &dirs.base)
            .map_err(|error| start_error(error.into()))?;
        node.vsock = node.vsock.or_else(|| known.vsock.clone());
        let boot = Boot::new(&node, None, &[])
            .ok_or_else(|| start_error("its file names no kernel".into()))?;
        Ok(Box::new((node, boot)))
    }

    /// The machine's description as it shall be started now.
    pub(super) fn resolved(&self, node: &NodeConfig, dirs: &Dirs) -> Result<NodeConfig> {
        self.resolve(node, dirs).map(|resolved| resolved.0)
    }

    /// The machine's user network as it would be started now.
    pub(super) fn user_network(
        &self,
        node: &NodeConfig,
        dirs: &Dirs,
    ) -> Result<Option<UserNetwork>> {
        self.resolve(node, dirs).map(|resolved| resolved.0.user_network)
    }
}

fn start_error(
    node: &NodeConfig,
    source: Box<dyn std::error::Error + Send + Sync>,
) -> MachineError {
    MachineError::Start { machine: node.name.clone(), source }
}

/// What a machine boots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Boot {
    kernel: PathBuf,
    initrd: Vec<PathBuf>,
    cmdline: String,
    /// The machine's configuration for the kit's initrd; other initrds do not understand it.
    overlay: Option<Arc<GuestConfig>>,
    /// The kit's store, if it has one.
    store: Option<PathBuf>,
}

impl Boot {
    /// What `node` boots, completed from `kit`.
    pub(crate) fn new(node: &NodeConfig, kit: Option<&Kit>, hosts: &[HostsEntry]) -> Option<Self> {
        if node.start_command.is_some() {
            return Some(Self::default());
        }
        // QEMU boots an unpacked kernel not on all machines.
        let kernel = match node.backend() {
            BackendKind::Firn => Kit::vmlinux,
            BackendKind::Qemu => Kit::kernel,
        };
        let cmdline =
            node.cmdline.clone().or_else(|| kit.map(|kit| kit.manifest.cmdline.clone()))?;
        let images = node.shares.iter().any(|share| share.image);
        let of_kit = |kit: &Kit| {
            std::iter::once(kit.initrd()).chain(images.then(|| kit.image_drivers())).collect()
        };
        Some(Self {
            kernel: node.kernel.clone().or_else(|| kit.map(kernel))?,
            initrd: node.initrd.clone().or_else(|| kit.map(of_kit))?,
            cmdline,
            overlay: node.initrd.is_none().then(|| Arc::new(overlay(node, hosts))),
            store: kit.and_then(Kit::store),
        })
    }

    /// Whether `node` boots anything of the kit.
    pub(crate) fn needs_kit(node: &NodeConfig) -> bool {
        if node.start_command.is_some() {
            return false;
        }
        let whole = node.kernel.is_some() && node.initrd.is_some() && node.cmdline.is_some();
        // A kit with a store is used for more than booting.
        !whole || node.kit != KitName::Micro
    }
}

/// The lines of all guests' `/etc/hosts`: each node's addresses on its first vlan.
pub(crate) fn hosts(nodes: &[NodeConfig]) -> Vec<HostsEntry> {
    let lines = |node: &NodeConfig| -> Vec<HostsEntry> {
        let Some(vlan) = node.vlans.first() else { return Vec::new() };
        let addresses = [IpAddr::V4(node.ipv4(*vlan)), IpAddr::V6(node.ipv6(*vlan))];
        addresses.map(|address| HostsEntry { address, names: vec![node.name.clone()] }).into()
    };
    nodes.iter().flat_map(lines).collect()
}

fn overlay(node: &NodeConfig, hosts: &[HostsEntry]) -> GuestConfig {
    let interface = |(at, vlan): (usize, &Number)| Interface {
        // eth0 is the user network's, as in NixOS tests.
        name: format!("eth{}", at + 1),
        mac: node.mac(*vlan).0,
        addresses: vec![(node.ipv4(*vlan).into(), 24), (node.ipv6(*vlan).into(), 64)],
        gateway: None,
    };
    // What DHCP would say, for guests without a client.
    let configured = node.kit == KitName::Micro;
    let user = node.user_network.iter().map(|_| Interface {
        name: "eth0".to_owned(),
        mac: CARD_MAC,
        addresses: configured.then_some((GUEST_V4.into(), 24)).into_iter().collect(),
        gateway: configured.then_some(GATEWAY_V4.into()),
    });
    let vlans = node.vlans.iter().enumerate().map(interface);
    let mount = |tag: &str, mount_point: &str, kind: MountKind, options: &str| Mount {
        tag: tag.to_owned(),
        mount_point: mount_point.to_owned(),
        kind,
        options: options.to_owned(),
    };
    let own = [(SHARED_TAG, "/tmp/shared"), (EXCHANGE_TAG, "/tmp/xchg")];
    let own = own.map(|(tag, at)| mount(tag, at, MountKind::Virtiofs, "rw"));
    let asked = node.shares.iter().filter_map(|share| {
        let target = share.target.as_ref()?.to_string_lossy();
        let (kind, options) = match (share.image, share.read_only) {
            (true, _) => (MountKind::Image, "ro,dax=always"),
            (false, true) => (MountKind::Virtiofs, "ro"),
            (false, false) => (MountKind::Virtiofs, "rw"),
        };
        Some(mount(&share.tag, &target, kind, options))
    });
    GuestConfig {
        hostname: node.name.clone(),
        hosts: hosts.to_vec(),
        interfaces: user.chain(vlans).collect(),
        dns: node.user_network.iter().map(|_| DNS_V4.into()).collect(),
        mounts: own.into_iter().chain(asked).collect(),
    }
}

impl Machine {
    /// What the machine would be made of if it were started now, and its disks.
    pub(super) fn devices(&self) -> Result<(NodeConfig, Vec<DiskSpec>)> {
        let dirs = self.dirs().clone();
        let (node, _) = *self.inner.source.resolve(&self.inner.node, &dirs)?;
        let disks = disks(&node, &dirs);
        Ok((node, disks))
    }
}

impl Source {
    /// Prepares the state directory for a start of the machine `known` so far, and returns the spec to build.
    pub(super) async fn spec(
        &self,
        known: &NodeConfig,
        dirs: &Dirs,
        log: &Logger,
    ) -> Result<MachineSpec> {
        let (node, boot) = &*self.resolve(known, dirs)?;
        // `release` may have removed it.
        dirs.make()?;
        for share in &node.shares {
            let missing = |name: &str, file: &Path| {
                let tag = &share.tag;
                log.info(format_args!("share {tag}: {name} is left out, there is no {file:?}"));
            };
            inputs::fill(share, missing).await?;
        }
        build_spec(node, boot, dirs).await
    }

    /// The spec without anything being copied into shares: for a start that is tried again, or a fork. The shares in
    /// `by_virtiofs` are no images.
    pub(super) async fn spec_again(
        &self,
        known: &NodeConfig,
        dirs: &Dirs,
        by_virtiofs: &Tags,
    ) -> Result<MachineSpec> {
        let (mut node, mut boot) = *self.resolve(known, dirs)?;
        for share in &mut node.shares {
            share.image &= !by_virtiofs.contains(&*share.tag);
        }
        boot.overlay = boot.overlay.map(|told| Arc::new(overlay(&node, &told.hosts)));
        build_spec(&node, &boot, dirs).await
    }

    /// Whether the guest is told how to mount a share.
    pub(super) fn mounts(&self, known: &NodeConfig, dirs: &Dirs, tag: &str) -> Result<bool> {
        let (node, boot) = &*self.resolve(known, dirs)?;
        let share = node.shares.iter().find(|share| *share.tag == *tag);
        Ok(boot.overlay.is_some() && share.is_some_and(|share| share.target.is_some()))
    }
}

async fn build_spec(node: &NodeConfig, boot: &Boot, dirs: &Dirs) -> Result<MachineSpec> {
    let mut oem_strings = inputs::credentials(node).await?;
    oem_strings.extend_from_slice(&node.oem_strings);
    let mut initrd = boot.initrd.clone();
    if let Some(overlay) = &boot.overlay {
        let bytes = kit::machine_overlay(overlay)
            .map_err(|e| MachineError::Start { machine: node.name.clone(), source: e.into() })?;
        let path = dirs.state.join("overlay.cpio");
        private::write(&path, &bytes).map_err(MachineError::file("write", &path))?;
        initrd.push(path);
    }
    let kernel = match node.backend() {
        BackendKind::Firn => unpacked(boot.kernel.clone()).await,
        BackendKind::Qemu => boot.kernel.clone(),
    };
    let own = [(SHARED_TAG, dirs.shared.clone()), (EXCHANGE_TAG, dirs.exchange())];
    let own = own
        .into_iter()
        .filter(|_| node.exchange)
        .map(|(tag, source)| Ok(ShareSpec::new(tag.try_into()?, source)));
    let own = own.chain(boot.store.as_deref().map(store)).collect::<Result<Vec<_>, _>>();
    let own = own.map_err(|error| start_error(node, error.into()))?;
    Ok(MachineSpec {
        name: node.name.clone(),
        cores: node.cores,
        memory: node.memory(),
        kernel,
        initrd,
        cmdline: boot.cmdline.clone(),
        console_ports: vec![
            ConsolePortSpec { name: None },
            ConsolePortSpec { name: Some(PORT_NAME.to_owned()) },
        ],
        nets: nets(node),
        shares: own.into_iter().chain(node.shares.iter().cloned()).collect(),
        disks: disks(node, dirs),
        rng: node.rng,
        balloon: node.balloon,
        vsock: node.vsock.clone(),
        oem_strings,
        screen: node.screen.spec(),
        keyboard: node.keyboard.unwrap_or_default(),
        tablet: node.tablet.unwrap_or_default(),
    })
}

/// What to boot in the place of a kernel.
async fn unpacked(kernel: PathBuf) -> PathBuf {
    let Some(dir) = kit::kernels_dir() else { return kernel };
    let original = kernel.clone();
    let work = move || Kernels::at(dir).unpacked(&kernel);
    // If it panicked, there is no result.
    tokio::task::spawn_blocking(work).await.unwrap_or(original)
}

/// The network cards: the user network's first, as in NixOS.
fn nets(node: &NodeConfig) -> Vec<NetSpec> {
    let user = node.user_network.iter().map(|_| Mac(CARD_MAC));
    let vlans = node.vlans.iter().map(|vlan| node.mac(*vlan));
    user.chain(vlans).map(|mac| NetSpec { mac }).collect()
}

/// The disks. Those without an image are created in the state directory, where they survive restarts of the machine.
fn disks(node: &NodeConfig, dirs: &Dirs) -> Vec<DiskSpec> {
    let placed = |(at, disk): (usize, &DiskSpec)| match disk.image.as_os_str().is_empty() {
        true => DiskSpec { image: dirs.state.join(format!("disk{at}.img")), ..disk.clone() },
        false => disk.clone(),
    };
    node.disks.iter().enumerate().map(placed).collect()
}

/// Nobody writes to it.
fn store(source: &Path) -> Result<ShareSpec, ValueError> {
    let share = ShareSpec::new(STORE_TAG.try_into()?, source.to_owned());
    Ok(ShareSpec { read_only: true, cache: CachePolicy::Always, ..share })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TestConfig;

    #[test]
    fn the_guest_is_told_names_and_addresses() {
        let text = "test_script = ''\n[nodes.b]\nvlans = [2, 1]\n[nodes.a]\n[nodes.c]\nvlans = []\n\
                    [[nodes.b.shares]]\ntag = 'etc'\nsource = '/etc'\ntarget = '/mnt'\nread_only = true\n";
        let nodes = TestConfig::from_toml(text, Path::new("t.toml")).expect("valid").nodes;
        let hosts = hosts(&nodes);
        let lines: Vec<_> =
            hosts.iter().map(|host| format!("{} {}", host.address, host.names.join(" "))).collect();
        assert_eq!(lines, ["192.168.1.1 a", "2001:db8:1::1 a", "192.168.2.2 b", "2001:db8:2::2 b"]);
        let configured = overlay(&nodes[1], &hosts);
        assert_eq!(configured.hostname, "b");
        let cards: Vec<_> = configured
            .interfaces
            .iter()
            .map(|card| (card.name.as_str(), card.mac[4], card.mac[5]))
            .collect();
        assert_eq!(cards, [("eth0", 0x34, 0x56), ("eth1", 2, 2), ("eth2", 1, 2)]);
        assert_eq!(configured.interfaces[0].gateway, Some(GATEWAY_V4.into()));
        let macs: Vec<_> = nets(&nodes[1]).iter().map(|net| net.mac.0).collect();
        assert_eq!(macs, configured.interfaces.iter().map(|card| card.mac).collect::<Vec<_>>());
        let addresses: Vec<_> = configured.interfaces[2]
            .addresses
            .iter()
            .map(|(ip, bits)| format!("{ip}/{bits}"))
            .collect();
        assert_eq!(addresses, ["192.168.1.2/24", "2001:db8:1::2/64"]);
        let mounts: Vec<_> = configured
            .mounts
            .iter()
            .map(|m| (m.tag.as_str(), m.mount_point.as_str(), m.options.as_str()))
            .collect();
        assert_eq!(
            mounts,
            [("shared", "/tmp/shared", "rw"), ("xchg", "/tmp/xchg", "rw"), ("etc", "/mnt", "ro")]
        );
    }
}
