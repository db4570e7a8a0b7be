//! Frames that a guest could send, and how to make bytes of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bolero::TypeGenerator;
use etherparse::checksum::Sum16BitWords;
use etherparse::{IpNumber, Ipv4Header, Ipv6Header};
use firn_gateway::{CARD_MAC, DNS_V4, DNS_V6, GATEWAY_V4, GATEWAY_V6, GUEST_V4};
use firn_net_switch::{Header, OwnedFrame};

/// Where the guest reaches a service of this process; all else is shut, so that nothing leaves it.
pub const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);
pub const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100);
pub const SERVICE_PORT: u16 = 7;
/// The guest's ports are this and the next ones.
pub const FIRST_PORT: u16 = 40_000;
/// The sequence number of the guest's SYNs: the next ones wrap.
const FIRST_NUMBER: u32 = u32::MAX - 2;
const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x15);

/// One frame.
#[derive(Debug, TypeGenerator)]
pub struct Step {
    content: Content,
    to: Place,
    v6: bool,
    fault: Fault,
    /// The checksum is left to the card.
    unsummed: bool,
}

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, TypeGenerator)]
enum Fault {
    None,
    Nothing,
    /// A byte of the IP payload is changed before its checksum is made.
    Early(u16, u8),
    /// A byte of the frame is changed after that.
    Late(u16, u8),
    /// The frame's end is cut off.
    Cut(u8),
    /// The card's header is another than belongs to the frame.
    Header(CardHeader),
}

#[derive(Clone, Copy, Debug, TypeGenerator)]
struct CardHeader {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u8,
    csum_offset: u8,
}

#[derive(Clone, Copy, Debug, TypeGenerator)]
enum Place {
    Gateway,
    Dns,
    Service,
    Broadcast,
}

#[derive(Debug, TypeGenerator)]
enum Content {
    Noise(Vec<u8>),
    Arp {
        operation: u8,
        target: u8,
    },
    Icmp {
        kind: u8,
        code: u8,
        body: Vec<u8>,
    },
    /// Neighbour discovery over IPv6.
    Discovery {
        kind: u8,
        target: u8,
        options: Vec<u8>,
    },
    Udp {
        port: u8,
        data: Vec<u8>,
    },
    Dhcp {
        operation: u8,
        kind: u8,
        options: Vec<(u8, Vec<u8>)>,
        ended: bool,
    },
    Dns {
        by_tcp: bool,
        counts: [u8; 4],
        labels: Vec<Vec<u8>>,
        rest: Vec<u8>,
    },
    Tcp(Segment),
    Fragment {
        protocol: u8,
        id: u8,
        offset: u16,
        more: bool,
        data: Vec<u8>,
    },
    /// An extension header of IPv6.
    Extended {
        kind: u8,
        length: u8,
        data: Vec<u8>,
    },
    AnyProtocol {
        protocol: u8,
        data: Vec<u8>,
    },
}

#[derive(Clone, Debug, TypeGenerator)]
pub struct Segment {
    pub port: u8,
    pub sequence: u8,
    pub acknowledges: u8,
    pub flags: Flags,
    pub window: u16,
    pub options: Options,
    pub data: Vec<u8>,
    /// So many times the data.
    pub repeat: u8,
}

#[derive(Clone, Debug, TypeGenerator)]
pub enum Options {
    None,
    /// What there is in a SYN: the largest segment and the window's scale.
    Usual(u16, u8),
    Any(Vec<u8>),
}

#[derive(Clone, Copy, Debug, TypeGenerator)]
pub enum Flags {
    Syn,
    Ack,
    Push,
    Fin,
    Reset,
    Any(u8),
}

impl Flags {
    fn bits(self) -> u8 {
        match self {
            Self::Syn => 0x02,
            Self::Ack => 0x10,
            Self::Push => 0x18,
            Self::Fin => 0x11,
            Self::Reset => 0x14,
            Self::Any(bits) => bits & 0x3f,
        }
    }
}

impl Step {
    pub fn of(v6: bool, segment: Segment) -> Self {
        let content = Content::Tcp(segment);
        Self { content, to: Place::Service, v6, fault: Fault::None, unsummed: false }
    }

    pub fn frame(&self, number: impl Fn(usize) -> u32) -> OwnedFrame {
        let mut payload = Vec::new();
        let (protocol, fragment) = match &self.content {
            Content::Tcp(segment) => {
                segment.push(&mut payload, number(segment.slot(self.v6)));
                (Some(6), None)
            }
            content => content.payload(&mut payload),
        };
        let Some(protocol) = protocol else {
            return self.spoiled(payload, Header::default());
        };
        if let Fault::Early(at, byte) = self.fault {
            change(&mut payload, at, byte);
        }
        let v6 = self.v6 || matches!(self.content, Content::Discovery { .. });
        let field = match protocol {
            6 => Some(16),
            17 => Some(6),
            1 | 58 => Some(2),
            _ => None,
        };
        let (source, destination) = self.ends(v6);
        if let (Some(at), None) = (field, fragment) {
            complete(source, destination, protocol, &mut payload, at);
        }
        let mut data = ethernet(if v6 { 0x86dd } else { 0x0800 });
        data.extend(ip_header(source, destination, protocol, fragment, payload.len()));
        let start = data.len();
        data.extend(payload);
        let header = Header {
            flags: u8::from(self.unsummed && field.is_some()),
            csum_start: short(start),
            csum_offset: field.map_or(0, short),
            ..Header::default()
        };
        self.spoiled(data, header)
    }

    fn ends(&self, v6: bool) -> (IpAddr, IpAddr) {
        if v6 {
            let to = match self.to {
                Place::Gateway => GATEWAY_V6,
                Place::Dns => DNS_V6,
                Place::Service => SERVICE_V6,
                Place::Broadcast => Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2),
            };
            (GUEST_V6.into(), to.into())
        } else {
            let to = match self.to {
                Place::Gateway => GATEWAY_V4,
                Place::Dns => DNS_V4,
                Place::Service => SERVICE_V4,
                Place::Broadcast => Ipv4Addr::BROADCAST,
            };
            (GUEST_V4.into(), to.into())
        }
    }

    fn spoiled(&self, mut data: Vec<u8>, mut header: Header) -> OwnedFrame {
        match self.fault {
            Fault::None | Fault::Nothing | Fault::Early(..) => {}
            Fault::Late(at, byte) => change(&mut data, at, byte),
            Fault::Cut(at) => data.truncate(at.into()),
            Fault::Header(card) => {
                header = Header {
                    flags: card.flags,
                    gso_type: card.gso_type % 8,
                    hdr_len: card.hdr_len,
                    gso_size: card.gso_size,
                    csum_start: card.csum_start.into(),
                    csum_offset: card.csum_offset.into(),
                };
            }
        }
        OwnedFrame { header, data }
    }

    /// The connection that this step begins, if it is right.
    pub fn begins(&self) -> Option<usize> {
        let right =
            matches!(self.fault, Fault::None | Fault::Nothing) && matches!(self.to, Place::Service);
        match &self.content {
            Content::Tcp(segment @ Segment { flags: Flags::Syn, .. }) if right => {
                Some(segment.slot(self.v6))
            }
            _ => None,
        }
    }
}

fn change(data: &mut [u8], at: u16, byte: u8) {
    let length = data.len().max(1);
    if let Some(there) = data.get_mut(usize::from(at) % length) {
        *there = byte;
    }
}

/// What the second word of an IPv4 header says of fragments: identification, offset in bytes, more.
type Fragment = (u16, u16, bool);

impl Content {
    /// Appends what is in the IP packet, and says of which protocol it is; without one it is the whole frame.
    fn payload(&self, to: &mut Vec<u8>) -> (Option<u8>, Option<Fragment>) {
        let protocol = match self {
            Self::Noise(data) => {
                to.extend(data);
                return (None, None);
            }
            Self::Arp { operation, target } => {
                to.extend(arp(*operation, *target));
                return (None, None);
            }
            Self::Icmp { kind, code, body } => {
                to.extend([*kind, *code, 0, 0]);
                to.extend(body);
                if kind & 1 == 0 { 1 } else { 58 }
            }
            Self::Discovery { kind, target, options } => {
                to.extend([133 + kind % 5, 0, 0, 0, 0, 0, 0, 0]);
                to.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, (*target).into()).octets());
                to.extend(options);
                58
            }
            Self::Udp { port, data } => {
                udp(to, (*port).into(), SERVICE_PORT, data);
                17
            }
            Self::Dhcp { operation, kind, options, ended } => {
                let mut message = vec![0; 236];
                message[..3].copy_from_slice(&[*operation, 1, 6]);
                message[28..34].copy_from_slice(&CARD_MAC);
                message.extend([99, 130, 83, 99, 53, 1, *kind]);
                for (option, value) in options {
                    message.extend([*option, u8::try_from(value.len()).unwrap_or(u8::MAX)]);
                    message.extend(value);
                }
                message.extend(ended.then_some(255));
                udp(to, 68, 67, &message);
                17
            }
            Self::Dns { by_tcp, counts, labels, rest } => {
                let mut message = vec![0x12, 0x34, 1, 0];
                message.extend(counts.iter().flat_map(|count| [0, *count]));
                for label in labels {
                    message.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
                    message.extend(label);
                }
                message.extend(rest);
                if *by_tcp {
                    to.extend([
                        0x40, 0, 0, 53, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0x20, 0, 0, 0, 0, 0,
                    ]);
                    to.extend(message);
                    6
                } else {
                    udp(to, 4000, 53, &message);
                    17
                }
            }
            Self::Tcp(_) => 6,
            Self::Fragment { protocol, id, offset, more, data } => {
                to.extend(data);
                return (Some(*protocol), Some((u16::from(*id), offset & !7, *more)));
            }
            Self::Extended { kind, length, data } => {
                let (kind, next) = (
                    [0, 43, 44, 60][usize::from(kind % 4)],
                    [6, 17, 44, 60][usize::from(kind / 4 % 4)],
                );
                to.extend([next, length % 8, 0, 0, 0, 0, 0, 0]);
                to.extend(data);
                kind
            }
            Self::AnyProtocol { protocol, data } => {
                to.extend(data);
                *protocol
            }
        };
        (Some(protocol), None)
    }
}

impl Segment {
    /// A SYN as it should be.
    pub fn syn(port: u8) -> Self {
        Self {
            port,
            // The next after the SYN's, on either side.
            sequence: 2,
            acknowledges: 1,
            flags: Flags::Syn,
            window: 8192,
            options: Options::Usual(1460, 4),
            data: Vec::new(),
            repeat: 0,
        }
    }

    /// Which of the connections that there can be it belongs to.
    pub fn slot(&self, v6: bool) -> usize {
        usize::from(self.port % 4) * 2 + usize::from(v6)
    }

    /// Appends the segment. The other side's numbers began with `number`.
    fn push(&self, to: &mut Vec<u8>, number: u32) {
        let options = match &self.options {
            Options::None => Vec::new(),
            Options::Usual(mss, scale) => {
                let [high, low] = mss.to_be_bytes();
                vec![2, 4, high, low, 1, 3, 3, *scale]
            }
            Options::Any(bytes) => bytes[..bytes.len().min(40) & !3].to_vec(),
        };
        to.extend((FIRST_PORT + u16::from(self.port % 4)).to_be_bytes());
        to.extend(SERVICE_PORT.to_be_bytes());
        // A SYN's own, or near what comes next, on either side: so that all states are reached.
        let sequence = match self.flags {
            Flags::Syn => FIRST_NUMBER,
            _ => FIRST_NUMBER.wrapping_sub(1).wrapping_add((self.sequence % 8).into()),
        };
        to.extend(sequence.to_be_bytes());
        to.extend(number.wrapping_add((self.acknowledges % 8).into()).to_be_bytes());
        let words = u8::try_from(5 + options.len() / 4).expect("15 at most");
        to.extend([words << 4, self.flags.bits()]);
        to.extend(self.window.to_be_bytes());
        to.extend([0; 4]);
        to.extend(options);
        for _ in 0..self.repeat {
            to.extend(&self.data);
        }
    }
}

fn udp(to: &mut Vec<u8>, source: u16, destination: u16, data: &[u8]) {
    to.extend(source.to_be_bytes());
    to.extend(destination.to_be_bytes());
    to.extend(short(8 + data.len()).to_be_bytes());
    to.extend([0, 0]);
    to.extend(data);
}

fn short(number: usize) -> u16 {
    u16::try_from(number).expect("no frame here is longer")
}

fn ethernet(kind: u16) -> Vec<u8> {
    // The gateway's address is QEMU's: 52:55 and its IPv4 address.
    let mut data = vec![0x52, 0x55, 10, 0, 2, 2];
    data.extend(CARD_MAC);
    data.extend(kind.to_be_bytes());
    data
}

pub fn arp(operation: u8, target: u8) -> Vec<u8> {
    let mut data = ethernet(0x0806);
    data.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    data.extend(CARD_MAC);
    data.extend(GUEST_V4.octets());
    data.extend([0, 0, 0, 0, 0, 0, 10, 0, 2, target]);
    data
}

fn ip_header(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    fragment: Option<Fragment>,
    length: usize,
) -> Vec<u8> {
    let length = u16::try_from(length).unwrap_or(u16::MAX - 20);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = Ipv4Header::new(
                length,
                64,
                IpNumber(protocol),
                source.octets(),
                destination.octets(),
            )
            .expect("it is no longer than packets are");
            header.dont_fragment = false;
            if let Some((id, offset, more)) = fragment {
                header.identification = id;
                header.fragment_offset = (offset / 8).try_into().expect("13 bits");
                header.more_fragments = more;
            }
            header.header_checksum = header.calc_header_checksum();
            header.to_bytes().to_vec()
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut header = Ipv6Header {
                payload_length: length,
                next_header: IpNumber(protocol),
                hop_limit: 255,
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv6Header::default()
            };
            let Some((id, offset, more)) = fragment else { return header.to_bytes().to_vec() };
            header.payload_length = length.saturating_add(8);
            header.next_header = IpNumber(44);
            let mut bytes = header.to_bytes().to_vec();
            bytes.extend([protocol, 0]);
            bytes.extend((offset | u16::from(more)).to_be_bytes());
            bytes.extend(u32::from(id).to_be_bytes());
            bytes
        }
        _ => unreachable!("both ends are of one family"),
    }
}

/// Puts the checksum into `payload`.
fn complete(source: IpAddr, destination: IpAddr, protocol: u8, payload: &mut [u8], at: usize) {
    let Some(field) = payload.get_mut(at..at + 2) else { return };
    field.fill(0);
    let length = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    let pseudo =
        |sum: Sum16BitWords| sum.add_2bytes([0, protocol]).add_2bytes(length.to_be_bytes());
    let sum = match (source, destination) {
        _ if protocol == 1 => Sum16BitWords::new(),
        (IpAddr::V4(source), IpAddr::V4(destination)) => pseudo(
            Sum16BitWords::new().add_4bytes(source.octets()).add_4bytes(destination.octets()),
        ),
        (IpAddr::V6(source), IpAddr::V6(destination)) => pseudo(
            Sum16BitWords::new().add_16bytes(source.octets()).add_16bytes(destination.octets()),
        ),
        _ => unreachable!("both ends are of one family"),
    };
    let sum = sum.add_slice(payload).ones_complement();
    payload[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
}
