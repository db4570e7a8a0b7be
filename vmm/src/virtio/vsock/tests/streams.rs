//! Connections as programs see them.

use super::*;

#[test]
fn the_host_connects_and_data_goes_both_ways() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(22);
    assert_eq!((answer.src_port, answer.dst_cid), (22, HOST_CID));

    client.write_all(b"ping").unwrap();
    let (packet, data) = peer.packet();
    assert_eq!((packet.op, packet.src_cid, packet.dst_cid), (op::RW, HOST_CID, u64::from(CID)));
    assert_eq!((packet.dst_port, packet.src_port), (22, answer.dst_port));
    assert_eq!((packet.kind, packet.buf_alloc, data), (TYPE_STREAM, BUFFER, b"ping".to_vec()));

    peer.send(Header { op: op::RW, ..answer }, b"pong");
    assert_eq!(read_exactly(&mut client, 4), b"pong");
}

#[test]
fn what_follows_the_first_line_is_the_guests() {
    let mut peer = Peer::new(16);
    let mut client = UnixStream::connect(peer.socket()).unwrap();
    client.write_all(b"CONN").unwrap();
    peer.wait();
    client.write_all(b"ECT 5\nhello").unwrap();
    let (request, _) = peer.packet();
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 5));
    peer.send(reply(&request, op::RESPONSE), b"");
    assert_eq!(peer.packet().1, b"hello");
}

#[test]
fn the_guest_connects_and_data_goes_both_ways() {
    let mut peer = Peer::new(16);
    let listener = UnixListener::bind(peer.dir.path().join("vsock_1000")).unwrap();
    peer.send(header(40, 1000, op::REQUEST), b"");
    let (response, _) = peer.packet();
    assert_eq!((response.op, response.src_port, response.dst_port), (op::RESPONSE, 1000, 40));
    assert_eq!(response.buf_alloc, BUFFER);
    let (mut program, _) = listener.accept().unwrap();
    peer.send(header(40, 1000, op::RW), b"from the guest");
    assert_eq!(read_exactly(&mut program, 14), b"from the guest");
    program.write_all(b"from the host").unwrap();
    assert_eq!(peer.packet().1, b"from the host");
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let mut peer = Peer::new(16);
    peer.send(header(40, 1000, op::REQUEST), b"");
    let (refusal, _) = peer.packet();
    assert_eq!((refusal.op, refusal.src_port, refusal.dst_port), (op::RST, 1000, 40));
    // A socket whose listener has gone.
    drop(UnixListener::bind(peer.dir.path().join("vsock_1000")).unwrap());
    peer.send(header(40, 1000, op::REQUEST), b"");
    assert_eq!(peer.packet().0.op, op::RST);
    // No more than that, and no socket is named by a path of another shape.
    peer.send(header(40, 0, op::REQUEST), b"");
    assert_eq!(peer.packet().0.op, op::RST);
}

#[test]
fn the_host_is_refused_where_nobody_listens() {
    let mut peer = Peer::new(16);
    let (mut client, request) = peer.host_connects(22);
    peer.send(reply(&request, op::RST), b"");
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0, "closed without an OK");
    assert!(peer.packets().is_empty());
}

#[test]
fn clients_that_talk_nonsense_are_closed() {
    let mut peer = Peer::new(16);
    let lines = [
        "HELLO 22\n",
        "CONNECT\n",
        "CONNECT ssh\n",
        "CONNECT 4294967295\n",
        "CONNECT 4294967296\n",
        "CONNECT -1\n",
        "CONNECT 1 2\n",
        "CONNECT 00000000000000000000000000000022\n",
        "\u{e9}\n",
        "\n",
    ];
    for line in lines {
        let mut client = UnixStream::connect(peer.socket()).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        peer.wait();
        let outcome = client.read(&mut [0; 8]);
        assert!(matches!(outcome, Ok(0) | Err(_)), "{line:?}");
    }
    // Nor does one that leaves in mid-word do harm.
    UnixStream::connect(peer.socket()).unwrap().write_all(b"CON").unwrap();
    peer.wait();
    assert!(peer.packets().is_empty());
    peer.connected(22);
}

#[test]
fn a_client_that_leaves_before_the_answer_is_announced_as_gone() {
    let mut peer = Peer::new(16);
    let (client, request) = peer.host_connects(22);
    drop(client);
    let (reset, _) = peer.packet();
    assert_eq!((reset.op, reset.src_port), (op::RST, request.src_port));
    // The guest's answer comes too late.
    peer.send(reply(&request, op::RESPONSE), b"");
    assert_eq!(peer.packet().0.op, op::RST);
}

#[test]
fn the_host_closes_one_direction_and_reads_on() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(22);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    peer.wait();
    let packets = peer.packets();
    assert_eq!((packets.len(), packets[0].1.as_slice()), (2, b"question".as_slice()));
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    peer.send(Header { op: op::RW, ..answer }, b"answer");
    peer.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_BOTH, ..answer }, b"");
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "answer");
    assert_eq!(peer.packet().0.op, op::RST, "both sides are done");
}

#[test]
fn the_guest_closes_one_direction_and_reads_on() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(22);
    peer.send(Header { op: op::RW, ..answer }, b"question");
    peer.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_SEND, ..answer }, b"");
    let mut question = String::new();
    client.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    client.write_all(b"answer").unwrap();
    assert_eq!(peer.packet().1, b"answer");
    drop(client);
    let ops: Vec<_> = std::iter::from_fn(|| {
        let mut packets = peer.packets();
        while packets.is_empty() {
            peer.wait();
            packets = peer.packets();
        }
        Some(packets)
    })
    .flatten()
    .map(|(header, _)| header.op)
    .take_while(|&op| op != op::RST)
    .collect();
    assert!(ops.iter().all(|&op| op == op::SHUTDOWN), "{ops:?}");
}

#[test]
fn what_the_host_wrote_before_it_closed_arrives() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(22);
    client.write_all(b"last words").unwrap();
    drop(client);
    peer.wait();
    let packets = peer.packets();
    assert_eq!(packets[0].1, b"last words");
    let (shutdown, _) = packets.last().unwrap();
    assert_eq!((shutdown.op, shutdown.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
    // What the guest still sends goes nowhere and does no harm; its reset ends it.
    peer.send(Header { op: op::RW, ..answer }, b"too late");
    peer.send(Header { op: op::RST, ..answer }, b"");
    assert!(peer.packets().is_empty());
    peer.send(Header { op: op::RW, ..answer }, b"unknown by now");
    assert_eq!(peer.packet().0.op, op::RST);
}

#[test]
fn what_the_guest_wrote_before_it_closed_arrives_though_the_host_reads_late() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(22);
    // More than the socket takes, so that some waits in the device.
    let data: Vec<u8> = (0..BUFFER).map(|n| n.to_le_bytes()[1]).collect();
    for part in data.chunks(64 << 10) {
        peer.send(Header { op: op::RW, ..answer }, part);
    }
    peer.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_BOTH, ..answer }, b"");
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    });
    while !peer.packets().iter().any(|(header, _)| header.op == op::RST) {
        peer.wait();
    }
    assert!(reader.join().unwrap() == data);
}

#[test]
fn many_connections_at_once_keep_apart() {
    let mut peer = Peer::new(32);
    let mut ends: Vec<_> =
        (0..MAX_CONNECTIONS).map(|n| peer.connected(u32::try_from(1000 + n).unwrap())).collect();
    for (n, (client, _)) in ends.iter_mut().enumerate() {
        write!(client, "from {n}").unwrap();
    }
    let mut seen = std::collections::BTreeMap::new();
    while seen.len() < MAX_CONNECTIONS {
        let packets = peer.packets();
        if packets.is_empty() {
            peer.wait();
        }
        for (header, data) in packets {
            assert_eq!(seen.insert(header.dst_port, data), None);
        }
    }
    for (n, (client, answer)) in ends.iter_mut().enumerate() {
        assert_eq!(seen[&answer.src_port], format!("from {n}").into_bytes());
        peer.send(Header { op: op::RW, ..*answer }, format!("to {n:5}").as_bytes());
        assert_eq!(read_exactly(client, 8), format!("to {n:5}").as_bytes());
    }

    // One more is one too many, from either side, until one ends.
    let mut refused = UnixStream::connect(peer.socket()).unwrap();
    peer.wait();
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    let _listener = UnixListener::bind(peer.dir.path().join("vsock_1")).unwrap();
    peer.send(header(1, 1, op::REQUEST), b"");
    assert_eq!(peer.packet().0.op, op::RST);
    let (_, gone) = ends.remove(0);
    peer.send(Header { op: op::RST, ..gone }, b"");
    peer.send(header(1, 1, op::REQUEST), b"");
    let (response, _) = peer.packet();
    assert_eq!(response.op, op::RESPONSE);
}
