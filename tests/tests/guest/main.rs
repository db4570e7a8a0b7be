//! Tests that boot guests: through firn's own API, on whatever KVM there is. Where there is none
//! that works, `make test` runs them in the carrier.
#![expect(clippy::unwrap_used, reason = "all of this is tests, helpers included")]

mod balloon;
mod boot;
mod boot_once;
mod checkpoint;
mod command;
mod devices;
mod disks;
mod files;
mod forks;
mod image_trouble;
mod images;
mod network;
mod power;
mod qemu;
mod rollback;
mod run;
mod screen;
mod share_files;
mod shares;
mod state;
mod systemd;
mod trouble;
mod typing;
mod usernet;
mod vsock;
mod waits;
