use std::net::UdpSocket;

use super::*;

#[test]
fn datagrams_go_out_and_answers_come_back() {
    let mut guest = Guest::new(GatewaySpec::default());
    let host = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = SocketAddr::from((GATEWAY_V4, host.local_addr().unwrap().port()));
    let socket = guest.udp(5000);
    guest.send_to(socket, b"question", address);
    guest.until(|_| Some(()));
    let mut buffer = [0; 100];
    let (length, peer) = host.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"question");
    host.send_to(b"answer", peer).unwrap();
    assert_eq!(guest.receive_from(socket), (b"answer".to_vec(), address));
}
