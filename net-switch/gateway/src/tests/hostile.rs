//! Whatever the guest sends, the gateway goes on.

use proptest::prelude::{Just, Strategy, any, prop};
use proptest::{prop_oneof, proptest};

use super::guest::raw;
use super::*;
use firn_net_switch::OwnedFrame;

/// A frame that is right but for some bytes, and possibly for its end.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let protocol = prop_oneof![Just(1_u8), Just(6), Just(17), any::<u8>()];
    let to = prop_oneof![Just(GATEWAY_V4), Just(DNS_V4), Just(Ipv4Addr::BROADCAST),];
    let payload = prop::collection::vec(any::<u8>(), 0..400);
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    (protocol, to, payload, changes, any::<prop::sample::Index>(), any::<bool>()).prop_map(
        |(protocol, to, payload, changes, end, cut)| {
            let mut frame = raw(protocol, to, &payload);
            for (index, byte) in changes {
                let at = index.index(frame.len());
                frame[at] = byte;
            }
            if cut {
                frame.truncate(end.index(frame.len()) + 1);
            }
            frame
        },
    )
}

/// Headers of the card that mean something, and others.
fn header() -> impl Strategy<Value = Header> {
    (any::<bool>(), 0_u8..6, any::<u16>(), 0_u16..2000, 0_u16..100, 0_u16..20).prop_map(
        |(sum, gso_type, hdr_len, gso_size, csum_start, csum_offset)| Header {
            flags: u8::from(sum),
            gso_type,
            hdr_len,
            gso_size,
            csum_start,
            csum_offset,
        },
    )
}

#[test]
fn hostile_frames_do_no_harm() {
    let mut guest = Guest::new(GatewaySpec::default());
    let gateway = Arc::clone(&guest.cable.gateway);
    let random = prop::collection::vec(any::<u8>(), 0..200);
    let frame = prop_oneof![random, nearly_right()];
    let head = prop_oneof![Just(Header::default()), header()];
    proptest!(|(frames in prop::collection::vec((head, frame), 1..20))| {
        for (header, data) in frames {
            OwnedFrame { header, data }.lend(|frame| gateway.send(frame));
        }
        while guest.cable.card.next(Duration::ZERO).is_some() {}
    });
    // It still works.
    let (host, address) = listener();
    let socket = guest.connect(address).unwrap();
    let (mut stream, _) = host.accept().unwrap();
    stream.write_all(b"alive").unwrap();
    drop(stream);
    assert_eq!(guest.receive(socket), b"alive");
}
