//! The wire protocol between firn's driver and its agent in the guest.
//!
//! The library holds what both sides share: messages, framing, handshake and flow control, without any I/O. The
//! agent itself is the binary `firn-agent` of this package; the driver's side is `firn::agent`.
#![forbid(unsafe_code)]

pub mod protocol;
