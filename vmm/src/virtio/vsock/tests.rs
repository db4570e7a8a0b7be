//! The device between a guest made of rings and real sockets of the host.

mod credit;
mod hostile;
mod sockets;
mod streams;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::BUFFER;
use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::virtio::testing::{DriverQueue, Guest, Part};

const CID: u32 = 7;
const SIZES: [u16; QUEUES] = [QUEUE_SIZE; QUEUES];
/// What the test's guest has room for in each connection.
const ROOM: u32 = 64 << 10;

/// A guest with a vsock device and a directory for its sockets.
struct Peer {
    dir: TempDir,
    guest: Guest,
    drivers: Vec<DriverQueue>,
    device: Option<Box<dyn ActiveDevice>>,
    ready: Epoll,
}

impl Peer {
    /// A running device; the guest has given `buffers` buffers of 4 KiB, as Linux does.
    fn new(buffers: usize) -> Peer {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::new();
        let (drivers, activation) = guest.activation(&SIZES, 0);
        let device = vsock(&dir);
        let ready = watch(&device);
        let device = Box::new(device).activate(activation).ok().unwrap();
        let mut peer = Peer { dir, guest, drivers, device: Some(device), ready };
        peer.fill(buffers);
        peer.device().host_event().unwrap();
        peer
    }

    fn device(&mut self) -> &mut dyn ActiveDevice {
        self.device.as_deref_mut().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    /// Gives the device buffers for packets.
    fn fill(&mut self, buffers: usize) {
        for _ in 0..buffers {
            self.drivers[RECEIVE].add(&[Part::Write(Header::LEN), Part::Write(4096)]);
        }
        self.device().notify(RECEIVE).unwrap();
    }

    /// The event thread's part: waits for an edge and hands it on.
    fn wait(&mut self) {
        let mut events = [EpollEvent::default(); 4];
        let count = self.ready.wait(10_000, &mut events).unwrap();
        assert!(count > 0, "nothing happens");
        self.device().host_event().unwrap();
    }

    /// Sends a packet.
    fn send(&mut self, header: Header, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let bytes = Header { len, ..header }.to_bytes();
        let parts = [Part::Read(&bytes), Part::Read(data)];
        self.drivers[TRANSMIT].add(&parts[..if data.is_empty() { 1 } else { 2 }]);
        self.device().notify(TRANSMIT).unwrap();
        while self.drivers[TRANSMIT].used().is_some() {}
    }

    /// The packets that have come, each with its data; their buffers are given back.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.drivers[RECEIVE].all_used();
        self.fill(used.len());
        used.into_iter()
            .map(|used| {
                let (header, data) = used.data.split_first_chunk().expect("a header");
                let header = Header::from_bytes(header);
                assert_eq!(usize::try_from(header.len).unwrap(), data.len());
                (header, data.to_vec())
            })
            .collect()
    }

    /// The next packet, which is the only one.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.packets();
        while packets.is_empty() {
            self.wait();
            packets = self.packets();
        }
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// Connects a client of the host to port `port`, up to the guest's answer.
    fn host_connects(&mut self, port: u32) -> (UnixStream, Header) {
        let mut client = UnixStream::connect(self.socket()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        writeln!(client, "CONNECT {port}").unwrap();
        let (request, _) = self.packet();
        assert_eq!(request.op, op::REQUEST);
        (client, request)
    }

    /// The same, taken by the guest.
    fn connected(&mut self, port: u32) -> (UnixStream, Header) {
        let (client, request) = self.host_connects(port);
        let answer = reply(&request, op::RESPONSE);
        self.send(answer, b"");
        let mut line = String::new();
        // One byte of buffer, or the reader would take what follows.
        BufReader::with_capacity(1, &client).read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port));
        (client, answer)
    }
}

/// The event loop's watch over the device.
fn watch(device: &Vsock) -> Epoll {
    let ready = Epoll::new().unwrap();
    let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
    for fd in device.host_fds() {
        ready.ctl(ControlOperation::Add, fd, EpollEvent::new(edges, 0)).unwrap();
    }
    ready
}

fn vsock(dir: &TempDir) -> Vsock {
    Vsock::new(&VsockSpec {
        cid: u64::from(CID).try_into().unwrap(),
        socket: dir.path().join("vsock"),
    })
    .unwrap()
}

/// A packet of the guest to the host.
fn header(guest: u32, host: u32, op: u16) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: TYPE_STREAM,
        op,
        buf_alloc: ROOM,
        ..Header::default()
    }
}

/// The guest's next packet in the connection of `packet`, which came from the host.
fn reply(packet: &Header, op: u16) -> Header {
    header(packet.dst_port, packet.src_port, op)
}

fn read_exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    stream.read_exact(&mut data).unwrap();
    data
}
