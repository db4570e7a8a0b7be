//! All connections of a device, and how new ones begin.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::VsockError;
use super::connection::{Connection, Liveness, MAX_DATA, Ports};
use super::packet::{self, HOST_CID, Header, TYPE_STREAM, op};
use crate::memory::MemoryMap;
use crate::socket::{Listener, connect_to};
use crate::spec::VsockSpec;
use crate::virtio::queue::{Chain, GuestSlice, Served};
use crate::virtio::turn::Turn;

/// Most connections at once, those that are just beginning included: each holds a descriptor and
/// up to [`super::connection::BUFFER`] bytes.
pub const MAX_CONNECTIONS: usize = 256;
/// Limit on the refusals that wait for the guest to make room. At the limit no more packets are read from it.
const MAX_REFUSALS: usize = 128;
/// VMADDR_PORT_ANY: no connection has this port (`man 7 vsock`).
const ANY_PORT: u32 = u32::MAX;
/// The host's ports of connections that the host asks for: far from those that programs listen at.
const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;
/// Longest first line of a client: `CONNECT 4294967295`, some blanks, and the line's end.
const MAX_LINE: usize = 32;
/// Belongs to the listener in the epoll set; others have [`token`].
const LISTENER: u64 = u64::MAX;

fn token(ports: Ports) -> u64 {
    u64::from(ports.host) << 32 | u64::from(ports.guest)
}

fn ports(token: u64) -> Ports {
    let low = token & u64::from(u32::MAX);
    // Both halves fit.
    let half = |value| u32::try_from(value).unwrap_or(ANY_PORT);
    Ports { host: half(token >> 32), guest: half(low) }
}

/// A client that has not yet said which port it wants.
struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

/// All connections of a device.
pub struct Hub {
    cid: u32,
    listener: Listener,
    epoll: Epoll,
    /// By the host's port that each will have.
    clients: HashMap<u32, Client>,
    connections: HashMap<Ports, Connection>,
    /// Those that may have something for the guest, in turn.
    waiting: VecDeque<Ports>,
    /// Refusals that the guest is owed.
    refusals: VecDeque<Header>,
    /// Clients may wait at the listener.
    knocked: bool,
    next_port: u32,
    /// Most connections, at most [`MAX_CONNECTIONS`].
    pub max: usize,
}

impl Hub {
    pub fn new(spec: &VsockSpec) -> Result<Hub, VsockError> {
        let listener = Listener::bind(&spec.socket)?;
        let hub = Hub {
            cid: spec.cid.get(),
            epoll: Epoll::new().map_err(VsockError::Host)?,
            clients: HashMap::new(),
            connections: HashMap::new(),
            waiting: VecDeque::new(),
            refusals: VecDeque::new(),
            knocked: true,
            next_port: HOST_PORTS.start,
            max: MAX_CONNECTIONS,
            listener,
        };
        hub.watch(ControlOperation::Add, &hub.listener, LISTENER).map_err(VsockError::Host)?;
        Ok(hub)
    }

    /// The guest's address.
    pub fn cid(&self) -> u32 {
        self.cid
    }

    /// Becomes readable when [`Hub::on_ready`] has work.
    pub fn epoll_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Ends all connections without informing the guest.
    pub fn clear(&mut self) {
        self.clients.clear();
        self.connections.clear();
        self.waiting.clear();
        self.refusals.clear();
        self.knocked = true;
    }

    /// Handles what has become ready on the host's side.
    ///
    /// # Errors
    /// The host's poll fails.
    pub fn on_ready(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        loop {
            let count = match self.epoll.wait(0, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in events.iter().take(count) {
                self.on_event(event.data(), event.event_set());
            }
            let accepted = std::mem::take(&mut self.knocked) && self.accept();
            if count < events.len() && !accepted {
                return Ok(());
            }
        }
    }

    fn on_event(&mut self, token: u64, events: EventSet) {
        let key = ports(token);
        if token == LISTENER {
            self.knocked = true;
        } else if key.guest == ANY_PORT {
            self.hear(key.host);
        } else if let Some(connection) = self.connections.get_mut(&key) {
            connection.on_ready(events.intersects(EventSet::HANG_UP | EventSet::ERROR));
            self.list(key);
        }
    }

    /// Takes in all clients that wait; whether there were any.
    fn accept(&mut self) -> bool {
        let mut any = false;
        loop {
            match self.listener.accept() {
                Ok(Some(stream)) => self.admit(stream),
                Ok(None) => return any,
                Err(error) => {
                    // They wait on; the next event of any kind tries again.
                    tracing::warn!(%error, "cannot accept a vsock client");
                    self.knocked = true;
                    return false;
                }
            }
            any = true;
        }
    }

    /// Takes in one client, or closes it if there are too many.
    fn admit(&mut self, stream: UnixStream) {
        if self.is_full() {
            return;
        }
        let port = self.free_port();
        let key = Ports { host: port, guest: ANY_PORT };
        if self.watch(ControlOperation::Add, &stream, token(key)).is_ok() {
            self.clients.insert(port, Client { stream, line: Vec::new() });
        }
    }

    fn is_full(&self) -> bool {
        self.clients.len() + self.connections.len() >= self.max
    }

    /// A port of the host that no connection has. There are many more than connections.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            let next = port + 1;
            self.next_port = if HOST_PORTS.contains(&next) { next } else { HOST_PORTS.start };
            let taken = self.clients.contains_key(&port)
                || self.connections.keys().any(|key| key.host == port);
            if !taken {
                return port;
            }
        }
    }

    /// Reads what the client with the host's port `port` asks for.
    fn hear(&mut self, port: u32) {
        let Some(client) = self.clients.get_mut(&port) else {
            return;
        };
        let guest = match client.hear() {
            Greeting::Incomplete => return,
            Greeting::Port(guest) => Some(guest),
            Greeting::Invalid => None,
        };
        // Invalid requests are dropped without an answer.
        let Some((client, guest)) = self.clients.remove(&port).zip(guest) else {
            return;
        };
        let key = Ports { host: port, guest };
        if self.watch(ControlOperation::Modify, &client.stream, token(key)).is_ok() {
            self.connections.insert(key, Connection::to_guest(client.stream));
            self.list(key);
        }
    }

    /// Edge-triggered; what is ready already is reported, too.
    fn watch(&self, operation: ControlOperation, fd: &impl AsRawFd, token: u64) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let watched = self.epoll.ctl(operation, fd.as_raw_fd(), EpollEvent::new(events, token));
        if let Err(error) = &watched {
            tracing::warn!(%error, "cannot watch a vsock descriptor");
        }
        watched
    }

    /// Whether there is room for the answer to another packet.
    pub fn can_hear_guest(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Takes one chain that the guest sends.
    pub fn take(&mut self, chain: Chain, memory: &MemoryMap, turn: &mut Turn) {
        let Some(header) = packet::read_header(&chain, memory) else {
            return;
        };
        // Only the guest itself is on the other side (5.10.6.4.1).
        if header.src_cid != u64::from(self.cid) {
            return;
        }
        let key = Ports { host: header.dst_port, guest: header.src_port };
        let ours =
            header.dst_cid == HOST_CID && header.kind == TYPE_STREAM && header.src_port != ANY_PORT;
        if !ours {
            self.refuse(&header);
        } else if let Some(connection) = self.connections.get_mut(&key) {
            let len = if header.op == op::RW { header.len } else { 0 };
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let fate = match packet::data(chain, memory, len) {
                Some(data) => connection.on_packet(&header, &data, key),
                None => {
                    connection.abort();
                    Liveness::Alive
                }
            };
            turn.spend(len);
            match fate {
                Liveness::Alive => self.list(key),
                Liveness::Gone => drop(self.connections.remove(&key)),
            }
        } else if header.op == op::REQUEST {
            self.connect(key, &header);
        } else {
            self.refuse(&header);
        }
    }

    /// The guest asks for a connection.
    fn connect(&mut self, key: Ports, request: &Header) {
        let stream = if self.is_full() {
            None
        } else {
            connect_to(&self.listener.path_of_port(key.host)).ok()
        };
        match stream {
            Some(stream) if self.watch(ControlOperation::Add, &stream, token(key)).is_ok() => {
                self.connections.insert(key, Connection::from_guest(stream, request));
                self.list(key);
            }
            _ => self.refuse(request),
        }
    }

    /// Refuses a packet, unless it is a refusal itself.
    fn refuse(&mut self, header: &Header) {
        if header.op == op::RST {
            return;
        }
        self.refusals.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: op::RST,
            ..Header::default()
        });
    }

    /// Puts a connection into the list if it has something for the guest.
    fn list(&mut self, key: Ports) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !connection.listed
            && connection.has_something()
        {
            connection.listed = true;
            self.waiting.push_back(key);
        }
    }

    /// Whether there may be something for the guest.
    pub fn has_something(&self) -> bool {
        !self.refusals.is_empty() || !self.waiting.is_empty()
    }

    /// Fills one chain with the next packet for the guest.
    pub fn give(&mut self, chain: Chain, memory: &MemoryMap, turn: &mut Turn) -> Served {
        let Some(mut room) =
            packet::room(chain.clone(), memory, MAX_DATA).filter(|room| !room.is_empty())
        else {
            // Too short for any data.
            return Served::Done(0);
        };
        let refusal = self.refusals.pop_front();
        let Some(header) = refusal.or_else(|| self.next_packet(&mut room)) else {
            return Served::Stop;
        };
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        turn.spend(len);
        if !packet::write_header(chain, memory, header) {
            return Served::Done(0);
        }
        Served::Done(u32::try_from(Header::LEN + len).unwrap_or(u32::MAX))
    }

    fn next_packet(&mut self, room: &mut [GuestSlice<'_>]) -> Option<Header> {
        while let Some(key) = self.waiting.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.listed = false;
            let header = connection.next_packet(key, self.cid, room);
            if connection.fate() == Liveness::Gone {
                self.connections.remove(&key);
            } else {
                self.list(key);
            }
            if header.is_some() {
                return header;
            }
        }
        None
    }
}

/// A client's first line.
enum Greeting {
    /// Not complete yet.
    Incomplete,
    /// A request for this port of the guest.
    Port(u32),
    /// The client has gone, or speaks another protocol.
    Invalid,
}

impl Client {
    /// Reads up to the end of the first line and no further: what follows is the guest's. That a
    /// byte is read at a time matters little for so few.
    fn hear(&mut self) -> Greeting {
        let mut byte = [0];
        while self.line.len() < MAX_LINE {
            match (&self.stream).read(&mut byte) {
                Ok(1) if byte == *b"\n" => {
                    return self.port().map_or(Greeting::Invalid, Greeting::Port);
                }
                Ok(1) => self.line.extend(byte),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Greeting::Incomplete,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return Greeting::Invalid,
            }
        }
        Greeting::Invalid
    }

    fn port(&self) -> Option<u32> {
        let line = std::str::from_utf8(&self.line).ok()?;
        let mut words = line.split_ascii_whitespace();
        let port = match (words.next()?, words.next()?, words.next()) {
            ("CONNECT", port, None) => port.parse().ok()?,
            _ => return None,
        };
        (port != ANY_PORT).then_some(port)
    }
}
