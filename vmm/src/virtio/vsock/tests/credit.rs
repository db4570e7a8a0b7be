//! Flow control.

use super::*;

const LENGTH: usize = 8 << 20;

fn pattern() -> Vec<u8> {
    (0..LENGTH).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect()
}

/// A guest's program that sends back what it gets, within its credit.
struct Echo {
    answer: Header,
    received: u32,
    sent: u32,
    host_forwarded: u32,
    pending: Vec<u8>,
}

impl Echo {
    /// How much the host has room for.
    fn credit(&self) -> usize {
        usize::try_from(BUFFER - self.sent.wrapping_sub(self.host_forwarded)).unwrap()
    }

    fn take(&mut self, header: &Header, data: &[u8]) {
        assert_eq!(header.buf_alloc, BUFFER);
        self.host_forwarded = header.fwd_cnt;
        self.pending.extend(data);
        let held = u32::try_from(self.pending.len()).unwrap();
        assert!(held <= ROOM, "the guest was sent more than it has room for");
        self.received = self.received.wrapping_add(header.len);
    }

    /// Sends what may be sent, and says what room there is if the host asked.
    fn go_on(&mut self, peer: &mut Peer, asked: bool) {
        let count = self.pending.len().min(self.credit()).min(60_000);
        let data: Vec<u8> = self.pending.drain(..count).collect();
        let waiting = u32::try_from(self.pending.len()).unwrap();
        let fwd_cnt = self.received.wrapping_sub(waiting);
        if !data.is_empty() {
            self.sent = self.sent.wrapping_add(u32::try_from(count).unwrap());
            peer.send(Header { op: op::RW, fwd_cnt, ..self.answer }, &data);
        } else if asked {
            peer.send(Header { op: op::CREDIT_UPDATE, fwd_cnt, ..self.answer }, b"");
        }
    }
}

#[test]
fn eight_megabytes_come_back_whole() {
    let mut peer = Peer::new(32);
    let (client, answer) = peer.connected(7);
    let mut writer = client.try_clone().unwrap();
    let feeding = std::thread::spawn(move || {
        writer.write_all(&pattern()).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut reader = client;
    let reading = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        all
    });
    let mut echo = Echo { answer, received: 0, sent: 0, host_forwarded: 0, pending: Vec::new() };
    let mut host_done = false;
    while !host_done || !echo.pending.is_empty() {
        let packets = peer.packets();
        let asked = packets.iter().any(|(header, _)| header.op == op::CREDIT_REQUEST);
        for (header, data) in &packets {
            echo.take(header, data);
            host_done |= header.op == op::SHUTDOWN;
        }
        echo.go_on(&mut peer, asked);
        if packets.is_empty() && (echo.pending.is_empty() || echo.credit() == 0) {
            peer.wait();
        }
    }
    peer.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_BOTH, ..answer }, b"");
    while !peer.packets().iter().any(|(header, _)| header.op == op::RST) {
        peer.wait();
    }
    feeding.join().unwrap();
    assert!(reading.join().unwrap() == pattern());
}

#[test]
fn the_host_sends_no_more_than_the_guest_has_room_for() {
    let mut peer = Peer::new(64);
    let (client, answer) = peer.connected(7);
    client.set_nonblocking(true).unwrap();
    while (&client).write(&[1; 4096]).is_ok() {}
    peer.wait();
    let packets = peer.packets();
    let received: u32 = packets.iter().map(|(header, _)| header.len).sum();
    assert_eq!(received, ROOM);
    assert_eq!(packets.last().unwrap().0.op, op::CREDIT_REQUEST, "then it asks, once");
    let update = Header { op: op::CREDIT_UPDATE, ..answer };
    peer.send(update, b"");
    assert!(peer.packets().is_empty());
    // Room for a few bytes more, then the guest's buffer grows, then it shrinks below what is used.
    peer.send(Header { fwd_cnt: 10, ..update }, b"");
    let packets = peer.packets();
    assert_eq!((packets.len(), packets[0].0.len, packets[1].0.op), (2, 10, op::CREDIT_REQUEST));
    peer.send(Header { fwd_cnt: 10, buf_alloc: ROOM + 5, ..update }, b"");
    assert_eq!(peer.packets()[0].0.len, 5);
    peer.send(Header { fwd_cnt: 10, buf_alloc: 1, ..update }, b"");
    // A counter that is ahead of what was sent gives nothing.
    peer.send(Header { fwd_cnt: ROOM * 2, ..update }, b"");
    assert!(peer.packets().iter().all(|(header, _)| header.len == 0));
}

#[test]
fn the_guest_hears_when_the_host_has_read() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(7);
    // Fill socket and buffer. What the socket takes at once is room again.
    let (mut sent, mut forwarded) = (0_u32, 0);
    while sent - forwarded < BUFFER {
        let count = (BUFFER - (sent - forwarded)).min(32 << 10);
        peer.send(Header { op: op::RW, ..answer }, &vec![1; usize::try_from(count).unwrap()]);
        sent += count;
        for (header, _) in peer.packets() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
        }
    }
    read_exactly(&mut client, usize::try_from(sent).unwrap() / 2);
    while forwarded < sent / 2 {
        let (update, _) = peer.packet();
        assert_eq!((update.op, update.buf_alloc), (op::CREDIT_UPDATE, BUFFER));
        forwarded = update.fwd_cnt;
    }
    peer.send(Header { op: op::CREDIT_REQUEST, ..answer }, b"");
    let (update, _) = peer.packet();
    assert_eq!(update.op, op::CREDIT_UPDATE);
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_the_connection() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(7);
    let mut reset = false;
    for _ in 0..64 {
        peer.send(Header { op: op::RW, ..answer }, &[1; 32 << 10]);
        reset |= peer.packets().iter().any(|(header, _)| header.op == op::RST);
    }
    assert!(reset);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(!rest.is_empty() && rest.len() < 64 * (32 << 10), "what the socket took is there");
}

#[test]
fn a_guest_without_buffers_holds_up_nothing_but_itself() {
    let mut peer = Peer::new(0);
    let mut client = UnixStream::connect(peer.socket()).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    peer.wait();
    // The refusals of all these are bounded: the rest waits in the guest's own ring.
    for n in 0..u32::from(QUEUE_SIZE) {
        peer.drivers[TRANSMIT].add(&[Part::Read(&header(n, 1, op::RW).to_bytes())]);
    }
    peer.device().notify(TRANSMIT).unwrap();
    let first = peer.drivers[TRANSMIT].all_used().len();
    for n in 0..u32::from(QUEUE_SIZE) / 2 {
        peer.drivers[TRANSMIT].add(&[Part::Read(&header(n, 2, op::RW).to_bytes())]);
    }
    peer.device().notify(TRANSMIT).unwrap();
    let second = peer.drivers[TRANSMIT].all_used().len();
    assert_eq!((first, second), (128, 0));
    // Once there is room all is answered, the client too.
    peer.fill(32);
    let (mut refusals, mut requests) = (0, 0);
    while refusals + requests < 128 + 64 + 1 {
        for (header, _) in peer.packets() {
            refusals += usize::from(header.op == op::RST);
            requests += usize::from(header.op == op::REQUEST);
        }
    }
    assert_eq!((refusals, requests), (128 + 64, 1));
}
