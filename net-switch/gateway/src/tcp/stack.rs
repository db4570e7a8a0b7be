//! The guest's side of one connection: smoltcp with a single socket.
//!
//! A stack of its own for each connection costs two kilobytes and makes the work for a segment the same however many
//! connections there are. Its buffers are mapped: only the used part takes up memory, and it is freed when the
//! connection ends.
//!
//! Segmentation is left to the card: the stack believes that the guest accepts segments of nearly 64 KiB, and frames
//! carry the size that the guest really asked for.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant as Clock;

use memmap2::MmapMut;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpCidr, TcpPacket};

use super::table::Key;
use crate::wire::{ETHERNET, Envelope, Hop, MTU, Mac, Packet, partial_checksum, protocol};
use crate::{GATEWAY_MAC, Inner};
use firn_net_switch::Header;

/// How long the guest has to answer before a connection exists.
const HALF_OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest IP packet: what its length can say.
const MAX_PACKET: usize = 65_535;
/// Length of a TCP header without options.
const TCP: usize = 20;
/// Where the flags are in a TCP header.
const TCP_FLAGS: usize = 13;
const TCP_SYN: u8 = 2;
/// Where the checksum is in a TCP header.
const TCP_CHECKSUM: u16 = 16;
/// The largest segment that who does not say otherwise takes (RFC 9293, 3.7.1).
const DEFAULT_MSS: u16 = 536;
/// The least that smoltcp cuts segments to.
const MIN_MSS: u16 = 48;
/// This part of the buffer for what is sent to the guest has to be free before it is filled: with
/// the largest buffer four whole frames.
const WORTHWHILE: usize = 4;
/// Option in a SYN: the largest segment (RFC 9293, 3.2).
const OPTION_MSS: u8 = 2;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    HalfOpen,
    Open,
    Ended,
}

/// The buffers of a connection.
pub(super) struct Buffers(MmapMut);

impl Buffers {
    /// Buffers of `size` bytes.
    ///
    /// # Errors
    /// There is no memory left.
    pub fn new(size: usize) -> io::Result<Self> {
        // One for each direction.
        MmapMut::map_anon(2 * size).map(Self)
    }
}

/// The guest's side of a connection.
pub(super) struct Stack<'a> {
    interface: Interface,
    sockets: SocketSet<'a>,
    socket: SocketHandle,
    cable: Cable,
    started: Clock,
}

impl<'a> Stack<'a> {
    /// Answers the guest's `syn`.
    pub fn accept(
        inner: Arc<Inner>,
        key: Key,
        buffers: &'a mut Buffers,
        mac: Mac,
        syn: &[u8],
    ) -> Self {
        let mut stack = Self::new(inner, key, buffers, mac);
        let remote = key.remote;
        // Fails if the port is zero or the socket is open: neither is so.
        let _ = stack.socket().listen((remote.ip(), remote.port()));
        stack.input(syn.to_vec());
        stack
    }

    /// Connects to the guest.
    pub fn connect(inner: Arc<Inner>, key: Key, buffers: &'a mut Buffers, mac: Mac) -> Self {
        let mut stack = Self::new(inner, key, buffers, mac);
        let Key { guest, remote } = key;
        let socket = stack.sockets.get_mut::<Socket>(stack.socket);
        let ends = |end: SocketAddr| (end.ip(), end.port());
        // A socket that could not connect is closed, which ends the connection.
        let _ = socket.connect(stack.interface.context(), ends(guest), ends(remote));
        stack
    }

    fn new(inner: Arc<Inner>, key: Key, buffers: &'a mut Buffers, mac: Mac) -> Self {
        let own = key.remote.ip();
        let hop = Hop { source: GATEWAY_MAC, destination: mac };
        let header = hop.header(own);
        let (input, output) = (None, Vec::new());
        let mut cable = Cable { inner, header, input, output, mss: DEFAULT_MSS };
        let mut config = Config::new(HardwareAddress::Ip);
        // Sequence numbers that nobody can guess; without entropy, still others each time.
        config.random_seed = getrandom::u64().unwrap_or_else(|_| u64::from(key.guest.port()));
        let mut interface = Interface::new(config, &mut cable, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let bits = if own.is_ipv4() { 32 } else { 128 };
            // There is room for one at least.
            let _ = addresses.push(IpCidr::new(own.into(), bits));
        });
        // Everything is behind the cable.
        let _ = match own {
            IpAddr::V4(own) => interface.routes_mut().add_default_ipv4_route(own),
            IpAddr::V6(own) => interface.routes_mut().add_default_ipv6_route(own),
        };
        let half = buffers.0.len() / 2;
        let (receive, send) = buffers.0.split_at_mut(half);
        let mut socket = Socket::new(SocketBuffer::new(receive), SocketBuffer::new(send));
        // Each round of work acknowledges all that came before it.
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(HALF_OPEN_TIMEOUT));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let socket = sockets.add(socket);
        Self { interface, sockets, socket, cable, started: Clock::now() }
    }

    fn now(&self) -> Instant {
        let elapsed = self.started.elapsed();
        Instant::from_micros(i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX))
    }

    fn socket(&mut self) -> &mut Socket<'a> {
        self.sockets.get_mut(self.socket)
    }

    fn peek(&self) -> &Socket<'a> {
        self.sockets.get(self.socket)
    }

    /// Takes a frame of the guest's that holds an IP packet with a TCP segment.
    pub fn input(&mut self, mut frame: Vec<u8>) {
        if let Some(mss) = raise_mss(&mut frame) {
            self.cable.mss = mss;
        }
        self.cable.input = Some(frame);
        let now = self.now();
        self.interface.poll_ingress_single(now, &mut self.cable, &mut self.sockets);
    }

    /// Sends what is to be sent now.
    pub fn output(&mut self) {
        let now = self.now();
        self.cable.output = self.cable.inner.link.scratch();
        while self.interface.poll_egress(now, &mut self.cable, &mut self.sockets)
            != PollResult::None
        {}
        // Most connections are idle for most of their life.
        self.cable.inner.link.keep_scratch(std::mem::take(&mut self.cable.output));
    }

    /// When [`Self::output`] has something to do although nothing happens.
    pub fn delay(&mut self) -> Option<std::time::Duration> {
        let now = self.now();
        self.interface.poll_delay(now, &self.sockets).map(Into::into)
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        match self.peek().state() {
            State::SynSent | State::SynReceived => Phase::HalfOpen,
            // The guest has answered the answer with a reset.
            State::Listen => Phase::Ended,
            // The guest knows that both sides have ended; no packet is left that could be late.
            State::Closed | State::TimeWait => Phase::Ended,
            _ => Phase::Open,
        }
    }

    /// From now on the guest may be silent as long as it likes: it may be paused.
    pub fn established(&mut self) {
        self.socket().set_timeout(None);
    }

    /// Whether the guest has sent something that was not taken yet.
    pub fn has_bytes(&self) -> bool {
        self.peek().can_recv()
    }

    /// Lets `take` have bytes that the guest has sent; it says how many it has taken.
    pub fn take_bytes(
        &mut self,
        take: impl FnOnce(&[u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let taken = self.socket().recv(|bytes| {
            let taken = take(bytes);
            (*taken.as_ref().unwrap_or(&0), taken)
        });
        taken.unwrap_or(Ok(0))
    }

    /// Whether all that the guest will ever send was taken.
    pub fn guest_has_ended(&self) -> bool {
        let socket = self.peek();
        let ended = matches!(
            socket.state(),
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        ended && !socket.can_recv()
    }

    /// Whether there is room for something to be sent to the guest: so much that it is worth the
    /// work, as what the guest acknowledges bit by bit would else be fetched and sent bit by bit.
    pub fn has_room(&self) -> bool {
        let socket = self.peek();
        let capacity = socket.send_capacity();
        socket.may_send() && capacity - socket.send_queue() >= capacity / WORTHWHILE
    }

    /// Lets `give` fill in bytes for the guest; it says how many it has given.
    pub fn give_bytes(
        &mut self,
        give: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let given = self.socket().send(|room| {
            let given = give(room);
            (*given.as_ref().unwrap_or(&0), given)
        });
        given.unwrap_or_else(|_| Err(io::ErrorKind::NotConnected.into()))
    }

    /// Nothing more will be sent to the guest.
    pub fn end(&mut self) {
        self.socket().close();
    }

    /// Makes the end of the connection a failure to the guest.
    pub fn abort(&mut self) {
        self.socket().abort();
    }
}

/// The stack's network card.
struct Cable {
    inner: Arc<Inner>,
    /// The Ethernet header of frames to the guest.
    header: [u8; ETHERNET],
    input: Option<Vec<u8>>,
    /// Where frames are put together: as long as the longest of a round.
    output: Vec<u8>,
    /// The largest segment that the guest takes.
    mss: u16,
}

impl Device for Cable {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sender<'_>)> {
        Some((Received(self.input.take()?), Sender(self)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sender<'_>> {
        Some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MAX_PACKET;
        // TCP's was looked at already, and is left to the guest's card when sending.
        capabilities.checksum = ChecksumCapabilities::ignored();
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

/// A frame that has come in.
struct Received(Vec<u8>);

impl smoltcp::phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0[ETHERNET..])
    }
}

/// Lends the room for a frame to send.
struct Sender<'a>(&'a mut Cable);

impl smoltcp::phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let Self(cable) = self;
        let length = ETHERNET + length;
        if cable.output.len() < length {
            cable.output.resize(length, 0);
        }
        let (head, packet) = cable.output[..length].split_at_mut(ETHERNET);
        head.copy_from_slice(&cable.header);
        let result = f(packet);
        cable.send(length);
        result
    }
}

impl Cable {
    /// Sends the frame with a segment of smoltcp's that is in the first `length` bytes of
    /// [`Self::output`], and leaves to the card what cards do.
    fn send(&mut self, length: usize) {
        let data = &mut self.output[..length];
        let Some((transport, envelope)) = transport(data) else { return };
        let Ok(segment) = TcpPacket::new_checked(&mut data[transport..]) else { return };
        let headers = transport + usize::from(segment.header_len());
        let syn = segment.syn();
        if syn {
            lower_mss(&mut data[transport..headers], envelope.header_len());
        }
        let length = data.len() - transport;
        let sum = partial_checksum(envelope.source, envelope.destination, protocol::TCP, length);
        let at = transport + usize::from(TCP_CHECKSUM);
        data[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        let mut header = Header {
            flags: Header::NEEDS_CSUM,
            csum_start: u16::try_from(transport).unwrap_or(u16::MAX),
            csum_offset: TCP_CHECKSUM,
            ..Header::default()
        };
        if data.len() - headers > usize::from(self.mss) {
            let v4 = envelope.source.is_ipv4();
            header.gso_type = if v4 { Header::GSO_TCPV4 } else { Header::GSO_TCPV6 };
            header.gso_size = self.mss;
            header.hdr_len = u16::try_from(headers).unwrap_or(u16::MAX);
        }
        self.inner.link.deliver(header, data);
    }
}

/// Where the segment of a frame with a plain IP header begins, and between whom it goes; `None` if
/// there is none.
fn transport(frame: &[u8]) -> Option<(usize, Envelope)> {
    let packet = Packet::parse(frame.get(ETHERNET..)?)?;
    let envelope = Envelope::new(packet.source, packet.destination, packet.protocol);
    let at = frame.len() - packet.payload.len();
    (packet.protocol == protocol::TCP).then_some((at, envelope))
}

/// The options of a segment.
fn options(segment: &mut [u8]) -> &mut [u8] {
    let length = segment.get(12).map_or(0, |words| usize::from(words >> 4) * 4);
    segment.get_mut(TCP..length).unwrap_or_default()
}

/// The value of the option that says how large segments may be.
fn mss_option(options: &mut [u8]) -> Option<&mut [u8; 2]> {
    let mut at = 0;
    loop {
        match *options.get(at)? {
            0 => return None,
            1 => at += 1,
            OPTION_MSS if options.get(at + 1) == Some(&4) => {
                return options.get_mut(at + 2..at + 4)?.try_into().ok();
            }
            _ => at += usize::from(*options.get(at + 1)?).max(2),
        }
    }
}

/// Says in the guest's SYN that segments may be as large as a packet. Returns what they may be
/// really; `None` if this is no SYN.
fn raise_mss(frame: &mut [u8]) -> Option<u16> {
    let (at, envelope) = transport(frame)?;
    let segment = frame.get_mut(at..)?;
    if segment.get(TCP_FLAGS)? & TCP_SYN == 0 {
        return None;
    }
    let Some(value) = mss_option(options(segment)) else { return Some(DEFAULT_MSS) };
    // As smoltcp reads it: too small is raised, zero is as good as nothing.
    let mss = match u16::from_be_bytes(*value) {
        0 => DEFAULT_MSS,
        mss => mss.max(MIN_MSS),
    };
    let room = u16::try_from(MAX_PACKET - envelope.header_len() - TCP).unwrap_or(u16::MAX);
    // A multiple, so that not every frame ends with a small segment.
    let raised = if mss < room { room - room % mss } else { mss };
    *value = raised.to_be_bytes();
    Some(mss)
}

/// Says in a SYN to the guest what fits on the link: the guest goes by its card in any case.
fn lower_mss(segment: &mut [u8], ip_header: usize) {
    if let Some(value) = mss_option(options(segment)) {
        let mss = u16::try_from(MTU - ip_header - TCP).unwrap_or(DEFAULT_MSS);
        *value = mss.to_be_bytes();
    }
}
