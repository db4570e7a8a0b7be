//! firn's KVM monitor.
//!
//! A [`MachineSpec`](spec::MachineSpec) says what to build, [`Vm::new`](vm::Vm::new) builds it and
//! [`Vm::start`](vm::Vm::start) runs it: one thread a vCPU and one event thread for the devices.
//! The crate knows nothing of tests, Python or Nix.

pub mod arch;
pub mod boot;
pub mod bus;
mod cancel;
mod common;
pub mod device;
mod erofs;
pub mod error;
mod event_loop;
mod extents;
pub mod file;
pub mod interrupt;
pub mod memory;
pub mod probe;
pub mod screen;
#[cfg(test)]
#[path = "../../tests/src/skip.rs"]
mod skip;
pub mod socket;
pub mod spec;
mod thread;
pub mod vcpu;
pub mod virtio;
pub mod vm;

pub use cancel::Cancel;
