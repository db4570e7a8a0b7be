//! x86-64: a PC without a BIOS, described by ACPI and SMBIOS tables.

mod acpi;
pub mod board;
mod bzimage;
mod console;
mod cpuid;
pub mod entry;
mod error;
pub mod firmware;
pub mod generation;
pub mod kernel;
pub mod layout;
pub mod params;
mod pci;
mod power;
pub(crate) mod probe;
mod smbios;
pub mod state;
pub mod tsc;
pub mod unpack;
pub mod vcpu;

pub use error::ArchError;
