//! A virtual Ethernet switch inside the process.
//!
//! Knows nothing of KVM: frames are slices of somebody's memory, ports are objects.

pub mod port;

pub use port::{Delivery, Frame, Header, NetPort, Receiver};
