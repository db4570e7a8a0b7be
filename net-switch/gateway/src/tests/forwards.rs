//! Ports that lead to the other side, and what stays shut.

use std::io::ErrorKind;
use std::net::{TcpStream, UdpSocket};

use smoltcp::socket::tcp::{Socket, State};

use super::guest::syn;
use super::*;

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn guest_at(port: u16) -> SocketAddr {
    (GUEST_V4, port).into()
}

/// Makes the guest listen.
fn listen(guest: &mut Guest, port: u16) -> smoltcp::iface::SocketHandle {
    let handle = guest.tcp(256 << 10);
    guest.socket::<Socket>(handle).listen(port).unwrap();
    handle
}

#[test]
fn the_host_reaches_the_guest() {
    let mut guest = Guest::new(GatewaySpec::default());
    let spec = forward(Side::Host, Protocol::Tcp, LOOPBACK, guest_at(80));
    let gateway = Arc::clone(&guest.cable.gateway);
    let bound = guest.runtime.block_on(gateway.forward(spec)).unwrap();
    assert!(bound.ip().is_loopback() && bound.port() != 0, "{bound}");
    let socket = listen(&mut guest, 80);
    let data = noise(3 << 20 | 1);
    let sent = data.clone();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(bound).unwrap();
        stream.write_all(&sent).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    guest.until(|sockets| sockets.get::<Socket>(socket).may_recv().then_some(()));
    let peer = guest.socket::<Socket>(socket).remote_endpoint().unwrap();
    assert_eq!(IpAddr::from(peer.addr), IpAddr::V4(GATEWAY_V4));
    assert!(guest.receive(socket) == data);
    guest.send(socket, b"got it");
    guest.close(socket);
    guest.state(socket, State::Closed);
    assert_eq!(client.join().unwrap(), "got it");
}

#[test]
fn nobody_listening_in_the_guest_is_told_to_the_host() {
    let mut guest = Guest::new(GatewaySpec {
        forwards: vec![forward(Side::Host, Protocol::Tcp, LOOPBACK, guest_at(81))],
        ..GatewaySpec::default()
    });
    // That of the spec has a port that nobody was told; this one leads to the same place.
    let spec = forward(Side::Host, Protocol::Tcp, LOOPBACK, guest_at(81));
    let gateway = Arc::clone(&guest.cable.gateway);
    let bound = guest.runtime.block_on(gateway.forward(spec)).unwrap();
    let client = thread::spawn(move || {
        TcpStream::connect(bound).unwrap().read(&mut [0]).unwrap_err().kind()
    });
    guest.until(|_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), ErrorKind::ConnectionReset);
}

#[test]
fn a_port_in_use_is_named() {
    let guest = Guest::new(GatewaySpec::default());
    let (taken, _) = listener();
    let address = taken.local_addr().unwrap();
    let spec = forward(Side::Host, Protocol::Tcp, address, guest_at(80));
    let error = guest.runtime.block_on(guest.gateway().forward(spec)).unwrap_err();
    let message =
        format!("cannot forward TCP port {} of 127.0.0.1: the port is in use", address.port());
    assert_eq!(error.to_string(), message);
    drop(taken);
    // Free again, at once: and free again when the gateway is gone.
    guest.runtime.block_on(guest.gateway().forward(spec)).unwrap();
    let error = guest.runtime.block_on(guest.gateway().forward(spec)).unwrap_err();
    assert_eq!(error.to_string(), message);
    guest.runtime.block_on(guest.gateway().close());
    TcpListener::bind(address).unwrap();
}

#[test]
fn forwards_that_make_no_sense_are_refused() {
    let guest = Guest::new(GatewaySpec::default());
    let broadcast = SocketAddr::from((Ipv4Addr::BROADCAST, 80));
    let cases = [
        forward(Side::Host, Protocol::Tcp, LOOPBACK, guest_at(0)),
        forward(Side::Host, Protocol::Udp, LOOPBACK, broadcast),
        forward(Side::Guest, Protocol::Tcp, LOOPBACK, guest_at(80)),
        forward(Side::Guest, Protocol::Tcp, guest_at(80), broadcast),
    ];
    for case in cases {
        let error = guest.runtime.block_on(guest.gateway().forward(case)).unwrap_err();
        assert!(matches!(error, ForwardError::Senseless { .. }), "{case:?}: {error}");
    }
}

#[test]
fn datagrams_are_forwarded_each_peer_apart() {
    let mut guest = Guest::new(GatewaySpec::default());
    let spec = forward(Side::Host, Protocol::Udp, LOOPBACK, guest_at(5353));
    let gateway = Arc::clone(&guest.cable.gateway);
    let bound = guest.runtime.block_on(gateway.forward(spec)).unwrap();
    let socket = guest.udp(5353);
    let peers = [(); 2].map(|()| UdpSocket::bind(LOOPBACK).unwrap());
    for (peer, word) in peers.iter().zip(["one", "two"]) {
        peer.send_to(word.as_bytes(), bound).unwrap();
    }
    for _ in &peers {
        let (data, from) = guest.receive_from(socket);
        assert_eq!(from.ip(), IpAddr::V4(GATEWAY_V4));
        guest.send_to(socket, &[b"re: ", &data[..]].concat(), from);
    }
    guest.until(|_| Some(()));
    for (peer, word) in peers.iter().zip(["re: one", "re: two"]) {
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut buffer = [0; 20];
        let (length, from) = peer.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (word.as_bytes(), bound));
    }
}

#[test]
fn the_guest_reaches_what_is_forwarded_for_it_though_all_else_is_shut() {
    let (host, to_host) = listener();
    let echo = UdpSocket::bind(LOOPBACK).unwrap();
    let service: SocketAddr = (Ipv4Addr::new(10, 0, 2, 100), 7).into();
    // The host needs no IPv6 for that.
    let service_v6: SocketAddr = "[fd00::100]:7".parse().unwrap();
    let there = host.local_addr().unwrap();
    let mut guest = Guest::new(GatewaySpec {
        restrict: true,
        forwards: vec![
            forward(Side::Guest, Protocol::Tcp, there, service),
            forward(Side::Guest, Protocol::Tcp, there, service_v6),
            forward(Side::Guest, Protocol::Udp, echo.local_addr().unwrap(), service),
        ],
        ..GatewaySpec::default()
    });
    for service in [service, service_v6] {
        let socket = guest.connect(service).expect("it is forwarded");
        let (mut stream, _) = host.accept().unwrap();
        let data = noise(1 << 20);
        let expected = data.clone();
        let server = thread::spawn(move || {
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            stream.write_all(&got).unwrap();
            got == expected
        });
        guest.send(socket, &data);
        guest.close(socket);
        assert!(guest.receive(socket) == data);
        assert!(server.join().unwrap());
    }
    let socket = guest.udp(4000);
    guest.send_to(socket, b"hello", service);
    guest.until(|_| Some(()));
    let mut buffer = [0; 10];
    assert_eq!(echo.recv_from(&mut buffer).unwrap().0, 5);

    // From outside is another matter.
    let spec = forward(Side::Host, Protocol::Tcp, LOOPBACK, guest_at(80));
    let gateway = Arc::clone(&guest.cable.gateway);
    let bound = guest.runtime.block_on(gateway.forward(spec)).unwrap();
    let socket = listen(&mut guest, 80);
    let stream = TcpStream::connect(bound).unwrap();
    guest.state(socket, State::Established);
    drop(stream);

    host.set_nonblocking(true).unwrap();
    guest.cable.send(&syn(4001, to_host, 1));
    let frame = guest.cable.card.find(|frame| frame.get(23) == Some(&1)).expect("an ICMP packet");
    assert_eq!(frame[34..36], [3, 13], "unreachable, prohibited");
    assert_eq!(host.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}
