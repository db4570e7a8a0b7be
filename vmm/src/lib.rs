//! firn's KVM monitor.
//!
//! A [`MachineSpec`](spec::MachineSpec) says what to build, [`Vm::new`](vm::Vm::new) builds it and
//! [`Vm::start`](vm::Vm::start) runs it: one thread a vCPU and one event thread for the devices.
//! The crate knows nothing of tests, Python or Nix.

pub mod memory;
pub mod spec;
pub mod virtio;
