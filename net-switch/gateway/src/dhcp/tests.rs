use super::*;
use crate::CARD_MAC;

const OTHER: Mac = [2, 0, 0, 0, 0, 9];

/// A client's message.
fn message(kind: DhcpMessageType, client: Mac, wants: Option<Ipv4Addr>, has: Ipv4Addr) -> Vec<u8> {
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: 0x1234_5678,
        secs: 0,
        client_hardware_address: EthernetAddress(client),
        client_ip: has,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: wants,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut message = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut message[..])).unwrap();
    message
}

const NONE: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

#[test]
fn a_client_gets_what_it_needs() {
    let mut server = Server::new(CARD_MAC, "machine1");
    let offer = server.answer(&message(DhcpMessageType::Discover, CARD_MAC, None, NONE)).unwrap();
    assert_eq!(offer.bound, None);
    let request = message(DhcpMessageType::Request, CARD_MAC, Some(GUEST_V4), NONE);
    let ack = server.answer(&request).unwrap();
    assert_eq!(ack.bound, Some((GUEST_V4.into(), CARD_MAC)));
    for (answer, kind) in [(&offer, DhcpMessageType::Offer), (&ack, DhcpMessageType::Ack)] {
        assert_eq!((answer.mac, answer.address), (Some(CARD_MAC), GUEST_V4));
        let packet = DhcpPacket::new_checked(&answer.message[..]).unwrap();
        let repr = DhcpRepr::parse(&packet).unwrap();
        assert_eq!((repr.message_type, repr.transaction_id), (kind, 0x1234_5678));
        assert_eq!(repr.your_ip, GUEST_V4);
        assert_eq!(repr.subnet_mask, Some(MASK));
        assert_eq!(repr.router, Some(GATEWAY_V4));
        assert_eq!(repr.dns_servers.as_deref(), Some(&[DNS_V4][..]));
        assert_eq!(repr.lease_duration, Some(86_400));
        let name = packet.options().find(|option| option.kind == HOST_NAME).unwrap();
        assert_eq!(name.data, b"machine1");
    }
    // It asks again when half of the time is over.
    let renewal = server.answer(&message(DhcpMessageType::Request, CARD_MAC, None, GUEST_V4));
    assert_eq!(renewal.unwrap().bound, Some((GUEST_V4.into(), CARD_MAC)));
}

#[test]
fn others_get_other_addresses_and_wrong_wishes_are_refused() {
    let mut server = Server::new(CARD_MAC, "");
    let wish = Some(GUEST_V4);
    let refused = server.answer(&message(DhcpMessageType::Request, OTHER, wish, NONE)).unwrap();
    let packet = DhcpPacket::new_checked(&refused.message[..]).unwrap();
    assert_eq!(DhcpRepr::parse(&packet).unwrap().message_type, DhcpMessageType::Nak);
    assert_eq!((refused.mac, refused.address), (None, Ipv4Addr::BROADCAST));
    let wish = Some(Ipv4Addr::new(10, 0, 2, 16));
    let given = server.answer(&message(DhcpMessageType::Request, OTHER, wish, NONE)).unwrap();
    assert_eq!(given.bound, Some((Ipv4Addr::new(10, 0, 2, 16).into(), OTHER)));
}

/// The address that a client is offered.
fn offered(server: &mut Server, client: Mac, wants: Option<Ipv4Addr>) -> Ipv4Addr {
    let offer = server.answer(&message(DhcpMessageType::Discover, client, wants, NONE)).unwrap();
    DhcpRepr::parse(&DhcpPacket::new_checked(&offer.message[..]).unwrap()).unwrap().your_ip
}

#[test]
fn there_is_always_an_address_for_one_more() {
    let mut server = Server::new(CARD_MAC, "");
    let client = |number: u16| [2, 0, 0, 0, number.to_be_bytes()[0], number.to_be_bytes()[1]];
    let last = u16::from(MAX_CLIENTS) - 1;
    let given: Vec<_> = (1..=last).map(|n| offered(&mut server, client(n), None)).collect();
    let mut different = given.clone();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), given.len());
    assert!(!given.contains(&GUEST_V4) && given.contains(&Ipv4Addr::new(10, 0, 2, 254)));
    // The first is heard of again, so the second has been silent for longest.
    assert_eq!(offered(&mut server, client(1), None), given[0]);
    assert_eq!(offered(&mut server, client(1000), None), given[1]);
    assert_eq!(offered(&mut server, CARD_MAC, None), GUEST_V4);
}

#[test]
fn what_is_given_back_is_free() {
    let mut server = Server::new(CARD_MAC, "");
    let first = offered(&mut server, OTHER, None);
    assert_eq!(offered(&mut server, OTHER, None), first, "it is kept");
    let another = [2, 0, 0, 0, 0, 10];
    assert_ne!(offered(&mut server, another, Some(first)), first);
    for kind in [DhcpMessageType::Release, DhcpMessageType::Decline] {
        for client in [OTHER, another] {
            assert_eq!(server.answer(&message(kind, client, None, first)), None);
        }
        assert_eq!(offered(&mut server, another, Some(first)), first, "it can be wished for");
    }
    assert_eq!(server.answer(&message(DhcpMessageType::Release, CARD_MAC, None, GUEST_V4)), None);
    assert_ne!(offered(&mut server, OTHER, Some(GUEST_V4)), GUEST_V4, "the first card keeps its");
}

#[test]
fn nonsense_is_not_answered() {
    let mut server = Server::new(CARD_MAC, "");
    let good = message(DhcpMessageType::Discover, CARD_MAC, None, NONE);
    for length in 0..240 {
        assert_eq!(server.answer(&good[..length]), None, "{length} bytes");
    }
    // A reply, not Ethernet, long addresses, another protocol, a group's address.
    for (at, value) in [(0, 2), (1, 6), (2, 16), (236, 0), (28, 1)] {
        let mut bad = good.clone();
        bad[at] = value;
        assert_eq!(server.answer(&bad), None, "byte {at} is {value}");
    }
    for kind in [DhcpMessageType::Release, DhcpMessageType::Decline] {
        assert_eq!(server.answer(&message(kind, CARD_MAC, None, GUEST_V4)), None);
    }
}
