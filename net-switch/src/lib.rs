//! A virtual Ethernet switch inside the process.
//!
//! Knows nothing of KVM: frames are borrowed slices, ports are objects. A [`Switch`] joins the cards of one vlan; a
//! card plugs its [`Receiver`] into a [`NetPort`] and sends through it. A frame is copied once, by the receiver on
//! the sender's thread, and keeps its offloads; [`without_offloads`] is for receivers that do not support them and
//! [`Backlog`] for those without room at the moment.
//!
//! A [`plugs::PlugDir`] lets programs outside plug in, such as QEMU.
//!
//! The user network's gateway, which leads to the host and beyond, is a crate of its own that plugs
//! into the same ports: `firn-gateway`.

#![forbid(unsafe_code)]

mod attachment;
mod backlog;
pub mod checksum;
mod offload;
pub mod plugs;
mod port;
mod switch;
mod table;

pub use attachment::Attachment;
pub use backlog::{Backlog, OwnedFrame};
pub use offload::{OffloadError, Offloads, Segments, sanitize, without_offloads};
pub use port::{Delivery, Frame, Header, MAX_FRAME, MIN_FRAME, NetPort, Receiver};
pub use switch::{Addresses, PortStats, Switch, SwitchPort};
pub use table::{AGEING, MAX_MACS, MAX_MACS_PER_PORT};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex` also after a panic elsewhere: what this crate guards is whole between any two
/// statements, and one card's bug must not take the network from the others.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
