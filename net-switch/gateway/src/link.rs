//! The cable to the guest: frames to it, and what is known of its stations.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use super::GATEWAY_MAC;
use super::wire::{ETHERNET, Envelope, Hop, IPV4, IPV6, MTU, Mac, protocol};
use crate::lock;
use firn_net_switch::Attachment;
use firn_net_switch::{Frame, Header};

/// How many addresses are remembered: those that DHCP gives, and as many again.
const MAX_NEIGHBOURS: usize = 512;

/// The cable to the guest.
pub(super) struct Link {
    pub attachment: Attachment,
    /// The card's address, for who has not been heard of.
    card: Mac,
    /// Each with its age: how many had been learnt before.
    neighbours: Mutex<HashMap<IpAddr, (Mac, u64)>>,
    learnt: AtomicU64,
    /// Tells the fragments of one packet from those of another.
    packet_id: AtomicU16,
    /// Where the last who sent long frames has put them together.
    scratch: Mutex<Vec<u8>>,
}

impl Link {
    pub fn new(card: Mac) -> Self {
        Self {
            attachment: Attachment::default(),
            card,
            neighbours: Mutex::default(),
            learnt: AtomicU64::new(0),
            packet_id: AtomicU16::new(1),
            scratch: Mutex::default(),
        }
    }

    /// Remembers who has `address`, if need be in the place of who was heard of first.
    pub fn learn(&self, address: IpAddr, mac: Mac) {
        let mut neighbours = lock(&self.neighbours);
        if neighbours.len() >= MAX_NEIGHBOURS && !neighbours.contains_key(&address) {
            let oldest = neighbours.iter().min_by_key(|(_, (_, age))| *age).map(|(old, _)| *old);
            oldest.and_then(|oldest| neighbours.remove(&oldest));
        }
        neighbours.insert(address, (mac, self.learnt.fetch_add(1, Ordering::Relaxed)));
    }

    /// Forgets all stations: the guest's card was taken out.
    pub fn forget(&self) {
        lock(&self.neighbours).clear();
    }

    /// The station that has `address`.
    pub fn neighbour(&self, address: IpAddr) -> Mac {
        lock(&self.neighbours).get(&address).map_or(self.card, |(mac, _)| *mac)
    }

    /// A place to put frames together: the one that was kept, or an empty one.
    pub fn scratch(&self) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.scratch))
    }

    /// Keeps the buffer for the next frame, which saves allocating and clearing one each time.
    pub fn keep_scratch(&self, scratch: Vec<u8>) {
        *lock(&self.scratch) = scratch;
    }

    /// Gives a frame to the guest's card. Without one, or without room, it is lost.
    pub fn deliver(&self, header: Header, data: &mut [u8]) {
        let data = [VolatileSlice::from(data)];
        self.attachment.call(|receiver| receiver.receive(&Frame { header, data: &data }));
    }

    /// Delivers a frame that needs no offloads to the guest's card.
    pub fn deliver_finished(&self, mut data: Vec<u8>) {
        self.deliver(Header::default(), &mut data);
    }

    /// Sends a packet whose payload is complete, in fragments if it is too long for the link.
    pub fn send(&self, to: Mac, envelope: &Envelope, payload: &[u8]) {
        let hop = Hop { source: GATEWAY_MAC, destination: to };
        if envelope.header_len() + payload.len() > MTU {
            self.send_fragments(hop, envelope, payload);
        } else if let Some(data) = envelope.frame(hop, payload) {
            self.deliver_finished(data);
        }
    }

    fn send_fragments(&self, hop: Hop, envelope: &Envelope, payload: &[u8]) {
        let id = self.packet_id.fetch_add(1, Ordering::Relaxed);
        let v4 = envelope.source.is_ipv4();
        let room = if v4 { MTU - IPV4 } else { MTU - IPV6 - 8 };
        // All but the last end at a multiple of eight bytes.
        let size = room & !7;
        let outer = Envelope {
            protocol: if v4 { envelope.protocol } else { protocol::FRAGMENT },
            ..*envelope
        };
        let count = payload.len().div_ceil(size);
        for (index, piece) in payload.chunks(size).enumerate() {
            let Ok(offset) = u16::try_from(index * size) else { return };
            let more = index + 1 < count;
            let mut data = Vec::with_capacity(ETHERNET + MTU);
            data.extend(hop.header(envelope.destination));
            let pushed = if v4 {
                let flags = u32::from(id) << 16 | u32::from(more) << 13 | u32::from(offset / 8);
                outer.push_header(&mut data, piece.len(), flags)
            } else {
                let pushed = outer.push_header(&mut data, 8 + piece.len(), 0);
                data.extend([envelope.protocol, 0]);
                data.extend((offset | u16::from(more)).to_be_bytes());
                data.extend(u32::from(id).to_be_bytes());
                pushed
            };
            if pushed.is_none() {
                return;
            }
            data.extend(piece);
            self.deliver_finished(data);
        }
    }
}
