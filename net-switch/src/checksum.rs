//! The internet checksum (RFC 1071).

/// In UDP a checksum of zero says that there is none, so the other zero is sent (RFC 768);
/// elsewhere the two are the same.
#[must_use]
pub fn nonzero(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

/// The sum of `data` as big-endian 16-bit words, not folded (RFC 1071).
#[must_use]
pub fn sum(data: &[u8]) -> u64 {
    let mut words = data.chunks_exact(2);
    let sum: u64 = words.by_ref().map(|w| u64::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    sum + words.remainder().first().map_or(0, |&last| u64::from(last) << 8)
}

/// The internet checksum of `data` and of what was summed before.
#[must_use]
pub fn checksum(before: u64, data: &[u8]) -> u16 {
    let mut sum = before + sum(data);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}
