//! Echo requests, and telling the guest what cannot be reached.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};

use super::route::Target;
use super::udp::{DatagramKey, Datagrams, Kind};
use super::wire::{Envelope, Mac, Packet, complete, protocol};
use super::{GATEWAY_V4, GATEWAY_V6, Inner};

// Kinds of message: RFC 792, RFC 4443.
const ECHO_REPLY_V4: u8 = 0;
const UNREACHABLE_V4: u8 = 3;
const ECHO_REQUEST_V4: u8 = 8;
const UNREACHABLE_V6: u8 = 1;
const PARAMETER_PROBLEM_V6: u8 = 4;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Most of a packet that an error quotes, so that it fits everywhere (RFC 1812, 4.3.2.3; RFC 4443,
/// 2.4).
const QUOTE_V4: usize = 576 - 20 - 8;
const QUOTE_V6: usize = 1280 - 40 - 8;

/// Why something is not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// There is no way to the host.
    Host,
    /// Nobody listens.
    Port,
    /// Nobody speaks that protocol.
    Protocol,
    /// It is not allowed.
    Prohibited,
}

impl Inner {
    /// Takes an ICMP packet.
    pub(super) fn icmp(self: &Arc<Self>, packet: &Packet<'_>, from: Mac) {
        if packet.protocol == protocol::ICMPV6 && self.neighbour_discovery(packet, from) {
            return;
        }
        let request =
            if packet.protocol == protocol::ICMP { ECHO_REQUEST_V4 } else { ECHO_REQUEST_V6 };
        // Type, code, checksum, identifier, sequence number.
        let [kind, 0, _, _, i0, i1, _, _, ..] = *packet.payload else { return };
        if kind != request {
            return;
        }
        if self.answers_for(packet.destination) {
            self.echo(packet.source, packet.destination, packet.payload, from);
            return;
        }
        let identifier = u16::from_be_bytes([i0, i1]);
        let remote = SocketAddr::new(packet.destination, 0);
        match self.target(None, remote) {
            Target::Host(address) => {
                let guest = SocketAddr::new(packet.source, identifier);
                let key = DatagramKey { kind: Kind::Echo, guest, remote };
                self.send_echo(key, address, packet, from);
            }
            Target::Unreachable(reason) => self.unreachable(packet.whole, reason, from),
            Target::Dns | Target::Nowhere => {}
        }
    }

    /// Answers an echo request as `own`.
    pub(super) fn echo(&self, to: IpAddr, own: IpAddr, request: &[u8], mac: Mac) {
        let (number, reply) = if own.is_ipv4() {
            (protocol::ICMP, ECHO_REPLY_V4)
        } else {
            (protocol::ICMPV6, ECHO_REPLY_V6)
        };
        let envelope = Envelope::new(own, to, number);
        let mut payload = request.to_vec();
        payload[0] = reply;
        complete(&envelope, &mut payload, 2);
        self.link.send(mac, &envelope, &payload);
    }

    fn send_echo(
        self: &Arc<Self>,
        key: DatagramKey,
        to: SocketAddr,
        packet: &Packet<'_>,
        from: Mac,
    ) {
        let sent = self.send_by(key, to, from, packet.payload, || echo_socket(to));
        if let Err(error) = sent {
            // Without the right to make such a socket that is all that can be said.
            self.unreachable(packet.whole, Datagrams::reason(&error, Reason::Prohibited), from);
        }
    }

    /// Passes on what an echo socket received: the host has put in an identifier of its own.
    pub(super) fn echo_reply(&self, key: &DatagramKey, reply: &[u8], mac: Mac) {
        let (number, kind) = if key.guest.is_ipv4() {
            (protocol::ICMP, ECHO_REPLY_V4)
        } else {
            (protocol::ICMPV6, ECHO_REPLY_V6)
        };
        if reply.len() < 8 || reply[0] != kind {
            return;
        }
        let envelope = Envelope::new(key.remote.ip(), key.guest.ip(), number);
        let mut payload = reply.to_vec();
        payload[4..6].copy_from_slice(&key.guest.port().to_be_bytes());
        complete(&envelope, &mut payload, 2);
        self.link.send(mac, &envelope, &payload);
    }

    /// Tells the guest that `packet`, an IP packet of its own, does not get where it should.
    pub(super) fn unreachable(&self, packet: &[u8], reason: Reason, mac: Mac) {
        let Some(packet) = Packet::parse(packet) else { return };
        let v4 = packet.source.is_ipv4();
        let (kind, code, pointer) = match (v4, reason) {
            (true, Reason::Host) => (UNREACHABLE_V4, 1, 0),
            (true, Reason::Protocol) => (UNREACHABLE_V4, 2, 0),
            (true, Reason::Port) => (UNREACHABLE_V4, 3, 0),
            (true, Reason::Prohibited) => (UNREACHABLE_V4, 13, 0),
            (false, Reason::Prohibited) => (UNREACHABLE_V6, 1, 0),
            (false, Reason::Host) => (UNREACHABLE_V6, 3, 0),
            (false, Reason::Port) => (UNREACHABLE_V6, 4, 0),
            // "Unrecognized next header", which is the seventh byte.
            (false, Reason::Protocol) => (PARAMETER_PROBLEM_V6, 1, 6),
        };
        let (own, number, quote): (IpAddr, _, _) = if v4 {
            (GATEWAY_V4.into(), protocol::ICMP, QUOTE_V4)
        } else {
            (GATEWAY_V6.into(), protocol::ICMPV6, QUOTE_V6)
        };
        let mut payload = vec![kind, code, 0, 0, 0, 0, 0, pointer];
        payload.extend(&packet.whole[..packet.whole.len().min(quote)]);
        let envelope = Envelope::new(own, packet.source, number);
        complete(&envelope, &mut payload, 2);
        self.link.send(mac, &envelope, &payload);
    }
}

/// A socket that may send echo requests and nothing else; Linux lets users make one if
/// `net.ipv4.ping_group_range` includes them.
fn echo_socket(to: SocketAddr) -> std::io::Result<Socket> {
    match to {
        SocketAddr::V4(_) => Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)),
        SocketAddr::V6(_) => Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::ICMPV6)),
    }
}
