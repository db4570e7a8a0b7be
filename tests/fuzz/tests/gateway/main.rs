//! Frames of a guest, right or nearly so, into the gateway of its user network.
//!
//! What comes out must be frames that a guest can take, and the gateway must go on.

mod frames;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bolero::check;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use firn_gateway::{Forward, Gateway, GatewaySpec, GatewayStats, Protocol, Side};
use firn_net_switch::{
    Delivery, Frame, Header, NetPort, Offloads, OwnedFrame, Receiver, without_offloads,
};
use frames::{FIRST_PORT, Flags, SERVICE_PORT, SERVICE_V4, SERVICE_V6, Segment, Step, arp};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::runtime::Runtime;

/// Inputs of an ordinary test run.
const ITERATIONS: usize = 3000;
/// No guest has more flows than this at a time.
const MOST: usize = 4096;
/// How long an answer is waited for; without one, the connection did not come about.
const PATIENCE: Duration = Duration::from_millis(20);
/// Longer than a runtime takes to give each task a turn.
const LONG: Duration = Duration::from_secs(30);

/// The guest's card: looks at all that comes.
#[derive(Default)]
struct Card {
    frames: AtomicUsize,
    /// The sequence numbers that answers to SYNs had, a connection each.
    numbers: Mutex<[Option<u32>; 8]>,
    answered: Condvar,
}

impl Card {
    fn numbers(&self) -> MutexGuard<'_, [Option<u32>; 8]> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self, slot: usize) -> u32 {
        self.numbers()[slot].unwrap_or_default()
    }

    /// Waits for the answer to a SYN.
    fn wait(&self, slot: usize) {
        let numbers = self.numbers();
        drop(self.answered.wait_timeout_while(numbers, PATIENCE, |them| them[slot].is_none()));
    }

    fn look_at(&self, data: &[u8]) {
        let packet = SlicedPacket::from_ethernet(data).expect("a frame that is right");
        self.frames.fetch_add(1, Ordering::Relaxed);
        if let Some(TransportSlice::Tcp(segment)) = packet.transport
            && segment.syn()
        {
            let port = segment.destination_port().wrapping_sub(FIRST_PORT);
            let v6 = matches!(packet.net, Some(NetSlice::Ipv6(_)));
            let slot = usize::from(port % 4) * 2 + usize::from(v6);
            self.numbers()[slot] = Some(segment.sequence_number());
            self.answered.notify_all();
        }
    }
}

impl Receiver for Card {
    fn receive(&self, frame: &Frame<'_>) -> Delivery {
        // What a card gets that can do nothing itself.
        let segments =
            without_offloads(frame, Offloads::default()).expect("a header that is right");
        segments.for_each(|segment| self.look_at(&segment.data));
        Delivery::Taken
    }

    fn link_changed(&self, _up: bool) {}
}

/// A gateway with a service behind it.
struct Network {
    gateway: Gateway,
    card: Arc<Card>,
    /// It has one guest at a time.
    alone: Mutex<()>,
    _runtime: Runtime,
}

impl Network {
    fn new() -> Self {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            before(panic);
            // The runtime would go on without the task.
            if std::thread::current().name() == Some("gateway") {
                std::process::abort();
            }
        }));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("gateway")
            .enable_all()
            .build()
            .expect("a runtime");
        let gateway = runtime.block_on(async {
            let loopback = (Ipv4Addr::LOCALHOST, 0);
            let listener = TcpListener::bind(loopback).await.expect("a port");
            let socket = UdpSocket::bind(loopback).await.expect("a port");
            let services = [
                (Protocol::Tcp, listener.local_addr().expect("it is bound")),
                (Protocol::Udp, socket.local_addr().expect("it is bound")),
            ];
            tokio::spawn(serve_connections(listener));
            tokio::spawn(serve_datagrams(socket));
            let forward = |(protocol, host), address: IpAddr| Forward {
                from: Side::Guest,
                protocol,
                host,
                guest: SocketAddr::new(address, SERVICE_PORT),
            };
            let at = |service| {
                [forward(service, SERVICE_V4.into()), forward(service, SERVICE_V6.into())]
            };
            let spec = GatewaySpec {
                host_name: "guest".to_owned(),
                restrict: true,
                forwards: services.into_iter().flat_map(at).collect(),
                // Nobody is asked.
                resolvers: Some(Vec::new()),
                ..GatewaySpec::default()
            };
            Gateway::new(spec).await.expect("it can be made")
        });
        Self { gateway, card: Arc::default(), alone: Mutex::default(), _runtime: runtime }
    }

    fn send(&self, mut frame: OwnedFrame) -> Delivery {
        frame.lend(|frame| self.gateway.send(frame))
    }

    /// Sends the frames of a guest that has just started, and looks whether the gateway is still there.
    fn run(&self, steps: &[Step]) {
        let _alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        self.gateway.attach(Arc::clone(&self.card) as Arc<dyn Receiver>);
        *self.card.numbers() = [None; 8];
        for step in steps {
            self.send(step.frame(|slot| self.card.number(slot)));
            if let Some(slot) = step.begins() {
                self.card.wait(slot);
            }
        }
        let before = self.card.frames.load(Ordering::Relaxed);
        self.send(OwnedFrame { header: Header::default(), data: arp(1, 2) });
        // It answers at once.
        assert!(self.card.frames.load(Ordering::Relaxed) > before, "no answer");
        let GatewayStats { connections, datagram_flows, .. } = self.gateway.stats();
        assert!(connections <= MOST && datagram_flows <= MOST, "{connections}, {datagram_flows}");
        self.gateway.detach();
        // Tasks of connections end when they next have their turn, and nobody tells of that.
        let began = Instant::now();
        while self.gateway.stats() != GatewayStats::default() {
            assert!(began.elapsed() < LONG, "flows are left: {:?}", self.gateway.stats());
            std::thread::yield_now();
        }
    }
}

async fn serve_connections(listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(echo(stream));
    }
}

async fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

async fn serve_datagrams(socket: UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        if let Ok((count, peer)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..count], peer).await;
        }
    }
}

fn network() -> &'static Network {
    static NETWORK: OnceLock<Network> = OnceLock::new();
    NETWORK.get_or_init(Network::new)
}

#[test]
fn frames_of_a_guest() {
    check!().with_iterations(ITERATIONS).with_type::<Vec<Step>>().for_each(|steps: &Vec<Step>| {
        network().run(steps);
    });
}

/// Segments of connections that have been made: what comes after the handshake.
#[test]
fn segments_of_a_guest() {
    let input = check!().with_iterations(ITERATIONS).with_type::<(bool, Vec<Segment>)>().cloned();
    input.for_each(|(v6, segments): (bool, Vec<Segment>)| {
        let mut begun = [false; 8];
        let mut steps = Vec::new();
        for segment in segments {
            if !std::mem::replace(&mut begun[segment.slot(v6)], true) {
                steps.push(Step::of(v6, Segment::syn(segment.port)));
                // The last part of the handshake.
                steps.push(Step::of(
                    v6,
                    Segment { flags: Flags::Ack, ..Segment::syn(segment.port) },
                ));
            }
            steps.push(Step::of(v6, segment));
        }
        network().run(&steps);
    });
}
