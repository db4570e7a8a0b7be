//! firn: drives virtual machines from a test script.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
mod descriptors;
pub mod driver;
pub mod error;
mod kernels;
pub mod kit;
pub mod log;
pub mod machine;
pub mod ocr;
pub mod picture;
pub mod private;
pub mod retry;
pub mod scratch;
pub mod ssh;
pub mod task;
pub mod viewers;
pub mod vlan;
pub mod worlds;

pub use driver::{Driver, DriverOptions};
pub use error::{End, Error, MachineError, Result};
pub use machine::{ExecOptions, Machine, Status};
pub use retry::retry;
pub use vlan::Vlan;
