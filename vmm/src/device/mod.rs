//! Devices that are not virtio.

pub mod boot_timer;
pub mod panic;
pub mod serial;
