//! Putting packets together that the guest has sent in fragments.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::wire::{Envelope, Fragment, Packet};

/// How many packets may wait for their fragments; each has at most 64 KiB.
const MAX_PACKETS: usize = 16;
/// Most fragments of one packet: what fits, when each but the last has 300 bytes or more.
const MAX_PIECES: usize = 220;
/// Longest payload of an IP packet, in bytes.
const MAX_PAYLOAD: usize = 65_535;
/// How long fragments wait for the others (RFC 8200, 4.5: 60 s; Linux' default for IPv4: 30 s).
const PATIENCE: Duration = Duration::from_secs(30);

/// Packets of which not all fragments are there.
#[derive(Default)]
pub(super) struct Reassembly {
    packets: Vec<Partial>,
}

struct Partial {
    envelope: Envelope,
    id: u32,
    began: Instant,
    pieces: BTreeMap<usize, Vec<u8>>,
    /// Known once the last fragment is there.
    total: Option<usize>,
}

impl Reassembly {
    /// Adds a fragment. Returns what the packet is made of when this was the last one missing.
    pub fn add(
        &mut self,
        packet: &Packet<'_>,
        fragment: Fragment,
        now: Instant,
    ) -> Option<(Envelope, Vec<u8>)> {
        self.packets.retain(|partial| now.duration_since(partial.began) < PATIENCE);
        let index = self.find_or_begin(packet, fragment.id, now);
        let partial = self.packets.get_mut(index)?;
        match partial.add(packet.payload, fragment) {
            Some(false) => None,
            Some(true) => {
                let partial = self.packets.swap_remove(index);
                let payload = partial.pieces.into_values().collect::<Vec<_>>().concat();
                Some((partial.envelope, payload))
            }
            // Fragments that contradict each other cost the whole packet (RFC 5722).
            None => {
                self.packets.swap_remove(index);
                None
            }
        }
    }

    fn find_or_begin(&mut self, packet: &Packet<'_>, id: u32, now: Instant) -> usize {
        let same = |partial: &Partial| {
            let envelope = &partial.envelope;
            partial.id == id
                && envelope.source == packet.source
                && envelope.destination == packet.destination
                && envelope.protocol == packet.protocol
        };
        if let Some(index) = self.packets.iter().position(same) {
            return index;
        }
        // The oldest stands first as long as none was taken out; nearly the oldest is good enough.
        if self.packets.len() == MAX_PACKETS {
            self.packets.swap_remove(0);
        }
        let envelope = Envelope {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol,
            hop_limit: packet.hop_limit,
        };
        let pieces = BTreeMap::new();
        self.packets.push(Partial { envelope, id, began: now, pieces, total: None });
        self.packets.len() - 1
    }
}

impl Partial {
    /// Whether the packet is complete now; `None` if the fragment cannot belong to it.
    fn add(&mut self, data: &[u8], Fragment { offset, more, .. }: Fragment) -> Option<bool> {
        let end = offset + data.len();
        let whole_units = !more || (data.len().is_multiple_of(8) && !data.is_empty());
        if !whole_units || end > MAX_PAYLOAD || self.pieces.len() == MAX_PIECES {
            return None;
        }
        if self.pieces.get(&offset).is_some_and(|piece| piece == data) {
            return Some(false);
        }
        let before = self.pieces.range(..=offset).next_back();
        let after = self.pieces.range(offset..).next();
        let overlaps = before.is_some_and(|(at, piece)| at + piece.len() > offset)
            || after.is_some_and(|(at, _)| *at < end);
        let beyond = self.total.is_some_and(|total| end > total || !more);
        let last = self.pieces.last_key_value().map_or(0, |(at, piece)| at + piece.len());
        if overlaps || beyond || (!more && last > end) {
            return None;
        }
        if !more {
            self.total = Some(end);
        }
        self.pieces.insert(offset, data.to_vec());
        let have: usize = self.pieces.values().map(Vec::len).sum();
        // Nothing overlaps, so bytes enough are all bytes.
        Some(self.total == Some(have))
    }
}

#[cfg(test)]
mod tests;
