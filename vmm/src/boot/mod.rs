//! What lies in guest memory before its first instruction: kernel, initrd, command line, ACPI and
//! SMBIOS tables and the zero page that points at them (Documentation/arch/x86/boot.rst).

pub mod acpi;
mod archive;
pub mod image;
pub mod kernel;
pub mod params;
pub mod smbios;
pub mod unpack;
