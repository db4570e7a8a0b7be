//! A virtual Ethernet switch inside the process.
//!
//! Knows nothing of KVM: frames are slices of somebody's memory, ports are objects. A
//! [`Switch`] joins the cards of one vlan; a card plugs its [`Receiver`] into a [`NetPort`] and
//! sends through it. A frame is copied once, by whoever receives it, on the sender's thread,
//! and keeps its offloads; [`without_offloads`] is for receivers that cannot take them and
//! [`Backlog`] for those that have no room right now.
//!
//! A [`Gateway`](gateway::Gateway) is the network behind a card that leads out of it all: to the
//! host and beyond, by sockets.

#![forbid(unsafe_code)]

mod backlog;
pub mod gateway;
mod offload;
mod port;
mod slot;
mod switch;
mod table;

pub use backlog::{Backlog, OwnedFrame};
pub use offload::{OffloadError, Offloads, Segments, sanitize, without_offloads};
pub use port::{Delivery, Frame, Header, MAX_FRAME, MIN_FRAME, NetPort, Receiver};
pub use switch::{PortStats, Switch, SwitchPort};
pub use table::{AGEING, MAX_MACS, MAX_MACS_PER_PORT};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex` also after a panic elsewhere: what this crate guards is whole between any two
/// statements, and one card's bug must not take the network from the others.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
