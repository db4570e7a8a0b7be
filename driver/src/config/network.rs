//! The user network of a machine, as files describe it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use firn_net_switch::gateway::{Forward, GUEST_V4, Protocol, Side};
use serde::Deserialize;

/// A machine's way to the host and beyond: the guest's eth0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserNetwork {
    /// Nothing gets out but to forwarded ports.
    pub restrict: bool,
    /// The gateway's addresses lead to the host's loopback.
    pub host_loopback: bool,
    /// Ports that lead to the other side.
    pub forwards: Vec<Forward>,
}

impl Default for UserNetwork {
    fn default() -> Self {
        Self { restrict: false, host_loopback: true, forwards: Vec::new() }
    }
}

/// A forwarded port, with NixOS's names (`virtualisation.forwardPorts`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawForward {
    #[serde(default)]
    from: RawSide,
    #[serde(default)]
    proto: RawProtocol,
    host: RawEnd,
    guest: RawEnd,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawSide {
    #[default]
    Host,
    Guest,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawProtocol {
    #[default]
    Tcp,
    Udp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEnd {
    address: Option<IpAddr>,
    port: u16,
}

/// A forward that makes no sense: the key within it, and what is wrong.
pub(super) struct SenselessForward {
    pub(super) key: &'static str,
    pub(super) problem: &'static str,
}

impl RawForward {
    /// The forward with what was left out: the host's loopback and the guest's own address.
    pub(super) fn forward(&self) -> Result<Forward, SenselessForward> {
        let senseless = |key, problem| Err(SenselessForward { key, problem });
        let (host, guest) = (self.host, self.guest);
        let from_guest = self.from == RawSide::Guest;
        if guest.port == 0 {
            return senseless("guest.port", "allowed: 1 to 65535");
        }
        if from_guest && host.port == 0 {
            return senseless("host.port", "allowed with `from = \"guest\"`: 1 to 65535");
        }
        let guest_address = match guest.address {
            Some(address) => address,
            None if from_guest => {
                return senseless(
                    "guest.address",
                    "`from = \"guest\"` needs an address that the guest uses, such as 10.0.2.100",
                );
            }
            None => GUEST_V4.into(),
        };
        let host_address = host.address.unwrap_or(Ipv4Addr::LOCALHOST.into());
        Ok(Forward {
            from: if from_guest { Side::Guest } else { Side::Host },
            protocol: match self.proto {
                RawProtocol::Tcp => Protocol::Tcp,
                RawProtocol::Udp => Protocol::Udp,
            },
            host: SocketAddr::new(host_address, host.port),
            guest: SocketAddr::new(guest_address, guest.port),
        })
    }
}
