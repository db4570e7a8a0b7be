//! Which station is behind which port.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

/// How long an address is remembered after its last frame (IEEE 802.1D-2004, table 7-5).
pub const AGEING: Duration = Duration::from_secs(300);

/// The most addresses a switch remembers.
pub const MAX_MACS: usize = 8192;

/// The most addresses a switch remembers for one port.
pub const MAX_MACS_PER_PORT: usize = 1024;

/// An entry is marked as seen no more often than this, which keeps the ordered index out of
/// the path of nearly every frame.
const GRAIN: Duration = Duration::from_secs(1);

pub(crate) type Mac = [u8; 6];
pub(crate) type PortId = u64;

/// A multicast or broadcast address (the group bit, IEEE 802-2014, 8.2).
fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// The table of learned addresses. Times are those of the switch's clock.
///
/// Bounded without a sweep: old entries are ignored when looked up, and go when their port, or the table, is full and
/// needs the room. A port that is full loses its own oldest entry; a table that is full takes the oldest entry of the
/// port that has the most. So a guest that sends from very many addresses displaces only its own.
pub(crate) struct MacTable {
    ageing: Duration,
    entries: HashMap<Mac, Entry>,
    /// Each port's addresses, oldest first. No port's set is empty.
    by_age: BTreeMap<PortId, BTreeSet<(Duration, Mac)>>,
}

#[derive(Clone, Copy)]
struct Entry {
    port: PortId,
    seen: Duration,
}

impl MacTable {
    pub(crate) fn new(ageing: Duration) -> Self {
        Self { ageing, entries: HashMap::new(), by_age: BTreeMap::new() }
    }

    /// Notes that `mac` sent a frame through `port`, unless it is a group, which no station is.
    /// Says which other port it moved from.
    pub(crate) fn learn(&mut self, mac: Mac, port: PortId, now: Duration) -> Option<PortId> {
        if is_group(mac) {
            return None;
        }
        let known = self.entries.get(&mac).copied();
        if let Some(entry) = known {
            if entry.port == port && now.saturating_sub(entry.seen) < GRAIN {
                return None;
            }
            self.forget(mac);
        }
        if self.by_age.get(&port).is_some_and(|macs| macs.len() >= MAX_MACS_PER_PORT) {
            self.evict(port);
        } else if self.entries.len() >= MAX_MACS
            && let Some((&busiest, _)) = self.by_age.iter().max_by_key(|(_, macs)| macs.len())
        {
            self.evict(busiest);
        }
        self.entries.insert(mac, Entry { port, seen: now });
        self.by_age.entry(port).or_default().insert((now, mac));
        known.map(|entry| entry.port).filter(|&from| from != port)
    }

    /// The port that `mac` was last seen on, unless that is unknown or too long ago.
    pub(crate) fn find(&self, mac: Mac, now: Duration) -> Option<PortId> {
        let entry = self.entries.get(&mac)?;
        (now.saturating_sub(entry.seen) < self.ageing).then_some(entry.port)
    }

    /// Everything that is remembered, oldest first, with its age at `now`.
    pub(crate) fn learned(&self, now: Duration) -> Vec<(Mac, PortId, Duration)> {
        let entry =
            |(&mac, entry): (&Mac, &Entry)| (mac, entry.port, now.saturating_sub(entry.seen));
        let mut all: Vec<_> = self.entries.iter().map(entry).collect();
        all.sort_by_key(|&(mac, _, age)| (std::cmp::Reverse(age), mac));
        all
    }

    /// Forgets everything behind `port`.
    pub(crate) fn flush(&mut self, port: PortId) {
        for (_, mac) in self.by_age.remove(&port).unwrap_or_default() {
            self.entries.remove(&mac);
        }
    }

    fn evict(&mut self, port: PortId) {
        if let Some(&(_, mac)) = self.by_age.get(&port).and_then(BTreeSet::first) {
            self.forget(mac);
        }
    }

    fn forget(&mut self, mac: Mac) {
        let Some(Entry { port, seen }) = self.entries.remove(&mac) else {
            return;
        };
        if let Some(macs) = self.by_age.get_mut(&port) {
            macs.remove(&(seen, mac));
            if macs.is_empty() {
                self.by_age.remove(&port);
            }
        }
    }
}

#[cfg(test)]
mod tests;
