//! What a PC's firmware would have left in memory.

use thiserror::Error;
use vm_memory::GuestMemoryError;

use super::acpi::{self, AcpiError};
use super::smbios::{self, SmbiosError};
use super::{entry, generation};
use crate::memory::MemoryMap;
use crate::spec::MachineSpec;

pub use acpi::MmioDevice;

/// Why the firmware's tables cannot be written.
#[derive(Debug, Error)]
pub enum FirmwareError {
    /// Those that announce devices.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Those that say what the machine is.
    #[error(transparent)]
    Smbios(#[from] SmbiosError),
    /// Those of the processor.
    #[error("cannot write the tables of the first processor, or the generation ID")]
    Memory(#[from] GuestMemoryError),
}

/// Makes sure, without touching anything, that [`write`] will have room.
///
/// # Errors
/// What the spec wants to be said is too long.
pub fn check(spec: &MachineSpec) -> Result<(), FirmwareError> {
    Ok(smbios::check(spec)?)
}

/// Writes everything for a machine with these devices.
///
/// # Errors
/// There is no room.
pub fn write(
    memory: &MemoryMap,
    spec: &MachineSpec,
    devices: &[MmioDevice],
) -> Result<(), FirmwareError> {
    acpi::write(memory, spec.cores.get(), devices)?;
    smbios::write(memory, spec)?;
    generation::write(memory)?;
    entry::write_tables(memory)?;
    Ok(entry::write_reset_vector(memory)?)
}
