use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver as Inbox, Sender, channel};
use std::thread;

use super::*;
use crate::backlog::OwnedFrame;
use crate::port::Header;
use crate::{MAX_FRAME, MIN_FRAME};

const BROADCAST: Mac = [0xff; 6];

/// A card that keeps what it gets.
#[derive(Default)]
struct Card {
    frames: Mutex<Vec<OwnedFrame>>,
    links: Mutex<Vec<bool>>,
}

impl Card {
    fn take(&self) -> Vec<Vec<u8>> {
        lock(&self.frames).drain(..).map(|frame| frame.data).collect()
    }
}

impl Receiver for Card {
    fn receive(&self, frame: &Frame<'_>) -> Delivery {
        lock(&self.frames).push(frame.into());
        Delivery::Taken
    }
    fn link_changed(&self, up: bool) {
        lock(&self.links).push(up);
    }
}

fn plug(switch: &Switch, name: &str) -> (SwitchPort, Arc<Card>) {
    let port = switch.add_port(name);
    let card = Arc::new(Card::default());
    port.attach(card.clone());
    (port, card)
}

fn mac(n: u8) -> Mac {
    [0x52, 0x54, 0, 0x12, 1, n]
}

fn bytes(to: Mac, from: Mac, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from[..], &[0x08, 0x00], payload].concat()
}

fn send_raw(port: &SwitchPort, data: Vec<u8>) -> Delivery {
    OwnedFrame { header: Header::default(), data }.lend(|frame| port.send(frame))
}

fn send(port: &SwitchPort, to: Mac, from: Mac) -> Delivery {
    send_raw(port, bytes(to, from, b"payload"))
}

#[test]
fn addresses_go_back() {
    let switch = Switch::new("vlan1");
    let ((a, _), (b, b_card), (c, c_card)) =
        (plug(&switch, "a"), plug(&switch, "b"), plug(&switch, "c"));
    send(&b, BROADCAST, mac(2));
    let then = switch.addresses();
    // A station moves, and another comes.
    send(&c, BROADCAST, mac(2));
    send(&b, BROADCAST, mac(3));
    b_card.take();
    c_card.take();
    switch.restore_addresses(&then);
    send(&a, mac(2), mac(1));
    assert_eq!((b_card.take().len(), c_card.take().len()), (1, 0), "where it was");
    send(&a, mac(3), mac(1));
    assert_eq!((b_card.take().len(), c_card.take().len()), (1, 1), "unknown: flooded");
    drop(b);
    switch.restore_addresses(&then);
    send(&a, mac(2), mac(1));
    assert_eq!(c_card.take().len(), 1, "its port is gone: flooded");
}

#[test]
fn floods_until_it_has_learned() {
    let switch = Switch::new("vlan1");
    let (p1, c1) = plug(&switch, "1");
    let (p2, c2) = plug(&switch, "2");
    let (_p3, c3) = plug(&switch, "3");

    assert_eq!(send(&p1, mac(2), mac(1)), Delivery::Taken);
    assert_eq!((c1.take().len(), c2.take().len(), c3.take().len()), (0, 1, 1));
    assert_eq!(send(&p2, mac(1), mac(2)), Delivery::Taken);
    assert_eq!(c1.take(), [bytes(mac(1), mac(2), b"payload")]);
    assert_eq!((c2.take().len(), c3.take().len()), (0, 0));
    send(&p1, mac(2), mac(1));
    assert_eq!((c1.take().len(), c2.take().len(), c3.take().len()), (0, 1, 0));
}

#[test]
fn groups_are_flooded_and_never_learned() {
    let switch = Switch::new("vlan1");
    let (p1, c1) = plug(&switch, "1");
    let (p2, c2) = plug(&switch, "2");
    let (_p3, c3) = plug(&switch, "3");
    let groups = [BROADCAST, [1, 0, 0x5e, 0, 0, 251], [1, 0x80, 0xc2, 0, 0, 2]];
    for group in groups {
        // A hostile source address must not pull the group to this port.
        send(&p2, mac(9), group);
        c1.take();
        c3.take();
        send(&p1, group, mac(1));
        assert_eq!((c1.take().len(), c2.take().len(), c3.take().len()), (0, 1, 1));
    }
}

#[test]
fn stays_silent_towards_the_port_it_came_from() {
    let switch = Switch::new("vlan1");
    let (p1, c1) = plug(&switch, "1");
    let (_p2, c2) = plug(&switch, "2");
    send(&p1, BROADCAST, mac(1));
    send(&p1, BROADCAST, mac(11));
    c2.take();
    // Two stations behind one port: they have heard each other already.
    assert_eq!(send(&p1, mac(11), mac(1)), Delivery::Dropped);
    assert_eq!((c1.take().len(), c2.take().len()), (0, 0));
    assert_eq!(p1.stats().dropped_in, 1);
}

#[test]
fn ages_by_its_clock_and_follows_moves() {
    let now = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&now);
    let clock = move || Duration::from_secs(clock.load(Ordering::Relaxed));
    let switch = Switch::with_clock("vlan1", AGEING, clock);
    let (p1, c1) = plug(&switch, "1");
    let (p2, c2) = plug(&switch, "2");
    let (p3, c3) = plug(&switch, "3");

    send(&p2, BROADCAST, mac(2));
    c1.take();
    c3.take();
    now.store(299, Ordering::Relaxed);
    send(&p1, mac(2), mac(1));
    assert_eq!((c2.take().len(), c3.take().len()), (1, 0));
    now.store(300, Ordering::Relaxed);
    send(&p1, mac(2), mac(1));
    assert_eq!((c2.take().len(), c3.take().len()), (1, 1));

    send(&p3, BROADCAST, mac(2));
    c1.take();
    c2.take();
    send(&p1, mac(2), mac(1));
    assert_eq!((c2.take().len(), c3.take().len()), (0, 1));
}

#[test]
fn two_switches_share_nothing() {
    let (one, two) = (Switch::new("vlan1"), Switch::new("vlan2"));
    let (p1, c1) = plug(&one, "a");
    let (_p2, c2) = plug(&one, "b");
    let (p3, c3) = plug(&two, "a");
    let (_p4, c4) = plug(&two, "b");
    send(&p1, BROADCAST, mac(1));
    assert_eq!((c2.take().len(), c3.take().len(), c4.take().len()), (1, 0, 0));
    send(&p3, mac(1), mac(3));
    assert_eq!((c1.take().len(), c2.take().len(), c4.take().len()), (0, 0, 1));
}

#[test]
fn a_stopped_switch_passes_nothing() {
    let switch = Switch::new("vlan1");
    let (p1, c1) = plug(&switch, "a");
    let (p2, c2) = plug(&switch, "b");
    send(&p1, BROADCAST, mac(1));
    assert_eq!(c2.take().len(), 1);
    switch.stop();
    for to in [BROADCAST, mac(1)] {
        assert_eq!(send(&p2, to, mac(2)), Delivery::Dropped);
    }
    assert!(c1.take().is_empty());
    // Also by what they send afterwards nobody can be reached.
    assert_eq!(send(&p1, mac(2), mac(1)), Delivery::Dropped);
    drop((p1, p2));
}

#[test]
fn tags_and_offloads_pass_unchanged() {
    let switch = Switch::new("vlan1");
    let (p1, _c1) = plug(&switch, "1");
    let (_p2, c2) = plug(&switch, "2");
    let tagged = [&mac(2)[..], &mac(1), &[0x81, 0, 0, 42, 0x08, 0], &[7; 60_000]].concat();
    let header = Header {
        flags: Header::NEEDS_CSUM,
        gso_type: Header::GSO_TCPV4,
        hdr_len: 58,
        gso_size: 1448,
        csum_start: 38,
        csum_offset: 16,
    };
    let mut sent = OwnedFrame { header, data: tagged };
    assert_eq!(sent.lend(|frame| p1.send(frame)), Delivery::Taken);
    assert_eq!(*lock(&c2.frames), [sent]);
}

#[test]
fn refuses_what_no_card_may_send() {
    let switch = Switch::new("vlan1");
    let (p1, _c1) = plug(&switch, "1");
    let (_p2, c2) = plug(&switch, "2");
    for length in [0, 1, 11, MIN_FRAME - 1, MAX_FRAME + 1] {
        assert_eq!(send_raw(&p1, vec![0; length]), Delivery::Dropped);
    }
    let absurd = Header { gso_type: Header::GSO_TCPV4, ..Header::default() };
    let mut absurd = OwnedFrame { header: absurd, data: vec![0; 100] };
    assert_eq!(absurd.lend(|frame| p1.send(frame)), Delivery::Dropped);
    assert_eq!(p1.stats(), PortStats { refused: 6, ..PortStats::default() });
    assert!(c2.take().is_empty());
    for length in [MIN_FRAME, MAX_FRAME] {
        let longest_or_shortest = bytes(BROADCAST, mac(1), &vec![0; length - MIN_FRAME]);
        assert_eq!(send_raw(&p1, longest_or_shortest), Delivery::Taken);
    }
}

#[test]
fn a_pulled_cable_stops_both_ways_and_is_forgotten() {
    let switch = Switch::new("vlan1");
    let (p1, c1) = plug(&switch, "1");
    let (p2, c2) = plug(&switch, "2");
    let (p3, c3) = plug(&switch, "3");
    send(&p2, BROADCAST, mac(2));
    p2.set_link(false);
    p2.set_link(false);
    assert!(!p2.link_up());
    assert_eq!(send(&p2, BROADCAST, mac(2)), Delivery::Dropped);
    assert_eq!((c1.take().len(), c3.take().len()), (1, 1));
    // Flooded, so that it finds the station wherever it is plugged in now.
    assert_eq!(send(&p1, mac(2), mac(1)), Delivery::Taken);
    assert_eq!((c2.take().len(), c3.take().len()), (0, 1));
    p2.set_link(true);
    assert!(p2.link_up());
    send(&p3, mac(2), mac(3));
    assert_eq!(c2.take().len(), 1);
    assert_eq!(*lock(&c2.links), [false, true]);
    assert!(lock(&c1.links).is_empty());
    assert_eq!((p2.stats().dropped_in, p2.stats().dropped_out), (1, 1));
}

#[test]
fn counts_and_says_what_became_of_a_frame() {
    struct Full;
    impl Receiver for Full {
        fn receive(&self, _: &Frame<'_>) -> Delivery {
            Delivery::Dropped
        }
        fn link_changed(&self, _: bool) {}
    }
    let switch = Switch::new("vlan1");
    let (p1, _c1) = plug(&switch, "1");
    assert_eq!(send(&p1, BROADCAST, mac(1)), Delivery::Dropped);
    let p2 = switch.add_port("2");
    assert_eq!(send(&p1, BROADCAST, mac(1)), Delivery::Dropped);
    p2.attach(Arc::new(Full));
    assert_eq!(send(&p1, BROADCAST, mac(1)), Delivery::Dropped);
    p2.attach(Arc::new(Card::default()));
    assert_eq!(send(&p1, BROADCAST, mac(1)), Delivery::Taken);
    p2.detach();
    p2.detach();
    assert_eq!(send(&p1, BROADCAST, mac(1)), Delivery::Dropped);
    let in_ = PortStats { frames_in: 5, bytes_in: 5 * 21, ..PortStats::default() };
    assert_eq!(p1.stats(), in_);
    let out = PortStats { frames_out: 1, bytes_out: 21, dropped_out: 3, ..PortStats::default() };
    assert_eq!(p2.stats(), out);
}

#[test]
fn a_dropped_port_is_gone_with_its_addresses_and_its_card() {
    let switch = Switch::new("vlan1");
    let (p1, _c1) = plug(&switch, "1");
    let (p2, c2) = plug(&switch, "2");
    let (_p3, c3) = plug(&switch, "3");
    send(&p2, BROADCAST, mac(2));
    c3.take();
    drop(p2);
    assert_eq!(Arc::strong_count(&c2), 1);
    send(&p1, mac(2), mac(1));
    assert_eq!((c2.take().len(), c3.take().len()), (0, 1));
    assert_eq!(lock(&switch.inner.fabric).ports.len(), 2);
}

/// A card that says when it has a frame and then waits to be let go.
struct Slow {
    entered: Sender<()>,
    leave: Mutex<Inbox<()>>,
    inside: AtomicUsize,
}

impl Slow {
    fn new() -> (Arc<Self>, Inbox<()>, Sender<()>) {
        let (entered, has_entered) = channel();
        let (let_go, leave) = channel();
        let slow = Self { entered, leave: Mutex::new(leave), inside: AtomicUsize::new(0) };
        (Arc::new(slow), has_entered, let_go)
    }
}

impl Receiver for Slow {
    fn receive(&self, _: &Frame<'_>) -> Delivery {
        self.inside.fetch_add(1, Ordering::SeqCst);
        self.entered.send(()).unwrap();
        let _ = lock(&self.leave).recv();
        self.inside.fetch_sub(1, Ordering::SeqCst);
        Delivery::Taken
    }
    fn link_changed(&self, _: bool) {}
}

#[test]
fn a_slow_card_delays_nobody_else_and_detach_waits_for_it() {
    let switch = Switch::new("vlan1");
    let (p1, c1) = plug(&switch, "1");
    let p2 = switch.add_port("2");
    let (p3, _c3) = plug(&switch, "3");
    let (slow, entered, let_go) = Slow::new();
    send(&p2, BROADCAST, mac(2));
    send(&p3, BROADCAST, mac(3));
    send(&p1, BROADCAST, mac(1));
    c1.take();
    p2.attach(slow.clone());

    thread::scope(|scope| {
        scope.spawn(|| send(&p1, mac(2), mac(1)));
        entered.recv().unwrap();
        // Others go on: to other ports, to port 1, and with adding and unplugging.
        assert_eq!(send(&p3, mac(1), mac(3)), Delivery::Taken);
        drop(switch.add_port("4"));
        p2.set_link(true);
        p3.set_link(false);
        p3.set_link(true);

        let (done, detached) = channel();
        let (p2, slow) = (&p2, &slow);
        scope.spawn(move || {
            p2.detach();
            done.send(slow.inside.load(Ordering::SeqCst)).unwrap();
        });
        // New frames are turned away once the receiver is out, without waiting.
        while p2.port.attachment.call(|_| ()).is_some() {
            thread::yield_now();
        }
        let meanwhile = send(&p3, mac(2), mac(3));
        let early = detached.try_recv().is_ok();
        let_go.send(()).unwrap();
        assert_eq!((meanwhile, early), (Delivery::Dropped, false));
        assert_eq!(detached.recv().unwrap(), 0);
    });
    assert_eq!(Arc::strong_count(&slow), 1);
}

#[test]
fn a_new_card_waits_for_the_old_one() {
    let switch = Switch::new("vlan1");
    let (p1, _c1) = plug(&switch, "1");
    let p2 = switch.add_port("2");
    let (slow, entered, let_go) = Slow::new();
    p2.attach(slow.clone());
    thread::scope(|scope| {
        scope.spawn(|| send(&p1, mac(2), mac(1)));
        entered.recv().unwrap();
        let (done, attached) = channel();
        let (p2, slow) = (&p2, &slow);
        scope.spawn(move || {
            p2.attach(Arc::new(Card::default()));
            done.send(slow.inside.load(Ordering::SeqCst)).unwrap();
        });
        // The old one is out at once, the new one not yet in.
        let mut early = false;
        while p2.port.attachment.call(|_| ()).is_some() && !early {
            early = attached.try_recv().is_ok();
            thread::yield_now();
        }
        let_go.send(()).unwrap();
        assert!(!early);
        assert_eq!(attached.recv().unwrap(), 0);
    });
    assert_eq!(send(&p1, mac(2), mac(1)), Delivery::Taken);
}

#[test]
fn a_card_that_panics_is_counted_out() {
    struct Broken;
    impl Receiver for Broken {
        fn receive(&self, _: &Frame<'_>) -> Delivery {
            std::panic::resume_unwind(Box::new("broken card"))
        }
        fn link_changed(&self, _: bool) {}
    }
    let switch = Switch::new("vlan1");
    let (p1, _c1) = plug(&switch, "1");
    let p2 = switch.add_port("2");
    p2.attach(Arc::new(Broken));
    let result = thread::scope(|scope| scope.spawn(|| send(&p1, BROADCAST, mac(1))).join());
    assert!(result.is_err());
    p2.detach();
    p2.attach(Arc::new(Card::default()));
    assert_eq!(send(&p1, BROADCAST, mac(1)), Delivery::Taken);
}

/// A card that must not be called once its owner has detached it, with a lock as a real one has.
#[derive(Default)]
struct Strict {
    gone: AtomicBool,
    inside: AtomicUsize,
    bytes: Mutex<usize>,
}

impl Receiver for Strict {
    fn receive(&self, frame: &Frame<'_>) -> Delivery {
        self.inside.fetch_add(1, Ordering::SeqCst);
        assert!(!self.gone.load(Ordering::SeqCst), "called after detach");
        *lock(&self.bytes) += frame.to_vec().len();
        self.inside.fetch_sub(1, Ordering::SeqCst);
        Delivery::Taken
    }
    fn link_changed(&self, _: bool) {
        assert!(!self.gone.load(Ordering::SeqCst), "called after detach");
    }
}

#[test]
fn crosswise_traffic_while_cards_come_and_go() {
    const ROUNDS: usize = 4000;
    let switch = Switch::new("vlan1");
    let ports: Vec<SwitchPort> = (0..4).map(|n| switch.add_port(format!("{n}"))).collect();
    let sending = AtomicUsize::new(ports.len());
    let steady: Vec<Arc<Strict>> = (0..2).map(|_| Arc::default()).collect();
    for (port, card) in ports.iter().zip(&steady) {
        port.attach(card.clone());
    }
    thread::scope(|scope| {
        for (from, port) in (0_u8..).zip(&ports) {
            let sending = &sending;
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let to = u8::try_from(round % 5).unwrap();
                    let to = if to == 4 { BROADCAST } else { mac(to) };
                    send(port, to, mac(from));
                }
                sending.fetch_sub(1, Ordering::SeqCst);
            });
        }
        // Ports 2 and 3 are unplugged and given new cards all the time, port 2 by two threads.
        for port in [&ports[2], &ports[2], &ports[3]] {
            let (sending, switch) = (&sending, &switch);
            scope.spawn(move || {
                while sending.load(Ordering::SeqCst) > 0 {
                    let card = Arc::new(Strict::default());
                    port.attach(card.clone());
                    port.set_link(false);
                    port.set_link(true);
                    port.detach();
                    // The other thread's attach may have taken ours out; either way it is.
                    card.gone.store(true, Ordering::SeqCst);
                    assert_eq!(card.inside.load(Ordering::SeqCst), 0);
                    drop(switch.add_port("guest"));
                }
            });
        }
    });
    // Every frame is accounted for.
    for (port, card) in ports.iter().zip(&steady) {
        let stats = port.stats();
        assert!(stats.frames_out > 0);
        assert_eq!(stats.bytes_out, u64::try_from(*lock(&card.bytes)).unwrap());
        let own = ROUNDS as u64;
        assert_eq!(stats.frames_in + stats.dropped_in, own);
        assert_eq!((stats.refused, stats.dropped_out), (0, 0));
    }
    assert_eq!(lock(&switch.inner.fabric).ports.len(), 4);
}
