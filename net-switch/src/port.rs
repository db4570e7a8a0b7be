//! What connects a network card to a network.

use std::sync::Arc;

use vm_memory::{VolatileSlice, WriteVolatile};

/// The shortest frame in bytes: an Ethernet header and nothing after it. Cards pad to 60, but that is the wire's
/// need, not ours.
pub const MIN_FRAME: usize = 14;

/// The longest frame in bytes: the largest IPv6 packet that is no jumbogram (RFC 8200, 3: 40 +
/// 65,535) behind an Ethernet header and two 802.1Q tags. TSO frames come close to it.
pub const MAX_FRAME: usize = MIN_FRAME + 2 * 4 + 40 + 65_535;

/// The offload header of a frame: the fields of `struct virtio_net_hdr` (virtio 1.2, 5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// `VIRTIO_NET_HDR_F_*`: bit 0 a checksum is still to be computed, bit 1 it was verified.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`: 0 none, 1 TCPv4, 3 UDP, 4 TCPv6, 5 UDP_L4; bit 7 ECN.
    pub gso_type: u8,
    /// Length of the headers that each segment repeats.
    pub hdr_len: u16,
    /// Payload bytes a segment.
    pub gso_size: u16,
    /// Where checksumming starts.
    pub csum_start: u16,
    /// Where the checksum goes, from `csum_start`.
    pub csum_offset: u16,
}

impl Header {
    /// In `flags`: the checksum of what follows `csum_start` is still to be computed.
    pub const NEEDS_CSUM: u8 = 1;
    /// In `flags`: the checksums were verified.
    pub const DATA_VALID: u8 = 2;
    /// `gso_type` of a frame that is no longer than the network allows.
    pub const GSO_NONE: u8 = 0;
    /// `gso_type`: TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// `gso_type`: UDP over IPv4, to be cut into IP fragments.
    pub const GSO_UDP: u8 = 3;
    /// `gso_type`: TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// `gso_type`: UDP, to be cut into datagrams.
    pub const GSO_UDP_L4: u8 = 5;
    /// Added to a TCP `gso_type`: the first segment carries CWR.
    pub const GSO_ECN: u8 = 0x80;

    /// Whether a checksum is still to be computed.
    #[must_use]
    pub fn needs_csum(&self) -> bool {
        self.flags & Self::NEEDS_CSUM != 0
    }

    /// `gso_type` without [`Header::GSO_ECN`].
    #[must_use]
    pub fn gso_kind(&self) -> u8 {
        self.gso_type & !Self::GSO_ECN
    }
}

/// A frame in transit: its bytes are still in the sender's memory.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    /// Offloads that the sender left to others.
    pub header: Header,
    /// The bytes, in order, from the destination address on. The sender may change them at any
    /// time: what is decided on must be copied first.
    pub data: &'a [VolatileSlice<'a>],
}

impl Frame<'_> {
    /// Length in bytes. Saturates, as a hostile ring can describe more than there is.
    #[must_use]
    pub fn total_len(&self) -> usize {
        self.data.iter().fold(0, |sum, part| sum.saturating_add(part.len()))
    }

    /// Copies the start of the frame to `target`, and says how many bytes there were.
    pub fn copy_to(&self, target: &mut [u8]) -> usize {
        let mut done = 0;
        for part in self.data {
            if done == target.len() {
                break;
            }
            done += part.copy_to(&mut target[done..]);
        }
        done
    }

    /// Copies the whole frame. The caller has checked that [`Self::total_len`] is bearable.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.total_len());
        for part in self.data {
            // A vector takes all that it is given.
            let _ = bytes.write_volatile(part);
        }
        bytes
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The receiver has it.
    Taken,
    /// Nobody was there, or the receiver had no room.
    Dropped,
}

/// The card's side: takes frames from the network, on the sender's thread.
pub trait Receiver: Send + Sync {
    /// Copies the frame. Must not block, and must not send on the same network, nor attach,
    /// detach or drop its port, from within: the last three wait for this call.
    fn receive(&self, frame: &Frame<'_>) -> Delivery;
    /// The cable was plugged (`true`) or pulled.
    fn link_changed(&self, up: bool);
}

/// The network's side: a place where one card is plugged in.
pub trait NetPort: Send + Sync {
    /// Sends a frame into the network.
    fn send(&self, frame: &Frame<'_>) -> Delivery;
    /// From now on frames for this port go to `receiver`. Takes the place of an earlier one, as after
    /// [`Self::detach`]. Call [`Self::link_up`] afterwards: only changes are reported.
    fn attach(&self, receiver: Arc<dyn Receiver>);
    /// From now on frames for this port are dropped. On return no call to the receiver is running,
    /// so the caller must hold no lock that the receiver takes.
    fn detach(&self);
    /// Whether the cable is plugged.
    fn link_up(&self) -> bool;
}
