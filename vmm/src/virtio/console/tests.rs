use std::io::{ErrorKind, Read, Write};

use proptest::prelude::{Strategy, any, prop};
use proptest::proptest;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::control::event;
use super::*;
use crate::virtio::testing::{DriverQueue, Guest, HOSTILE_MEMORY, Part, hostile_ring};

/// A console `hvc0` and a port `agent`, with the ends that the host holds.
fn console() -> (Console, Vec<UnixStream>) {
    let specs = [ConsolePortSpec { name: None }, ConsolePortSpec { name: Some("agent".into()) }];
    let (ends, host): (Vec<_>, _) = (0..2).map(|_| UnixStream::pair().unwrap()).unzip();
    (Console::new(specs.into_iter().zip(ends).collect()).unwrap(), host)
}

/// A console with its guest and its host.
struct Bench {
    guest: Guest,
    drivers: Vec<DriverQueue>,
    device: Box<dyn ActiveDevice>,
    host: Vec<UnixStream>,
}

const AGENT: usize = 1;
const AGENT_RX: usize = 4;
const AGENT_TX: usize = 5;

impl Bench {
    fn with_features(features: u64) -> Bench {
        let (device, host) = console();
        for end in &host {
            end.set_nonblocking(true).unwrap();
        }
        let guest = Guest::new();
        let (drivers, activation) = guest.activation(&device.queue_sizes(), features);
        let device = Box::new(device).activate(activation).ok().unwrap();
        Bench { guest, drivers, device, host }
    }

    fn new() -> Bench {
        Bench::with_features(F_MULTIPORT)
    }

    /// A guest that has both ports open.
    fn opened() -> Bench {
        let mut bench = Bench::new();
        bench.give_control_buffers(16);
        bench.tell(0, event::DEVICE_READY, 1);
        for port in 0..2 {
            bench.tell(port, event::PORT_READY, 1);
            bench.tell(port, event::PORT_OPEN, 1);
        }
        bench.heard();
        bench
    }

    fn give_control_buffers(&mut self, count: usize) {
        for _ in 0..count {
            self.drivers[CONTROL_RX].add(&[Part::Write(64)]);
        }
        self.device.notify(CONTROL_RX).unwrap();
    }

    /// The guest sends a control message.
    fn tell(&mut self, id: u32, event: u16, value: u16) {
        let message = Message { id, event, value }.to_bytes();
        self.drivers[CONTROL_TX].add(&[Part::Read(&message)]);
        self.device.notify(CONTROL_TX).unwrap();
        assert!(self.drivers[CONTROL_TX].used().is_some(), "the driver spins on this");
    }

    /// The control messages that reached the guest, with the bytes that followed them.
    fn heard(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        let used = self.drivers[CONTROL_RX].all_used();
        used.iter()
            .map(|used| {
                let (message, name) = used.data.split_at(Message::LEN);
                let message = Message::from_bytes(message.try_into().unwrap());
                (message.id, message.event, message.value, name.to_vec())
            })
            .collect()
    }

    fn send(&mut self, queue: usize, data: &[u8]) {
        self.drivers[queue].add(&[Part::Read(data)]);
        self.device.notify(queue).unwrap();
    }

    /// All that the host can read of a port now.
    fn host_read(&mut self, port: usize) -> Vec<u8> {
        let mut data = Vec::new();
        let error = self.host[port].read_to_end(&mut data).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        data
    }
}

#[test]
fn ports_are_announced_as_the_driver_asks() {
    let mut bench = Bench::new();
    bench.give_control_buffers(8);
    assert_eq!(bench.heard(), []);
    bench.tell(0, event::DEVICE_READY, 1);
    let add = |id| (id, event::DEVICE_ADD, 0, vec![]);
    assert_eq!(bench.heard(), [add(0), add(1)]);
    bench.tell(1, event::PORT_READY, 1);
    assert_eq!(
        bench.heard(),
        [(1, event::PORT_NAME, 1, b"agent".to_vec()), (1, event::PORT_OPEN, 1, vec![])]
    );
    bench.tell(0, event::PORT_READY, 1);
    assert_eq!(
        bench.heard(),
        [(0, event::CONSOLE_PORT, 1, vec![]), (0, event::PORT_OPEN, 1, vec![])]
    );
    assert!(bench.guest.interrupt.take_queue(CONTROL_RX) >= 3);
}

#[test]
fn messages_wait_for_buffers_and_do_not_pile_up() {
    let mut bench = Bench::new();
    for _ in 0..1000 {
        bench.tell(0, event::DEVICE_READY, 1);
        bench.tell(1, event::PORT_READY, 1);
    }
    bench.give_control_buffers(1);
    assert_eq!(bench.heard(), [(0, event::DEVICE_ADD, 0, vec![])]);
    bench.give_control_buffers(10);
    let events: Vec<_> = bench.heard().iter().map(|(id, event, ..)| (*id, *event)).collect();
    assert_eq!(events, [(1, event::DEVICE_ADD), (1, event::PORT_NAME), (1, event::PORT_OPEN)]);
}

#[test]
fn nonsense_on_the_control_queue_is_ignored() {
    let mut bench = Bench::new();
    bench.give_control_buffers(8);
    bench.tell(7, event::PORT_READY, 1);
    bench.tell(u32::MAX, event::PORT_OPEN, 1);
    bench.tell(0, 0xffff, 1);
    bench.tell(0, event::DEVICE_READY, 0);
    bench.send(CONTROL_TX, &[0, 0, 0]);
    bench.drivers[CONTROL_TX].add(&[Part::Write(8)]);
    bench.device.notify(CONTROL_TX).unwrap();
    assert_eq!(bench.heard(), []);
    // Longer than needed is fine, and so is a message in pieces.
    bench.drivers[CONTROL_TX].add(&[Part::Read(&[0; 6]), Part::Read(&[1, 0, 9, 9])]);
    bench.device.notify(CONTROL_TX).unwrap();
    assert_eq!(bench.heard().len(), 2);
    assert_eq!(bench.drivers[CONTROL_TX].all_used().len(), 3);
}

#[test]
fn a_control_buffer_that_is_too_small_costs_the_message() {
    let mut bench = Bench::new();
    bench.drivers[CONTROL_RX].add(&[Part::Write(4)]);
    bench.tell(0, event::DEVICE_READY, 1);
    assert_eq!(bench.drivers[CONTROL_RX].used().unwrap().len, 0);
    bench.give_control_buffers(1);
    assert_eq!(bench.heard(), [(1, event::DEVICE_ADD, 0, vec![])]);
}

#[test]
fn output_reaches_the_host_in_order() {
    let mut bench = Bench::opened();
    bench.drivers[1].add(&[Part::Read(b"one "), Part::Read(b"two ")]);
    bench.drivers[1].add(&[Part::Read(b"three")]);
    bench.device.notify(1).unwrap();
    bench.send(AGENT_TX, b"to the agent");
    assert_eq!(bench.host_read(0), b"one two three");
    assert_eq!(bench.host_read(AGENT), b"to the agent");
    assert_eq!(bench.drivers[1].all_used().len(), 2);
}

#[test]
fn input_waits_until_the_guest_opens_the_port() {
    let mut bench = Bench::new();
    bench.host[AGENT].write_all(b"early").unwrap();
    bench.drivers[AGENT_RX].add(&[Part::Write(64)]);
    bench.device.notify(AGENT_RX).unwrap();
    bench.device.host_event().unwrap();
    assert_eq!(bench.drivers[AGENT_RX].used(), None);
    bench.tell(1, event::PORT_OPEN, 1);
    assert_eq!(bench.drivers[AGENT_RX].used().unwrap().data, b"early");

    bench.tell(1, event::PORT_OPEN, 0);
    bench.drivers[AGENT_RX].add(&[Part::Write(64)]);
    bench.host[AGENT].write_all(b"late").unwrap();
    bench.device.host_event().unwrap();
    assert_eq!(bench.drivers[AGENT_RX].used(), None);
}

#[test]
fn input_waits_for_buffers_and_fills_them() {
    let mut bench = Bench::opened();
    bench.host[0].write_all(b"0123456789").unwrap();
    bench.device.host_event().unwrap();
    assert_eq!(bench.guest.interrupt.take_queue(0), 0);
    bench.drivers[0].add(&[Part::Write(3), Part::Write(1)]);
    bench.drivers[0].add(&[Part::Read(b"not writable")]);
    bench.drivers[0].add(&[Part::Write(64)]);
    bench.drivers[0].add(&[Part::Write(64)]);
    bench.device.notify(0).unwrap();
    let data: Vec<_> = bench.drivers[0].all_used().into_iter().map(|used| used.data).collect();
    assert_eq!(data, [b"0123".to_vec(), vec![], b"456789".to_vec()]);
    assert_eq!(bench.guest.interrupt.take_queue(0), 1);

    bench.host[0].write_all(b"more").unwrap();
    bench.device.host_event().unwrap();
    assert_eq!(bench.drivers[0].used().unwrap().data, b"more");
}

/// More than a socket takes at once, every byte telling its place.
fn long_text() -> Vec<u8> {
    (0..300_000_u32).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_full_socket_holds_the_chain_back_and_loses_nothing() {
    let mut bench = Bench::opened();
    let text = long_text();
    let (first, second) = text.split_at(700_001);
    bench.drivers[AGENT_TX].add(&[Part::Read(first), Part::Read(second)]);
    bench.drivers[AGENT_TX].add(&[Part::Read(b"!")]);
    bench.device.notify(AGENT_TX).unwrap();
    assert_eq!(bench.drivers[AGENT_TX].used(), None);
    let mut arrived = Vec::new();
    while bench.drivers[AGENT_TX].used().is_none() {
        let piece = bench.host_read(AGENT);
        assert!(!piece.is_empty(), "no progress");
        arrived.extend(piece);
        bench.device.host_event().unwrap();
    }
    arrived.extend(bench.host_read(AGENT));
    assert_eq!(arrived, [&text[..], b"!"].concat());
}

#[test]
fn a_chain_half_sent_survives_a_snapshot() {
    let mut bench = Bench::opened();
    let text = long_text();
    bench.send(AGENT_TX, &text);
    bench.device.pause();
    let (state, positions) = (bench.device.save(), bench.device.queue_positions());
    let mut arrived = bench.host_read(AGENT);
    drop(bench.device);

    let (mut device, mut host) = console();
    device.restore(&state).unwrap();
    let activation = bench.guest.reactivation(&bench.drivers, F_MULTIPORT, &positions);
    let mut device = Box::new(device).activate(activation).ok().unwrap();
    assert_eq!(device.save(), state);
    host[AGENT].set_nonblocking(true).unwrap();
    while bench.drivers[AGENT_TX].used().is_none() {
        device.host_event().unwrap();
        let before = arrived.len();
        let _ = host[AGENT].read_to_end(&mut arrived);
        assert!(arrived.len() > before, "no progress");
    }
    assert_eq!(arrived, text);
    // The guest had the port open, so it still has.
    host[AGENT].write_all(b"hello again").unwrap();
    bench.drivers[AGENT_RX].add(&[Part::Write(64)]);
    device.notify(AGENT_RX).unwrap();
    assert_eq!(bench.drivers[AGENT_RX].used().unwrap().data, b"hello again");
}

#[test]
fn the_guest_learns_that_the_host_has_gone() {
    let mut bench = Bench::opened();
    let closed = |id| (id, event::PORT_OPEN, 0, vec![]);
    bench.drivers[AGENT_RX].add(&[Part::Write(64)]);
    bench.device.notify(AGENT_RX).unwrap();
    bench.host[AGENT].write_all(b"last words").unwrap();
    bench.host.remove(AGENT);
    bench.drivers[AGENT_RX].add(&[Part::Write(64)]);
    bench.device.host_event().unwrap();
    assert_eq!(bench.drivers[AGENT_RX].used().unwrap().data, b"last words");
    assert_eq!(bench.heard(), [closed(1)]);
    bench.send(AGENT_TX, b"into the void");
    assert!(bench.drivers[AGENT_TX].used().is_some(), "dropped, not held");

    // Found out by sending.
    bench.host.clear();
    bench.send(1, b"anybody there?");
    assert!(bench.drivers[1].used().is_some());
    assert_eq!(bench.heard(), [closed(0)]);
}

#[test]
fn a_driver_without_multiport_has_one_open_console() {
    let mut bench = Bench::with_features(0);
    bench.send(1, b"out");
    assert_eq!(bench.host_read(0), b"out");
    bench.host[0].write_all(b"in").unwrap();
    bench.drivers[0].add(&[Part::Write(8)]);
    bench.device.notify(0).unwrap();
    assert_eq!(bench.drivers[0].used().unwrap().data, b"in");
    for queue in 2..8 {
        bench.device.notify(queue).unwrap();
    }
    let positions = bench.device.queue_positions();
    assert_eq!(positions.iter().filter(|position| position.is_some()).count(), 2);
}

#[test]
fn a_host_that_reads_as_fast_as_the_guest_sends_does_not_keep_the_thread() {
    let mut bench = Bench::opened();
    let socket = bench.device.host_fds()[AGENT];
    let mut host = bench.host.remove(AGENT);
    host.set_nonblocking(false).unwrap();
    let reader = std::thread::spawn(move || io::copy(&mut host, &mut io::sink()).unwrap());
    let text = vec![b'x'; 6 << 20];
    bench.drivers[AGENT_TX].add(&[Part::Read(&text)]);
    bench.drivers[AGENT_TX].add(&[Part::Read(&text)]);
    let mut returned = 0;
    while returned < 2 {
        let mut poll = libc::pollfd { fd: socket, events: libc::POLLOUT, revents: 0 };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, -1) }, 1);
        bench.device.host_event().unwrap();
        let now = bench.drivers[AGENT_TX].all_used().len();
        assert!(now < 2, "a turn is shorter than this");
        returned += now;
    }
    drop(bench.device);
    assert_eq!(reader.join().unwrap(), 2 * u64::try_from(text.len()).unwrap());
}

/// Everything the guest sends comes back to it, with the device called only on edges of its
/// descriptors and when the guest rings: no edge is missed, no byte lost or doubled.
#[test]
fn an_echo_needs_only_edges_and_rings() {
    const TOTAL: usize = 8 << 20;
    let mut bench = Bench::opened();
    let epoll = Epoll::new().unwrap();
    let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
    for fd in bench.device.host_fds() {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(edges, 0)).unwrap();
    }
    let mut host = bench.host.remove(AGENT);
    host.set_nonblocking(false).unwrap();
    let mut sink = host.try_clone().unwrap();
    let echo = std::thread::spawn(move || {
        // In its own pace, so that now one side is full and now the other.
        let mut buffer = vec![0; 300_000];
        while let Ok(count @ 1..) = host.read(&mut buffer) {
            if sink.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
    });
    let byte = |at: usize| u8::try_from(at * 7 % 253).unwrap();
    let (mut sent, mut arrived) = (0, 0);
    let (mut sending, mut buffers) = (0, 0);
    while arrived < TOTAL {
        let before = (sent, arrived, sending, buffers);
        if sent < TOTAL && sending < 4 && sent < arrived + (1 << 20) {
            let data: Vec<u8> = (sent..TOTAL.min(sent + 30_000)).map(byte).collect();
            bench.drivers[AGENT_TX].add(&[Part::Read(&data)]);
            (sent, sending) = (sent + data.len(), sending + 1);
            bench.device.notify(AGENT_TX).unwrap();
        }
        if buffers < 8 {
            bench.drivers[AGENT_RX].add(&[Part::Write(4096)]);
            buffers += 1;
            bench.device.notify(AGENT_RX).unwrap();
        }
        sending -= bench.drivers[AGENT_TX].all_used().len();
        for used in bench.drivers[AGENT_RX].all_used() {
            buffers -= 1;
            assert!(used.data.iter().zip(arrived..).all(|(got, at)| *got == byte(at)));
            arrived += used.data.len();
        }
        if before == (sent, arrived, sending, buffers) {
            let mut events = [EpollEvent::default(); 4];
            let count = epoll.wait(10_000, &mut events).unwrap();
            assert!(count > 0, "no edge: {sent} sent, {arrived} arrived");
            bench.device.host_event().unwrap();
        }
    }
    assert_eq!((sent, arrived), (TOTAL, TOTAL));
    drop(bench.device);
    echo.join().unwrap();
}

#[test]
fn a_reset_forgets_the_guest_and_keeps_the_host() {
    let mut bench = Bench::opened();
    bench.host[AGENT].write_all(b"for the next driver").unwrap();
    let device = bench.device.reset();
    assert_eq!(device.save(), console().0.save());
    let (drivers, activation) = bench.guest.activation(&device.queue_sizes(), F_MULTIPORT);
    bench.drivers = drivers;
    bench.device = device.activate(activation).ok().unwrap();
    bench.drivers[AGENT_RX].add(&[Part::Write(64)]);
    bench.device.host_event().unwrap();
    assert_eq!(bench.drivers[AGENT_RX].used(), None, "closed again");
    bench.tell(1, event::PORT_OPEN, 1);
    assert_eq!(bench.drivers[AGENT_RX].used().unwrap().data, b"for the next driver");
}

#[test]
fn what_the_driver_sees() {
    let (device, _host) = console();
    assert_eq!(device.queue_sizes().len(), 6);
    // The control transmit queue and hvc0's.
    assert_eq!(device.inline_queues(), 0b1010);
    let mut config = [0xff; 16];
    device.read_config(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_last_port_fits_the_inline_bits() {
    let port = |_| (ConsolePortSpec { name: None }, UnixStream::pair().unwrap().0);
    let device = Console::new((0..MAX_PORTS).map(port).collect()).unwrap();
    assert_eq!(device.queue_sizes().len(), 64);
    assert_eq!(device.inline_queues(), 0xaaaa_aaaa_aaaa_aaaa);
}

#[test]
fn bad_ports_are_refused() {
    let end = || UnixStream::pair().unwrap().0;
    let port = |name: &str| ConsolePortSpec { name: Some(name.into()) };
    assert!(matches!(Console::new(vec![]), Err(ConsoleError::PortCount(0))));
    let many = vec![port("x"); MAX_PORTS + 1];
    let many = many.into_iter().map(|port| (port, end())).collect();
    assert!(matches!(Console::new(many), Err(ConsoleError::PortCount(32))));
    for name in ["", "a/b", "a\nb", &"n".repeat(256)] {
        assert!(matches!(Console::new(vec![(port(name), end())]), Err(ConsoleError::Name(_))));
        let checked = DeviceSpec::check(&vec![port(name)]);
        assert!(matches!(checked, Err(BuildError::Console(ConsoleError::Name(_)))));
    }
}

#[test]
fn a_state_of_another_console_is_refused() {
    let state = console().0.save();
    let port = (ConsolePortSpec { name: None }, UnixStream::pair().unwrap().0);
    let mut one = Console::new(vec![port]).unwrap();
    assert!(matches!(one.restore(&state), Err(RestoreError::OtherDevice { .. })));
    let damaged = SavedState { version: STATE_VERSION, data: vec![0xff; 3] };
    assert!(matches!(console().0.restore(&damaged), Err(RestoreError::Decode(_))));
}

proptest! {
    #[test]
    fn hostile_chains_do_no_harm(
        rings in prop::collection::vec((0..6_usize, hostile_ring()), 1..6),
        features in any::<bool>().prop_map(|multiport| if multiport { F_MULTIPORT } else { 0 }),
        input in prop::collection::vec(any::<u8>(), 0..100),
        control in any::<[u8; 8]>(),
    ) {
        let (device, mut host) = console();
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let (mut drivers, activation) = guest.activation(&[16; 6], features);
        let mut device = Box::new(device).activate(activation).ok().unwrap();
        host[AGENT].write_all(&input).unwrap();
        for start in (0x1000..0x4000).step_by(8) {
            guest.write(0x10000 + start, &control);
        }
        for (queue, ring) in &rings {
            drivers[*queue].corrupt(ring);
            let _ = device.notify(*queue);
            let _ = device.host_event();
            device.save();
        }
        drop(device.reset());
    }
}
