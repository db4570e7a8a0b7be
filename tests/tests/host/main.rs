//! Tests that run on the host itself.
#![expect(clippy::unwrap_used, reason = "all of this is tests, helpers included")]

mod carrier;
mod cli;
mod qemu;
