//! The user network: a guest's private way to the host and beyond, by ordinary sockets.
//!
//! A [`Gateway`] is the other end of one card's cable. The guest finds a network as QEMU's user network has it: it is
//! 10.0.2.15 (by DHCP) and fd00::/64 (by router advertisement), the gateway is 10.0.2.2 and fd00::2, DNS is at
//! 10.0.2.3 and fd00::3. What it sends to the gateway's addresses arrives at the host's loopback, anything else goes
//! where the host's routes lead, except to addresses of the host itself or of its own link.
//!
//! ```text
//! guest's card -> Gateway::send -> ARP, DHCP, echo: answered at once
//!                               -> UDP: a connected socket each flow (udp)
//!                               -> TCP: a task each connection (tcp), with a stack of its own on
//!                                  the guest's side and a stream on the host's
//! ```
//!
//! TCP is ended here and begun again: the guest's connection is accepted only once the host's is
//! made, and either side's end or failure becomes the other's. Frames of 64 KiB go both ways whole.
//!
//! Everything that a guest can have many of is limited. At a limit the entry that has waited longest makes room for
//! the new one, so nothing that hangs blocks anything else.

#![forbid(unsafe_code)]

mod dhcp;
mod dns;
mod forward;
mod fragment;
mod icmp;
mod limits;
mod link;
mod neighbour;
mod route;
mod tcp;
mod udp;
mod wire;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use dns::Questions;
use firn_net_switch::sanitize;
use firn_net_switch::{Delivery, Frame, Header, NetPort, Receiver};
use fragment::Reassembly;
use icmp::Reason;
use limits::Limits;
use link::Link;
use neighbour::ALL_NODES;
use tcp::{Connections, Segment};
use udp::Datagrams;
use wire::{ArpRequest, Content, ETHERNET, Hop, Mac, Packet, multicast_mac, protocol};

/// Locks `mutex` also after a panic elsewhere: what this crate guards is whole between any two
/// statements, and one connection's bug must not take the network from the others.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address of the gateway, which is the host's loopback.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The address at which names are asked.
pub const DNS_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The address that the guest gets.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// As [`GATEWAY_V4`].
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
/// As [`DNS_V4`].
pub const DNS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3);
/// The hardware address that QEMU gives a machine's first card.
pub const CARD_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// The guest's network, a /24.
const PREFIX_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);
/// The guest's network, a /64.
const PREFIX_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0);
/// The address of the router, which has to be one that holds on this link only.
const GATEWAY_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// The gateway's hardware address: locally administered, with its IPv4 address in it.
const GATEWAY_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];
/// How often the router advertises itself (RFC 4861, 6.2.1: MaxRtrAdvInterval, at most this).
const ADVERTISEMENT_INTERVAL: Duration = Duration::from_secs(1800);

/// What is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// On which side a forwarded port is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Programs of the host reach the guest.
    Host,
    /// The guest reaches a program of the host, or beyond.
    Guest,
}

/// A port that leads to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The side that connects.
    pub from: Side,
    /// By what.
    pub protocol: Protocol,
    /// From the host: where it listens; port 0 lets the system choose one. From the guest: where
    /// it leads.
    pub host: SocketAddr,
    /// From the host: where it leads. From the guest: the address that the guest uses.
    pub guest: SocketAddr,
}

/// What kind of gateway to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewaySpec {
    /// The hardware address of the guest's card.
    pub card: [u8; 6],
    /// The host name that DHCP gives the guest.
    pub host_name: String,
    /// Let nothing out but to [`Side::Guest`] forwards: no question about a name, either.
    pub restrict: bool,
    /// Let what the guest sends to the gateway's addresses arrive at the host's loopback.
    pub host_loopback: bool,
    /// How many files it may open for the guest; with less than 5,248 it may have fewer connections.
    pub descriptors: usize,
    /// Ports to forward from the start.
    pub forwards: Vec<Forward>,
    /// DNS resolvers. `None` means those in the host's `/etc/resolv.conf`, read again for each query.
    pub resolvers: Option<Vec<SocketAddr>>,
}

impl Default for GatewaySpec {
    fn default() -> Self {
        Self {
            card: CARD_MAC,
            host_name: String::new(),
            restrict: false,
            host_loopback: true,
            descriptors: usize::MAX,
            forwards: Vec::new(),
            resolvers: None,
        }
    }
}

/// A port cannot be forwarded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// It is in use.
    #[error("cannot forward {protocol} port {} of {}: the port is in use", address.port(), address.ip())]
    InUse {
        /// By what.
        protocol: Protocol,
        /// The address of the host, or the one that the guest uses.
        address: SocketAddr,
    },
    /// The system refuses it.
    #[error("cannot forward {protocol} port {} of {}", address.port(), address.ip())]
    Listen {
        /// By what.
        protocol: Protocol,
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is invalid.
    #[error("cannot forward {protocol} port {} of {}: {problem}", address.port(), address.ip())]
    Senseless {
        /// By what.
        protocol: Protocol,
        /// The address.
        address: SocketAddr,
        /// What is wrong.
        problem: &'static str,
    },
}

/// How busy a gateway is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GatewayStats {
    /// TCP connections, also those that are being made.
    pub connections: usize,
    /// Flows of UDP datagrams and echo requests.
    pub datagram_flows: usize,
    /// Bytes that may be in buffers of connections.
    pub reserved: usize,
}

/// The user network of one card. Dropping it, or [`Self::close`], ends all that goes through it.
///
/// It works on the runtime it was made in, which must have I/O and time enabled.
pub struct Gateway {
    inner: Arc<Inner>,
}

/// What the card's thread and the gateway's tasks share.
struct Inner {
    runtime: Handle,
    started: Instant,
    link: Link,
    /// There is a card.
    plugged: AtomicBool,
    restrict: bool,
    host_loopback: bool,
    resolvers: Option<Vec<SocketAddr>>,
    /// Where addresses that the guest uses lead.
    guest_forwards: Mutex<HashMap<(Protocol, SocketAddr), SocketAddr>>,
    dhcp: Mutex<dhcp::Server>,
    reassembly: Mutex<Reassembly>,
    connections: Connections,
    datagrams: Datagrams,
    questions: Questions,
    /// The tasks that listen on the host's ports.
    listeners: Mutex<Vec<JoinHandle<()>>>,
    closed: watch::Sender<bool>,
}

impl Gateway {
    /// Makes a gateway, with its forwards, on the present runtime.
    ///
    /// # Errors
    /// A port cannot be forwarded.
    ///
    /// # Panics
    /// Outside a runtime.
    pub async fn new(spec: GatewaySpec) -> Result<Self, ForwardError> {
        let limits = Limits::new(spec.descriptors);
        let inner = Arc::new(Inner {
            runtime: Handle::current(),
            started: Instant::now(),
            link: Link::new(spec.card),
            plugged: AtomicBool::new(false),
            restrict: spec.restrict,
            host_loopback: spec.host_loopback,
            resolvers: spec.resolvers,
            guest_forwards: Mutex::default(),
            dhcp: Mutex::new(dhcp::Server::new(spec.card, &spec.host_name)),
            reassembly: Mutex::default(),
            connections: Connections::new(limits),
            datagrams: Datagrams::new(limits),
            questions: Questions::new(limits.questions),
            listeners: Mutex::default(),
            closed: watch::Sender::new(false),
        });
        let gateway = Self { inner };
        for forward in spec.forwards {
            gateway.forward(forward).await?;
        }
        gateway.inner.runtime.spawn(advertise(Arc::clone(&gateway.inner)));
        Ok(gateway)
    }

    /// Forwards one more port. Returns where it listens: with the port that was chosen, if any
    /// would do.
    ///
    /// # Errors
    /// The port is in use or not allowed.
    pub async fn forward(&self, forward: Forward) -> Result<SocketAddr, ForwardError> {
        Inner::forward(&self.inner, forward).await
    }

    /// Ends all that goes through it. On return its ports of the host are free.
    pub async fn close(&self) {
        self.inner.close();
        let listeners = std::mem::take(&mut *lock(&self.inner.listeners));
        for listener in listeners {
            // It has ended, or its runtime has.
            let _ = listener.await;
        }
    }

    /// How busy it is at present.
    #[must_use]
    pub fn stats(&self) -> GatewayStats {
        let inner = &self.inner;
        GatewayStats {
            connections: inner.connections.len(),
            datagram_flows: inner.datagrams.len(),
            reserved: inner.connections.reserved(),
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.inner.close();
    }
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl NetPort for Gateway {
    fn send(&self, frame: &Frame<'_>) -> Delivery {
        let Ok(header) = sanitize(frame.header, frame.total_len()) else {
            return Delivery::Dropped;
        };
        // No card here offers to segment datagrams.
        if header.gso_kind() == Header::GSO_UDP_L4 {
            return Delivery::Dropped;
        }
        Inner::receive(&self.inner, header, frame.to_vec());
        Delivery::Taken
    }

    fn attach(&self, receiver: Arc<dyn Receiver>) {
        if self.inner.plugged.swap(true, Ordering::Relaxed) {
            self.inner.hang_up();
        }
        self.inner.link.attachment.attach(receiver);
    }

    /// The card is gone and with it the guest's ends of all flows, so the host's ends are closed too.
    fn detach(&self) {
        self.inner.link.attachment.detach();
        self.inner.plugged.store(false, Ordering::Relaxed);
        self.inner.hang_up();
    }

    fn link_up(&self) -> bool {
        true
    }
}

impl Inner {
    /// Takes a frame of the guest, on its device's thread.
    fn receive(self: &Arc<Self>, header: Header, frame: Vec<u8>) {
        let Some((to, from, content)) = wire::ethernet(&frame) else { return };
        let group = to[0] & 1 != 0;
        if !(group || to == GATEWAY_MAC) || from[0] & 1 != 0 {
            return;
        }
        match content {
            Content::Arp(data) => self.arp(data),
            Content::Ip => self.ip(from, frame, header.needs_csum()),
        }
    }

    fn arp(&self, data: &[u8]) {
        let Some(request) = ArpRequest::parse(data) else { return };
        let (sender, mac) = request.sender;
        if !self.answers_for(request.target.into()) {
            return;
        }
        // Who only looks whether the address is taken has none yet.
        if !sender.is_unspecified() {
            self.link.learn(sender.into(), mac);
        }
        self.link.deliver_finished(request.reply(GATEWAY_MAC));
    }

    /// Takes a frame with an IP packet. `unsummed`: its checksum was left to the card.
    fn ip(self: &Arc<Self>, from: Mac, frame: Vec<u8>, unsummed: bool) {
        let Some(packet) = frame.get(ETHERNET..).and_then(Packet::parse) else { return };
        let fragment = packet.fragment;
        if fragment.is_some() || packet.extended {
            if let Some(frame) = self.plain(from, &packet) {
                // It is neither now.
                self.ip(from, frame, unsummed && fragment.is_none());
            }
            return;
        }
        if !unsummed && !packet.checksum_fits() {
            return;
        }
        match packet.protocol {
            protocol::TCP => {
                let segment = Segment::parse(&packet);
                let length = ETHERNET + packet.whole.len();
                if let Some(segment) = segment {
                    let mut frame = frame;
                    // Without what pads it.
                    frame.truncate(length);
                    self.tcp(from, segment, frame);
                }
            }
            protocol::UDP => self.udp(&packet, from),
            protocol::ICMP if packet.source.is_ipv4() => self.icmp(&packet, from),
            protocol::ICMPV6 if packet.source.is_ipv6() => self.icmp(&packet, from),
            _ if self.answers_for(packet.destination) => {
                self.unreachable(packet.whole, Reason::Protocol, from);
            }
            _ => {}
        }
    }

    /// The packet as one piece with a plain header, as a frame; `None` if pieces are missing.
    fn plain(&self, from: Mac, packet: &Packet<'_>) -> Option<Vec<u8>> {
        let hop = Hop { source: from, destination: GATEWAY_MAC };
        if let Some(fragment) = packet.fragment {
            let (envelope, payload) =
                lock(&self.reassembly).add(packet, fragment, Instant::now())?;
            return envelope.frame(hop, &payload);
        }
        let mut envelope = wire::Envelope::new(packet.source, packet.destination, packet.protocol);
        envelope.hop_limit = packet.hop_limit;
        envelope.frame(hop, packet.payload)
    }

    /// Ends all flows of the guest, because it or the gateway goes.
    fn hang_up(&self) {
        self.connections.close_all();
        self.datagrams.clear();
        self.link.forget();
        *lock(&self.reassembly) = Reassembly::default();
    }

    fn close(&self) {
        self.closed.send_replace(true);
        self.hang_up();
    }

    /// Waits until the gateway is closed.
    async fn closed(&self) {
        // The sender lives in self.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }
}

/// Tells the guest now and then that there is a router.
async fn advertise(inner: Arc<Inner>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(ADVERTISEMENT_INTERVAL) => {
                inner.advertise_router(ALL_NODES, multicast_mac(ALL_NODES));
            }
            () = inner.closed() => return,
        }
    }
}

/// The unspecified address of the family of `address`.
fn any(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests;
