//! All connections of a gateway, and their limits.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use smoltcp::wire::TcpSeqNumber;
use tokio::sync::Notify;

use crate::limits::Limits;
use crate::lock;
use crate::{GATEWAY_V4, GATEWAY_V6};

/// Bytes of buffers that connections share out. When they are gone, further ones get the least.
const BUDGET: usize = 256 << 20;
/// Each connection gets one in this many bytes of the remaining budget.
const SHARE: usize = 64;
/// How many bytes are buffered in one direction: several times what is in flight between two running programs. If the
/// receiver sleeps, the window stops the sender.
const MAX_BUFFER: usize = 1 << 20;
/// Least, of which TCP works with some speed still.
const MIN_BUFFER: usize = 16 << 10;
/// The overhead of a frame.
const FRAME_COST: usize = 128;
/// Extra room in an inbox for headers and control packets.
const INBOX_EXTRA: usize = 128 << 10;
/// First of the ports that IANA assigns to no one (RFC 6335, 6).
const FIRST_DYNAMIC_PORT: u16 = 49_152;

/// The two ends of a connection, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub guest: SocketAddr,
    pub remote: SocketAddr,
}

/// All connections.
pub(crate) struct Connections {
    table: Arc<Mutex<Table>>,
    limits: Limits,
}

#[derive(Default)]
struct Table {
    connections: HashMap<Key, Arc<Connection>>,
    /// Those among them that one side has not answered yet, the oldest first.
    half_open: VecDeque<Arc<Connection>>,
    /// Connections whose task has not ended, also those that are in the table no more.
    alive: usize,
    /// Bytes that they may have in their buffers.
    reserved: usize,
}

/// What is known of a connection outside its task.
pub(super) struct Connection {
    pub key: Key,
    /// Where the guest's sequence numbers began, if it was the guest who connected.
    began: Option<TcpSeqNumber>,
    /// The host's side has answered.
    accepted: AtomicBool,
    pub inbox: Inbox,
    /// Size of each buffer.
    pub buffer: usize,
}

impl Connection {
    /// Whether the guest waits for the host's side.
    pub fn waits(&self) -> bool {
        self.began.is_some() && !self.accepted.load(Ordering::Relaxed)
    }

    /// The host's side has answered the guest.
    pub fn accept(&self) {
        self.accepted.store(true, Ordering::Relaxed);
    }

    /// The end that has to answer: an address on the host's side, or the guest.
    fn destination(&self) -> (bool, IpAddr) {
        match self.began {
            Some(_) => (true, self.key.remote.ip()),
            None => (false, self.key.guest.ip()),
        }
    }

    /// Whether a SYN with this number is for another connection than this.
    pub fn is_another(&self, sequence: TcpSeqNumber) -> bool {
        self.began.is_some_and(|began| began != sequence)
    }

    /// Bytes it may have in buffers: two, and frames for one.
    fn reserved(&self) -> usize {
        3 * self.buffer
    }
}

/// A connection's place in the table; its task has it. Dropping it takes the connection out.
pub(super) struct Entry {
    connection: Arc<Connection>,
    table: Arc<Mutex<Table>>,
    half_open: bool,
}

impl Entry {
    /// Both sides have answered.
    pub fn established(&mut self) {
        if std::mem::take(&mut self.half_open) {
            lock(&self.table).settle(&self.connection);
        }
    }
}

impl Deref for Entry {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = lock(&self.table);
        table.alive -= 1;
        table.reserved -= self.connection.reserved();
        table.take(&self.connection);
    }
}

impl Table {
    /// Takes out this connection, but not one that has taken its place.
    fn take(&mut self, connection: &Arc<Connection>) {
        self.settle(connection);
        let key = &connection.key;
        if self.connections.get(key).is_some_and(|there| Arc::ptr_eq(there, connection)) {
            self.connections.remove(key);
            // After many connections at once, not to keep room for as many for ever.
            if self.connections.len() < self.connections.capacity() / 4 {
                self.connections.shrink_to(self.connections.len() * 2);
            }
        }
    }

    /// Nobody has to answer this connection any more.
    fn settle(&mut self, connection: &Arc<Connection>) {
        let at = self.half_open.iter().position(|there| Arc::ptr_eq(there, connection));
        at.and_then(|at| self.half_open.remove(at));
    }

    /// If there are too many unanswered connections for another one, ends the oldest to the destination that has the
    /// most. Its client will retry if it still wants it.
    fn make_room(&mut self, new: &Connection, limits: Limits) {
        if self.half_open.len() < limits.half_open_to_one {
            return;
        }
        let mut counts = HashMap::new();
        for connection in &self.half_open {
            *counts.entry(connection.destination()).or_insert(0_usize) += 1;
        }
        let new = new.destination();
        let fullest = if counts.get(&new).is_some_and(|count| *count >= limits.half_open_to_one) {
            Some(new)
        } else if self.half_open.len() >= limits.half_open {
            let most = counts.values().max().copied();
            // The first that has so many, so that of single ones the oldest goes.
            let mut all = self.half_open.iter().map(|connection| connection.destination());
            all.find(|destination| counts.get(destination).copied() == most)
        } else {
            None
        };
        let Some(fullest) = fullest else { return };
        let oldest = self.half_open.iter().find(|there| there.destination() == fullest).cloned();
        if let Some(oldest) = oldest {
            self.take(&oldest);
            oldest.inbox.close();
        }
    }
}

impl Connections {
    pub fn new(limits: Limits) -> Self {
        Self { table: Arc::default(), limits }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        lock(&self.table).connections.len()
    }

    /// Bytes that may be in their buffers.
    pub fn reserved(&self) -> usize {
        lock(&self.table).reserved
    }

    pub(super) fn find(&self, key: &Key) -> Option<Arc<Connection>> {
        lock(&self.table).connections.get(key).cloned()
    }

    pub(super) fn remove(&self, connection: &Arc<Connection>) {
        lock(&self.table).take(connection);
    }

    /// Adds a connection that the guest began, or the host's side; `None` if there are too many.
    pub(super) fn enter(&self, key: Key, began: Option<TcpSeqNumber>) -> Option<Entry> {
        let mut table = lock(&self.table);
        // Also those count that were replaced and have not ended yet.
        if table.alive >= self.limits.connections || table.reserved >= 2 * BUDGET {
            return None;
        }
        let share = BUDGET.saturating_sub(table.reserved) / SHARE / 3;
        let buffer = share.clamp(MIN_BUFFER, MAX_BUFFER);
        let inbox = Inbox::new(buffer + INBOX_EXTRA);
        let accepted = AtomicBool::new(false);
        let connection = Arc::new(Connection { key, began, accepted, inbox, buffer });
        table.make_room(&connection, self.limits);
        table.alive += 1;
        table.reserved += connection.reserved();
        table.half_open.push_back(Arc::clone(&connection));
        table.connections.insert(key, Arc::clone(&connection));
        drop(table);
        Some(Entry { connection, table: Arc::clone(&self.table), half_open: true })
    }

    /// Adds a connection to the guest. It seems to come from the gateway, and if possible from
    /// `port`, that of the real peer.
    pub(super) fn enter_from_host(&self, port: u16, guest: SocketAddr) -> Option<Entry> {
        let own = match guest {
            SocketAddr::V4(_) => GATEWAY_V4.into(),
            SocketAddr::V6(_) => GATEWAY_V6.into(),
        };
        let key = {
            let table = lock(&self.table);
            std::iter::once(port)
                .chain(FIRST_DYNAMIC_PORT..=u16::MAX)
                .map(|port| Key { guest, remote: SocketAddr::new(own, port) })
                .find(|key| !table.connections.contains_key(key))?
        };
        self.enter(key, None)
    }

    /// Ends all connections.
    pub fn close_all(&self) {
        for connection in lock(&self.table).connections.values() {
            connection.inbox.close();
        }
    }
}

/// Frames of the guest that wait for the connection's task.
pub(super) struct Inbox {
    state: Mutex<Waiting>,
    changed: Notify,
    /// How many bytes may wait.
    max: usize,
}

#[derive(Default)]
struct Waiting {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    closed: bool,
}

impl Inbox {
    fn new(max: usize) -> Self {
        Self { state: Mutex::default(), changed: Notify::new(), max }
    }

    /// Adds a frame. Beyond what the window allows it is dropped.
    pub fn push(&self, frame: Vec<u8>) {
        let mut state = lock(&self.state);
        let cost = frame.len() + FRAME_COST;
        if state.closed || state.bytes + cost > self.max {
            return;
        }
        state.bytes += cost;
        state.frames.push_back(frame);
        let first = state.frames.len() == 1;
        drop(state);
        if first {
            self.changed.notify_one();
        }
    }

    /// Takes the waiting segments; `None` once the connection is to end.
    pub fn take(&self) -> Option<VecDeque<Vec<u8>>> {
        let mut state = lock(&self.state);
        state.bytes = 0;
        let frames = std::mem::take(&mut state.frames);
        (!state.closed).then_some(frames)
    }

    /// Forgets what is there.
    pub fn clear(&self) {
        let _ = self.take();
    }

    /// Ends the connection at once.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_one();
    }

    /// Waits until there is something new.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}
