//! What connects a network card to a network.

use std::sync::Arc;

use vm_memory::VolatileSlice;

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

/// A frame on its way: its bytes still lie in the sender's memory.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    /// Offloads that the sender left to others.
    pub header: Header,
    /// The bytes, in order, from the destination address on. The sender may change them at any
    /// time: what is decided on must be copied first.
    pub data: &'a [VolatileSlice<'a>],
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
    /// Copies the frame. Must not block, and must not send on the same network from within.
    fn receive(&self, frame: &Frame<'_>) -> Delivery;
    /// The cable was plugged (`true`) or pulled.
    fn link_changed(&self, up: bool);
}

/// The network's side: a place where one card is plugged in.
pub trait NetPort: Send + Sync {
    /// Sends a frame into the network.
    fn send(&self, frame: &Frame<'_>) -> Delivery;
    /// From now on frames for this port go to `receiver`.
    fn attach(&self, receiver: Arc<dyn Receiver>);
    /// From now on frames for this port are dropped. On return no call to the receiver is running.
    fn detach(&self);
    /// Whether the cable is plugged.
    fn link_up(&self) -> bool;
}
