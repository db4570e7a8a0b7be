//! firn: drives virtual machines from a test script.
#![forbid(unsafe_code)]

pub mod agent;
pub mod carrier;
pub mod config;
pub mod kit;
pub mod log;
