use std::io::ErrorKind;
use std::net::Shutdown;

use smoltcp::socket::tcp::{Socket, State};

use super::*;

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
