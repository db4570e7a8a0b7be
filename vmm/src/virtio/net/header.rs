//! `struct virtio_net_hdr` as it precedes each frame (virtio 1.2, 5.1.6).

use firn_net_switch::Header;

/// Length with `num_buffers`, which devices of version 1 always have.
pub(super) const LEN: usize = 12;

/// Reads the header of a frame that the guest sends; `num_buffers` means nothing there.
pub(super) fn parse(raw: [u8; LEN]) -> Header {
    let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, _, _] = raw;
    Header {
        flags,
        gso_type,
        hdr_len: u16::from_le_bytes([h0, h1]),
        gso_size: u16::from_le_bytes([g0, g1]),
        csum_start: u16::from_le_bytes([s0, s1]),
        csum_offset: u16::from_le_bytes([o0, o1]),
    }
}

/// Writes the header of a frame for the guest that fills `buffers` chains.
pub(super) fn compose(header: &Header, buffers: u16) -> [u8; LEN] {
    let mut raw = [0; LEN];
    raw[0] = header.flags;
    raw[1] = header.gso_type;
    let words = [header.hdr_len, header.gso_size, header.csum_start, header.csum_offset, buffers];
    for (place, word) in raw[2..].chunks_exact_mut(2).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    raw
}
