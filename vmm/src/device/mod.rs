//! Devices that are not virtio.

pub mod panic;
pub mod power;
pub mod serial;
