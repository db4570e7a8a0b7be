//! The DHCP server (RFC 2131): everybody gets an address, the first card always the same.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::wire::{
    DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress, Ipv4Address,
};

use super::wire::Mac;
use super::{DNS_V4, GATEWAY_V4, GUEST_V4};

/// Port of the server.
pub(super) const SERVER_PORT: u16 = 67;
/// Port of clients.
pub(super) const CLIENT_PORT: u16 = 68;

/// How long an address may be kept, in seconds: a day.
const LEASE: u32 = 86_400;
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// How many stations can have an address: from 10.0.2.15 to 10.0.2.254.
const MAX_CLIENTS: u8 = 240;

// Options of RFC 2132.
const HOST_NAME: u8 = 12;
const REQUESTED_ADDRESS: u8 = 50;
const MESSAGE_TYPE: u8 = 53;
const SERVER: u8 = 54;
/// BOOTREQUEST, what clients send (RFC 2131, 2).
const REQUEST: u8 = 1;
/// In `flags`: the client cannot take unicast yet.
const BROADCAST: u16 = 0x8000;

/// Which station has which address.
pub(super) struct Server {
    host_name: String,
    /// Has the first address, also while it says nothing.
    card: Mac,
    /// The others that have an address, and its place behind the first; the most recently seen one last.
    others: Vec<(Mac, u8)>,
}

/// An answer to a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Whom it goes to on the link; `None` for all.
    pub mac: Option<Mac>,
    pub address: Ipv4Addr,
    pub message: Vec<u8>,
    /// The client has this address now.
    pub bound: Option<(IpAddr, Mac)>,
}

/// What a client asks for.
struct Question {
    kind: DhcpMessageType,
    client: Mac,
    /// The address it wants, or has.
    wants: Option<Ipv4Addr>,
    has: Ipv4Addr,
    broadcast: bool,
    transaction: u32,
}

impl Question {
    fn parse(message: &[u8]) -> Option<Self> {
        let packet = DhcpPacket::new_checked(message).ok()?;
        // Ethernet with addresses of six bytes, and nobody relays here.
        let [operation, 1, 6, ..] = *message else { return None };
        if operation != REQUEST || packet.magic_number() != 0x6382_5363 {
            return None;
        }
        let mut kind = None;
        let mut wants = None;
        for option in packet.options() {
            match (option.kind, option.data) {
                (MESSAGE_TYPE, [number]) => kind = Some(DhcpMessageType::from(*number)),
                (REQUESTED_ADDRESS, &[a, b, c, d]) => wants = Some(Ipv4Addr::new(a, b, c, d)),
                // It has chosen another server.
                (SERVER, &[a, b, c, d]) if Ipv4Addr::new(a, b, c, d) != GATEWAY_V4 => return None,
                _ => {}
            }
        }
        let EthernetAddress(client) = packet.client_hardware_address();
        if client[0] & 1 != 0 {
            return None;
        }
        let has = packet.client_ip();
        Some(Self {
            kind: kind?,
            client,
            wants: wants.or((!has.is_unspecified()).then_some(has)),
            has,
            broadcast: u16::from_be_bytes([message[10], message[11]]) & BROADCAST != 0,
            transaction: packet.transaction_id(),
        })
    }
}

impl Server {
    /// A server that gives `card` the guest's address. All clients get `host_name`, if it is a valid host name.
    pub fn new(card: Mac, host_name: &str) -> Self {
        let fits = (1..=63).contains(&host_name.len());
        let host_name = if fits { host_name.to_owned() } else { String::new() };
        Self { host_name, card, others: Vec::new() }
    }

    /// Answers what a client has sent, if there is something to say.
    pub fn answer(&mut self, message: &[u8]) -> Option<Answer> {
        let question = Question::parse(message)?;
        if matches!(question.kind, DhcpMessageType::Release | DhcpMessageType::Decline) {
            self.others.retain(|(known, _)| *known != question.client);
            return None;
        }
        let address = self.address(question.client, question.wants);
        let kind = match question.kind {
            DhcpMessageType::Discover => DhcpMessageType::Offer,
            DhcpMessageType::Request if question.wants == Some(address) => DhcpMessageType::Ack,
            DhcpMessageType::Request => DhcpMessageType::Nak,
            DhcpMessageType::Inform => DhcpMessageType::Ack,
            _ => return None,
        };
        let refused = kind == DhcpMessageType::Nak;
        let inform = question.kind == DhcpMessageType::Inform;
        let given = if refused || inform { Ipv4Addr::UNSPECIFIED } else { address };
        let name = self.host_name.as_bytes();
        let options = [DhcpOption { kind: HOST_NAME, data: name }];
        let granted = !refused;
        let reply = DhcpRepr {
            message_type: kind,
            transaction_id: question.transaction,
            secs: 0,
            client_hardware_address: EthernetAddress(question.client),
            client_ip: question.has,
            your_ip: given,
            server_ip: GATEWAY_V4,
            router: granted.then_some(GATEWAY_V4),
            subnet_mask: granted.then_some(MASK),
            relay_agent_ip: Ipv4Address::UNSPECIFIED,
            broadcast: question.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(GATEWAY_V4),
            parameter_request_list: None,
            dns_servers: granted.then(|| [DNS_V4].into_iter().collect()),
            max_size: None,
            lease_duration: (granted && !inform).then_some(LEASE),
            renew_duration: None,
            rebind_duration: None,
            additional_options: if granted && !name.is_empty() { &options } else { &[] },
        };
        let mut message = vec![0; reply.buffer_len()];
        reply.emit(&mut DhcpPacket::new_unchecked(&mut message[..])).ok()?;
        let bound = kind == DhcpMessageType::Ack && !inform;
        Some(Answer {
            // RFC 2131, 4.1.
            mac: (!refused && !question.broadcast).then_some(question.client),
            address: match question.has {
                has if !has.is_unspecified() && !refused => has,
                _ if refused || question.broadcast => Ipv4Addr::BROADCAST,
                _ => given,
            },
            message,
            bound: bound.then_some((address.into(), question.client)),
        })
    }

    /// The address of a client: the one it has, the one it wants if that is free, or any. If there is none left, that
    /// of who has not been heard of for longest.
    fn address(&mut self, client: Mac, wants: Option<Ipv4Addr>) -> Ipv4Addr {
        let at = |place: u8| Ipv4Addr::from_bits(GUEST_V4.to_bits() + u32::from(place));
        if client == self.card {
            return GUEST_V4;
        }
        let known = self.others.iter().position(|(known, _)| *known == client);
        let place = match known {
            Some(index) => self.others.remove(index).1,
            None => {
                let free = |place: &u8| !self.others.iter().any(|(_, taken)| taken == place);
                let mut wanted = (1..MAX_CLIENTS).filter(|place| wants == Some(at(*place)));
                let place = wanted.find(free).or_else(|| (1..MAX_CLIENTS).find(free));
                place.unwrap_or_else(|| self.others.remove(0).1)
            }
        };
        self.others.push((client, place));
        at(place)
    }
}

#[cfg(test)]
mod tests;
