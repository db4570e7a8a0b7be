//! Does for a receiver what the sender left to its card: checksums and segmentation.
//!
//! All input is written by a guest. Frames are copied before they are parsed, every offset is checked against the
//! copy, and inconsistencies are errors.

use crate::backlog::OwnedFrame;
use crate::checksum::{checksum, nonzero, sum};
use crate::port::{Frame, Header, MAX_FRAME, MIN_FRAME};

const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// The smallest payload of a TCP segment: Linux sends no less (`TCP_MIN_SND_MSS` in
/// include/net/tcp.h is 48, of which options may take 40).
const MIN_TCP_PAYLOAD: u16 = 8;

/// The most datagrams one UDP frame may hold (`UDP_MAX_SEGMENTS` in Linux' include/linux/udp.h).
const MAX_DATAGRAMS: usize = 128;

/// The most bytes of headers that are repeated for each segment: Ethernet, two tags, the
/// longest TCP and IPv4 headers, or IPv6 with some 380 bytes of extensions. Bounds, with
/// [`MIN_TCP_PAYLOAD`], how much one frame can grow.
const MAX_HEADERS: usize = 512;

/// Why a frame cannot be passed on as its header asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// Not between [`MIN_FRAME`] and [`MAX_FRAME`].
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// The checksum is to be read or written outside the frame's payload.
    #[error("checksum from {start} at +{offset} in a frame of {length} bytes")]
    Checksum {
        /// `csum_start`.
        start: u16,
        /// `csum_offset`.
        offset: u16,
        /// Bytes in the frame.
        length: usize,
    },
    /// Not a kind of segmentation that is offered here.
    #[error("gso_type {0:#x}")]
    GsoType(u8),
    /// Segmentation changes what is summed, so the checksum must be left to do as well.
    #[error("segmentation without NEEDS_CSUM")]
    GsoWithoutChecksum,
    /// Zero, or so small that a frame would become too many segments.
    #[error("gso_size {0}")]
    GsoSize(u16),
    /// The headers are said to be longer than the frame.
    #[error("hdr_len {hdr_len} in a frame of {length} bytes")]
    HeaderLength {
        /// `hdr_len`.
        hdr_len: u16,
        /// Bytes in the frame.
        length: usize,
    },
    /// The frame's own headers run past its end or contradict themselves or the offload header.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// A valid frame of a kind that is not supported.
    #[error("cannot segment {0}")]
    Unsupported(&'static str),
}

/// What a receiver takes upon itself: the `VIRTIO_NET_F_GUEST_*` features of virtio 1.2, 5.1.3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// `GUEST_CSUM`: frames whose checksum is not computed.
    pub csum: bool,
    /// `GUEST_TSO4`: long TCP frames over IPv4.
    pub tso4: bool,
    /// `GUEST_TSO6`: long TCP frames over IPv6.
    pub tso6: bool,
    /// `GUEST_ECN`: long TCP frames with CWR.
    pub ecn: bool,
    /// `GUEST_USO4` and `GUEST_USO6`: long UDP frames.
    pub uso: bool,
}

impl Offloads {
    /// Whether a frame with this header may be passed to the receiver unchanged.
    #[must_use]
    pub fn cover(self, header: &Header) -> bool {
        let kind = match header.gso_kind() {
            Header::GSO_NONE => true,
            Header::GSO_TCPV4 => self.tso4,
            Header::GSO_TCPV6 => self.tso6,
            Header::GSO_UDP_L4 => self.uso,
            _ => false,
        };
        let ecn = self.ecn || header.gso_type & Header::GSO_ECN == 0;
        kind && ecn && (self.csum || !header.needs_csum())
    }
}

/// Checks the offload header of a frame of `length` bytes, so that one guest cannot feed
/// another an absurd one. Returns it with all fields cleared that mean nothing in it, and
/// without [`Header::DATA_VALID`], which a sender has no say in.
///
/// # Errors
/// Says what contradicts itself. `GSO_UDP` (IP fragments) is refused: Linux dropped it in 4.14
/// and no card here offers it.
pub fn sanitize(header: Header, length: usize) -> Result<Header, OffloadError> {
    if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
        return Err(OffloadError::Length(length));
    }
    let mut clean = Header::default();
    if header.needs_csum() {
        let (start, offset) = (header.csum_start, header.csum_offset);
        let end = usize::from(start) + usize::from(offset) + 2;
        if usize::from(start) < MIN_FRAME || end > length {
            return Err(OffloadError::Checksum { start, offset, length });
        }
        clean.flags = Header::NEEDS_CSUM;
        clean.csum_start = start;
        clean.csum_offset = offset;
    }
    if header.gso_type == Header::GSO_NONE {
        return Ok(clean);
    }
    let size_ok = match (header.gso_kind(), header.gso_type & Header::GSO_ECN) {
        (Header::GSO_TCPV4 | Header::GSO_TCPV6, _) => header.gso_size >= MIN_TCP_PAYLOAD,
        // The length of the headers is not known yet, so this is the first of two checks.
        (Header::GSO_UDP_L4, 0) => header.gso_size > 0,
        _ => return Err(OffloadError::GsoType(header.gso_type)),
    };
    if !size_ok {
        return Err(OffloadError::GsoSize(header.gso_size));
    }
    // virtio 1.2, 5.1.6.4.1: what has a gso_type also has NEEDS_CSUM.
    if !header.needs_csum() {
        return Err(OffloadError::GsoWithoutChecksum);
    }
    if usize::from(header.hdr_len) > length {
        return Err(OffloadError::HeaderLength { hdr_len: header.hdr_len, length });
    }
    clean.gso_type = header.gso_type;
    clean.gso_size = header.gso_size;
    clean.hdr_len = header.hdr_len;
    Ok(clean)
}

/// Copies a frame and does what the receiver does not support. A frame that it
/// [covers](Offloads::cover) comes out once, with its header; anything else as one or more
/// frames with nothing left to do and an empty header.
///
/// # Errors
/// The header fails [`sanitize`], or the frame is to be segmented and is not IPv4 or IPv6 with
/// TCP or UDP behind it, up to two 802.1Q tags before it and no more than 512 bytes of headers.
/// Refused as well: IP fragments, jumbograms, IPv6 routing headers that are not used up.
pub fn without_offloads(frame: &Frame<'_>, supports: Offloads) -> Result<Segments, OffloadError> {
    let header = sanitize(frame.header, frame.total_len())?;
    let mut data = frame.to_vec();
    if supports.cover(&header) {
        return Ok(Segments(State::Whole(Some(OwnedFrame { header, data }))));
    }
    if header.gso_type == Header::GSO_NONE {
        complete_checksum(&mut data, &header);
        return Ok(Segments(State::Whole(Some(OwnedFrame { header: Header::default(), data }))));
    }
    Ok(Segments(State::Cut(Cut::new(data, &header)?)))
}

/// The frames that [`without_offloads`] makes of one, made one by one.
#[derive(Debug)]
pub struct Segments(State);

#[derive(Debug)]
enum State {
    Whole(Option<OwnedFrame>),
    Cut(Cut),
}

impl Iterator for Segments {
    type Item = OwnedFrame;

    fn next(&mut self) -> Option<OwnedFrame> {
        match &mut self.0 {
            State::Whole(frame) => frame.take(),
            State::Cut(cut) => cut.next(),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = match &self.0 {
            State::Whole(frame) => usize::from(frame.is_some()),
            State::Cut(cut) => usize::from(cut.count - cut.index),
        };
        (left, Some(left))
    }
}

impl ExactSizeIterator for Segments {}

/// Where the parts of a frame are; each offset is no greater than the next and all lie within
/// the frame.
#[derive(Clone, Copy, Debug)]
struct Layout {
    ip: usize,
    v6: bool,
    protocol: u8,
    transport: usize,
    payload: usize,
    /// Where the IP packet ends. What follows is padding.
    end: usize,
}

/// A frame that is being cut into segments.
#[derive(Debug)]
struct Cut {
    data: Vec<u8>,
    layout: Layout,
    size: usize,
    /// At most 65,535 / 8 + 1.
    count: u16,
    index: u16,
}

impl Cut {
    fn new(data: Vec<u8>, header: &Header) -> Result<Self, OffloadError> {
        let layout = Layout::of(&data, header)?;
        let size = usize::from(header.gso_size);
        // A frame without payload is a segment as well.
        let count = (layout.end - layout.payload).div_ceil(size).max(1);
        if layout.protocol == IPPROTO_UDP && count > MAX_DATAGRAMS {
            return Err(OffloadError::GsoSize(header.gso_size));
        }
        let count = u16::try_from(count).map_err(|_| OffloadError::GsoSize(header.gso_size))?;
        Ok(Self { data, layout, size, count, index: 0 })
    }

    fn next(&mut self) -> Option<OwnedFrame> {
        if self.index == self.count {
            return None;
        }
        let Layout { payload, end, .. } = self.layout;
        let sent = usize::from(self.index) * self.size;
        let from = payload + sent;
        let mut data = self.data[..payload].to_vec();
        data.extend_from_slice(&self.data[from..end.min(from + self.size)]);
        self.fix_ip(&mut data);
        self.fix_transport(&mut data, sent);
        self.index += 1;
        Some(OwnedFrame { header: Header::default(), data })
    }

    /// Lengths, and for IPv4 the identification and the header's checksum.
    fn fix_ip(&self, data: &mut [u8]) {
        let Layout { ip, v6, transport, .. } = self.layout;
        if v6 {
            put16(data, ip + 4, len16(data.len() - ip - 40));
            return;
        }
        put16(data, ip + 2, len16(data.len() - ip));
        let id = get16(data, ip + 4).wrapping_add(self.index);
        put16(data, ip + 4, id);
        put16(data, ip + 10, 0);
        let sum = checksum(0, &data[ip..transport]);
        put16(data, ip + 10, sum);
    }

    /// Length, or sequence number and flags, and the checksum.
    fn fix_transport(&self, data: &mut [u8], sent: usize) {
        let Layout { ip, v6, protocol, transport, .. } = self.layout;
        let sum_at = if protocol == IPPROTO_UDP {
            put16(data, transport + 4, len16(data.len() - transport));
            transport + 6
        } else {
            let sequence =
                u32::from(get16(data, transport + 4)) << 16 | u32::from(get16(data, transport + 6));
            let sequence = sequence.wrapping_add(u32::try_from(sent).unwrap_or(u32::MAX));
            data[transport + 4..transport + 8].copy_from_slice(&sequence.to_be_bytes());
            if self.index + 1 < self.count {
                data[transport + 13] &= !(TCP_FIN | TCP_PSH);
            }
            if self.index > 0 {
                data[transport + 13] &= !TCP_CWR;
            }
            transport + 16
        };
        put16(data, sum_at, 0);
        // The pseudo-header: both addresses, the protocol and the length (RFC 9293, 3.1; RFC
        // 8200, 8.1). Its other fields are zero.
        let addresses = if v6 { ip + 8..ip + 40 } else { ip + 12..ip + 20 };
        let pseudo =
            sum(&data[addresses]) + u64::from(protocol) + u64::from(len16(data.len() - transport));
        let sum = checksum(pseudo, &data[transport..]);
        put16(data, sum_at, nonzero(sum));
    }
}

impl Layout {
    /// Finds the headers of a frame that is to be segmented.
    fn of(data: &[u8], header: &Header) -> Result<Self, OffloadError> {
        let mut at = 12;
        for _ in 0..2 {
            if matches!(read16(data, at)?, 0x8100 | 0x88a8) {
                at += 4;
            }
        }
        let ip = at + 2;
        let wants_v6 = match header.gso_kind() {
            Header::GSO_TCPV4 => Some(false),
            Header::GSO_TCPV6 => Some(true),
            _ => None,
        };
        let (v6, (protocol, transport, end)) = match read16(data, at)? {
            0x0800 => (false, ipv4(data, ip)?),
            0x86dd => (true, ipv6(data, ip)?),
            _ => return Err(OffloadError::Unsupported("what is not IP")),
        };
        if wants_v6.is_some_and(|wanted| wanted != v6) {
            return Err(OffloadError::Malformed("IP version and gso_type"));
        }
        let (wants, sum_offset, length) = if header.gso_kind() == Header::GSO_UDP_L4 {
            (IPPROTO_UDP, 6, 8)
        } else {
            let words = read8(data, transport + 12)? >> 4;
            (IPPROTO_TCP, 16, usize::from(words) * 4)
        };
        if protocol != wants {
            return Err(OffloadError::Malformed("protocol and gso_type"));
        }
        if usize::from(header.csum_start) != transport || header.csum_offset != sum_offset {
            return Err(OffloadError::Malformed("csum_start or csum_offset"));
        }
        let payload = transport + length;
        if (wants == IPPROTO_TCP && length < 20) || payload > end {
            return Err(OffloadError::Malformed("transport header's length"));
        }
        if payload > MAX_HEADERS {
            return Err(OffloadError::Unsupported("headers this long"));
        }
        Ok(Self { ip, v6, protocol, transport, payload, end })
    }
}

/// The protocol, where its header starts and where the packet ends. The start may be past the
/// end, the end is within `data`.
fn ipv4(data: &[u8], ip: usize) -> Result<(u8, usize, usize), OffloadError> {
    let first = read8(data, ip)?;
    let length = usize::from(first & 0xf) * 4;
    let end = ip + usize::from(read16(data, ip + 2)?);
    if first >> 4 != 4 || length < 20 || end > data.len() {
        return Err(OffloadError::Malformed("IPv4 version or lengths"));
    }
    // More fragments, or an offset.
    if read16(data, ip + 6)? & 0x3fff != 0 {
        return Err(OffloadError::Unsupported("an IP fragment"));
    }
    Ok((read8(data, ip + 9)?, ip + length, end))
}

/// As [`ipv4`]. Passes over the extension headers that may stand before TCP in a whole packet.
fn ipv6(data: &[u8], ip: usize) -> Result<(u8, usize, usize), OffloadError> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;

    let length = usize::from(read16(data, ip + 4)?);
    if length == 0 {
        return Err(OffloadError::Unsupported("a jumbogram"));
    }
    let end = ip + 40 + length;
    if read8(data, ip)? >> 4 != 6 || end > data.len() {
        return Err(OffloadError::Malformed("IPv6 version or length"));
    }
    let mut next = read8(data, ip + 6)?;
    let mut at = ip + 40;
    // Ends, as each step goes on by 8 bytes or more.
    loop {
        match next {
            // The checksum covers the last destination, which is not the one in the header.
            ROUTING if read8(data, at + 3)? != 0 => {
                return Err(OffloadError::Unsupported("a routing header with segments left"));
            }
            HOP_BY_HOP | ROUTING | DESTINATION => {
                next = read8(data, at)?;
                at += (usize::from(read8(data, at + 1)?) + 1) * 8;
            }
            FRAGMENT => return Err(OffloadError::Unsupported("an IP fragment")),
            protocol => return Ok((protocol, at, end)),
        }
    }
}

/// Writes the checksum that `header` asks for. The field holds the pseudo-header's sum already
/// (virtio 1.2, 5.1.6.2). `header` is sanitized for `data`.
fn complete_checksum(data: &mut [u8], header: &Header) {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    let sum = checksum(0, &data[start..]);
    put16(data, at, nonzero(sum));
}

/// A number that is known to fit.
fn len16(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}

fn read8(data: &[u8], at: usize) -> Result<u8, OffloadError> {
    data.get(at).copied().ok_or(OffloadError::Malformed("a header runs past the end"))
}

fn read16(data: &[u8], at: usize) -> Result<u16, OffloadError> {
    Ok(u16::from(read8(data, at)?) << 8 | u16::from(read8(data, at + 1)?))
}

/// For offsets that [`Layout::of`] or [`sanitize`] has checked.
fn get16(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([data[at], data[at + 1]])
}

fn put16(data: &mut [u8], at: usize, value: u16) {
    data[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests;
