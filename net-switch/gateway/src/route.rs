//! Where the guest's packets go.

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
    /// To a DNS resolver.
    Dns,
    /// Refused, with an error to the guest.
    Unreachable(Reason),
    /// Dropped, as on a link where no station has the address.
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
        if never_sent(address) {
            return Target::Nowhere;
        }
        // Questions leave the host, too, and what is asked for can say anything.
        if self.restrict {
            return Target::Unreachable(Reason::Prohibited);
        }
        if address == IpAddr::V4(DNS_V4) || address == IpAddr::V6(DNS_V6) {
            let asks = protocol.is_some() && remote.port() == dns::PORT;
            return if asks { Target::Dns } else { Target::Unreachable(Reason::Port) };
        }
        let loopback = match address {
            IpAddr::V4(GATEWAY_V4) => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            IpAddr::V6(GATEWAY_V6) => Some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
            _ => None,
        };
        match loopback {
            Some(_) if !self.host_loopback => Target::Unreachable(Reason::Prohibited),
            Some(loopback) => Target::Host((loopback, remote.port()).into()),
            None if on_link(address) => Target::Unreachable(Reason::Host),
            None if link_local(address) => Target::Unreachable(Reason::Prohibited),
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

/// Whether `address` is one of the link that the host is on, which is not the guest's: what answers there, such as a
/// cloud's metadata service at 169.254.169.254, takes who asks for the host.
fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => {
            address.is_unicast_link_local()
                || embedded(address).is_some_and(|inner| inner.is_link_local())
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
                || embedded(address).is_some_and(|inner| never_sent(inner.into()))
        }
    }
}

/// The IPv4 address to which a host with a translator or a tunnel would pass on what is sent to
/// `address`.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = address.segments();
    let (high, low) = match [a, b, c, d, e, f] {
        // Compatible (RFC 4291, 2.5.5.1), translated (RFC 2765), and what NAT64 has: its common
        // prefix (RFC 6052) and the local ones (RFC 8215).
        [0, 0, 0, 0, 0, 0] | [0, 0, 0, 0, 0xffff, 0] | [0x64, 0xff9b, 0, 0, 0, 0] => (g, h),
        [0x64, 0xff9b, 1, ..] => (g, h),
        // 6to4 (RFC 3056).
        [0x2002, high, low, ..] => (high, low),
        // ISATAP (RFC 5214).
        [.., 0 | 0x200, 0x5efe] => (g, h),
        _ => return None,
    };
    Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
}

#[cfg(test)]
mod tests;
