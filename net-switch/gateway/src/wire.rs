//! Packets as bytes: taking apart what the guest sends, putting together what it is answered.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::wire::{ArpPacket, ArpRepr, EthernetAddress, Ipv4Packet, Ipv6Packet, UDP_HEADER_LEN};

use firn_net_switch::checksum::{checksum, nonzero, sum};

/// An Ethernet address.
pub(super) type Mac = [u8; 6];

/// Length of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Length of an IPv4 header without options.
pub(super) const IPV4: usize = 20;
/// Length of an IPv6 header without extensions.
pub(super) const IPV6: usize = 40;
/// Largest IP packet that goes to the guest, unless its card segments it.
pub(super) const MTU: usize = 1500;

/// Numbers of the protocols in IP (IANA).
pub(super) mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION: u8 = 60;
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// What is in a frame.
pub(super) enum Content<'a> {
    Arp(&'a [u8]),
    /// An IP packet of either version, as it says itself.
    Ip,
}

/// Addresses and content of a frame; `None` for protocols that are not supported.
pub(super) fn ethernet(frame: &[u8]) -> Option<(Mac, Mac, Content<'_>)> {
    let (head, rest) = frame.split_first_chunk::<ETHERNET>()?;
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *head;
    let content = match u16::from_be_bytes([t0, t1]) {
        ETHERTYPE_ARP => Content::Arp(rest),
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => Content::Ip,
        _ => return None,
    };
    Some(([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5], content))
}

/// Where a piece of a packet belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fragment {
    pub id: u32,
    pub offset: usize,
    pub more: bool,
}

/// An IP packet whose lengths add up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub hop_limit: u8,
    pub fragment: Option<Fragment>,
    /// There are headers between that of IPv6 and the payload.
    pub extended: bool,
    pub payload: &'a [u8],
    /// From the IP header to the end of the payload.
    pub whole: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Takes a packet apart; `None` if it contradicts itself, comes from an address that no single
    /// station can have, or is a kind of packet that is never seen on such a link.
    pub fn parse(data: &'a [u8]) -> Option<Self> {
        let packet = match data.first()? >> 4 {
            4 => Self::parse_v4(data),
            6 => Self::parse_v6(data),
            _ => None,
        }?;
        let single = match packet.source {
            IpAddr::V4(source) => !(source.is_multicast() || source.is_broadcast()),
            IpAddr::V6(source) => !source.is_multicast(),
        };
        (single && !packet.source.is_loopback()).then_some(packet)
    }

    fn parse_v4(data: &'a [u8]) -> Option<Self> {
        let packet = Ipv4Packet::new_checked(data).ok()?;
        if !packet.verify_checksum() {
            return None;
        }
        let (offset, more) = (usize::from(packet.frag_offset()), packet.more_frags());
        let fragment = Fragment { id: u32::from(packet.ident()), offset, more };
        Some(Self {
            source: packet.src_addr().into(),
            destination: packet.dst_addr().into(),
            protocol: packet.next_header().into(),
            hop_limit: packet.hop_limit(),
            fragment: (more || offset != 0).then_some(fragment),
            extended: false,
            payload: packet.payload(),
            whole: &data[..usize::from(packet.total_len())],
        })
    }

    fn parse_v6(data: &'a [u8]) -> Option<Self> {
        let packet = Ipv6Packet::new_checked(data).ok()?;
        let whole = &data[..packet.total_len()];
        let (mut next, mut payload) = (u8::from(packet.next_header()), &whole[IPV6..]);
        let mut fragment = None;
        let mut extended = false;
        // Ends, as each step takes at least 8 bytes away.
        loop {
            let length = match next {
                protocol::HOP_BY_HOP | protocol::DESTINATION | protocol::ROUTING => {
                    // Segments left: the packet is for another host.
                    if next == protocol::ROUTING && *payload.get(3)? != 0 {
                        return None;
                    }
                    (usize::from(*payload.get(1)?) + 1) * 8
                }
                protocol::FRAGMENT if fragment.is_none() => {
                    let [_, _, o0, o1, i0, i1, i2, i3] = *payload.first_chunk()?;
                    let field = u16::from_be_bytes([o0, o1]);
                    let offset = usize::from(field & !7);
                    let id = u32::from_be_bytes([i0, i1, i2, i3]);
                    fragment = Some(Fragment { id, offset, more: field & 1 != 0 });
                    8
                }
                _ => break,
            };
            next = *payload.first()?;
            payload = payload.get(length..)?;
            extended = true;
            // What follows the fragment header may be in another fragment.
            if fragment.is_some() {
                break;
            }
        }
        Some(Self {
            source: packet.src_addr().into(),
            destination: packet.dst_addr().into(),
            protocol: next,
            hop_limit: packet.hop_limit(),
            // A fragment that is the whole packet is not one (RFC 6946).
            fragment: fragment.filter(|f| f.more || f.offset != 0),
            extended,
            payload,
            whole,
        })
    }

    /// Whether the checksum in the payload is right, for protocols that have one.
    pub fn checksum_fits(&self) -> bool {
        match self.protocol {
            protocol::ICMP => checksum(0, self.payload) == 0,
            // Zero: not computed. Only IPv4 allows that (RFC 8200, 8.1).
            protocol::UDP
                if self.source.is_ipv4() && self.payload.get(6..8).is_some_and(|f| f == [0, 0]) =>
            {
                true
            }
            protocol::TCP | protocol::UDP | protocol::ICMPV6 => {
                let pseudo =
                    pseudo_sum(self.source, self.destination, self.protocol, self.payload.len());
                checksum(pseudo, self.payload) == 0
            }
            _ => true,
        }
    }
}

/// A datagram from the guest: both ends and what it carries.
pub(super) fn udp<'a>(packet: &Packet<'a>) -> Option<(SocketAddr, SocketAddr, &'a [u8])> {
    let [s0, s1, d0, d1, l0, l1, _, _] = *packet.payload.first_chunk()?;
    let length = usize::from(u16::from_be_bytes([l0, l1]));
    let data = packet.payload.get(UDP_HEADER_LEN..length)?;
    let source = SocketAddr::new(packet.source, u16::from_be_bytes([s0, s1]));
    let destination = SocketAddr::new(packet.destination, u16::from_be_bytes([d0, d1]));
    (destination.port() != 0).then_some((source, destination, data))
}

/// Adds up the pseudo-header of TCP, UDP and ICMPv6 (RFC 9293, 3.1; RFC 8200, 8.1).
pub(super) fn pseudo_sum(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u64 {
    let address = |address| match address {
        IpAddr::V4(address) => sum(&address.octets()),
        IpAddr::V6(address) => sum(&address.octets()),
    };
    // No packet is longer than 65,575 bytes.
    address(source) + address(destination) + u64::from(protocol) + length as u64
}

/// The pseudo-header's sum, as the checksum field holds it when the checksum is left to the receiver (virtio 1.2,
/// 5.1.6.2).
pub(super) fn partial_checksum(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    length: usize,
) -> u16 {
    !checksum(pseudo_sum(source, destination, protocol, length), &[])
}

/// Sender and receiver of a frame on the link.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hop {
    pub source: Mac,
    pub destination: Mac,
}

impl Hop {
    /// The Ethernet header for a packet to `address`.
    pub fn header(self, address: IpAddr) -> [u8; ETHERNET] {
        let ethertype = if address.is_ipv4() { ETHERTYPE_IPV4 } else { ETHERTYPE_IPV6 };
        self.with_ethertype(ethertype)
    }

    fn with_ethertype(self, ethertype: u16) -> [u8; ETHERNET] {
        let mut header = [0; ETHERNET];
        header[..6].copy_from_slice(&self.destination);
        header[6..12].copy_from_slice(&self.source);
        header[12..].copy_from_slice(&ethertype.to_be_bytes());
        header
    }
}

/// The fields of an IP header other than the length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Envelope {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub hop_limit: u8,
}

impl Envelope {
    pub fn new(source: IpAddr, destination: IpAddr, protocol: u8) -> Self {
        // The default of RFC 1700.
        Self { source, destination, protocol, hop_limit: 64 }
    }

    /// Length of the header.
    pub fn header_len(&self) -> usize {
        if self.source.is_ipv4() { IPV4 } else { IPV6 }
    }

    /// Appends a header for `length` bytes. `flags` is the second word of an IPv4 header: what
    /// there is to say about fragments. `None` if there is no such packet: too long, or of two
    /// families.
    pub fn push_header(&self, to: &mut Vec<u8>, length: usize, flags: u32) -> Option<()> {
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let total = u16::try_from(IPV4 + length).ok()?;
                let at = to.len();
                to.extend([0x45, 0]);
                to.extend(total.to_be_bytes());
                to.extend(flags.to_be_bytes());
                to.extend([self.hop_limit, self.protocol, 0, 0]);
                to.extend(source.octets());
                to.extend(destination.octets());
                let sum = checksum(0, &to[at..]);
                to[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                to.extend([0x60, 0, 0, 0]);
                to.extend(u16::try_from(length).ok()?.to_be_bytes());
                to.extend([self.protocol, self.hop_limit]);
                to.extend(source.octets());
                to.extend(destination.octets());
            }
            _ => return None,
        }
        Some(())
    }

    /// A frame with `payload` in an IP packet of its own.
    pub fn frame(&self, hop: Hop, payload: &[u8]) -> Option<Vec<u8>> {
        let mut data = Vec::with_capacity(ETHERNET + IPV6 + payload.len());
        data.extend(hop.header(self.destination));
        self.push_header(&mut data, payload.len(), 0)?;
        data.extend(payload);
        Some(data)
    }
}

/// Puts the checksum of a whole packet into its payload at `offset`.
pub(super) fn complete(envelope: &Envelope, payload: &mut [u8], offset: usize) {
    payload[offset..offset + 2].fill(0);
    let before = match envelope.protocol {
        protocol::ICMP => 0,
        protocol => pseudo_sum(envelope.source, envelope.destination, protocol, payload.len()),
    };
    let sum = nonzero(checksum(before, payload));
    payload[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
}

/// The header and data of a datagram, with its checksum. `None` if it is too long.
pub(super) fn datagram(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER_LEN + data.len()).ok()?;
    let mut payload = Vec::with_capacity(usize::from(length));
    payload.extend(from.port().to_be_bytes());
    payload.extend(to.port().to_be_bytes());
    payload.extend(length.to_be_bytes());
    payload.extend([0, 0]);
    payload.extend(data);
    complete(&Envelope::new(from.ip(), to.ip(), protocol::UDP), &mut payload, 6);
    Some(payload)
}

/// An ARP request for an IPv4 address, or a host announcing its own.
pub(super) struct ArpRequest {
    pub sender: (Ipv4Addr, Mac),
    pub target: Ipv4Addr,
}

impl ArpRequest {
    pub fn parse(data: &[u8]) -> Option<Self> {
        let packet = ArpPacket::new_checked(data).ok()?;
        let ArpRepr::EthernetIpv4 {
            operation: smoltcp::wire::ArpOperation::Request,
            source_hardware_addr: EthernetAddress(mac),
            source_protocol_addr,
            target_protocol_addr,
            ..
        } = ArpRepr::parse(&packet).ok()?
        else {
            return None;
        };
        Some(Self { sender: (source_protocol_addr, mac), target: target_protocol_addr })
    }

    /// The answer: `mac` has the address.
    pub fn reply(&self, mac: Mac) -> Vec<u8> {
        let (sender, sender_mac) = self.sender;
        let reply = ArpRepr::EthernetIpv4 {
            operation: smoltcp::wire::ArpOperation::Reply,
            source_hardware_addr: EthernetAddress(mac),
            source_protocol_addr: self.target,
            target_hardware_addr: EthernetAddress(sender_mac),
            target_protocol_addr: sender,
        };
        let hop = Hop { source: mac, destination: sender_mac };
        let mut data = hop.with_ethertype(ETHERTYPE_ARP).to_vec();
        data.resize(ETHERNET + reply.buffer_len(), 0);
        reply.emit(&mut ArpPacket::new_unchecked(&mut data[ETHERNET..]));
        data
    }
}

/// The group address of an IPv6 multicast group (RFC 2464, 7).
pub(super) fn multicast_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

#[cfg(test)]
mod tests;
