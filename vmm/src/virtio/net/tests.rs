use std::io::Write;
use std::sync::Mutex;
use std::thread;

use firn_net_switch::{Delivery, Frame, Header, MAX_FRAME, OwnedFrame, Switch, SwitchPort};
use proptest::prelude::{Strategy, any, prop};
use proptest::proptest;

use super::*;
use crate::virtio::testing::{DriverQueue, Guest, HOSTILE_MEMORY, Part, hostile_ring};

const EVENT_IDX: u64 = 1 << 29;

/// A network that records what is sent and from which a test can deliver.
#[derive(Default)]
struct Wire {
    sent: Mutex<Vec<OwnedFrame>>,
    receiver: Mutex<Option<Arc<dyn Receiver>>>,
    down: Mutex<bool>,
}

impl NetPort for Wire {
    fn send(&self, frame: &Frame<'_>) -> Delivery {
        self.sent.lock().unwrap().push(OwnedFrame::from(frame));
        Delivery::Taken
    }
    fn attach(&self, receiver: Arc<dyn Receiver>) {
        *self.receiver.lock().unwrap() = Some(receiver);
    }
    fn detach(&self) {
        *self.receiver.lock().unwrap() = None;
    }
    fn link_up(&self) -> bool {
        !*self.down.lock().unwrap()
    }
}

impl Wire {
    fn take_sent(&self) -> Vec<OwnedFrame> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    /// Delivers a frame to the card.
    fn deliver(&self, header: Header, data: &[u8]) -> Delivery {
        let receiver = self.receiver.lock().unwrap().clone().expect("a card is plugged in");
        OwnedFrame { header, data: data.to_vec() }.lend(|frame| receiver.receive(frame))
    }

    fn set_link(&self, up: bool) {
        *self.down.lock().unwrap() = !up;
        if let Some(receiver) = self.receiver.lock().unwrap().clone() {
            receiver.link_changed(up);
        }
    }
}

const SPEC: NetSpec = NetSpec { mac: Mac([2, 0, 0, 0, 0, 1]) };

struct Bench {
    guest: Guest,
    drivers: Vec<DriverQueue>,
    device: Box<dyn ActiveDevice>,
    wire: Arc<Wire>,
}

impl Bench {
    fn new(features: u64) -> Bench {
        let wire = Arc::new(Wire::default());
        let guest = Guest::new();
        let (drivers, device) = plug(&guest, Arc::clone(&wire) as Arc<dyn NetPort>, features);
        Bench { guest, drivers, device, wire }
    }

    fn give_buffers(&mut self, count: usize, len: usize) {
        for _ in 0..count {
            self.drivers[RX].add(&[Part::Write(len)]);
        }
        self.device.notify(RX).unwrap();
    }

    /// What the guest finds in its receive buffers, header and frame apart.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        received(&mut self.drivers[RX])
    }
}

fn plug(
    guest: &Guest,
    port: Arc<dyn NetPort>,
    features: u64,
) -> (Vec<DriverQueue>, Box<dyn ActiveDevice>) {
    let device = Net::new(&SPEC, port).unwrap();
    let (drivers, activation) = guest.activation(&device.queue_sizes(), features);
    let device = Box::new(device).activate(activation).ok().unwrap();
    (drivers, device)
}

/// Puts frames together as a driver does.
fn received(driver: &mut DriverQueue) -> Vec<(Header, Vec<u8>)> {
    let mut frames = Vec::new();
    while let Some(first) = driver.used() {
        let (head, data) = first.data.split_at(header::LEN);
        let mut data = data.to_vec();
        let buffers = u16::from_le_bytes([head[10], head[11]]);
        assert!(buffers >= 1);
        for _ in 1..buffers {
            data.extend(driver.used().expect("all buffers of a frame come together").data);
        }
        frames.push((header::parse(head.try_into().unwrap()), data));
    }
    frames
}

/// A frame of `len` bytes that tell their place.
fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

/// A TCP segment over IPv4 that its sender left to the card to cut and sum.
fn tso_frame(payload: usize) -> (Header, Vec<u8>) {
    let mut data = frame(54 + payload);
    data[12..14].copy_from_slice(&[8, 0]);
    data[14] = 0x45;
    data[16..18].copy_from_slice(&u16::try_from(40 + payload).unwrap().to_be_bytes());
    data[20..22].fill(0);
    data[23] = 6;
    data[46] = 0x50;
    let header = Header {
        flags: Header::NEEDS_CSUM,
        gso_type: Header::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
    };
    (header, data)
}

#[test]
fn frames_are_sent_however_they_are_cut() {
    let mut bench = Bench::new(0);
    let (header, data) = tso_frame(3000);
    let bytes = [&header::compose(&header, 0)[..], &data].concat();
    for cuts in [&[12][..], &[5, 12, 100], &[1, 2, 3, 13], &[60], &[0, 12], &[]] {
        let edges: Vec<usize> =
            [0].into_iter().chain(cuts.iter().copied()).chain([bytes.len()]).collect();
        let parts: Vec<Part<'_>> =
            edges.windows(2).map(|edge| Part::Read(&bytes[edge[0]..edge[1]])).collect();
        bench.drivers[TX].add(&parts);
    }
    bench.device.notify(TX).unwrap();
    let sent = bench.wire.take_sent();
    assert_eq!(sent.len(), 6);
    assert!(sent.iter().all(|frame| frame.header == header && frame.data == data));
    assert_eq!(bench.drivers[TX].all_used().len(), 6);
    assert_eq!(bench.guest.interrupt.take_queue(TX), 1, "one interrupt for the batch");
}

#[test]
fn what_is_no_frame_is_dropped_and_given_back() {
    let mut bench = Bench::new(0);
    let good = [&[0; 12][..], &frame(60)].concat();
    let too_long = vec![0; 12 + MAX_FRAME + 1];
    for parts in [
        &[Part::Read(&good[..11])][..],
        &[Part::Read(&good[..12])],
        &[Part::Read(&good[..25])],
        &[Part::Read(&too_long)],
        &[Part::Write(100)],
        &[Part::Write(12), Part::Read(&good)],
        &[Part::Read(&[])],
    ] {
        bench.drivers[TX].add(parts);
    }
    // A buffer that starts in memory and ends outside.
    bench.drivers[TX].set_descriptor(0, (256 << 20) - 8, 64, 0, 0);
    bench.drivers[TX].add(&[Part::Read(&good)]);
    bench.device.notify(TX).unwrap();
    let sent = bench.wire.take_sent();
    assert_eq!(sent.len(), 1, "the good one");
    assert_eq!(sent[0].data, frame(60));
    let used = bench.drivers[TX].all_used();
    assert_eq!(used.len(), 8);
    assert!(used.iter().all(|used| used.len == 0));
}

#[test]
fn a_frame_is_spread_over_mergeable_buffers() {
    let mut bench = Bench::new(feature::ALL);
    bench.give_buffers(100, 1536);
    let (header, data) = tso_frame(65_000);
    assert_eq!(bench.wire.deliver(header, &data), Delivery::Taken);
    assert_eq!(bench.wire.deliver(Header::default(), &frame(1524)), Delivery::Taken);
    assert_eq!(bench.wire.deliver(Header::default(), &frame(1525)), Delivery::Taken);
    let frames = bench.received();
    assert_eq!(frames[0], (header, data), "offloads survive");
    assert_eq!(frames[1], (Header::default(), frame(1524)), "one buffer exactly");
    assert_eq!(frames[2], (Header::default(), frame(1525)), "one byte in the second");
    assert_eq!(bench.guest.interrupt.take_queue(RX), 3);
}

#[test]
fn without_mergeable_buffers_a_chain_holds_a_frame_or_it_is_dropped() {
    let mut bench = Bench::new(0);
    bench.drivers[RX].add(&[Part::Write(7), Part::Write(50), Part::Write(1479)]);
    assert_eq!(bench.wire.deliver(Header::default(), &frame(1525)), Delivery::Dropped);
    assert_eq!(bench.wire.deliver(Header::default(), &frame(1524)), Delivery::Taken);
    let used = bench.drivers[RX].used().unwrap();
    assert_eq!(used.data[10..12], [1, 0], "num_buffers");
    assert_eq!(used.data[12..], frame(1524));
}

#[test]
fn a_guest_without_offloads_gets_whole_segments() {
    let mut bench = Bench::new(feature::MRG_RXBUF);
    bench.give_buffers(100, 2048);
    let (header, data) = tso_frame(65_000);
    assert_eq!(bench.wire.deliver(header, &data), Delivery::Taken);
    let frames = bench.received();
    assert_eq!(frames.len(), 65_000_usize.div_ceil(1448));
    assert!(frames.iter().all(|(header, _)| *header == Header::default()));
    let payload: Vec<u8> = frames.iter().flat_map(|(_, data)| data[54..].to_vec()).collect();
    assert_eq!(payload, data[54..]);
    assert_eq!(bench.guest.interrupt.take_queue(RX), 1, "one interrupt for the batch");
    // A frame that cannot be cut is dropped.
    assert_eq!(bench.wire.deliver(header, &frame(3000)), Delivery::Dropped);
}

#[test]
fn frames_wait_for_buffers_in_order_and_bounded() {
    let mut bench = Bench::new(feature::ALL);
    let short = |n: u8| vec![n; 100];
    for n in 0..3 {
        assert_eq!(bench.wire.deliver(Header::default(), &short(n)), Delivery::Taken);
    }
    bench.give_buffers(2, 256);
    assert_eq!(bench.guest.interrupt.take_queue(RX), 1);
    // The third still waits, so the fourth goes behind it although there is room for it.
    bench.drivers[RX].add(&[Part::Write(256)]);
    bench.drivers[RX].add(&[Part::Write(256)]);
    assert_eq!(bench.wire.deliver(Header::default(), &short(3)), Delivery::Taken);
    bench.device.notify(RX).unwrap();
    let first: Vec<u8> = bench.received().iter().map(|(_, data)| data[0]).collect();
    assert_eq!(first, [0, 1, 2, 3]);

    let long = frame(MAX_FRAME);
    let kept = (0..1000)
        .take_while(|_| bench.wire.deliver(Header::default(), &long) == Delivery::Taken)
        .count();
    // The largest window that Linux gives a TCP connection waits without loss.
    assert!((6 << 20..=8 << 20).contains(&(kept * MAX_FRAME)), "{kept} of the longest frames");
    bench.give_buffers(200, 1536);
    let whole = bench.received();
    assert!(whole.len() >= 2 && whole.iter().all(|(_, data)| *data == long));
}

#[test]
fn a_frame_too_long_for_tiny_buffers_does_not_block_the_ring() {
    let mut bench = Bench::new(feature::ALL);
    bench.give_buffers(256, 16);
    assert_eq!(bench.wire.deliver(Header::default(), &frame(9000)), Delivery::Dropped);
    assert_eq!(bench.wire.deliver(Header::default(), &frame(100)), Delivery::Taken);
    assert_eq!(bench.received(), [(Header::default(), frame(100))]);
    // One that waited for buffers and finds only such is dropped too.
    let mut bench = Bench::new(0);
    bench.wire.deliver(Header::default(), &frame(9000));
    bench.wire.deliver(Header::default(), &frame(60));
    bench.give_buffers(1, 256);
    assert_eq!(bench.received(), [(Header::default(), frame(60))]);
}

#[test]
fn the_guest_never_finds_part_of_a_frame() {
    /// Chains of a frame, and frames that the ring has buffers for.
    const PARTS: u16 = 32;
    const FRAMES: u16 = 8;
    for _ in 0..200 {
        let mut bench = Bench::new(feature::ALL);
        bench.give_buffers(usize::from(PARTS * FRAMES), 256);
        let data = frame(usize::from(PARTS) * 256 - header::LEN);
        let (wire, ring) = (&bench.wire, &bench.drivers[RX]);
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                for _ in 0..FRAMES {
                    assert_eq!(wire.deliver(Header::default(), &data), Delivery::Taken);
                }
            });
            while !sender.is_finished() {
                let index = ring.used_index();
                assert_eq!(index % PARTS, 0, "{index}");
            }
        });
        assert_eq!(bench.received().len(), usize::from(FRAMES));
    }
}

#[test]
fn the_guest_is_rung_only_when_it_wants_to_be() {
    let mut bench = Bench::new(feature::ALL | EVENT_IDX);
    bench.give_buffers(10, 256);
    bench.drivers[RX].set_used_event(4);
    for n in 0..10_u8 {
        bench.wire.deliver(Header::default(), &[n; 60]);
        assert_eq!(bench.guest.interrupt.take_queue(RX), u64::from(n == 4), "frame {n}");
    }
    assert_eq!(bench.received().len(), 10);
    // The ring was found empty, so the guest has to ring for the very next buffer.
    bench.wire.deliver(Header::default(), &frame(60));
    assert_eq!(bench.drivers[RX].avail_event(), 10);
}

#[test]
fn a_paused_card_touches_nothing_and_loses_nothing() {
    let mut bench = Bench::new(feature::ALL);
    bench.give_buffers(4, 256);
    bench.device.pause();
    let positions = bench.device.queue_positions();
    bench.wire.deliver(Header::default(), &frame(60));
    assert_eq!(bench.drivers[RX].used(), None);
    assert_eq!(bench.guest.interrupt.take_queue(RX), 0);
    assert_eq!(bench.device.queue_positions(), positions);
    bench.device.host_event().unwrap();
    assert_eq!(bench.received(), [(Header::default(), frame(60))]);
}

#[test]
fn a_card_goes_on_after_a_restore_and_hears_of_a_pulled_cable() {
    let mut bench = Bench::new(feature::ALL);
    bench.give_buffers(20, 256);
    bench.wire.deliver(Header::default(), &frame(60));
    bench.device.pause();
    let (header, data) = tso_frame(2000);
    bench.wire.deliver(header, &data);
    let (state, positions) = (bench.device.save(), bench.device.queue_positions());
    drop(bench.device);
    assert!(bench.wire.receiver.lock().unwrap().is_none(), "dropping pulls the card");

    bench.wire.set_link(false);
    let mut device = Net::new(&SPEC, Arc::clone(&bench.wire) as Arc<dyn NetPort>).unwrap();
    device.restore(&state).unwrap();
    let activation = bench.guest.reactivation(&bench.drivers, feature::ALL, &positions);
    let mut device = Box::new(device).activate(activation).ok().unwrap();
    assert_eq!(bench.guest.interrupt.take_config(), 1);
    bench.wire.deliver(Header::default(), &frame(61));
    let plain = |len| (Header::default(), frame(len));
    assert_eq!(received(&mut bench.drivers[RX]), [plain(60)], "it is still paused");
    device.host_event().unwrap();
    assert_eq!(received(&mut bench.drivers[RX]), [(header, data), plain(61)]);
}

#[test]
fn a_reset_card_is_unplugged_and_can_start_again() {
    let mut bench = Bench::new(feature::ALL);
    bench.give_buffers(4, 256);
    let device = bench.device.reset();
    assert!(bench.wire.receiver.lock().unwrap().is_none());
    let (drivers, activation) = bench.guest.activation(&device.queue_sizes(), feature::ALL);
    bench.drivers = drivers;
    bench.device = device.activate(activation).ok().unwrap();
    assert_eq!(bench.guest.interrupt.take_config(), 0);
    bench.give_buffers(4, 256);
    bench.wire.deliver(Header::default(), &frame(60));
    assert_eq!(bench.received().len(), 1);
}

#[test]
fn a_card_without_a_queue_stays_unplugged() {
    for missing in [RX, TX] {
        let wire = Arc::new(Wire::default());
        let guest = Guest::new();
        let (_, mut activation) = guest.activation(&[256; 2], 0);
        activation.queues[missing] = None;
        let device = Net::new(&SPEC, Arc::clone(&wire) as Arc<dyn NetPort>).unwrap();
        let (_, error) = Box::new(device).activate(activation).err().unwrap();
        assert!(matches!(error, DeviceError::Queue { index, .. } if index == missing));
        assert!(wire.receiver.lock().unwrap().is_none());
    }
}

#[test]
fn the_configuration_follows_the_cable() {
    let bench = Bench::new(feature::STATUS);
    let config = || {
        let mut data = [0xff; 10];
        bench.device.read_config(0, &mut data);
        data
    };
    assert_eq!(config(), [2, 0, 0, 0, 0, 1, 1, 0, 0, 0]);
    bench.wire.set_link(false);
    assert_eq!(config(), [2, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(bench.guest.interrupt.take_config(), 1);
    let bench = Bench::new(0);
    bench.wire.set_link(false);
    assert_eq!(bench.guest.interrupt.take_config(), 0, "nobody asked");
}

#[test]
fn a_broken_receive_queue_is_reported_by_its_own_device() {
    let mut bench = Bench::new(feature::ALL);
    bench.drivers[RX].set_available(1000);
    assert_eq!(bench.wire.deliver(Header::default(), &frame(60)), Delivery::Dropped);
    let error = bench.device.host_event().unwrap_err();
    assert!(matches!(error, DeviceError::Queue { index: RX, .. }));
}

/// Two guests on one switch, both sending and receiving at once: nothing waits for ever, nothing
/// is lost while the backlog has room, and each byte arrives where it should.
#[test]
fn two_guests_send_to_each_other_at_once() {
    const FRAMES: usize = 2000;
    let switch = Switch::new("test");
    let ports: Vec<Arc<SwitchPort>> =
        (0..2).map(|n| Arc::new(switch.add_port(format!("{n}")))).collect();
    let start = std::sync::Barrier::new(2);
    let guests: Vec<_> = ports
        .iter()
        .map(|port| {
            let guest = Guest::new();
            let port = Arc::clone(port) as Arc<dyn NetPort>;
            let (drivers, device) = plug(&guest, port, feature::ALL | EVENT_IDX);
            (guest, drivers, device)
        })
        .collect();
    thread::scope(|scope| {
        for (me, (_guest, mut drivers, mut device)) in (0_u8..).zip(guests) {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                let (mut sent, mut arrived) = (0, 0);
                let mut free = 0;
                let idle = std::time::Instant::now();
                while sent < FRAMES || arrived < FRAMES {
                    assert!(idle.elapsed().as_secs() < 60, "stuck at {sent} and {arrived}");
                    for _ in free..64 {
                        drivers[RX].add(&[Part::Write(1536)]);
                    }
                    device.notify(RX).unwrap();
                    let got = received(&mut drivers[RX]);
                    free = 64 - got.len();
                    for (_, data) in got {
                        assert_eq!(data[6..12], [2, 0, 0, 0, 0, 1 - me]);
                        assert_eq!(data[14..22], (arrived as u64).to_le_bytes());
                        arrived += 1;
                    }
                    // At most 100 ahead of the other, who is at most 100 ahead of what it has
                    // taken: no more on the way than a backlog keeps.
                    if sent < FRAMES && sent < arrived + 100 {
                        let mut data = vec![0; header::LEN];
                        data.write_all(&[2, 0, 0, 0, 0, 1 - me]).unwrap();
                        data.write_all(&[2, 0, 0, 0, 0, me, 8, 0]).unwrap();
                        data.write_all(&(sent as u64).to_le_bytes()).unwrap();
                        data.resize(200, 0);
                        drivers[TX].add(&[Part::Read(&data)]);
                        device.notify(TX).unwrap();
                        sent += drivers[TX].all_used().len();
                    }
                }
            });
        }
    });
}

/// The card may be pulled while others send to it.
#[test]
fn resets_and_pauses_race_with_senders() {
    let switch = Switch::new("race");
    let (a, b) = (Arc::new(switch.add_port("a")), Arc::new(switch.add_port("b")));
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut frame = OwnedFrame { header: Header::default(), data: vec![0xff; 200] };
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                frame.lend(|frame| a.send(frame));
            }
        });
        let guest = Guest::new();
        let port = Arc::clone(&b) as Arc<dyn NetPort>;
        let mut device: Box<dyn VirtioDevice> = Box::new(Net::new(&SPEC, port).unwrap());
        for _ in 0..200 {
            let (mut drivers, activation) = guest.activation(&[256; 2], feature::ALL);
            let mut active = device.activate(activation).ok().unwrap();
            for _ in 0..64 {
                drivers[RX].add(&[Part::Write(256)]);
            }
            active.notify(RX).unwrap();
            active.pause();
            let positions = active.queue_positions();
            thread::yield_now();
            assert_eq!(active.queue_positions(), positions);
            active.host_event().unwrap();
            device = active.reset();
            let left = drivers[RX].all_used().len();
            thread::yield_now();
            assert_eq!(drivers[RX].all_used().len(), 0, "after {left} it is over");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

proptest! {
    #[test]
    fn hostile_chains_do_no_harm(
        rings in prop::collection::vec((0..2_usize, hostile_ring()), 1..6),
        features in any::<u64>().prop_map(|bits| bits & (feature::ALL | EVENT_IDX)),
        len in 14..3000_usize,
    ) {
        let wire = Arc::new(Wire::default());
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let (mut drivers, activation) = guest.activation(&[16; 2], features);
        let device = Net::new(&SPEC, Arc::clone(&wire) as Arc<dyn NetPort>).unwrap();
        let mut device = Box::new(device).activate(activation).ok().unwrap();
        for (queue, ring) in &rings {
            drivers[*queue].corrupt(ring);
            let _ = device.notify(*queue);
            let (header, data) = tso_frame(len);
            wire.deliver(header, &data);
            wire.deliver(Header::default(), &data);
            let _ = device.host_event();
        }
        for frame in wire.take_sent() {
            assert!((14..=MAX_FRAME).contains(&frame.data.len()));
        }
        drop(device.reset());
    }
}
