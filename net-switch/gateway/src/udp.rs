//! Datagrams: UDP, and echo requests on the host's echo sockets.
//!
//! Each pair of a guest's and a remote address has a connected socket of the host. So errors get back to their
//! sender; a reply from another port than the one asked is lost, as with many routers.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::{sleep_until, timeout};

use super::icmp::Reason;
use super::limits::Limits;
use super::route::Target;
use super::wire::{Envelope, Mac, Packet, complete, datagram, protocol, udp};
use super::{GATEWAY_V4, GATEWAY_V6, Inner, Protocol, dhcp};
use crate::lock;

/// How long a flow lives without a datagram (RFC 4787, REQ-5: at least two minutes).
const IDLE: Duration = Duration::from_secs(120);
/// How long an echo is waited for.
const IDLE_ECHO: Duration = Duration::from_secs(20);
/// Longest datagram, in bytes.
const MAX_DATAGRAM: usize = 65_507;
/// First of the ports that IANA assigns to no one (RFC 6335, 6).
const FIRST_DYNAMIC_PORT: u16 = 49_152;

/// What a flow's datagrams are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Udp,
    /// Ports are identifiers of echo requests.
    Echo,
}

/// A flow, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct DatagramKey {
    pub kind: Kind,
    pub guest: SocketAddr,
    pub remote: SocketAddr,
}

/// All flows of datagrams.
pub(super) struct Datagrams {
    flows: Mutex<HashMap<DatagramKey, Arc<Flow>>>,
    /// Most flows. Beyond, the one that was idle for longest goes.
    max: usize,
    sockets: Arc<Semaphore>,
}

struct Flow {
    socket: Arc<UdpSocket>,
    /// The host's peer, if the socket has many.
    peer: Option<SocketAddr>,
    /// Milliseconds since the start of the gateway.
    last_used: AtomicU64,
    /// Ends the task that listens to the socket, if the flow has one of its own.
    listener: Mutex<Option<AbortHandle>>,
}

impl Drop for Flow {
    fn drop(&mut self) {
        if let Some(listener) = lock(&self.listener).take() {
            listener.abort();
        }
    }
}

impl Flow {
    fn send(&self, data: &[u8]) -> io::Result<()> {
        // At once, or not at all, whatever the runtime knows of the socket: it is non-blocking.
        let socket = SockRef::from(&*self.socket);
        let sent = match self.peer {
            Some(peer) => socket.send_to(data, &peer.into()),
            None => socket.send(data),
        };
        match sent {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            sent => sent.map(drop),
        }
    }
}

impl Datagrams {
    pub fn new(limits: Limits) -> Self {
        let sockets = Arc::new(Semaphore::new(limits.sockets));
        Self { flows: Mutex::default(), max: limits.flows, sockets }
    }

    /// How many flows there are.
    pub fn len(&self) -> usize {
        lock(&self.flows).len()
    }

    /// Ends all flows.
    pub fn clear(&self) {
        let flows = std::mem::take(&mut *lock(&self.flows));
        drop(flows);
    }

    /// The ICMP reason for a socket's error.
    pub fn reason(error: &io::Error, otherwise: Reason) -> Reason {
        match error.kind() {
            ErrorKind::ConnectionRefused => Reason::Port,
            ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::AddrNotAvailable => Reason::Host,
            _ => otherwise,
        }
    }

    /// Adds a flow; if there are too many, the one idle for longest makes room.
    fn insert(&self, key: DatagramKey, flow: Arc<Flow>) {
        let mut flows = lock(&self.flows);
        let mut victim = None;
        if flows.len() >= self.max && !flows.contains_key(&key) {
            let used = |flow: &Flow| flow.last_used.load(Ordering::Relaxed);
            let idle = flows.iter().min_by_key(|(_, flow)| used(flow)).map(|(key, _)| *key);
            victim = idle.and_then(|key| flows.remove(&key));
        }
        let before = flows.insert(key, flow);
        drop(flows);
        drop((victim, before));
    }

    fn remove(&self, key: &DatagramKey) {
        let flow = lock(&self.flows).remove(key);
        drop(flow);
    }
}

impl Inner {
    /// Takes a datagram of the guest.
    pub(super) fn udp(self: &Arc<Self>, packet: &Packet<'_>, from: Mac) {
        let Some((guest, remote, data)) = udp(packet) else { return };
        if remote.port() == dhcp::SERVER_PORT && remote.is_ipv4() {
            self.dhcp(data);
            return;
        }
        if guest.ip().is_unspecified() {
            return;
        }
        let key = DatagramKey { kind: Kind::Udp, guest, remote };
        // A flow that began on the host's side goes where it came from.
        let known = lock(&self.datagrams.flows).get(&key).cloned();
        let sent = match (known, self.target(Some(Protocol::Udp), remote)) {
            (Some(flow), _) => self.send_on(&flow, data),
            (None, Target::Host(to)) => {
                let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
                let socket = || Socket::new(domain, Type::DGRAM, None);
                self.send_by(key, to, from, data, socket)
            }
            (None, Target::Dns) => {
                self.ask(guest, remote, data, from);
                Ok(())
            }
            (None, Target::Unreachable(reason)) => {
                self.unreachable(packet.whole, reason, from);
                Ok(())
            }
            (None, Target::Nowhere) => Ok(()),
        };
        if let Err(error) = sent {
            self.unreachable(packet.whole, Datagrams::reason(&error, Reason::Host), from);
        }
    }

    fn send_on(&self, flow: &Flow, data: &[u8]) -> io::Result<()> {
        flow.last_used.store(self.clock(), Ordering::Relaxed);
        flow.send(data)
    }

    /// Sends on the flow `key`; if there is none, makes one with a `socket` connected to `to`.
    pub(super) fn send_by(
        self: &Arc<Self>,
        key: DatagramKey,
        to: SocketAddr,
        mac: Mac,
        data: &[u8],
        socket: impl FnOnce() -> io::Result<Socket>,
    ) -> io::Result<()> {
        let known = lock(&self.datagrams.flows).get(&key).cloned();
        if let Some(flow) = known {
            return self.send_on(&flow, data);
        }
        // Those that made room for others have not all closed yet: lost, as on a busy link.
        let Ok(permit) = Arc::clone(&self.datagrams.sockets).try_acquire_owned() else {
            return Ok(());
        };
        let socket = socket()?;
        socket.set_nonblocking(true)?;
        socket.connect(&to.into())?;
        let socket = {
            let _runtime = self.runtime.enter();
            Arc::new(UdpSocket::from_std(socket.into())?)
        };
        let flow = Arc::new(Flow {
            socket: Arc::clone(&socket),
            peer: None,
            last_used: AtomicU64::new(self.clock()),
            listener: Mutex::default(),
        });
        self.datagrams.insert(key, Arc::clone(&flow));
        let listener = listen(Arc::clone(self), key, mac, Arc::downgrade(&flow), socket);
        let task = self.runtime.spawn(async move {
            listener.await;
            drop(permit);
        });
        *lock(&flow.listener) = Some(task.abort_handle());
        flow.send(data)
    }

    /// Gives the guest a datagram.
    pub(super) fn send_datagram(&self, from: SocketAddr, to: SocketAddr, mac: Mac, data: &[u8]) {
        if let Some(payload) = datagram(from, to, data) {
            self.link.send(mac, &Envelope::new(from.ip(), to.ip(), protocol::UDP), &payload);
        }
    }

    fn dhcp(&self, message: &[u8]) {
        let Some(answer) = lock(&self.dhcp).answer(message) else { return };
        if let Some((address, mac)) = answer.bound {
            self.link.learn(address, mac);
        }
        let from = SocketAddr::new(GATEWAY_V4.into(), dhcp::SERVER_PORT);
        let to = SocketAddr::new(answer.address.into(), dhcp::CLIENT_PORT);
        self.send_datagram(from, to, answer.mac.unwrap_or([0xff; 6]), &answer.message);
    }

    /// Passes on to the guest what comes in on a forwarded port, until the gateway closes.
    pub(super) async fn forward_datagrams(
        self: Arc<Self>,
        socket: Arc<UdpSocket>,
        guest: SocketAddr,
    ) {
        let mut flows = Peers { inner: &self, socket: &socket, guest, keys: HashMap::new() };
        let mut buffer = Vec::with_capacity(MAX_DATAGRAM);
        let mut sweep = tokio::time::Instant::now() + IDLE;
        loop {
            buffer.clear();
            tokio::select! {
                received = socket.recv_buf_from(&mut buffer) => {
                    // An error tells of an earlier datagram that a peer did not take.
                    if let Ok((_, peer)) = received
                        && let Some(remote) = flows.address_of(peer)
                    {
                        let mac = self.link.neighbour(guest.ip());
                        self.send_datagram(remote, guest, mac, &buffer);
                    }
                }
                () = sleep_until(sweep), if !flows.keys.is_empty() => {
                    flows.sweep();
                    sweep = tokio::time::Instant::now() + IDLE;
                }
                () = self.closed() => return,
            }
        }
    }
}

/// The host's peers of a forwarded port; to the guest each is a port of the gateway.
struct Peers<'a> {
    inner: &'a Arc<Inner>,
    socket: &'a Arc<UdpSocket>,
    guest: SocketAddr,
    keys: HashMap<SocketAddr, DatagramKey>,
}

impl Peers<'_> {
    /// What the guest sees as the sender of what `peer` sends.
    fn address_of(&mut self, peer: SocketAddr) -> Option<SocketAddr> {
        let now = self.inner.clock();
        if let Some(key) = self.keys.get(&peer)
            && let Some(flow) = lock(&self.inner.datagrams.flows).get(key)
            && flow.peer == Some(peer)
        {
            flow.last_used.store(now, Ordering::Relaxed);
            return Some(key.remote);
        }
        if self.keys.len() >= self.inner.datagrams.max {
            self.sweep();
        }
        let flow = Arc::new(Flow {
            socket: Arc::clone(self.socket),
            peer: Some(peer),
            last_used: AtomicU64::new(now),
            listener: Mutex::default(),
        });
        let key = self.free_key(peer.port())?;
        self.inner.datagrams.insert(key, flow);
        self.keys.insert(peer, key);
        Some(key.remote)
    }

    /// The key of a new flow, with the peer's own port if it is free.
    fn free_key(&self, port: u16) -> Option<DatagramKey> {
        let own: IpAddr = match self.guest {
            SocketAddr::V4(_) => GATEWAY_V4.into(),
            SocketAddr::V6(_) => GATEWAY_V6.into(),
        };
        let flows = lock(&self.inner.datagrams.flows);
        let key = |port| {
            let remote = SocketAddr::new(own, port);
            DatagramKey { kind: Kind::Udp, guest: self.guest, remote }
        };
        std::iter::once(port)
            .chain(FIRST_DYNAMIC_PORT..=u16::MAX)
            .map(key)
            .find(|key| !flows.contains_key(key))
    }

    /// Ends flows that have been idle for a while.
    fn sweep(&mut self) {
        let now = self.inner.clock();
        let idle = u64::try_from(IDLE.as_millis()).unwrap_or(u64::MAX);
        let mut flows = lock(&self.inner.datagrams.flows);
        self.keys.retain(|peer, key| {
            let Some(flow) = flows.get(key) else { return false };
            if flow.peer != Some(*peer) {
                return false;
            }
            let live = now.saturating_sub(flow.last_used.load(Ordering::Relaxed)) < idle;
            if !live {
                flows.remove(key);
            }
            live
        });
    }
}

/// Waits for a datagram.
///
/// # Errors
/// An error of an earlier datagram that the host has learned of since.
pub(super) async fn readable(socket: &UdpSocket) -> io::Result<()> {
    // A refused datagram makes a socket no more readable.
    let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
    if ready.is_error() {
        // Takes away the mark that there is an error, before looking which.
        let _ = socket.try_io(Interest::ERROR, || Err::<(), _>(ErrorKind::WouldBlock.into()));
        return socket.take_error()?.map_or(Ok(()), Err);
    }
    Ok(())
}

/// Gives the guest what comes back on a flow, until the flow has been idle for long enough.
async fn listen(
    inner: Arc<Inner>,
    key: DatagramKey,
    mac: Mac,
    flow: std::sync::Weak<Flow>,
    socket: Arc<UdpSocket>,
) {
    let patience = match key.kind {
        Kind::Udp => IDLE,
        Kind::Echo => IDLE_ECHO,
    };
    let mut buffer = Vec::new();
    let mut wait = patience;
    loop {
        // Most flows are idle for most of their life: they keep no buffer meanwhile.
        let ready = timeout(wait, readable(&socket)).await;
        let Some(flow) = flow.upgrade() else { return };
        if let Ok(Err(error)) = ready {
            inner.refused(&key, Datagrams::reason(&error, Reason::Host), mac);
            continue;
        }
        if ready.is_err() {
            let used = flow.last_used.load(Ordering::Relaxed);
            let idle = Duration::from_millis(inner.clock().saturating_sub(used));
            if idle >= patience {
                inner.datagrams.remove(&key);
                return;
            }
            wait = patience - idle;
            continue;
        }
        wait = patience;
        buffer.reserve(MAX_DATAGRAM);
        loop {
            buffer.clear();
            match socket.try_recv_buf(&mut buffer) {
                Ok(_) => {
                    flow.last_used.store(inner.clock(), Ordering::Relaxed);
                    match key.kind {
                        Kind::Udp => inner.send_datagram(key.remote, key.guest, mac, &buffer),
                        Kind::Echo => inner.echo_reply(&key, &buffer, mac),
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => inner.refused(&key, Datagrams::reason(&error, Reason::Host), mac),
            }
            tokio::task::coop::consume_budget().await;
        }
        buffer = Vec::new();
    }
}

impl Inner {
    /// Tells the guest that a datagram of this flow was not taken.
    fn refused(&self, key: &DatagramKey, reason: Reason, mac: Mac) {
        if key.kind == Kind::Echo {
            return;
        }
        // What it has sent is gone; its headers are what the guest goes by.
        let envelope = Envelope::new(key.guest.ip(), key.remote.ip(), protocol::UDP);
        let Some(mut payload) = datagram(key.guest, key.remote, &[]) else { return };
        complete(&envelope, &mut payload, 6);
        let mut packet = Vec::new();
        if envelope.push_header(&mut packet, payload.len(), 0).is_some() {
            packet.extend(payload);
            self.unreachable(&packet, reason, mac);
        }
    }
}

impl Inner {
    /// Milliseconds since the gateway's start.
    pub(super) fn clock(&self) -> u64 {
        let elapsed = Instant::now().duration_since(self.started);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    }
}
