use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv6Header, LinkSlice, NetSlice, SlicedPacket,
    TransportSlice,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const NONE: Offloads = Offloads { csum: false, tso4: false, tso6: false, ecn: false, uso: false };
const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true, ecn: true, uso: true };

/// What a guest would hand over to be segmented.
#[derive(Clone, Debug)]
struct Packet {
    v6: bool,
    udp: bool,
    tags: usize,
    /// Bytes of IPv4 options or of IPv6 destination options, in units of 4 or 8.
    options: usize,
    /// TCP options, in units of 4.
    tcp_options: usize,
    id: u16,
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
    size: u16,
    padding: usize,
}

impl Default for Packet {
    fn default() -> Self {
        Self {
            v6: false,
            udp: false,
            tags: 0,
            options: 0,
            tcp_options: 3,
            id: 0xfffe,
            sequence: 0xffff_ff00,
            flags: 0x10,
            payload: (0..=255).cycle().take(5000).collect(),
            size: 1448,
            padding: 0,
        }
    }
}

impl Packet {
    fn transport_header(&self) -> Vec<u8> {
        let mut header = [0x13, 0x88, 0x00, 0x50].to_vec();
        if self.udp {
            let length = u16::try_from(8 + self.payload.len()).unwrap();
            header.extend(length.to_be_bytes());
            header.extend([0, 0]);
        } else {
            header.extend(self.sequence.to_be_bytes());
            header.extend([1, 2, 3, 4]);
            let words = u8::try_from(5 + self.tcp_options).unwrap();
            header.extend([words << 4, self.flags, 0x20, 0, 0, 0, 0, 0]);
            header.extend(std::iter::repeat_n(1, self.tcp_options * 4));
        }
        header
    }

    fn ip_header(&self, length: usize, protocol: u8) -> Vec<u8> {
        if self.v6 {
            let options = self.options * 8;
            let header = Ipv6Header {
                payload_length: u16::try_from(length + options).unwrap(),
                next_header: IpNumber(if options > 0 { 60 } else { protocol }),
                hop_limit: 64,
                source: [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
                destination: [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
                ..Ipv6Header::default()
            };
            let mut bytes = header.to_bytes().to_vec();
            if let Some(units) = self.options.checked_sub(1) {
                // One PadN option fills it.
                let pad = u8::try_from(options - 4).unwrap();
                bytes.extend([protocol, u8::try_from(units).unwrap(), 1, pad]);
                bytes.extend(vec![0; options - 4]);
            }
            bytes
        } else {
            let options = vec![1; self.options * 4];
            let mut header = Ipv4Header {
                total_len: u16::try_from(20 + options.len() + length).unwrap(),
                identification: self.id,
                dont_fragment: true,
                fragment_offset: IpFragOffset::ZERO,
                time_to_live: 64,
                protocol: IpNumber(protocol),
                source: [192, 168, 1, 1],
                destination: [192, 168, 1, 2],
                options: options.as_slice().try_into().unwrap(),
                ..Ipv4Header::default()
            };
            header.header_checksum = header.calc_header_checksum();
            header.to_bytes().to_vec()
        }
    }

    fn build(&self) -> OwnedFrame {
        let mut data = vec![0x52; 12];
        for tag in [&[0x88, 0xa8, 0, 7], &[0x81, 0, 0, 42]].into_iter().rev().take(self.tags) {
            data.splice(12..12, *tag);
        }
        data.extend(if self.v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        let transport = self.transport_header();
        let protocol = if self.udp { 17 } else { 6 };
        data.extend(self.ip_header(transport.len() + self.payload.len(), protocol));
        let csum_start = u16::try_from(data.len()).unwrap();
        data.extend(&transport);
        let hdr_len = u16::try_from(data.len()).unwrap();
        data.extend(&self.payload);
        data.extend(vec![0xee; self.padding]);
        let header = Header {
            flags: Header::NEEDS_CSUM,
            gso_type: match (self.udp, self.v6) {
                (true, _) => Header::GSO_UDP_L4,
                (false, false) => Header::GSO_TCPV4,
                (false, true) => Header::GSO_TCPV6,
            },
            hdr_len,
            gso_size: self.size,
            csum_start,
            csum_offset: if self.udp { 6 } else { 16 },
        };
        OwnedFrame { header, data }
    }
}

fn plain(mut frame: OwnedFrame, supports: Offloads) -> Result<Vec<OwnedFrame>, OffloadError> {
    frame.lend(|frame| without_offloads(frame, supports)).map(|segments| {
        let count = segments.len();
        let all: Vec<_> = segments.collect();
        assert_eq!(all.len(), count);
        all
    })
}

/// Reads segments with somebody else's parser, compares all that must hold, and returns the
/// payload put together.
fn reassemble(packet: &Packet, segments: &[OwnedFrame]) -> Vec<u8> {
    let mut payload = Vec::new();
    let last = segments.len() - 1;
    for (index, segment) in segments.iter().enumerate() {
        assert_eq!(segment.header, Header::default());
        let sliced = SlicedPacket::from_ethernet(&segment.data).unwrap();
        assert_eq!(sliced.link_exts.len(), packet.tags);
        let Some(LinkSlice::Ethernet2(ethernet)) = sliced.link else { panic!("no Ethernet") };
        assert_eq!(ethernet.destination(), [0x52; 6]);
        match (sliced.net.as_ref().unwrap(), sliced.transport.unwrap()) {
            (NetSlice::Ipv4(ip), TransportSlice::Tcp(tcp)) if !packet.udp && !packet.v6 => {
                let sum = tcp
                    .calc_checksum_ipv4(ip.header().source(), ip.header().destination())
                    .unwrap();
                assert_eq!(nonzero(tcp.checksum()), nonzero(sum));
                payload.extend(check_tcp(packet, &tcp, index, last, payload.len()));
            }
            (NetSlice::Ipv6(ip), TransportSlice::Tcp(tcp)) if !packet.udp && packet.v6 => {
                let sum = tcp
                    .calc_checksum_ipv6(ip.header().source(), ip.header().destination())
                    .unwrap();
                assert_eq!(nonzero(tcp.checksum()), nonzero(sum));
                payload.extend(check_tcp(packet, &tcp, index, last, payload.len()));
            }
            (NetSlice::Ipv4(ip), TransportSlice::Udp(udp)) if packet.udp && !packet.v6 => {
                let header = udp.to_header();
                let sum = header.calc_checksum_ipv4(&ip.header().to_header(), udp.payload());
                assert_eq!(udp.checksum(), nonzero(sum.unwrap()));
                payload.extend(udp.payload());
            }
            (NetSlice::Ipv6(ip), TransportSlice::Udp(udp)) if packet.udp && packet.v6 => {
                let header = udp.to_header();
                let sum = header.calc_checksum_ipv6(&ip.header().to_header(), udp.payload());
                assert_eq!(udp.checksum(), nonzero(sum.unwrap()));
                payload.extend(udp.payload());
            }
            other => panic!("{other:?}"),
        }
        check_ip(packet, sliced.net.as_ref().unwrap(), index);
        let expected = if index < last { segments[0].data.len() } else { segment.data.len() };
        assert_eq!(segment.data.len(), expected);
    }
    payload
}

fn check_ip(packet: &Packet, net: &NetSlice<'_>, index: usize) {
    match net {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            let id = packet.id.wrapping_add(u16::try_from(index).unwrap());
            assert_eq!(header.identification, id);
            assert!(header.dont_fragment);
            assert_eq!(header.options.len(), packet.options * 4);
        }
        NetSlice::Ipv6(ip) => {
            assert_eq!(ip.extensions().slice().len(), packet.options * 8);
        }
        NetSlice::Arp(_) => panic!("ARP"),
    }
}

fn check_tcp<'a>(
    packet: &Packet,
    tcp: &etherparse::TcpSlice<'a>,
    index: usize,
    last: usize,
    sent: usize,
) -> &'a [u8] {
    let mut flags = packet.flags;
    if index != last {
        flags &= !0x09;
    }
    if index != 0 {
        flags &= !0x80;
    }
    assert_eq!(tcp.slice()[13], flags);
    let sent = u32::try_from(sent).unwrap();
    assert_eq!(tcp.sequence_number(), packet.sequence.wrapping_add(sent));
    assert_eq!(tcp.options().len(), packet.tcp_options * 4);
    tcp.payload()
}

fn packets() -> impl Strategy<Value = Packet> {
    let shape = (any::<bool>(), any::<bool>(), 0..=2_usize, 0..=10_usize, 0..=10_usize);
    let numbers = (any::<u16>(), any::<u32>(), any::<u8>(), 0..100_usize);
    (shape, numbers, vec(any::<u8>(), 0..9000), 8..3000_u16).prop_map(
        |((v6, udp, tags, options, tcp_options), (id, sequence, flags, padding), payload, size)| {
            let size = if udp { size.max(100) } else { size };
            Packet {
                v6,
                udp,
                tags,
                options,
                tcp_options,
                id,
                sequence,
                flags,
                payload,
                size,
                padding,
            }
        },
    )
}

proptest! {
    #[test]
    fn segments_put_together_are_what_was_sent(packet in packets()) {
        let segments = plain(packet.build(), NONE).unwrap();
        let size = usize::from(packet.size);
        prop_assert_eq!(segments.len(), packet.payload.len().div_ceil(size).max(1));
        let payload = reassemble(&packet, &segments);
        prop_assert_eq!(payload, packet.payload);
    }

    #[test]
    fn garbage_is_no_harm(
        data in vec(any::<u8>(), 0..300),
        (flags, gso_type) in (any::<u8>(), any::<u8>()),
        (hdr_len, gso_size) in (any::<u16>(), any::<u16>()),
        (csum_start, csum_offset) in (0..400_u16, 0..400_u16),
    ) {
        let header = Header { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset };
        if let Ok(frames) = plain(OwnedFrame { header, data }, NONE) {
            prop_assert!(frames.iter().all(|frame| frame.header == Header::default()));
        }
    }

    /// Nearer to what passes: a good frame with some bytes and header fields wrong.
    #[test]
    fn spoiled_frames_are_no_harm(
        packet in packets(),
        spoiled in vec((0..130_usize, any::<u8>()), 1..4),
        cut in proptest::option::of(0..150_usize),
        field in 0..12_u8,
        value in any::<u16>(),
    ) {
        let mut frame = packet.build();
        for (at, byte) in spoiled {
            if let Some(place) = frame.data.get_mut(at) {
                *place = byte;
            }
        }
        frame.data.truncate(cut.unwrap_or(usize::MAX));
        match field {
            0 => frame.header.hdr_len = value,
            1 => frame.header.gso_size = value,
            2 => frame.header.csum_start = value,
            3 => frame.header.csum_offset = value,
            4 => frame.header.gso_type = value.to_be_bytes()[0],
            _ => {}
        }
        let length = frame.data.len();
        if let Ok(frames) = plain(frame, NONE) {
            prop_assert!(frames.iter().all(|frame| frame.data.len() <= length));
        }
    }

    #[test]
    fn a_sane_header_stays_as_it_is(
        length in 0..70_000_usize,
        (flags, gso_type) in (0..8_u8, prop_oneof![0..8_u8, 0x80..0x88_u8]),
        (hdr_len, gso_size) in (any::<u16>(), any::<u16>()),
        (csum_start, csum_offset) in (any::<u16>(), any::<u16>()),
    ) {
        let header = Header { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset };
        if let Ok(clean) = sanitize(header, length) {
            prop_assert_eq!(sanitize(clean, length), Ok(clean));
            prop_assert!(usize::from(clean.hdr_len) <= length);
            prop_assert_eq!(clean.gso_type, gso_type);
            prop_assert_eq!(clean.gso_size != 0, gso_type != 0);
            let end = usize::from(clean.csum_start) + usize::from(clean.csum_offset) + 2;
            prop_assert!(!clean.needs_csum() || end <= length);
        }
    }
}

#[test]
fn the_largest_frames_are_cut() {
    for v6 in [false, true] {
        let most = if v6 { 65_535 - 32 } else { 65_535 - 20 - 32 };
        let packet = Packet { v6, tags: 2, payload: vec![0x5a; most], ..Packet::default() };
        let frame = packet.build();
        assert!(frame.data.len() <= MAX_FRAME);
        let segments = plain(frame, NONE).unwrap();
        assert_eq!(reassemble(&packet, &segments), packet.payload);
    }
}

#[test]
fn flags_are_on_the_right_segments() {
    let packet = Packet { flags: 0x80 | 0x40 | 0x10 | 0x08 | 0x01, ..Packet::default() };
    let mut frame = packet.build();
    frame.header.gso_type |= Header::GSO_ECN;
    let segments = plain(frame, NONE).unwrap();
    let flags: Vec<u8> = segments.iter().map(|segment| segment.data[34 + 13]).collect();
    assert_eq!(flags, [0xd0, 0x50, 0x50, 0x59]);
    let ids: Vec<u16> = segments.iter().map(|segment| get16(&segment.data, 18)).collect();
    assert_eq!(ids, [0xfffe, 0xffff, 0, 1]);
    assert_eq!(reassemble(&packet, &segments), packet.payload);
}

#[test]
fn a_checksum_is_completed() {
    let packet = Packet { payload: b"odd".to_vec(), ..Packet::default() };
    for v6 in [false, true] {
        let packet = Packet { v6, ..packet.clone() };
        let mut frame = packet.build();
        frame.header.gso_type = Header::GSO_NONE;
        let at = usize::from(frame.header.csum_start) + 16;
        // What Linux leaves in the field: the sum of the pseudo-header, not inverted.
        let addresses = if v6 { 22..54 } else { 26..34 };
        let pseudo = sum(&frame.data[addresses]) + 6 + 20 + 12 + 3;
        put16(&mut frame.data, at, !checksum(pseudo, &[]));
        let segments = plain(frame, NONE).unwrap();
        assert_eq!(segments.len(), 1);
        assert_eq!(reassemble(&packet, &segments), b"odd");
    }
}

#[test]
fn a_zero_sum_is_sent_as_the_other_zero() {
    let header =
        Header { flags: Header::NEEDS_CSUM, csum_start: 14, csum_offset: 0, ..Header::default() };
    let data = [vec![0; 14], vec![0xff, 0xff, 0, 0]].concat();
    let done = plain(OwnedFrame { header, data }, NONE).unwrap();
    assert_eq!(done[0].data[14..], [0xff, 0xff, 0, 0]);
}

#[test]
fn what_the_receiver_supports_stays() {
    let kinds = [
        (false, false, Offloads { tso4: true, csum: true, ..NONE }),
        (true, false, Offloads { tso6: true, csum: true, ..NONE }),
        (false, true, Offloads { uso: true, csum: true, ..NONE }),
    ];
    for (v6, udp, enough) in kinds {
        let frame = Packet { v6, udp, ..Packet::default() }.build();
        assert_eq!(plain(frame.clone(), enough).unwrap(), std::slice::from_ref(&frame));
        let lacking = [
            Offloads { csum: false, ..ALL },
            Offloads { csum: true, ..NONE },
            Offloads { tso4: v6 || udp, tso6: !v6 || udp, uso: !udp, ..ALL },
        ];
        for supports in lacking {
            assert!(!supports.cover(&frame.header));
            assert_eq!(plain(frame.clone(), supports).unwrap().len(), 4);
        }
    }
    let mut ecn = Packet::default().build();
    ecn.header.gso_type |= Header::GSO_ECN;
    assert_eq!(plain(ecn.clone(), ALL).unwrap().len(), 1);
    assert_eq!(plain(ecn, Offloads { ecn: false, ..ALL }).unwrap().len(), 4);
    let simple = OwnedFrame { header: Header::default(), data: vec![1; 60] };
    assert_eq!(plain(simple.clone(), NONE).unwrap(), [simple]);
}

#[test]
fn absurd_headers_are_refused() {
    let good = Packet::default().build().header;
    let refused = |header| sanitize(header, 5000).unwrap_err();
    let bad = |gso_type| refused(Header { gso_type, ..good });
    for kind in [2, Header::GSO_UDP, 6, 0x7f, Header::GSO_ECN, 0x85] {
        assert_eq!(bad(kind), OffloadError::GsoType(kind));
    }
    assert_eq!(refused(Header { flags: 0, ..good }), OffloadError::GsoWithoutChecksum);
    assert_eq!(refused(Header { gso_size: 7, ..good }), OffloadError::GsoSize(7));
    let udp = Header { gso_type: Header::GSO_UDP_L4, gso_size: 0, ..good };
    assert_eq!(refused(udp), OffloadError::GsoSize(0));
    let hdr_len = 5001;
    let expected = OffloadError::HeaderLength { hdr_len, length: 5000 };
    assert_eq!(refused(Header { hdr_len, ..good }), expected);
    for (start, offset) in [(13, 16), (34, 4965), (4999, 0), (u16::MAX, u16::MAX)] {
        let header = Header { csum_start: start, csum_offset: offset, ..good };
        assert_eq!(refused(header), OffloadError::Checksum { start, offset, length: 5000 });
    }
    assert_eq!(sanitize(Header { csum_start: 34, csum_offset: 4964, ..good }, 5000).err(), None);
    let stray = Header { flags: 0xfe, gso_type: 0, ..good };
    assert_eq!(sanitize(stray, 5000), Ok(Header::default()));
}

#[test]
fn what_cannot_be_segmented_is_refused() {
    use OffloadError::{GsoSize, Malformed, Unsupported};
    let base = Packet::default();
    let v6 = Packet { v6: true, options: 1, ..base.clone() };
    let with = |packet: &Packet, at: usize, byte: u8| {
        let mut frame = packet.build();
        frame.data[at] = byte;
        plain(frame, NONE).unwrap_err()
    };
    assert_eq!(with(&base, 12, 0x99), Unsupported("what is not IP"));
    // Three tags.
    let tagged = Packet { tags: 2, ..base.clone() };
    assert_eq!(with(&tagged, 20, 0x81), Unsupported("what is not IP"));
    assert_eq!(with(&base, 14, 0x55), Malformed("IPv4 version or lengths"));
    assert_eq!(with(&base, 14, 0x44), Malformed("IPv4 version or lengths"));
    assert_eq!(with(&base, 14, 0x46), Malformed("csum_start or csum_offset"));
    assert_eq!(with(&base, 16, 0xff), Malformed("IPv4 version or lengths"));
    assert_eq!(with(&base, 20, 0x20), Unsupported("an IP fragment"));
    assert_eq!(with(&base, 21, 0x01), Unsupported("an IP fragment"));
    assert_eq!(with(&base, 23, 17), Malformed("protocol and gso_type"));
    assert_eq!(with(&base, 34 + 12, 0x40), Malformed("transport header's length"));
    assert_eq!(with(&v6, 14, 0x40), Malformed("IPv6 version or length"));
    assert_eq!(with(&v6, 18, 0xff), Malformed("IPv6 version or length"));
    assert_eq!(with(&v6, 20, 44), Unsupported("an IP fragment"));
    // The options read as a routing header: its segments left are the PadN's length.
    let routing = Unsupported("a routing header with segments left");
    assert_eq!(with(&v6, 20, 43), routing);
    assert_eq!(with(&v6, 54 + 1, 0xff), Malformed("csum_start or csum_offset"));

    // One byte short, by the IP header and by the TCP header.
    for (packet, reason) in [(&base, "IPv4 version or lengths"), (&v6, "IPv6 version or length")] {
        let mut frame = packet.build();
        frame.data.pop();
        assert_eq!(plain(frame, NONE), Err(Malformed(reason)));
    }
    let tiny = Packet { payload: vec![0; 3], padding: 9, ..Packet::default() };
    assert_eq!(with(&tiny, 34 + 12, 0x90), Malformed("transport header's length"));

    let mut jumbo = v6.build();
    put16(&mut jumbo.data, 18, 0);
    assert_eq!(plain(jumbo, NONE), Err(Unsupported("a jumbogram")));
    let mut mixed = base.build();
    mixed.header.gso_type = Header::GSO_TCPV6;
    assert_eq!(plain(mixed, NONE), Err(Malformed("IP version and gso_type")));
    // The options reach far into the payload, and what is there passes for a TCP header.
    let mut long = v6.build();
    long.data[54 + 1] = 100;
    long.header.csum_start = 54 + 101 * 8;
    long.data[54 + 101 * 8 + 12] = 0x50;
    assert_eq!(plain(long, NONE), Err(Unsupported("headers this long")));
    let many = Packet { udp: true, size: 39, ..base }.build();
    assert_eq!(plain(many, NONE), Err(GsoSize(39)));
}
