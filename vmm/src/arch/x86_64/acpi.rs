//! ACPI tables: hardware-reduced, so that there is no PIC, PIT, RTC or keyboard controller to
//! probe for (ACPI 6.5, 4.1), with every device announced in the DSDT.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::generation::Generation;
use super::layout::{ACPI_END, ACPI_START, IOAPIC_START, LAPIC_START, VIRTIO_MMIO_SIZE};
use super::{board, console, power};
use crate::memory::MemoryMap;

/// Address of the root pointer.
pub const RSDP: u64 = ACPI_START;

const OEM: [u8; 6] = *b"FIRN  ";
const OEM_TABLE: [u8; 8] = *b"FIRNVM  ";
const OEM_REVISION: u32 = 1;
/// The DSDT's revision from which on AML integers have 64 bits.
const DSDT_REVISION: u8 = 2;
const TABLE_ALIGN: u64 = 8;

/// FADT `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): no VGA, and no CMOS clock. That the bits for
/// legacy devices and the keyboard controller are clear says those are missing too.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// Why the tables cannot be written.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// They need more than the BIOS area.
    #[error("the ACPI tables do not fit into the BIOS area")]
    TooLarge,
    /// Guest memory is too small.
    #[error("cannot write the ACPI tables")]
    Write(#[from] GuestMemoryError),
}

/// A virtio-mmio device as the DSDT announces it.
#[derive(Clone, Copy, Debug)]
pub struct MmioDevice {
    /// Its first register.
    pub address: u32,
    /// Its interrupt line.
    pub line: u32,
}

/// Writes all tables into the BIOS area.
///
/// # Errors
/// There is no room.
pub fn write(memory: &MemoryMap, cores: u8, devices: &[MmioDevice]) -> Result<(), AcpiError> {
    let mut area = Area { memory, next: RSDP + Rsdp::len() as u64 };
    let dsdt = area.place(&dsdt(devices))?;
    let fadt = area.place(&fadt(dsdt))?;
    let madt = area.place(&madt(cores))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.place(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(RSDP))?;
    Ok(())
}

struct Area<'a> {
    memory: &'a MemoryMap,
    next: u64,
}

impl Area<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let address = self.next.next_multiple_of(TABLE_ALIGN);
        self.next = address + table.len() as u64;
        if self.next > ACPI_END {
            return Err(AcpiError::TooLarge);
        }
        self.memory.write_slice(table, GuestAddress(address))?;
        Ok(address)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    bytes(&fadt.finalize())
}

fn madt(cores: u8) -> Vec<u8> {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LAPIC_START));
    for id in 0..cores {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // KVM's IOAPIC always has the id 0 and 24 pins (arch/x86/kvm/ioapic.h).
    madt.add_structure(IoApic::new(0, IOAPIC_START, 0));
    bytes(&madt)
}

fn dsdt(devices: &[MmioDevice]) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    let sleep_type = Name::new(
        "_S5_".into(),
        &Package::new(vec![&power::SLEEP_TYPE_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    );
    table.append_slice(&bytes(&sleep_type));
    table.append_slice(&bytes(&Scope::new(
        "_SB_".into(),
        vec![&SerialPort, &PowerButton, &Panic, &Generation],
    )));
    for (index, device) in devices.iter().enumerate() {
        let device = VirtioMmio { index, device: *device };
        table.append_slice(&bytes(&Scope::new("_SB_".into(), vec![&device])));
    }
    table.as_slice().to_vec()
}

struct SerialPort;

impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &aml::ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(console::PORT, console::PORT, 0, console::PORTS),
                        &Interrupt::new(true, true, false, false, console::GSI),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The power button, and the generic event device that says when it is pressed.
struct PowerButton;

/// The `Notify` value for a pressed [`PowerButton`] (ACPI 6.5, table 5.180).
const PRESSED: u8 = 0x80;

impl Aml for PowerButton {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "PWRB".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                &Name::new("_UID".into(), &aml::ZERO),
            ],
        )
        .to_aml_bytes(sink);
        let button: aml::Path = "PWRB".into();
        Device::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &aml::ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&Interrupt::new(
                        true,
                        true,
                        false,
                        false,
                        power::BUTTON_GSI,
                    )]),
                ),
                // The argument is the interrupt, and there is one only.
                &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&button, &PRESSED)]),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The pvpanic device, as QEMU announces it.
struct Panic;

impl Aml for Panic {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&IO::new(board::PANIC, board::PANIC, 0, 1)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

struct VirtioMmio {
    index: usize,
    device: MmioDevice,
}

impl Aml for VirtioMmio {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let name = format!("V{:03X}", self.index);
        Device::new(
            name.as_str().into(),
            vec![
                // Linux's virtio_mmio driver binds to this (drivers/virtio/virtio_mmio.c).
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &self.index),
                // DMA is coherent (ACPI 6.5, 6.2.17).
                &Name::new("_CCA".into(), &aml::ONE),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, self.device.address, VIRTIO_MMIO_SIZE),
                        // Edge-triggered and shared.
                        &Interrupt::new(true, true, false, true, self.device.line),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests;
