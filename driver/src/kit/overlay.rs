//! A machine's own configuration on top of its kit: a second archive behind the initrd.

use std::net::IpAddr;

use thiserror::Error;

use super::archive::Archive;

/// The configuration of one machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestConfig {
    /// Its host name.
    pub hostname: String,
    /// The lines of `/etc/hosts`, besides those of localhost.
    pub hosts: Vec<HostsEntry>,
    /// Its network cards.
    pub interfaces: Vec<Interface>,
    /// Its DNS servers.
    pub dns: Vec<IpAddr>,
    /// What it mounts at boot, in this order.
    pub mounts: Vec<Mount>,
}

/// A line of `/etc/hosts`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostsEntry {
    /// The address.
    pub address: IpAddr,
    /// Its names.
    pub names: Vec<String>,
}

/// A network card, identified by its hardware address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name, such as `eth1`: at most 15 bytes.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its addresses, each with its prefix length.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The default gateway.
    pub gateway: Option<IpAddr>,
}

/// A share mounted at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The share's tag.
    pub tag: String,
    /// The mount point; created if missing.
    pub mount_point: String,
    /// How it comes into the guest.
    pub kind: MountKind,
    /// Mount options, such as `ro`; may be empty.
    pub options: String,
}

/// How a share comes into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountKind {
    /// By virtio-fs.
    Virtiofs,
    /// As an image in memory, whose label is the tag.
    Image,
}

/// A value that the guest cannot use.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("{what} {value:?} {problem}")]
pub struct OverlayError {
    what: &'static str,
    value: String,
    problem: &'static str,
}

/// Builds the archive that configures a machine of the micro kit: `/etc/hostname`, `/etc/hosts`, `/etc/resolv.conf`,
/// `/etc/firn/network` (lines `NAME MAC ADDRESS/PREFIX... via=GATEWAY`) and `/etc/firn/mounts` (lines
/// `TAG MOUNTPOINT TYPE OPTIONS`), which the kit's boot script reads.
///
/// # Errors
/// If a value is empty, too long, or has characters that those files cannot hold.
pub fn machine_overlay(config: &GuestConfig) -> Result<Vec<u8>, OverlayError> {
    let mut archive = Archive::new();
    archive.dir("etc", 0o755);
    archive.dir("etc/firn", 0o755);
    // HOST_NAME_MAX
    let hostname = word("host name", &config.hostname, 64)?;
    archive.file("etc/hostname", 0o644, format!("{hostname}\n").as_bytes());
    archive.file("etc/hosts", 0o644, hosts(&config.hosts)?.as_bytes());
    let resolv: String = config.dns.iter().map(|dns| format!("nameserver {dns}\n")).collect();
    archive.file("etc/resolv.conf", 0o644, resolv.as_bytes());
    archive.file("etc/firn/network", 0o644, network(&config.interfaces)?.as_bytes());
    archive.file("etc/firn/mounts", 0o644, mounts(&config.mounts)?.as_bytes());
    Ok(archive.finish())
}

fn hosts(hosts: &[HostsEntry]) -> Result<String, OverlayError> {
    let mut text = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n".to_owned();
    for host in hosts {
        let names = host
            .names
            .iter()
            .map(|name| word("host name", name, 253))
            .collect::<Result<Vec<_>, _>>()?;
        text.push_str(&format!("{} {}\n", host.address, names.join(" ")));
    }
    Ok(text)
}

fn network(interfaces: &[Interface]) -> Result<String, OverlayError> {
    let mut text = String::new();
    // The last first: see the script.
    for interface in interfaces.iter().rev() {
        // IFNAMSIZ, less the final zero
        let name = word("interface name", &interface.name, 15)?;
        if name.contains('/') {
            return Err(OverlayError {
                what: "interface name",
                value: name.to_owned(),
                problem: "has a slash",
            });
        }
        let [a, b, c, d, e, f] = interface.mac;
        let mut addresses = String::new();
        for (address, prefix) in &interface.addresses {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            if *prefix > bits {
                let value = format!("{address}/{prefix}");
                return Err(OverlayError {
                    what: "address",
                    value,
                    problem: "has too long a prefix",
                });
            }
            addresses.push_str(&format!(" {address}/{prefix}"));
        }
        if let Some(gateway) = interface.gateway {
            addresses.push_str(&format!(" via={gateway}"));
        }
        text.push_str(&format!(
            "{name} {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}{addresses}\n"
        ));
    }
    Ok(text)
}

fn mounts(mounts: &[Mount]) -> Result<String, OverlayError> {
    let mut text = String::new();
    for mount in mounts {
        if !mount.mount_point.starts_with('/') {
            let value = mount.mount_point.clone();
            return Err(OverlayError {
                what: "mount point",
                value,
                problem: "does not start with a slash",
            });
        }
        let tag = escaped("share tag", &mount.tag)?;
        let mount_point = escaped("mount point", &mount.mount_point)?;
        let options = if mount.options.is_empty() {
            "rw"
        } else {
            word("mount options", &mount.options, 4096)?
        };
        let kind = match mount.kind {
            MountKind::Virtiofs => "virtiofs",
            MountKind::Image => "erofs",
        };
        text.push_str(&format!("{tag} {mount_point} {kind} {options}\n"));
    }
    Ok(text)
}

/// Returns `value` if it is one word: not empty, at most `max` bytes, without whitespace, controls or backslashes.
fn word<'a>(what: &'static str, value: &'a str, max: usize) -> Result<&'a str, OverlayError> {
    let problem = if value.is_empty() {
        "is empty"
    } else if value.len() > max {
        "is too long"
    } else if value.contains(|c: char| c.is_whitespace() || c.is_control() || c == '\\') {
        "has invalid characters"
    } else {
        return Ok(value);
    };
    Err(OverlayError { what, value: value.to_owned(), problem })
}

/// Escapes `value` for the shell's `read` as one word: a backslash before each blank and backslash.
fn escaped(what: &'static str, value: &str) -> Result<String, OverlayError> {
    if value.is_empty() || value.contains(['\n', '\0']) {
        let problem = "is empty or has a line break";
        return Err(OverlayError { what, value: value.to_owned(), problem });
    }
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, ' ' | '\t' | '\\') {
            text.push('\\');
        }
        text.push(c);
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
