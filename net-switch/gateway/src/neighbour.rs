//! Neighbour discovery (RFC 4861): who has an address, and which router there is.

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Duration;
use smoltcp::wire::{
    Icmpv6Packet, Icmpv6Repr, NdiscNeighborFlags, NdiscPrefixInfoFlags, NdiscPrefixInformation,
    NdiscRepr, NdiscRouterFlags, RawHardwareAddress,
};

use super::wire::{Envelope, Mac, Packet, complete, multicast_mac, protocol};
use super::{DNS_V6, GATEWAY_LINK_LOCAL, GATEWAY_MAC, Inner, PREFIX_V6};

/// All nodes on the link (RFC 4291, 2.7.1).
pub(super) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Hop limit of neighbour discovery: a packet from outside the link cannot have it.
const HOP_LIMIT: u8 = 255;
/// How long the router is one, in seconds: the field's largest value. It is renewed when the guest asks, and in any
/// case every [`super::ADVERTISEMENT_INTERVAL`].
const ROUTER_LIFETIME: u16 = u16::MAX;
/// "For ever" as a lifetime, in seconds.
const FOR_EVER: u32 = u32::MAX;
/// Option with the addresses of DNS servers (RFC 8106, 5.1); smoltcp has no name for it.
const RDNSS: u8 = 25;

// Kinds of message (RFC 4861, 4).
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const REDIRECT: u8 = 137;

impl Inner {
    /// Answers a solicitation, if this is one. Returns whether it was part of neighbour discovery.
    pub(super) fn neighbour_discovery(&self, packet: &Packet<'_>, from: Mac) -> bool {
        let IpAddr::V6(source) = packet.source else { return false };
        let [kind, _, _, _, _, _, _, _, body @ ..] = packet.payload else { return false };
        if !matches!(*kind, ROUTER_SOLICITATION..=REDIRECT) {
            return false;
        }
        let on_link = packet.hop_limit == HOP_LIMIT;
        match (*kind, body.first_chunk::<16>()) {
            (ROUTER_SOLICITATION, _) if on_link => self.advertise_router(source, from),
            (NEIGHBOUR_SOLICITATION, Some(target)) if on_link => {
                let target = Ipv6Addr::from(*target);
                if self.answers_for(target.into()) {
                    self.advertise_neighbour(source, target, from);
                }
            }
            _ => {}
        }
        true
    }

    fn advertise_neighbour(&self, to: Ipv6Addr, target_addr: Ipv6Addr, mac: Mac) {
        // Who asks from no address at all wants to know whether this one is taken: all are told.
        let (to, mac, solicited) = if to.is_unspecified() {
            (ALL_NODES, multicast_mac(ALL_NODES), NdiscNeighborFlags::empty())
        } else {
            self.link.learn(to.into(), mac);
            (to, mac, NdiscNeighborFlags::SOLICITED)
        };
        let advertisement = NdiscRepr::NeighborAdvert {
            flags: NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE | solicited,
            target_addr,
            lladdr: Some(RawHardwareAddress::from_bytes(&GATEWAY_MAC)),
        };
        self.send_ndisc(target_addr, to, mac, advertisement, &[]);
    }

    /// Tells a station, or all, what network this is.
    pub(super) fn advertise_router(&self, to: Ipv6Addr, mac: Mac) {
        let (to, mac) =
            if to.is_unspecified() { (ALL_NODES, multicast_mac(ALL_NODES)) } else { (to, mac) };
        let advertisement = NdiscRepr::RouterAdvert {
            hop_limit: 64,
            flags: NdiscRouterFlags::empty(),
            router_lifetime: Duration::from_secs(u64::from(ROUTER_LIFETIME)),
            reachable_time: Duration::ZERO,
            retrans_time: Duration::ZERO,
            lladdr: Some(RawHardwareAddress::from_bytes(&GATEWAY_MAC)),
            mtu: None,
            prefix_info: Some(NdiscPrefixInformation {
                prefix_len: 64,
                flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
                valid_lifetime: Duration::from_secs(u64::from(FOR_EVER)),
                preferred_lifetime: Duration::from_secs(u64::from(FOR_EVER)),
                prefix: PREFIX_V6,
            }),
        };
        // Length in units of eight bytes, two reserved, a lifetime, one address.
        let mut dns = vec![RDNSS, 3, 0, 0];
        dns.extend(FOR_EVER.to_be_bytes());
        dns.extend(DNS_V6.octets());
        self.send_ndisc(GATEWAY_LINK_LOCAL, to, mac, advertisement, &dns);
    }

    fn send_ndisc(
        &self,
        from: Ipv6Addr,
        to: Ipv6Addr,
        mac: Mac,
        message: NdiscRepr<'_>,
        options: &[u8],
    ) {
        let message = Icmpv6Repr::Ndisc(message);
        let mut payload = vec![0; message.buffer_len()];
        let mut packet = Icmpv6Packet::new_unchecked(&mut payload[..]);
        message.emit(&from, &to, &mut packet, &ChecksumCapabilities::ignored());
        payload.extend(options);
        let envelope = Envelope {
            hop_limit: HOP_LIMIT,
            ..Envelope::new(from.into(), to.into(), protocol::ICMPV6)
        };
        complete(&envelope, &mut payload, 2);
        self.link.send(mac, &envelope, &payload);
    }
}
