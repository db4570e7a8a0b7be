use std::net::{Ipv6Addr, UdpSocket};

use smoltcp::socket::udp;
use socket2::{Domain, Socket, Type};

use super::guest::raw;
use super::*;
use crate::wire::{Envelope, complete, datagram};

/// A socket of the host's loopback, and what the guest calls it.
pub(super) fn host() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, (GATEWAY_V4, port).into())
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 65_536];
    let (length, peer) = socket.recv_from(&mut buffer).unwrap();
    buffer.truncate(length);
    (buffer, peer)
}

#[test]
fn datagrams_go_out_and_answers_come_back() {
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, address) = host();
    let socket = guest.udp(5000);
    guest.send_to(socket, b"question", address);
    guest.until(|_| Some(()));
    let (data, peer) = receive(&host);
    assert_eq!(data, b"question");
    host.send_to(b"answer", peer).unwrap();
    assert_eq!(guest.receive_from(socket), (b"answer".to_vec(), address));
    guest.send_to(socket, b"", address);
    guest.until(|_| Some(()));
    assert_eq!(receive(&host), (Vec::new(), peer), "the same flow, and empty is allowed");
    assert_eq!(guest.gateway().stats().datagram_flows, 1);
}

#[test]
fn nobody_listening_is_told_by_icmp() {
    let guest = Guest::new(GatewaySpec::default());
    let (from, to) = ((GUEST_V4, 4000).into(), (GATEWAY_V4, closed_udp_port()).into());
    guest.cable.send(&raw(17, GATEWAY_V4, &datagram(from, to, b"hello").unwrap()));
    let told = guest.cable.card.find(|frame| frame.get(23) == Some(&1)).unwrap();
    assert_eq!(told[34..36], [3, 3], "port unreachable");
    // It quotes what it is about: the header, then both ports.
    assert_eq!(told[54..58], GUEST_V4.octets());
    assert_eq!(told[62..64], 4000_u16.to_be_bytes());

    let nobody = Ipv4Addr::new(10, 0, 2, 77);
    let to = SocketAddr::from((nobody, 9));
    guest.cable.send(&raw(17, nobody, &datagram(from, to, b"hello").unwrap()));
    let told = guest.cable.card.find(|frame| frame.get(23) == Some(&1)).unwrap();
    assert_eq!(told[34..36], [3, 1], "host unreachable");
}

fn closed_udp_port() -> u16 {
    host().1.port()
}

#[test]
fn long_datagrams_go_in_fragments() {
    let guest = Guest::new(GatewaySpec::default());
    let (host, address) = host();
    let (from, data) = (SocketAddr::from((GUEST_V4, 4000)), noise(9000));
    let payload = datagram(from, address, &data).unwrap();
    // The second half first.
    let half = 4496;
    for (offset, piece) in [(half, &payload[half..]), (0, &payload[..half])] {
        let mut frame = raw(17, GATEWAY_V4, piece);
        let field = u16::try_from(offset / 8).unwrap() | if offset == 0 { 0x2000 } else { 0 };
        frame[18..22].copy_from_slice(&(0x0007_0000 | u32::from(field)).to_be_bytes());
        frame[24..26].fill(0);
        let sum = firn_net_switch::checksum::checksum(0, &frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        guest.cable.send(&frame);
    }
    let (got, peer) = receive(&host);
    assert!(got == data);

    host.send_to(&data, peer).unwrap();
    let mut fragments = Vec::new();
    while fragments.len() < 7 {
        let frame = guest.cable.card.find(|frame| frame.get(23) == Some(&17)).unwrap();
        assert!(frame.len() <= 1514);
        assert_eq!(Packet::parse(&frame[14..]).unwrap().whole.len(), frame.len() - 14);
        fragments.push(frame);
    }
    let mut reassembly = Reassembly::default();
    let mut whole = None;
    for frame in fragments.iter().rev() {
        let packet = Packet::parse(&frame[14..]).unwrap();
        whole = reassembly.add(&packet, packet.fragment.unwrap(), Instant::now()).or(whole);
    }
    assert!(whole.unwrap().1[8..] == data);
}

/// Who answers an echo request to `to`, and with what.
fn echo_request(guest: &Guest, to: IpAddr) -> (IpAddr, Vec<u8>) {
    let (source, number, kind): (IpAddr, _, _) = match to {
        IpAddr::V4(_) => (GUEST_V4.into(), protocol::ICMP, 8),
        IpAddr::V6(_) => {
            (Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x15).into(), protocol::ICMPV6, 128)
        }
    };
    let envelope = Envelope::new(source, to, number);
    let mut payload = vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1, b'd', b'a', b't', b'a'];
    complete(&envelope, &mut payload, 2);
    let hop = Hop { source: CARD_MAC, destination: GATEWAY_MAC };
    guest.cable.send(&envelope.frame(hop, &payload).unwrap());
    let reply = guest.cable.card.next(PATIENCE).expect("an answer");
    let packet = Packet::parse(&reply[14..]).unwrap();
    assert!(packet.checksum_fits());
    assert_eq!(packet.destination, source);
    (packet.source, packet.payload.to_vec())
}

#[test]
fn the_gateway_answers_echo_requests() {
    let guest = Guest::new(GatewaySpec { restrict: true, ..GatewaySpec::default() });
    for address in [GATEWAY_V4, DNS_V4] {
        let (from, reply) = echo_request(&guest, address.into());
        assert_eq!(from, address);
        assert_eq!((reply[0], &reply[4..]), (0, &b"\x12\x34\0\x01data"[..]));
    }
    for address in [GATEWAY_V6, DNS_V6, GATEWAY_LINK_LOCAL] {
        let (from, reply) = echo_request(&guest, address.into());
        assert_eq!(from, address);
        assert_eq!((reply[0], &reply[4..]), (129, &b"\x12\x34\0\x01data"[..]));
    }
}

#[test]
fn echo_requests_go_beyond_the_gateway_where_the_host_allows_it() {
    // An address of the host's own, which answers without anybody else's help.
    let probe = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let found = probe.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).and_then(|()| probe.local_addr());
    let Ok(SocketAddr::V4(own)) = found else {
        eprintln!("this host has no address but loopback's");
        return;
    };
    let guest = Guest::new(GatewaySpec::default());
    let (from, reply) = echo_request(&guest, (*own.ip()).into());
    let allowed = Socket::new(Domain::IPV4, Type::DGRAM, Some(socket2::Protocol::ICMPV4)).is_ok();
    if allowed {
        assert_eq!(from, *own.ip());
        assert_eq!((reply[0], &reply[4..]), (0, &b"\x12\x34\0\x01data"[..]));
    } else {
        assert_eq!((from, &reply[..2]), (GATEWAY_V4.into(), &[3, 13][..]));
    }
}

#[test]
fn flows_of_datagrams_are_bounded() {
    let guest = Guest::new(GatewaySpec::default());
    let (host, address) = host();
    host.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    for port in 1..3000 {
        let payload = datagram((GUEST_V4, port).into(), address, b"x").unwrap();
        // One is lost now and then, where those that made room for it are not closed yet.
        let mut arrived = false;
        while !arrived {
            guest.cable.send(&raw(17, GATEWAY_V4, &payload));
            arrived = host.recv(&mut [0; 2]).is_ok();
        }
    }
    assert_eq!(guest.gateway().stats().datagram_flows, Limits::new(usize::MAX).flows);
    guest.gateway().detach();
    assert_eq!(guest.gateway().stats().datagram_flows, 0);
}

/// A question for the address of `a.b`.
const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x01b\0\0\x01\0\x01";

/// What a datagram for the guest carries that is too long for one frame.
fn in_fragments(guest: &Guest) -> Vec<u8> {
    let mut reassembly = Reassembly::default();
    let (_, payload) = std::iter::from_fn(|| guest.cable.card.find(|f| f.get(23) == Some(&17)))
        .find_map(|frame| {
            let packet = Packet::parse(&frame[14..]).unwrap();
            reassembly.add(&packet, packet.fragment.unwrap(), Instant::now())
        })
        .unwrap();
    payload[8..].to_vec()
}

#[test]
fn names_are_asked_of_the_hosts_resolvers() {
    let resolver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let closed = SocketAddr::from((Ipv4Addr::LOCALHOST, closed_udp_port()));
    let mut guest = Guest::new(GatewaySpec {
        // The first one is down.
        resolvers: Some(vec![closed, resolver.local_addr().unwrap()]),
        ..GatewaySpec::default()
    });
    // Longer than the link takes, and behind one that is not for this question.
    let answer = [b"\x12\x34\x81\x80", &noise(4000)[..]].concat();
    let expected = answer.clone();
    let server = thread::spawn(move || {
        let (query, peer) = receive(&resolver);
        assert_eq!(query, QUERY);
        resolver.send_to(b"\x12\x35\x81\x80 and so on", peer).unwrap();
        resolver.send_to(&answer, peer).unwrap();
    });
    let socket = guest.udp(4000);
    guest.send_to(socket, QUERY, (DNS_V4, 53).into());
    guest.until(|_| Some(()));
    assert!(in_fragments(&guest) == expected);
    server.join().unwrap();
}

#[test]
fn the_longest_answers_arrive_and_those_too_short_are_passed_over() {
    let resolver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let resolvers = Some(vec![resolver.local_addr().unwrap()]);
    let mut guest = Guest::new(GatewaySpec { resolvers, ..GatewaySpec::default() });
    // The longest that a datagram can have: the guest gets all of it.
    let longest = [b"\x12\x34\x81\x80", &noise(65_503)[..]].concat();
    let expected = longest.clone();
    let server = thread::spawn(move || {
        let (_, peer) = receive(&resolver);
        resolver.send_to(&longest, peer).unwrap();
        // To the next question: shorter than a header, and empty; then the answer.
        let (_, peer) = receive(&resolver);
        for answer in [&b""[..], b"\x12\x34\x81", b"\x12\x34\x81\x80 and so on"] {
            resolver.send_to(answer, peer).unwrap();
        }
    });
    let socket = guest.udp(4000);
    guest.send_to(socket, QUERY, (DNS_V4, 53).into());
    guest.until(|_| Some(()));
    assert!(in_fragments(&guest) == expected);
    guest.send_to(socket, QUERY, (DNS_V4, 53).into());
    assert_eq!(guest.receive_from(socket).0, b"\x12\x34\x81\x80 and so on");
    server.join().unwrap();
}

#[test]
fn the_newest_question_is_asked_whatever_hangs() {
    let (silent, _) = host();
    let resolvers = Some(vec![silent.local_addr().unwrap()]);
    let mut guest = Guest::new(GatewaySpec { resolvers, ..GatewaySpec::default() });
    let socket = guest.udp(4000);
    let count = u16::try_from(3 * Limits::new(usize::MAX).questions).unwrap();
    let question = |number: u16| [&number.to_be_bytes(), &QUERY[2..]].concat();
    for number in 0..count {
        guest.send_to(socket, &question(number), (DNS_V4, 53).into());
        guest.until(|_| Some(()));
        assert_eq!(receive(&silent).0, question(number));
    }
    guest.send_to(socket, QUERY, (DNS_V4, 53).into());
    guest.until(|_| Some(()));
    let (query, peer) = receive(&silent);
    assert_eq!(query, QUERY);
    silent.send_to(b"\x12\x34\x81\x80 and so on", peer).unwrap();
    assert_eq!(guest.receive_from(socket).0, b"\x12\x34\x81\x80 and so on");
}

#[test]
fn without_a_resolver_questions_fail_at_once() {
    let closed = SocketAddr::from((Ipv4Addr::LOCALHOST, closed_udp_port()));
    for resolvers in [vec![], vec![closed]] {
        let resolvers = Some(resolvers);
        let mut guest = Guest::new(GatewaySpec { resolvers, ..GatewaySpec::default() });
        let socket = guest.udp(4000);
        guest.send_to(socket, QUERY, (DNS_V4, 53).into());
        let began = Instant::now();
        let (answer, from) = guest.receive_from(socket);
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!(from, (DNS_V4, 53).into());
        assert_eq!(answer[..4], *b"\x12\x34\x81\x82", "server failure");
        assert_eq!(guest.connect((DNS_V4, 53).into()), None);
        guest.socket::<udp::Socket>(socket).close();
    }
}

#[test]
fn a_client_of_dhcp_is_configured() {
    use smoltcp::socket::dhcpv4::{Event, Socket};
    let mut guest = Guest::new(GatewaySpec::default());
    let client = guest.sockets.add(Socket::new());
    let config = guest.until(|sockets| match sockets.get_mut::<Socket>(client).poll()? {
        Event::Configured(config) => Some((config.address, config.router, config.dns_servers)),
        Event::Deconfigured => None,
    });
    assert_eq!((config.0.address(), config.0.prefix_len()), (GUEST_V4, 24));
    assert_eq!((config.1, &config.2[..]), (Some(GATEWAY_V4), &[DNS_V4][..]));
}

#[test]
fn the_router_says_what_network_this_is() {
    let guest = Guest::new(GatewaySpec::default());
    let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfe12, 0x3456);
    let all_routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    let envelope = Envelope {
        hop_limit: 255,
        ..Envelope::new(source.into(), all_routers.into(), protocol::ICMPV6)
    };
    let mut payload = vec![133, 0, 0, 0, 0, 0, 0, 0];
    complete(&envelope, &mut payload, 2);
    let hop = Hop { source: CARD_MAC, destination: multicast_mac(all_routers) };
    guest.cable.send(&envelope.frame(hop, &payload).unwrap());
    let frame = guest.cable.card.next(PATIENCE).unwrap();
    let packet = Packet::parse(&frame[14..]).unwrap();
    assert!(packet.checksum_fits());
    assert_eq!((packet.destination, packet.hop_limit), (source.into(), 255));
    let message = packet.payload;
    assert_eq!(message[0], 134);
    assert_ne!(message[6..8], [0, 0], "it is a router");
    // Option 3: the prefix; 25: who knows names.
    let options: Vec<_> = message[16..].chunks_exact(8).collect();
    let at = options.iter().position(|part| part[..4] == [3, 4, 64, 0xc0]).unwrap();
    assert_eq!(options[at + 2..at + 4].concat(), PREFIX_V6.octets());
    let at = options.iter().position(|part| part[..2] == [25, 3]).unwrap();
    assert_eq!(options[at + 1..at + 3].concat(), DNS_V6.octets());

    // From beyond the link nobody may ask.
    let envelope = Envelope { hop_limit: 254, ..envelope };
    guest.cable.send(&envelope.frame(hop, &payload).unwrap());
    assert_eq!(guest.cable.card.next(Duration::from_millis(50)), None);
}
