//! Guests that keep to no rule.

use proptest::prelude::*;

use super::*;
use crate::virtio::testing::{HOSTILE_MEMORY, hostile_ring};

#[test]
fn packets_that_are_not_the_guests_to_send_are_dropped_or_refused() {
    let mut peer = Peer::new(16);
    let good = header(40, 1000, op::REQUEST);
    // Somebody else's.
    for src_cid in [0, HOST_CID, u64::from(CID) + 1, u64::from(CID) | 1 << 32] {
        peer.send(Header { src_cid, ..good }, b"");
        assert!(peer.packets().is_empty(), "{src_cid}");
    }
    // For somebody else, itself included, or of another kind; the answer comes from there.
    let refused = [
        Header { dst_cid: u64::from(CID), ..good },
        Header { dst_cid: 99, ..good },
        Header { dst_cid: HOST_CID | 1 << 32, ..good },
        Header { kind: 2, ..good },
        Header { src_port: u32::MAX, ..good },
        Header { op: op::RW, ..good },
        Header { op: op::RESPONSE, ..good },
        Header { op: op::SHUTDOWN, flags: 3, ..good },
        Header { op: op::CREDIT_UPDATE, ..good },
        Header { op: 0, ..good },
        Header { op: 0xffff, ..good },
    ];
    for packet in refused {
        peer.send(packet, b"");
        let (answer, _) = peer.packet();
        assert_eq!((answer.op, answer.kind), (op::RST, packet.kind));
        assert_eq!((answer.src_cid, answer.dst_cid), (packet.dst_cid, packet.src_cid));
        assert_eq!((answer.src_port, answer.dst_port), (packet.dst_port, packet.src_port));
    }
    // A refusal is not refused.
    peer.send(Header { op: op::RST, ..good }, b"");
    assert!(peer.packets().is_empty());
}

#[test]
fn nonsense_in_a_connection_ends_it() {
    let nonsense = [op::REQUEST, op::RESPONSE, 0, 8];
    for op in nonsense {
        let mut peer = Peer::new(16);
        let (mut client, answer) = peer.connected(22);
        peer.send(Header { op, ..answer }, b"");
        assert_eq!(peer.packet().0.op, op::RST);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
    for op in [op::REQUEST, op::RW, op::SHUTDOWN, op::CREDIT_REQUEST] {
        let mut peer = Peer::new(16);
        let (mut client, request) = peer.host_connects(22);
        peer.send(reply(&request, op), b"");
        assert_eq!(peer.packet().0.op, op::RST, "before it is established");
        assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    }
}

#[test]
fn lengths_that_do_not_fit_end_the_connection() {
    for len in [1, 5, BUFFER, BUFFER + 1, u32::MAX] {
        let mut peer = Peer::new(16);
        let (mut client, answer) = peer.connected(22);
        let bytes = Header { op: op::RW, len, ..answer }.to_bytes();
        let data: &[u8] = if len == 1 { b"" } else { b"four" };
        peer.drivers[TRANSMIT].add(&[Part::Read(&bytes), Part::Read(data)]);
        peer.device().notify(TRANSMIT).unwrap();
        assert_eq!(peer.packet().0.op, op::RST);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
    // A chain that ends within the header is nobody's.
    let mut peer = Peer::new(16);
    peer.drivers[TRANSMIT].add(&[Part::Read(&[0; Header::LEN - 1])]);
    peer.drivers[TRANSMIT].add(&[Part::Write(Header::LEN)]);
    peer.device().notify(TRANSMIT).unwrap();
    assert_eq!(peer.drivers[TRANSMIT].all_used().len(), 2);
    assert!(peer.packets().is_empty());
}

#[test]
fn data_after_the_guests_own_end_is_refused() {
    let mut peer = Peer::new(16);
    let (_client, answer) = peer.connected(22);
    peer.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_SEND | 0xff00, ..answer }, b"");
    assert!(peer.packets().is_empty());
    peer.send(Header { op: op::RW, ..answer }, b"more");
    assert_eq!(peer.packet().0.op, op::RST);
}

#[test]
fn a_packet_may_be_spread_over_many_buffers() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(22);
    let bytes = Header { op: op::RW, len: 6, ..answer }.to_bytes();
    let (start, rest) = bytes.split_at(20);
    let parts = [start, rest, b"ab", b"", b"cde", b"fgh"].map(Part::Read);
    peer.drivers[TRANSMIT].add(&parts);
    peer.device().notify(TRANSMIT).unwrap();
    assert_eq!(read_exactly(&mut client, 6), b"abcdef");
}

#[test]
fn buffers_too_short_for_a_packet_come_back_and_nothing_is_lost() {
    let mut peer = Peer::new(0);
    let mut client = UnixStream::connect(peer.socket()).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    peer.wait();
    let receive = &mut peer.drivers[RECEIVE];
    receive.add(&[Part::Write(10)]);
    receive.add(&[Part::Write(Header::LEN)]);
    receive.add(&[Part::Read(b"no room at all")]);
    receive.add(&[Part::Write(20), Part::Write(25)]);
    peer.device().notify(RECEIVE).unwrap();
    let lengths: Vec<_> = peer.drivers[RECEIVE].all_used().iter().map(|used| used.len).collect();
    assert_eq!(lengths, [0, 0, 0, 44]);
}

/// A packet with fields that make sense as often as not.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let cid = prop_oneof![4 => Just(u64::from(CID)), 4 => Just(HOST_CID), 1 => any::<u64>()];
    let port = || prop_oneof![4 => 0..3_u32, 4 => (1 << 30)..(1 << 30) + 3_u32, 1 => any::<u32>()];
    let count = || prop_oneof![4 => 0..32_u32, 1 => any::<u32>()];
    let kind = prop_oneof![8 => Just(TYPE_STREAM), 1 => any::<u16>()];
    let op = prop_oneof![16 => 0..9_u16, 1 => any::<u16>()];
    let numbers = (count(), count(), count(), count());
    let dst = prop_oneof![8 => Just(HOST_CID), 1 => any::<u64>()];
    ((cid, dst, port(), port()), (kind, op), numbers, prop::collection::vec(any::<u8>(), 0..32))
        .prop_map(|((src_cid, dst_cid, src_port, dst_port), (kind, op), numbers, data)| {
            let (len, flags, buf_alloc, fwd_cnt) = numbers;
            let header = Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            [header.to_bytes().as_slice(), &data].concat()
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_packets_do_no_harm(packets in prop::collection::vec(packet(), 1..64)) {
        let mut peer = Peer::new(16);
        let _listeners: Vec<_> = (0..2)
            .map(|port| UnixListener::bind(peer.dir.path().join(format!("vsock_{port}"))).unwrap())
            .collect();
        let mut clients: Vec<_> = (0..3)
            .map(|port| {
                let mut client = UnixStream::connect(peer.socket()).unwrap();
                client.write_all(format!("CONNECT {port}\nsome data").as_bytes()).unwrap();
                client
            })
            .collect();
        for packet in packets {
            peer.drivers[TRANSMIT].add(&[Part::Read(&packet)]);
            peer.device().notify(TRANSMIT).unwrap();
            peer.device().host_event().unwrap();
            prop_assert!(peer.drivers[TRANSMIT].used().is_some());
            peer.packets();
        }
        clients.clear();
        peer.device().host_event().unwrap();
    }

    #[test]
    fn hostile_chains_do_no_harm(rings in prop::collection::vec(hostile_ring(), QUEUES)) {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let mut drivers: Vec<_> = (0..3).map(|index| guest.driver(index, 16)).collect();
        let activation =
            guest.reactivation(&drivers, 0, &[Some(Position::default()); QUEUES]);
        let mut device = vsock(&dir);
        device.owes_reset = true;
        let mut client = UnixStream::connect(dir.path().join("vsock")).unwrap();
        client.write_all(b"CONNECT 1\n").unwrap();
        let mut device = Box::new(device).activate(activation).ok().unwrap();
        for (driver, ring) in drivers.iter_mut().zip(&rings) {
            driver.corrupt(ring);
        }
        for index in 0..QUEUES {
            let _ = device.notify(index);
        }
        let _ = device.host_event();
    }
}
