//! The gateway as a guest and the host's programs see it: over loopback, with smoltcp as the guest.

mod datagrams;
mod forwards;
mod guest;
mod hostile;
mod memory;
mod tcp;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use super::*;
pub(super) use guest::Guest;

/// Longer than anything here takes, even on a machine that does much else.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A forward to the port that `from` is to reach at `to`.
pub(super) fn forward(
    from: Side,
    protocol: Protocol,
    host: SocketAddr,
    guest: SocketAddr,
) -> Forward {
    Forward { from, protocol, host, guest }
}

/// A port of the host's loopback that somebody listens on, and what the guest calls it.
pub(super) fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, (GATEWAY_V4, port).into())
}

/// A port of the host's loopback that nobody listens on.
pub(super) fn closed_port() -> u16 {
    listener().1.port()
}

/// Bytes without a short pattern.
pub(super) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}
