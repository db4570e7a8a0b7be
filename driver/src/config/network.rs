//! The user network of a machine, as described in files.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use firn_gateway::{Forward, GUEST_V4, Protocol, Side};
use firn_vmm::spec::ValueError;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A machine's connection to the host and beyond: the guest's eth0.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UserNetwork {
    /// Only forwarded ports are reachable.
    pub restrict: bool,
    /// Maps the gateway's addresses to the host's loopback.
    pub host_loopback: bool,
    /// Forwarded ports.
    pub forward_ports: Vec<PortForward>,
    /// QEMU user network options that override it, as in `QEMU_NET_OPTS`.
    pub qemu_net_opts: String,
}

impl Default for UserNetwork {
    fn default() -> Self {
        Self {
            restrict: false,
            host_loopback: true,
            forward_ports: Vec::new(),
            qemu_net_opts: String::new(),
        }
    }
}

/// A forwarded port, with NixOS's names (`virtualisation.forwardPorts`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Keys")]
pub struct PortForward(pub Forward);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    #[serde(default)]
    from: From,
    #[serde(default)]
    proto: Proto,
    host: End,
    guest: End,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum From {
    #[default]
    Host,
    Guest,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Proto {
    #[default]
    Tcp,
    Udp,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct End {
    address: Option<IpAddr>,
    port: u16,
}

impl TryFrom<Keys> for PortForward {
    type Error = ValueError;

    /// Fills in defaults: the host's loopback and the guest's own address.
    fn try_from(keys: Keys) -> Result<Self, ValueError> {
        let Keys { from, proto, host, guest } = keys;
        let from_guest = from == From::Guest;
        if guest.port == 0 {
            return Err(ValueError::new("`guest.port` 0", "1 to 65535"));
        }
        if from_guest && host.port == 0 {
            return Err(ValueError::new("`host.port` 0 with `from = \"guest\"`", "1 to 65535"));
        }
        let guest_address = match guest.address {
            Some(address) => address,
            None if from_guest => {
                return Err(ValueError::new(
                    "`from = \"guest\"` without `guest.address`",
                    "an address that the guest uses, such as 10.0.2.100",
                ));
            }
            None => GUEST_V4.into(),
        };
        let host_address = host.address.unwrap_or(Ipv4Addr::LOCALHOST.into());
        Ok(Self(Forward {
            from: if from_guest { Side::Guest } else { Side::Host },
            protocol: match proto {
                Proto::Tcp => Protocol::Tcp,
                Proto::Udp => Protocol::Udp,
            },
            host: SocketAddr::new(host_address, host.port),
            guest: SocketAddr::new(guest_address, guest.port),
        }))
    }
}

/// Reads `true`, `false`, or the network's keys.
pub(super) fn user_network<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<UserNetwork>, D::Error> {
    struct Wanted;

    impl<'de> Visitor<'de> for Wanted {
        type Value = Option<UserNetwork>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("true, false, or a table with `restrict` and `forward_ports`")
        }

        fn visit_bool<E>(self, wanted: bool) -> Result<Self::Value, E> {
            Ok(wanted.then(UserNetwork::default))
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            UserNetwork::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }

    deserializer.deserialize_any(Wanted)
}
