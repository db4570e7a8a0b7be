use std::net::IpAddr;

use super::*;

const GUEST: IpAddr = IpAddr::V4(crate::GUEST_V4);
const HOST: IpAddr = IpAddr::V4(crate::GATEWAY_V4);

fn add(
    to: &mut Reassembly,
    id: u32,
    offset: usize,
    data: &[u8],
    more: bool,
    now: Instant,
) -> Option<Vec<u8>> {
    let packet = Packet {
        source: GUEST,
        destination: HOST,
        protocol: 17,
        hop_limit: 64,
        fragment: None,
        extended: false,
        payload: data,
        whole: data,
    };
    to.add(&packet, Fragment { id, offset, more }, now).map(|(_, payload)| payload)
}

#[test]
fn fragments_come_in_any_order_and_mixed() {
    let (mut reassembly, now) = (Reassembly::default(), Instant::now());
    let mut add = |id, offset, data: &[u8], more| add(&mut reassembly, id, offset, data, more, now);
    assert_eq!(add(1, 16, b"end", false), None);
    assert_eq!(add(2, 8, b"x", false), None);
    assert_eq!(add(1, 0, b"01234567", true), None);
    assert_eq!(add(1, 0, b"01234567", true), None, "again the same");
    assert_eq!(add(1, 8, b"89abcdef", true).as_deref(), Some(&b"0123456789abcdefend"[..]));
    assert_eq!(add(2, 0, b"abcdefgh", true).as_deref(), Some(&b"abcdefghx"[..]));
    assert!(reassembly.packets.is_empty());
}

#[test]
fn fragments_that_contradict_each_other_cost_the_packet() {
    let now = Instant::now();
    let eight = b"01234567";
    let cases: [&[(usize, &[u8], bool)]; 6] = [
        &[(0, b"0123456789abcdef", true), (8, eight, true)],
        &[(8, eight, true), (0, b"0123456789abcdef", true)],
        &[(8, b"x", false), (16, eight, true)],
        &[(16, eight, true), (8, b"x", false)],
        &[(8, b"x", false), (8, b"xy", false)],
        &[(65_528, eight, false)],
    ];
    for case in cases {
        let mut reassembly = Reassembly::default();
        for (offset, data, more) in case {
            assert_eq!(add(&mut reassembly, 1, *offset, data, *more, now), None);
        }
        assert!(reassembly.packets.is_empty(), "{case:?}");
    }
}

#[test]
fn what_waits_is_bounded_in_number_and_time() {
    let (mut reassembly, now) = (Reassembly::default(), Instant::now());
    for id in 0..1000 {
        add(&mut reassembly, id, 0, b"01234567", true, now);
        assert!(reassembly.packets.len() <= MAX_PACKETS);
    }
    for at in 0..8191 {
        add(&mut reassembly, 5000, at * 8, b"01234567", true, now);
        assert!(reassembly.packets.iter().all(|packet| packet.pieces.len() <= MAX_PIECES));
    }
    add(&mut reassembly, 6000, 0, b"01234567", true, now + PATIENCE);
    assert_eq!(reassembly.packets.len(), 1);
}
