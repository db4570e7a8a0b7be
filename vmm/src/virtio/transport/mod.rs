//! How the guest's drivers reach a device.
//!
//! [`Slot`] holds a device and all that every transport shares: status, feature negotiation,
//! queue set-up, activation and reset (virtio 1.2, chapter 3). [`mmio`] is the register layout
//! around it; a PCI one has its place beside it.

pub mod mmio;
mod slot;
#[cfg(test)]
mod tests;

pub use slot::{QueueConfig, Slot, SlotState};
