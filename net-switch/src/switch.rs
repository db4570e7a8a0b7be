//! The learning switch of one vlan.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tracing::debug;

use crate::attachment::Attachment;
use crate::lock;
use crate::offload::sanitize;
use crate::port::{Delivery, Frame, NetPort, Receiver};
use crate::table::{AGEING, Mac, MacTable, PortId};

type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// A learning switch: the stations of one vlan. Clones are handles to the same switch.
///
/// It learns source addresses, sends a frame to the port that its destination was last seen
/// at, and floods what is unknown, multicast or broadcast to all other ports. The link-local
/// groups of 802.1D (01-80-C2-00-00-0x) are flooded too: guests run LACP, LLDP and spanning
/// trees with each other, and nothing here would answer them. Tagged frames pass unchanged;
/// all tags share one address table.
///
/// Bytes are never copied here except the two addresses that decide. Frames are delivered on the
/// sender's thread while no lock is held, so a slow receiver delays only who sends to it.
/// Between two ports frames of one thread keep their order.
#[derive(Clone)]
pub struct Switch {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    clock: Clock,
    fabric: Mutex<Fabric>,
}

/// What each frame is looked up in. Never locked while code outside this crate is called.
struct Fabric {
    /// Replaced as a whole when a port comes or goes, so that flooding can walk it unlocked.
    ports: Arc<[Arc<Port>]>,
    macs: MacTable,
    next_id: PortId,
}

/// Where a frame goes.
enum Route {
    Nowhere,
    To(Arc<Port>),
    /// All but the one it came from.
    Flood(Arc<[Arc<Port>]>),
}

impl Switch {
    /// A switch without ports. `name` is for the log.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let start = Instant::now();
        Self::with_clock(name, AGEING, move || start.elapsed())
    }

    /// A switch that forgets addresses after `ageing` by a clock of the caller's, which must
    /// not go back.
    #[must_use]
    pub fn with_clock(
        name: impl Into<String>,
        ageing: Duration,
        clock: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Self {
        let fabric = Fabric { ports: Arc::new([]), macs: MacTable::new(ageing), next_id: 0 };
        Self {
            inner: Arc::new(Inner {
                name: name.into(),
                clock: Box::new(clock),
                fabric: Mutex::new(fabric),
            }),
        }
    }

    /// Adds a port with the cable plugged and no card attached yet. `name` is for the log.
    #[must_use]
    pub fn add_port(&self, name: impl Into<String>) -> SwitchPort {
        let mut fabric = lock(&self.inner.fabric);
        let port = Arc::new(Port::new(fabric.next_id, name.into()));
        fabric.next_id += 1;
        fabric.ports = fabric.ports.iter().chain([&port]).cloned().collect();
        drop(fabric);
        debug!(switch = self.inner.name, port = port.name, "port added");
        SwitchPort { switch: self.clone(), port }
    }

    /// What it has learned, for [`Self::restore_addresses`].
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        let now = (self.inner.clock)();
        Addresses(lock(&self.inner.fabric).macs.learned(now))
    }

    /// Knows what it knew then, as if no time had passed, and no more. Ports that are gone stay so.
    pub fn restore_addresses(&self, then: &Addresses) {
        let now = (self.inner.clock)();
        let mut fabric = lock(&self.inner.fabric);
        let ports = Arc::clone(&fabric.ports);
        for port in &*ports {
            fabric.macs.flush(port.id);
        }
        for &(mac, port, age) in &then.0 {
            if ports.binary_search_by_key(&port, |port| port.id).is_ok() {
                fabric.macs.learn(mac, port, now.saturating_sub(age));
            }
        }
    }

    /// Takes all ports away: from now on no frame gets anywhere from them.
    pub fn stop(&self) {
        // An address that was learned leads nowhere without its port.
        lock(&self.inner.fabric).ports = Arc::new([]);
        debug!(switch = self.inner.name, "stopped");
    }

    /// Learns from a frame that came in at `from`, and decides where it goes.
    fn route(&self, from: &Port, source: Mac, destination: Mac) -> Route {
        let now = (self.inner.clock)();
        let mut fabric = lock(&self.inner.fabric);
        // Looked at under this lock, because `set_link` flushes under it: nothing is learned
        // from a frame that lost the race against the cable.
        if !from.is_up() {
            return Route::Nowhere;
        }
        let moved = fabric.macs.learn(source, from.id, now).is_some();
        // Groups are never learned, so they are flooded as well.
        let route = match fabric.macs.find(destination, now) {
            Some(id) if id == from.id => Route::Nowhere,
            Some(id) => match fabric.ports.binary_search_by_key(&id, |port| port.id) {
                Ok(index) => Route::To(Arc::clone(&fabric.ports[index])),
                Err(_) => Route::Nowhere,
            },
            None => Route::Flood(Arc::clone(&fabric.ports)),
        };
        drop(fabric);
        if moved {
            debug!(switch = self.inner.name, port = from.name, mac = ?source, "station moved");
        }
        route
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch").field("name", &self.inner.name).finish_non_exhaustive()
    }
}

/// Addresses that a [`Switch`] has learned: each with its port and its age.
#[derive(Clone, Debug)]
pub struct Addresses(Vec<(Mac, PortId, Duration)>);

/// What the switch and the handle of a port share.
struct Port {
    id: PortId,
    name: String,
    up: AtomicBool,
    /// Held while the link changes, so that the receiver sees changes in order.
    changing: Mutex<()>,
    attachment: Attachment,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    frames_in: AtomicU64,
    bytes_in: AtomicU64,
    frames_out: AtomicU64,
    bytes_out: AtomicU64,
    refused: AtomicU64,
    dropped_in: AtomicU64,
    dropped_out: AtomicU64,
}

/// What a port has seen. "In" is from the card into the switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Frames that the card sent and the switch passed on.
    pub frames_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Frames that the card took.
    pub frames_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Frames from the card that no card may send: shorter than [`MIN_FRAME`](crate::MIN_FRAME), longer than
    /// [`MAX_FRAME`](crate::MAX_FRAME), or with an offload header that contradicts itself.
    pub refused: u64,
    /// Frames from the card that were dropped: the cable was pulled, or the destination is behind this very port.
    pub dropped_in: u64,
    /// Frames for the card that it did not get: cable pulled, no card, or no room.
    pub dropped_out: u64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Port {
    fn new(id: PortId, name: String) -> Self {
        Self {
            id,
            name,
            up: AtomicBool::new(true),
            changing: Mutex::new(()),
            attachment: Attachment::default(),
            counters: Counters::default(),
        }
    }

    fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    fn deliver(&self, frame: &Frame<'_>, length: u64) -> Delivery {
        let taken = self.is_up()
            && self.attachment.call(|receiver| receiver.receive(frame)) == Some(Delivery::Taken);
        if taken {
            count(&self.counters.frames_out, 1);
            count(&self.counters.bytes_out, length);
            Delivery::Taken
        } else {
            count(&self.counters.dropped_out, 1);
            Delivery::Dropped
        }
    }
}

/// One place at a [`Switch`]. Dropping it removes the port and the addresses learned on it; like [`NetPort::detach`]
/// it waits for a running call to the receiver.
pub struct SwitchPort {
    switch: Switch,
    port: Arc<Port>,
}

impl SwitchPort {
    /// Plugs or pulls the cable and notifies the receiver. With the cable pulled no frame enters or leaves and
    /// nothing behind the port is remembered; a delivery in progress is completed. Must not be called from within the
    /// receiver.
    pub fn set_link(&self, up: bool) {
        let _changing = lock(&self.port.changing);
        if self.port.up.swap(up, Ordering::AcqRel) == up {
            return;
        }
        if !up {
            lock(&self.switch.inner.fabric).macs.flush(self.port.id);
        }
        debug!(switch = self.switch.inner.name, port = self.port.name, up, "link changed");
        self.port.attachment.call(|receiver| receiver.link_changed(up));
    }

    /// What the port has seen since it was added.
    #[must_use]
    pub fn stats(&self) -> PortStats {
        let counters = &self.port.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PortStats {
            frames_in: get(&counters.frames_in),
            bytes_in: get(&counters.bytes_in),
            frames_out: get(&counters.frames_out),
            bytes_out: get(&counters.bytes_out),
            refused: get(&counters.refused),
            dropped_in: get(&counters.dropped_in),
            dropped_out: get(&counters.dropped_out),
        }
    }

    /// The name it was given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.port.name
    }
}

impl NetPort for SwitchPort {
    /// `Taken` if anybody took it: of a flooded frame's receivers, any.
    fn send(&self, frame: &Frame<'_>) -> Delivery {
        let counters = &self.port.counters;
        let length = frame.total_len();
        let mut macs = [0; 12];
        let header = match sanitize(frame.header, length) {
            Ok(header) if frame.copy_to(&mut macs) == macs.len() => header,
            _ => {
                count(&counters.refused, 1);
                return Delivery::Dropped;
            }
        };
        let [d0, d1, d2, d3, d4, d5, source @ ..] = macs;
        let route = self.switch.route(&self.port, source, [d0, d1, d2, d3, d4, d5]);

        let frame = Frame { header, data: frame.data };
        let length = length as u64;
        if matches!(route, Route::Nowhere) {
            count(&counters.dropped_in, 1);
        } else {
            count(&counters.frames_in, 1);
            count(&counters.bytes_in, length);
        }
        match route {
            Route::Nowhere => Delivery::Dropped,
            Route::To(port) => port.deliver(&frame, length),
            Route::Flood(ports) => {
                let others = ports.iter().filter(|port| port.id != self.port.id);
                others.fold(Delivery::Dropped, |so_far, port| match port.deliver(&frame, length) {
                    Delivery::Taken => Delivery::Taken,
                    Delivery::Dropped => so_far,
                })
            }
        }
    }

    fn attach(&self, receiver: Arc<dyn Receiver>) {
        self.port.attachment.attach(receiver);
    }

    fn detach(&self) {
        self.port.attachment.detach();
    }

    fn link_up(&self) -> bool {
        self.port.is_up()
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        let mut fabric = lock(&self.switch.inner.fabric);
        fabric.macs.flush(self.port.id);
        fabric.ports =
            fabric.ports.iter().filter(|port| port.id != self.port.id).cloned().collect();
        drop(fabric);
        self.port.attachment.detach();
        debug!(switch = self.switch.inner.name, port = self.port.name, "port removed");
    }
}

impl fmt::Debug for SwitchPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SwitchPort")
            .field("switch", &self.switch.inner.name)
            .field("name", &self.port.name)
            .field("up", &self.port.is_up())
            .field("stats", &self.stats())
            .finish()
    }
}

#[cfg(test)]
mod tests;
