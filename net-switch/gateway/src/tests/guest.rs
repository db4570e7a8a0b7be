//! A guest: smoltcp behind a card that is plugged into a gateway.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant as Clock};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{AnySocket, tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, TcpControl};
use tokio::runtime::Runtime;

use super::PATIENCE;
use crate::lock;
use crate::{CARD_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_V4, Gateway, GatewaySpec};
use firn_net_switch::{Delivery, Frame, NetPort, Offloads, OwnedFrame, Receiver, without_offloads};

/// What came to the card.
#[derive(Default)]
pub(crate) struct Card {
    frames: Mutex<VecDeque<OwnedFrame>>,
    arrived: Condvar,
}

impl Receiver for Card {
    fn receive(&self, frame: &Frame<'_>) -> Delivery {
        // Segments as a card cuts them that can do nothing itself; this checks the header too.
        let segments = without_offloads(frame, Offloads::default()).expect("it can be segmented");
        lock(&self.frames).extend(segments);
        self.arrived.notify_all();
        Delivery::Taken
    }

    fn link_changed(&self, _up: bool) {}
}

impl Card {
    /// The oldest frame; waits for one, for at most `patience`.
    pub fn next(&self, patience: Duration) -> Option<Vec<u8>> {
        let frames = lock(&self.frames);
        let empty = |frames: &mut VecDeque<_>| frames.is_empty();
        let (mut frames, _) =
            self.arrived.wait_timeout_while(frames, patience, empty).expect("nobody panicked");
        frames.pop_front().map(|frame| frame.data)
    }

    /// The first frame that `wanted` is true of; those before it are lost.
    pub fn find(&self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        std::iter::from_fn(|| self.next(PATIENCE)).find(|frame| wanted(frame))
    }

    fn wait(&self, patience: Duration) {
        let frames = lock(&self.frames);
        let empty = |frames: &mut VecDeque<_>| frames.is_empty();
        drop(self.arrived.wait_timeout_while(frames, patience, empty));
    }
}

/// The card as smoltcp sees it.
pub(crate) struct Cable {
    pub gateway: Arc<Gateway>,
    pub card: Arc<Card>,
}

impl Cable {
    pub fn send(&self, data: &[u8]) {
        let mut frame = OwnedFrame { data: data.to_vec(), ..OwnedFrame::default() };
        frame.lend(|frame| self.gateway.send(frame));
    }
}

impl Device for Cable {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        let frame = lock(&self.card.frames).pop_front()?;
        Some((Rx(frame.data), Tx(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

pub(crate) struct Rx(Vec<u8>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub(crate) struct Tx<'a>(&'a Cable);

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut data = vec![0; length];
        let result = f(&mut data);
        self.0.send(&data);
        result
    }
}

/// A guest at its gateway. All addresses are set, so that no test waits for them.
pub(crate) struct Guest {
    pub cable: Cable,
    pub sockets: SocketSet<'static>,
    interface: Interface,
    began: Clock,
    next_port: u16,
    pub runtime: Runtime,
}

impl Guest {
    pub fn new(spec: GatewaySpec) -> Self {
        // Hosts commonly let a process have 1,024 files until it asks for more.
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, most.min(20_000), most).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let gateway = Arc::new(runtime.block_on(Gateway::new(spec)).unwrap());
        let card = Arc::new(Card::default());
        gateway.attach(Arc::clone(&card) as Arc<dyn Receiver>);
        let mut cable = Cable { gateway, card };
        let config = Config::new(EthernetAddress(CARD_MAC).into());
        let mut interface = Interface::new(config, &mut cable, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(GUEST_V4.into(), 24)).unwrap();
            let v6 = std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x15);
            addresses.push(IpCidr::new(v6.into(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(GATEWAY_V4).unwrap();
        interface.routes_mut().add_default_ipv6_route(GATEWAY_V6).unwrap();
        Self {
            cable,
            sockets: SocketSet::new(Vec::new()),
            interface,
            began: Clock::now(),
            next_port: 40_000,
            runtime,
        }
    }

    pub fn gateway(&self) -> &Gateway {
        &self.cable.gateway
    }

    /// Works until `done` has an answer. It may use sockets at each look.
    #[track_caller]
    pub fn until<T>(&mut self, mut done: impl FnMut(&mut SocketSet<'static>) -> Option<T>) -> T {
        let began = Clock::now();
        loop {
            let now =
                Instant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap());
            self.interface.poll(now, &mut self.cable, &mut self.sockets);
            if let Some(answer) = done(&mut self.sockets) {
                // What it has put into sockets goes out.
                self.interface.poll(now, &mut self.cable, &mut self.sockets);
                return answer;
            }
            assert!(began.elapsed() < PATIENCE, "it takes too long");
            let wait = self.interface.poll_delay(now, &self.sockets).map(Duration::from);
            self.cable.card.wait(wait.unwrap_or(PATIENCE).min(Duration::from_millis(20)));
        }
    }

    fn port(&mut self) -> u16 {
        self.next_port += 1;
        self.next_port
    }

    /// A TCP socket with buffers of `size` bytes.
    pub fn tcp(&mut self, size: usize) -> SocketHandle {
        // Not zero, so that it takes up its memory now.
        let buffer = || tcp::SocketBuffer::new(vec![1; size]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    /// Begins to connect.
    pub fn begin(&mut self, to: SocketAddr) -> SocketHandle {
        let handle = self.tcp(256 << 10);
        self.begin_by(handle, to);
        handle
    }

    fn begin_by(&mut self, handle: SocketHandle, to: SocketAddr) {
        let port = self.port();
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        let context = self.interface.context();
        socket.connect(context, (to.ip(), to.port()), port).unwrap();
    }

    /// Connects; `None` if that is refused.
    #[track_caller]
    pub fn connect(&mut self, to: SocketAddr) -> Option<SocketHandle> {
        let handle = self.begin(to);
        self.connected(handle).then_some(handle)
    }

    /// Connects by a socket that is there.
    #[track_caller]
    pub fn connect_by(&mut self, handle: SocketHandle, to: SocketAddr) {
        self.begin_by(handle, to);
        assert!(self.connected(handle));
    }

    #[track_caller]
    fn connected(&mut self, handle: SocketHandle) -> bool {
        self.until(|sockets| match sockets.get::<tcp::Socket>(handle).state() {
            tcp::State::Closed => Some(false),
            tcp::State::SynSent => None,
            _ => Some(true),
        })
    }

    /// Sends all of `data`.
    #[track_caller]
    pub fn send(&mut self, handle: SocketHandle, mut data: &[u8]) {
        self.until(|sockets| {
            let socket = sockets.get_mut::<tcp::Socket>(handle);
            let sent = socket.send_slice(data).expect("it can be sent");
            data = &data[sent..];
            data.is_empty().then_some(())
        });
    }

    /// Receives until the other side ends.
    #[track_caller]
    pub fn receive(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut data = Vec::new();
        self.until(|sockets| {
            let socket = sockets.get_mut::<tcp::Socket>(handle);
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), data.extend(&*bytes))).unwrap();
            }
            (!socket.may_recv()).then_some(())
        });
        data
    }

    /// Waits until a socket is in a state.
    #[track_caller]
    pub fn state(&mut self, handle: SocketHandle, state: tcp::State) {
        self.until(|sockets| (sockets.get::<tcp::Socket>(handle).state() == state).then_some(()));
    }

    pub fn close(&mut self, handle: SocketHandle) {
        self.sockets.get_mut::<tcp::Socket>(handle).close();
    }

    /// A UDP socket on a port of its own.
    pub fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer =
            || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 256 << 10]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    /// Sends a datagram.
    pub fn send_to(&mut self, handle: SocketHandle, data: &[u8], to: SocketAddr) {
        let socket = self.sockets.get_mut::<udp::Socket>(handle);
        socket.send_slice(data, (to.ip(), to.port())).unwrap();
    }

    /// Receives a datagram.
    #[track_caller]
    pub fn receive_from(&mut self, handle: SocketHandle) -> (Vec<u8>, SocketAddr) {
        self.until(|sockets| {
            let (data, from) = sockets.get_mut::<udp::Socket>(handle).recv().ok()?;
            let from = SocketAddr::new(from.endpoint.addr.into(), from.endpoint.port);
            Some((data.to_vec(), from))
        })
    }

    pub fn socket<T: AnySocket<'static>>(&mut self, handle: SocketHandle) -> &mut T {
        self.sockets.get_mut(handle)
    }
}

/// An IPv4 packet from the guest with any payload, in a frame.
pub(crate) fn raw(protocol: u8, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    use crate::GATEWAY_MAC;
    use crate::wire::{Envelope, Hop};
    let hop = Hop { source: CARD_MAC, destination: GATEWAY_MAC };
    let envelope = Envelope::new(IpAddr::from(GUEST_V4), IpAddr::from(to), protocol);
    envelope.frame(hop, payload).unwrap()
}

/// The guest's SYN in a frame.
pub(crate) fn syn(from_port: u16, to: SocketAddr, sequence: i32) -> Vec<u8> {
    segment(TcpControl::Syn, from_port, to, sequence)
}

/// The guest's reset in a frame.
pub(crate) fn reset(from_port: u16, to: SocketAddr, sequence: i32) -> Vec<u8> {
    segment(TcpControl::Rst, from_port, to, sequence)
}

fn segment(control: TcpControl, from_port: u16, to: SocketAddr, sequence: i32) -> Vec<u8> {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{TcpPacket, TcpRepr, TcpSeqNumber};
    let IpAddr::V4(address) = to.ip() else { panic!("{to}") };
    let syn = control == TcpControl::Syn;
    let repr = TcpRepr {
        src_port: from_port,
        dst_port: to.port(),
        control,
        seq_number: TcpSeqNumber(sequence),
        ack_number: None,
        window_len: 8192,
        window_scale: syn.then_some(0),
        max_seg_size: syn.then_some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let mut payload = vec![0; repr.buffer_len()];
    let mut packet = TcpPacket::new_unchecked(&mut payload[..]);
    let ends = (IpAddr::from(GUEST_V4).into(), IpAddr::from(address).into());
    repr.emit(&mut packet, &ends.0, &ends.1, &ChecksumCapabilities::default());
    raw(6, address, &payload)
}
