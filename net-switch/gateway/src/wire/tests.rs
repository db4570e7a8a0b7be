use super::*;

const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 15));
const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2));
const GUEST_6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x15));
const HOST_6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));

/// An IP packet with these headers.
fn packet(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let envelope = Envelope::new(source, destination, protocol);
    envelope.push_header(&mut packet, payload.len(), 0).unwrap();
    packet.extend(payload);
    packet
}

#[test]
fn a_datagram_is_what_others_take_for_one() {
    for (source, destination) in [(GUEST, HOST), (GUEST_6, HOST_6)] {
        let ends = (SocketAddr::new(source, 1000), SocketAddr::new(destination, 2000));
        let payload = datagram(ends.0, ends.1, b"odd").unwrap();
        let bytes = packet(source, destination, protocol::UDP, &payload);
        // Independent of what is written here.
        let other = etherparse::SlicedPacket::from_ip(&bytes).unwrap();
        let Some(etherparse::TransportSlice::Udp(slice)) = other.transport else { panic!() };
        let header = slice.to_header();
        let sum = match other.net.unwrap() {
            etherparse::NetSlice::Ipv4(ip) => {
                let ip = ip.header().to_header();
                assert_eq!(ip.calc_header_checksum(), ip.header_checksum);
                header.calc_checksum_ipv4(&ip, slice.payload())
            }
            etherparse::NetSlice::Ipv6(ip) => {
                header.calc_checksum_ipv6(&ip.header().to_header(), slice.payload())
            }
            etherparse::NetSlice::Arp(_) => panic!(),
        };
        assert_eq!(sum.unwrap(), header.checksum);

        let parsed = Packet::parse(&bytes).unwrap();
        assert!(parsed.checksum_fits());
        assert_eq!(udp(&parsed), Some((ends.0, ends.1, &b"odd"[..])));
        // Behind it may be padding, within it every bit counts.
        let padded = [&bytes[..], &[0; 20]].concat();
        assert_eq!(Packet::parse(&padded).unwrap().whole, bytes);
        let mut wrong = bytes.clone();
        *wrong.last_mut().unwrap() ^= 1;
        assert!(!Packet::parse(&wrong).unwrap().checksum_fits());
    }
}

#[test]
fn malformed_packets_are_none() {
    let good = packet(GUEST, HOST, protocol::UDP, b"12345678");
    assert!(Packet::parse(&good).is_some());
    for at in 0..20 {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(Packet::parse(&bad).is_none(), "the checksum covers byte {at}");
    }
    for length in 0..good.len() {
        assert!(Packet::parse(&good[..length]).is_none(), "{length} bytes");
    }
    let good = packet(GUEST_6, HOST_6, protocol::UDP, b"12345678");
    for length in 0..good.len() {
        assert!(Packet::parse(&good[..length]).is_none(), "{length} bytes");
    }
    for source in ["224.0.0.1", "255.255.255.255", "127.0.0.1"] {
        let bytes = packet(source.parse().unwrap(), HOST, protocol::UDP, b"12345678");
        assert!(Packet::parse(&bytes).is_none(), "from {source}");
    }
}

#[test]
fn extension_headers_are_passed_over() {
    // Hop by hop, then destination options, each of eight bytes.
    let mut payload = vec![protocol::DESTINATION, 0, 1, 4, 0, 0, 0, 0];
    payload.extend([protocol::UDP, 0, 1, 4, 0, 0, 0, 0]);
    payload.extend(datagram((GUEST_6, 7).into(), (HOST_6, 9).into(), b"x").unwrap());
    let bytes = packet(GUEST_6, HOST_6, protocol::HOP_BY_HOP, &payload);
    let parsed = Packet::parse(&bytes).unwrap();
    assert!(parsed.extended && parsed.checksum_fits());
    assert_eq!(udp(&parsed).unwrap().2, b"x");
    // A header that says that it is longer than all there is.
    payload[1] = 200;
    let bytes = packet(GUEST_6, HOST_6, protocol::HOP_BY_HOP, &payload);
    assert!(Packet::parse(&bytes).is_none());
    // A router's business.
    let routing = [protocol::UDP, 0, 0, 1, 0, 0, 0, 0];
    assert!(Packet::parse(&packet(GUEST_6, HOST_6, protocol::ROUTING, &routing)).is_none());
}

#[test]
fn lengths_of_datagrams_are_checked() {
    let length_is = |length: u16, data: &[u8]| {
        let mut payload = datagram((GUEST, 7).into(), (HOST, 9).into(), data).unwrap();
        payload[4..6].copy_from_slice(&length.to_be_bytes());
        udp(&Packet::parse(&packet(GUEST, HOST, protocol::UDP, &payload)).unwrap())
            .map(|(_, _, data)| data.len())
    };
    assert_eq!(length_is(12, b"data"), Some(4));
    assert_eq!(length_is(10, b"data"), Some(2));
    assert_eq!(length_is(13, b"data"), None);
    assert_eq!(length_is(7, b"data"), None);
}
