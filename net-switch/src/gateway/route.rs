//! Where what the guest sends shall go.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::icmp::Reason;
use super::{
    DNS_V4, DNS_V6, GATEWAY_LINK_LOCAL, GATEWAY_V4, GATEWAY_V6, Inner, PREFIX_V4, PREFIX_V6,
    Protocol, dns,
};
use crate::lock;

/// Where a packet for some address goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// To a socket that the host reaches.
    Host(SocketAddr),
    /// To whoever knows names.
    Dns,
    /// The guest is told that it does not.
    Unreachable(Reason),
    /// Into the void, as on a cable where nobody has the address.
    Nowhere,
}

impl Inner {
    /// Where the guest gets when it addresses `remote` by `protocol`, or by ICMP.
    pub(super) fn target(&self, protocol: Option<Protocol>, remote: SocketAddr) -> Target {
        if let Some(protocol) = protocol
            && let Some(host) = lock(&self.guest_forwards).get(&(protocol, remote))
        {
            return Target::Host(*host);
        }
        let address = remote.ip();
        if address == IpAddr::V4(DNS_V4) || address == IpAddr::V6(DNS_V6) {
            let asks = protocol.is_some() && remote.port() == dns::PORT;
            return if asks { Target::Dns } else { Target::Unreachable(Reason::Port) };
        }
        if never_sent(address) {
            return Target::Nowhere;
        }
        if self.restrict {
            return Target::Unreachable(Reason::Prohibited);
        }
        match address {
            IpAddr::V4(GATEWAY_V4) => Target::Host((Ipv4Addr::LOCALHOST, remote.port()).into()),
            IpAddr::V6(GATEWAY_V6) => Target::Host((Ipv6Addr::LOCALHOST, remote.port()).into()),
            _ if on_link(address) => Target::Unreachable(Reason::Host),
            _ => Target::Host(remote),
        }
    }

    /// Whether `address` is one that this end of the cable has.
    pub(super) fn answers_for(&self, address: IpAddr) -> bool {
        let own = match address {
            IpAddr::V4(address) => [GATEWAY_V4, DNS_V4].contains(&address),
            IpAddr::V6(address) => [GATEWAY_V6, DNS_V6, GATEWAY_LINK_LOCAL].contains(&address),
        };
        let forwarded = || lock(&self.guest_forwards).keys().any(|(_, at)| at.ip() == address);
        own || on_link(address) && forwarded()
    }
}

/// Whether a station on the guest's network would have this address.
fn on_link(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[..3] == PREFIX_V4.octets()[..3],
        IpAddr::V6(address) => {
            address.octets()[..8] == PREFIX_V6.octets()[..8] || address.is_unicast_link_local()
        }
    }
}

/// Whether no router passes on what is sent to this address. To the host's own sockets some of
/// these mean the host itself.
fn never_sent(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let [first, .., last] = address.octets();
            first == 0
                || first == 127
                // 224 and up: groups, and 240/4 with the broadcast address.
                || first >= 224
                || on_link(address.into()) && last == 255
        }
        IpAddr::V6(address) => {
            address.is_multicast()
                || address.is_unspecified()
                || address.is_loopback()
                || address.to_ipv4_mapped().is_some()
        }
    }
}

#[cfg(test)]
mod tests;
