//! Packets between guest and device (virtio 1.2, 5.10.6).
//!
//! The `virtio-vsock` crate takes packets of one or two buffers only. Linux spreads long ones over
//! more, so this takes any.

use std::io::{Read, Write};

use crate::memory::MemoryMap;
use crate::virtio::queue::{Chain, GuestSlice, readable, writable};

/// The host's address (5.10.4).
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM (5.10.6): the only kind of socket that is offered.
pub const TYPE_STREAM: u16 = 1;
/// In a shutdown's flags: the sender will receive no more (5.10.6.5).
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// In a shutdown's flags: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Values of [`Header::op`] (5.10.6).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Takes it.
    pub const RESPONSE: u16 = 2;
    /// Ends it, or refuses it.
    pub const RST: u16 = 3;
    /// Closes one direction or both.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Says how much can be sent to the sender.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for that.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender.
    pub src_cid: u64,
    /// The receiver.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// The kind of socket.
    pub kind: u16,
    /// What it is about, one of [`op`].
    pub op: u16,
    /// Depends on `op`.
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes that have left that buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Length in bytes.
    pub const LEN: usize = 44;

    /// From the guest's bytes.
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Header {
        let mut rest = bytes.as_slice();
        Header {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// To the guest's bytes.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; Self::LEN];
        let mut rest = bytes.as_mut_slice();
        for field in fields {
            let (head, tail) = rest.split_at_mut(field.len());
            head.copy_from_slice(field);
            rest = tail;
        }
        bytes
    }
}

/// The next `N` bytes. There are enough: [`Header::LEN`] is the sum of the fields.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    let (head, tail) = rest.split_at(N);
    bytes.copy_from_slice(head);
    *rest = tail;
    bytes
}

/// The header at the start of a chain that the guest sends, if it is long enough to have one.
pub fn read_header(chain: &Chain, memory: &MemoryMap) -> Option<Header> {
    let mut bytes = [0; Header::LEN];
    chain.clone().reader(memory).ok()?.read_exact(&mut bytes).ok()?;
    Some(Header::from_bytes(&bytes))
}

/// The `len` bytes of data after the header; `None` if the chain has fewer.
pub fn data(chain: Chain, memory: &MemoryMap, len: usize) -> Option<Vec<GuestSlice<'_>>> {
    let (slices, found) = behind_header(readable(chain, memory).map_while(Result::ok), len);
    (found == len).then_some(slices)
}

/// Room for data behind the header of a chain that the guest wants filled, at most `max` bytes.
/// `None` if it is too short for a header.
pub fn room(chain: Chain, memory: &MemoryMap, max: usize) -> Option<Vec<GuestSlice<'_>>> {
    // `writer` checks all buffers.
    let writer = chain.clone().writer(memory).ok()?;
    let enough = writer.available_bytes() >= Header::LEN;
    enough.then(|| behind_header(writable(chain, memory).map_while(Result::ok), max).0)
}

/// Writes the header at the start of a chain for which [`room`] was found.
pub fn write_header(chain: Chain, memory: &MemoryMap, header: Header) -> bool {
    let Ok(mut writer) = chain.writer(memory) else {
        return false;
    };
    writer.write_all(&header.to_bytes()).is_ok()
}

/// Cuts the header and what is behind `max` more bytes off a list of buffers; also says how many
/// bytes are left.
fn behind_header<'a>(
    slices: impl Iterator<Item = GuestSlice<'a>>,
    max: usize,
) -> (Vec<GuestSlice<'a>>, usize) {
    let (mut skip, mut found, mut kept) = (Header::LEN, 0, Vec::new());
    for slice in slices {
        let start = skip.min(slice.len());
        skip -= start;
        let len = (slice.len() - start).min(max - found);
        if len > 0
            && let Ok(part) = slice.subslice(start, len)
        {
            found += len;
            kept.push(part);
        }
    }
    (kept, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_laid_out_as_specified() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: HOST_CID,
            src_port: 0x1112_1314,
            dst_port: 22,
            len: 3,
            kind: TYPE_STREAM,
            op: op::RW,
            flags: 0x2122_2324,
            buf_alloc: 0x3132_3334,
            fwd_cnt: 0x4142_4344,
        };
        let bytes = header.to_bytes();
        let expected = [
            8, 7, 6, 5, 4, 3, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0x14, 0x13, 0x12, 0x11, 22, 0, 0, 0, 3,
            0, 0, 0, 1, 0, 5, 0, 0x24, 0x23, 0x22, 0x21, 0x34, 0x33, 0x32, 0x31, 0x44, 0x43, 0x42,
            0x41,
        ];
        assert_eq!(bytes, expected);
        assert_eq!(Header::from_bytes(&bytes), header);
    }
}
