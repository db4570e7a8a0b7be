//! What lies in guest memory before its first instruction: kernel, initrd, command line, ACPI
//! tables and the zero page that points at all of them (Documentation/arch/x86/boot.rst).

pub mod acpi;
mod archive;
pub mod image;
pub mod kernel;
pub mod params;
pub mod unpack;
