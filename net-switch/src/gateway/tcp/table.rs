//! All connections of a gateway, and their limits.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use smoltcp::wire::TcpSeqNumber;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::gateway::{GATEWAY_V4, GATEWAY_V6};
use crate::lock;

/// Most connections.
pub(super) const MAX_CONNECTIONS: usize = 4096;
/// Most connections that one side has not answered yet.
pub(in crate::gateway) const MAX_HALF_OPEN: usize = 512;
/// Bytes of buffers that connections share out. When they are gone, further ones get the least.
const BUDGET: usize = 256 << 20;
/// Each connection takes this part of what is left of the budget.
const SHARE: usize = 64;
/// Most bytes that are buffered in one direction: several times what is on the way between two
/// programs that run. A receiver that sleeps is told to the sender by the window.
const MAX_BUFFER: usize = 1 << 20;
/// Least, of which TCP works with some speed still.
const MIN_BUFFER: usize = 16 << 10;
/// What a frame takes up beside its bytes.
const FRAME_COST: usize = 128;
/// Room in an inbox beside what the window lets the guest send: for headers and control.
const INBOX_EXTRA: usize = 128 << 10;
/// First port of those that nobody is given by IANA (RFC 6335, 6).
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
    half_open: Arc<Semaphore>,
}

#[derive(Default)]
struct Table {
    connections: HashMap<Key, Arc<Connection>>,
    /// Bytes that connections may have in their buffers.
    reserved: usize,
}

/// What is known of a connection outside its task.
pub(super) struct Connection {
    pub key: Key,
    /// Where the guest's sequence numbers began, if it was the guest who connected.
    began: Option<TcpSeqNumber>,
    pub inbox: Inbox,
    /// Size of each buffer.
    pub buffer: usize,
}

impl Connection {
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
    half_open: Option<OwnedSemaphorePermit>,
}

impl Entry {
    /// Both sides have answered.
    pub fn established(&mut self) {
        self.half_open = None;
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
        table.reserved -= self.connection.reserved();
        table.take(&self.connection);
    }
}

impl Table {
    /// Takes out this connection, but not one that has taken its place.
    fn take(&mut self, connection: &Arc<Connection>) {
        let key = &connection.key;
        if self.connections.get(key).is_some_and(|there| Arc::ptr_eq(there, connection)) {
            self.connections.remove(key);
            // After many connections at once, not to keep room for as many for ever.
            if self.connections.len() < self.connections.capacity() / 4 {
                self.connections.shrink_to(self.connections.len() * 2);
            }
        }
    }
}

impl Connections {
    pub fn new() -> Self {
        Self { table: Arc::default(), half_open: Arc::new(Semaphore::new(MAX_HALF_OPEN)) }
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
        let half_open = Arc::clone(&self.half_open).try_acquire_owned().ok()?;
        let mut table = lock(&self.table);
        // Those that were replaced and have not ended yet are not in the table, but in the budget.
        if table.connections.len() >= MAX_CONNECTIONS || table.reserved >= 2 * BUDGET {
            return None;
        }
        let share = BUDGET.saturating_sub(table.reserved) / SHARE / 3;
        let buffer = share.clamp(MIN_BUFFER, MAX_BUFFER);
        let inbox = Inbox::new(buffer + INBOX_EXTRA);
        let connection = Arc::new(Connection { key, began, inbox, buffer });
        table.reserved += connection.reserved();
        table.connections.insert(key, Arc::clone(&connection));
        drop(table);
        Some(Entry { connection, table: Arc::clone(&self.table), half_open: Some(half_open) })
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
    /// Most bytes that may wait.
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

    /// Takes what is there; `None` once the connection shall end.
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

    /// Waits until the connection shall end.
    pub async fn closed(&self) {
        while !lock(&self.state).closed {
            self.changed().await;
        }
    }
}
