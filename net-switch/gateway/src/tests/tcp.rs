use std::cell::Cell;
use std::io::ErrorKind;
use std::net::{Shutdown, TcpStream};

use smoltcp::socket::tcp::{Socket, State};

use super::datagrams::host as host_datagrams;
use super::guest::{raw, reset, syn};
use super::*;
use crate::wire::datagram;

/// Odd, and more than fits into all buffers together.
const LARGE: usize = 6 << 20 | 1;

#[test]
fn bytes_go_both_ways_and_either_side_ends_first() {
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, address) = listener();
    let data = noise(LARGE);
    let expected = data.clone();
    let server = thread::spawn(move || {
        let (mut stream, _) = host.accept().unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == expected, "{} of {LARGE} bytes, or others", got.len());
        // The guest has ended; this direction is still open.
        stream.write_all(&got).unwrap();
        got.len()
    });
    let socket = guest.connect(address).expect("somebody listens");
    guest.send(socket, &data);
    guest.close(socket);
    let back = guest.receive(socket);
    assert!(back == data, "{} of {LARGE} bytes, or others", back.len());
    assert_eq!(server.join().unwrap(), LARGE);

    let (host, address) = listener();
    let server = thread::spawn(move || {
        let (mut stream, _) = host.accept().unwrap();
        stream.write_all(b"first").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut got = String::new();
        stream.read_to_string(&mut got).unwrap();
        got
    });
    let socket = guest.connect(address).unwrap();
    assert_eq!(guest.receive(socket), b"first");
    guest.send(socket, b"last word");
    guest.close(socket);
    guest.state(socket, State::Closed);
    assert_eq!(server.join().unwrap(), "last word");
    settles(&mut guest);
}

/// Waits until no connection is left.
#[track_caller]
fn settles(guest: &mut Guest) {
    let gateway = Arc::clone(&guest.cable.gateway);
    guest.until(|_| (gateway.stats().connections == 0).then_some(()));
    assert_eq!(gateway.stats().reserved, 0);
}

#[test]
fn refusals_arrive_as_such() {
    let mut guest = Guest::new(GatewaySpec::default());
    assert_eq!(guest.connect((GATEWAY_V4, closed_port()).into()), None);
    // Only names are served there.
    assert_eq!(guest.connect((DNS_V4, 80).into()), None);
    settles(&mut guest);
}

#[test]
fn a_host_that_does_not_answer_leaves_the_guest_to_its_own_timeout() {
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, first, address) = silent();
    let socket = guest.begin(address);
    let gateway = Arc::clone(&guest.cable.gateway);
    guest.until(|_| (gateway.stats().connections == 1).then_some(()));
    settles(&mut guest);
    assert_eq!(guest.socket::<Socket>(socket).state(), State::SynSent);
    // The guest's next attempt is a new one for the host too.
    drop((first, host.accept().unwrap()));
    guest.state(socket, State::Established);
}

/// A port of the host where nobody is ever answered, and what keeps it so.
fn silent() -> (TcpListener, TcpStream, SocketAddr) {
    let (host, address) = listener();
    // With its queue full the host's kernel drops what asks for a connection.
    socket2::SockRef::from(&host).listen(0).unwrap();
    let first = TcpStream::connect(host.local_addr().unwrap()).unwrap();
    (host, first, address)
}

#[test]
fn what_hangs_keeps_nobody_else_from_connecting() {
    let mut guest = Guest::new(GatewaySpec::default());
    let limits = Limits::new(usize::MAX);
    let silent: Vec<_> = (0..3).map(|_| silent()).collect();
    // Three destinations by port, but one by address: it gets its part.
    for port in 1..u16::try_from(2 * limits.half_open).unwrap() {
        let address = silent[usize::from(port) % 3].2;
        guest.cable.send(&syn(port, address, i32::from(port)));
    }
    let gateway = Arc::clone(&guest.cable.gateway);
    assert_eq!(gateway.stats().connections, limits.half_open_to_one);
    let (host, address) = listener();
    let began = Instant::now();
    guest.connect(address).unwrap();
    host.accept().unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // It had to make room in its own destination's part.
    assert!(gateway.stats().connections <= limits.half_open_to_one);
}

#[test]
fn a_gateway_stays_within_its_descriptors() {
    const DESCRIPTORS: usize = 80;
    let guest = Guest::new(GatewaySpec { descriptors: DESCRIPTORS, ..GatewaySpec::default() });
    let (_host, address) = listener();
    let (socket, remote) = host_datagrams();
    for port in 1..500 {
        guest.cable.send(&syn(port, address, i32::from(port)));
        let payload = datagram((GUEST_V4, port).into(), remote, b"x").unwrap();
        guest.cable.send(&raw(17, GATEWAY_V4, &payload));
    }
    let stats = guest.gateway().stats();
    assert!(stats.connections + stats.datagram_flows <= DESCRIPTORS, "{stats:?}");
    assert!(stats.connections > 0 && stats.datagram_flows > 0, "{stats:?}");
    drop(socket);
}

#[test]
fn what_the_guest_gives_up_is_forgotten() {
    let guest = Guest::new(GatewaySpec::default());
    let gateway = Arc::clone(&guest.cable.gateway);
    let (_host, _first, address) = silent();
    guest.cable.send(&syn(1000, address, 7));
    guest.cable.send(&syn(1001, address, 7));
    assert_eq!(gateway.stats().connections, 2);
    // One is reset by the guest, of the other nothing is heard any more.
    guest.cable.send(&reset(1000, address, 8));
    assert_eq!(gateway.stats().connections, 1);
    let began = Instant::now();
    while gateway.stats().connections > 0 {
        // Before the host would give up by itself.
        assert!(began.elapsed() < Duration::from_secs(7), "{:?}", gateway.stats());
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_the_guest_repeats_is_kept() {
    let guest = Guest::new(GatewaySpec::default());
    let (host, first, address) = silent();
    for at in [0, 1, 3] {
        thread::sleep(Duration::from_secs(at).min(Duration::from_secs(2)));
        guest.cable.send(&syn(1000, address, 7));
    }
    thread::sleep(Duration::from_secs(3));
    assert_eq!(guest.gateway().stats().connections, 1);
    drop((first, host.accept().unwrap()));
}

#[test]
fn a_reset_goes_on_to_the_other_side() {
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, address) = listener();
    let socket = guest.connect(address).unwrap();
    let (stream, _) = host.accept().unwrap();
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    guest.state(socket, State::Closed);

    let socket = guest.connect(address).unwrap();
    let (mut stream, _) = host.accept().unwrap();
    guest.socket::<Socket>(socket).abort();
    guest.until(|_| Some(()));
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    settles(&mut guest);
}

#[test]
fn the_guest_going_away_ends_its_connections() {
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, address) = listener();
    guest.connect(address).unwrap();
    let (mut stream, _) = host.accept().unwrap();
    guest.gateway().detach();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    settles(&mut guest);
}

/// The control bits of a frame's TCP segment over IPv4, if it holds one.
fn flags(frame: &[u8]) -> Option<u8> {
    (frame.get(12..14)? == [8, 0] && frame.get(23)? == &6).then(|| frame[47] & 0x3f)
}

const SYN_ACK: u8 = 0x12;
const RST_ACK: u8 = 0x14;

#[test]
fn a_guest_that_has_forgotten_may_connect_again_from_the_same_port() {
    let guest = Guest::new(GatewaySpec::default());
    let (host, address) = listener();
    guest.cable.send(&syn(1234, address, 1000));
    assert!(guest.cable.card.find(|frame| flags(frame) == Some(SYN_ACK)).is_some());
    let (mut old, _) = host.accept().unwrap();
    // Again the same one: nothing new.
    guest.cable.send(&syn(1234, address, 1000));
    // Another: the guest was started again.
    guest.cable.send(&syn(1234, address, 5000));
    let frame = guest
        .cable
        .card
        .find(|frame| flags(frame) == Some(SYN_ACK) && frame[42..46] == 5001_u32.to_be_bytes());
    assert!(frame.is_some());
    assert_eq!(old.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    host.accept().unwrap();
}

#[test]
fn segments_of_no_connection_are_answered_by_a_reset() {
    let guest = Guest::new(GatewaySpec::default());
    let mut frame = syn(1234, (GATEWAY_V4, 80).into(), 1000);
    // An acknowledgement of 7, and the checksum put right by its difference (RFC 1624).
    frame[42..46].copy_from_slice(&7_u32.to_be_bytes());
    frame[47] = 0x10;
    let sum = u16::from_be_bytes([frame[50], frame[51]]);
    let sum = !sum;
    let change = u32::from(sum) + 7 + u32::from(0x10_u16.wrapping_sub(2));
    let folded = u16::try_from((change & 0xffff) + (change >> 16)).unwrap();
    frame[50..52].copy_from_slice(&(!folded).to_be_bytes());
    guest.cable.send(&frame);
    let reset = guest.cable.card.find(|frame| flags(frame).is_some()).unwrap();
    assert_eq!((flags(&reset), &reset[38..42]), (Some(0x04), &7_u32.to_be_bytes()[..]));

    guest.cable.send(&syn(1234, (DNS_V4, 80).into(), 1000));
    let reset = guest.cable.card.find(|frame| flags(frame).is_some()).unwrap();
    assert_eq!((flags(&reset), &reset[42..46]), (Some(RST_ACK), &1001_u32.to_be_bytes()[..]));
}

#[test]
fn a_flood_of_syns_is_bounded() {
    let guest = Guest::new(GatewaySpec::default());
    let (_host, address) = listener();
    // More than the backlog of the listener takes: most of them hang.
    for round in 0..2_u16 {
        for port in 1..20_000 {
            guest.cable.send(&syn(port, address, i32::from(port) * 7 + i32::from(round)));
            while guest.cable.card.next(Duration::ZERO).is_some() {}
        }
    }
    let stats = guest.gateway().stats();
    assert!(stats.connections <= Limits::new(usize::MAX).half_open_to_one, "{stats:?}");
    assert!(stats.reserved <= 512 << 20, "{stats:?}");
    guest.gateway().detach();
    let began = Instant::now();
    while guest.gateway().stats() != GatewayStats::default() {
        assert!(began.elapsed() < PATIENCE, "{:?}", guest.gateway());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn connections_that_the_guest_never_answers_are_bounded() {
    const COUNT: usize = 700;
    let guest = Guest::new(GatewaySpec::default());
    let loopback = (Ipv4Addr::LOCALHOST, 0).into();
    let spec = forward(Side::Host, Protocol::Tcp, loopback, (GUEST_V4, 80).into());
    let bound = guest.runtime.block_on(guest.gateway().forward(spec)).unwrap();
    let most = Limits::new(usize::MAX).half_open_to_one;
    // All are taken from the listener: when there are more than may be half open the oldest is reset.
    let (mut waiting, mut reset) = (Vec::new(), 0);
    for _ in 0..COUNT {
        match TcpStream::connect(bound) {
            Ok(stream) => waiting.push(stream),
            // The reset may be there before connect() looks.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => reset += 1,
            Err(error) => panic!("{error}"),
        }
        while guest.cable.card.next(Duration::ZERO).is_some() {}
    }
    let began = Instant::now();
    while waiting.len() > most {
        assert!(began.elapsed() < PATIENCE, "{} still wait", waiting.len());
        waiting.retain_mut(|stream| {
            stream.set_nonblocking(true).unwrap();
            let error = stream.read(&mut [0]).unwrap_err();
            reset += usize::from(error.kind() == ErrorKind::ConnectionReset);
            error.kind() == ErrorKind::WouldBlock
        });
    }
    assert_eq!((waiting.len(), reset), (most, COUNT - most));
    assert_eq!(guest.gateway().stats().connections, most);
    // The others hear when the guest goes.
    guest.gateway().detach();
    for mut stream in waiting {
        stream.set_nonblocking(false).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_listener_that_dies_takes_its_connections_along() {
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, address) = listener();
    // Made by the system, and never accepted.
    let socket = guest.connect(address).expect("somebody listens");
    guest.send(socket, &noise(100_000));
    drop(host);
    guest.state(socket, State::Closed);
    assert_eq!(guest.connect(address), None, "nobody listens any more");
    settles(&mut guest);
}

#[test]
fn a_guest_that_does_not_read_holds_up_only_its_own_connection() {
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, address) = listener();
    let stuck = guest.connect(address).unwrap();
    let (mut stream, _) = host.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    // Until neither host nor gateway nor guest takes any more.
    let mut sent = 0;
    let mut idle = Instant::now();
    while idle.elapsed() < Duration::from_millis(300) {
        if let Ok(count) = stream.write(&[0; 65_536]) {
            sent += count;
            idle = Instant::now();
        }
        guest.until(|_| Some(()));
    }
    assert!(sent < 64 << 20, "{sent} bytes are somewhere");
    let other = guest.connect(address).unwrap();
    let (mut stream, _) = host.accept().unwrap();
    stream.write_all(b"goes on").unwrap();
    drop(stream);
    assert_eq!(guest.receive(other), b"goes on");
    // Once it reads, it gets all.
    let data = Cell::new(0);
    guest.until(|sockets| {
        let socket = sockets.get_mut::<Socket>(stuck);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), data.set(data.get() + bytes.len()))).unwrap();
        }
        (data.get() == sent).then_some(())
    });
}

#[test]
fn many_connections_at_once() {
    const COUNT: usize = 1000;
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, address) = listener();
    let server = thread::spawn(move || {
        let streams: Vec<_> = (0..COUNT).map(|_| host.accept().unwrap().0).collect();
        for mut stream in streams {
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            stream.write_all(&got).unwrap();
        }
    });
    let sockets: Vec<_> = (0..COUNT).map(|_| guest.connect(address).unwrap()).collect();
    assert_eq!(guest.gateway().stats().connections, COUNT);
    for (number, socket) in sockets.iter().enumerate() {
        guest.send(*socket, format!("number {number}").as_bytes());
        guest.close(*socket);
    }
    for (number, socket) in sockets.iter().enumerate() {
        assert_eq!(guest.receive(*socket), format!("number {number}").as_bytes());
    }
    server.join().unwrap();
    settles(&mut guest);
}
