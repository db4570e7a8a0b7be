//! SMBIOS tables (DMTF DSP0134, 3.1): who made the machine and what is in it, as programs in the
//! guest read it below `/sys/class/dmi/id`, and texts for them that the spec brings.

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{self, SMBIOS_END, SMBIOS_START};
use crate::memory::MemoryMap;
use crate::spec::MachineSpec;

/// Length of the 64-bit entry point (5.2.2).
const ENTRY_POINT: usize = 24;
/// Structures begin here; Linux looks for the entry point at multiples of 16.
const TABLE: u64 = SMBIOS_START + 32;
/// The version of the specification that the structures follow.
const VERSION: (u8, u8) = (3, 1);

const MANUFACTURER: &str = "firn";
const PRODUCT: &str = "firn virtual machine";

/// The tables could not be made.
#[derive(Debug, Error)]
pub enum SmbiosError {
    /// They need more than the BIOS area.
    #[error(
        "the SMBIOS tables need {needed} bytes and there is room for {room}: the OEM strings are too long"
    )]
    TooLarge {
        /// What they need.
        needed: usize,
        /// What there is.
        room: usize,
    },
    /// A string that would end the list of strings.
    #[error("OEM string {0:?} is empty or contains a NUL byte")]
    OemString(String),
    /// Guest memory is too small.
    #[error("cannot write the SMBIOS tables")]
    Write(#[from] GuestMemoryError),
}

/// Makes sure that the tables of a machine can be written.
///
/// # Errors
/// A bad OEM string, or more than there is room for.
pub fn check(spec: &MachineSpec) -> Result<(), SmbiosError> {
    fitting_table(spec).map(drop)
}

/// Writes the tables of a machine into the BIOS area.
///
/// # Errors
/// A bad OEM string, or more than there is room for.
pub fn write(memory: &MemoryMap, spec: &MachineSpec) -> Result<(), SmbiosError> {
    let table = fitting_table(spec)?;
    memory.write_slice(&entry_point(table.len()), GuestAddress(SMBIOS_START))?;
    Ok(memory.write_slice(&table, GuestAddress(TABLE))?)
}

fn fitting_table(spec: &MachineSpec) -> Result<Vec<u8>, SmbiosError> {
    let table = table(spec)?;
    let room = usize::try_from(SMBIOS_END - TABLE).unwrap_or(usize::MAX);
    if table.len() > room {
        return Err(SmbiosError::TooLarge { needed: table.len(), room });
    }
    Ok(table)
}

fn entry_point(len: usize) -> [u8; ENTRY_POINT] {
    let mut entry = [0; ENTRY_POINT];
    entry[..5].copy_from_slice(b"_SM3_");
    entry[6] = 24;
    (entry[7], entry[8]) = VERSION;
    // The revision of this layout.
    entry[10] = 1;
    entry[12..16].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    entry[16..].copy_from_slice(&TABLE.to_le_bytes());
    entry[5] = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

/// Kinds of structures (7).
mod kind {
    pub const FIRMWARE: u8 = 0;
    pub const SYSTEM: u8 = 1;
    pub const CHASSIS: u8 = 3;
    pub const PROCESSOR: u8 = 4;
    pub const OEM_STRINGS: u8 = 11;
    pub const MEMORY_ARRAY: u8 = 16;
    pub const MEMORY_DEVICE: u8 = 17;
    pub const MAPPED_ADDRESS: u8 = 19;
    pub const BOOT: u8 = 32;
    pub const END: u8 = 127;
}

/// "Other" and "unknown", as most enumerations of the specification number them.
const OTHER: u8 = 1;
const UNKNOWN: u8 = 2;
/// A state in which nothing is wrong (table 17).
const SAFE: u8 = 3;
/// What a handle that refers to nothing is.
const NO_HANDLE: u16 = 0xffff;

/// All structures, one after the other.
fn table(spec: &MachineSpec) -> Result<Vec<u8>, SmbiosError> {
    let mut table = Table::default();
    firmware(&mut table);
    system(&mut table, &spec.name);
    chassis(&mut table);
    processor(&mut table, spec.cores.get());
    // Their number is one byte.
    for strings in spec.oem_strings.chunks(u8::MAX.into()) {
        oem_strings(&mut table, strings)?;
    }
    memory_structures(&mut table, spec.memory.get());
    // Reserved bytes and a status: no errors were found.
    table.add(Structure::new(kind::BOOT).bytes(&[0; 7]));
    table.add(Structure::new(kind::END));
    Ok(table.bytes)
}

fn firmware(table: &mut Table) {
    /// Two bytes beyond the first eight say more: bit 3 of these says that the others are unknown.
    const CHARACTERISTICS: u64 = 1 << 3;
    /// Extension byte 2, bit 4: this describes a virtual machine.
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    let segment = u16::try_from(SMBIOS_START >> 4).unwrap_or(u16::MAX);
    table.add(
        Structure::new(kind::FIRMWARE)
            .string(MANUFACTURER)
            .string(env!("CARGO_PKG_VERSION"))
            .bytes(&segment.to_le_bytes())
            // Linux takes a machine for an old one without a year of at least 2001.
            .string("01/01/2026")
            // Its size: 64 KiB.
            .bytes(&[0])
            .bytes(&CHARACTERISTICS.to_le_bytes())
            .bytes(&[0, VIRTUAL_MACHINE])
            // No releases of firmware or of an embedded controller.
            .bytes(&[0xff; 4])
            // The size once more.
            .bytes(&[0; 2]),
    );
}

fn system(table: &mut Table, machine: &str) {
    const POWER_SWITCH: u8 = 6;
    table.add(
        Structure::new(kind::SYSTEM)
            .string(MANUFACTURER)
            .string(PRODUCT)
            .string(env!("CARGO_PKG_VERSION"))
            .string(machine)
            .bytes(&uuid(machine))
            .bytes(&[POWER_SWITCH])
            // Neither a stock number nor a family.
            .bytes(&[0; 2]),
    );
}

/// A UUID of version 8 (RFC 9562, 5.8) from a machine's name: machines of a test differ, and each
/// has the same in each run, for systemd makes the machine's id of it.
fn uuid(name: &str) -> [u8; 16] {
    // FNV-1a with 128 bits.
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash =
        name.bytes().fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    let mut uuid = hash.to_le_bytes();
    // The first three fields have their low byte first (7.2.1).
    uuid[7] = uuid[7] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn chassis(table: &mut Table) {
    table.add(
        Structure::new(kind::CHASSIS)
            .string(MANUFACTURER)
            .bytes(&[OTHER])
            // No version, serial number or asset tag.
            .bytes(&[0; 3])
            // Boot-up, power supply and thermal state; security is unknown.
            .bytes(&[SAFE, SAFE, SAFE, UNKNOWN])
            // An OEM's own; height, power cords and contained elements are not said.
            .bytes(&[0; 4])
            .bytes(&[0; 4])
            // No stock number.
            .bytes(&[0]),
    );
}

fn processor(table: &mut Table, cores: u8) {
    const CENTRAL_PROCESSOR: u8 = 3;
    /// Populated and enabled.
    const ENABLED: u8 = 0x41;
    /// 64-bit capable.
    const CHARACTERISTICS: u16 = 1 << 2;
    table.add(
        Structure::new(kind::PROCESSOR)
            .string("CPU 0")
            .bytes(&[CENTRAL_PROCESSOR, OTHER])
            .string(MANUFACTURER)
            // What it is CPUID says.
            .bytes(&[0; 8])
            // No version; voltage and speeds are unknown.
            .bytes(&[0, 0, 0, 0, 0, 0, 0, 0])
            .bytes(&[ENABLED, OTHER])
            // No structures for the three caches.
            .bytes(&[0xff; 6])
            // No serial number, asset tag or part number.
            .bytes(&[0; 3])
            // Cores, those enabled, and threads.
            .bytes(&[cores; 3])
            .bytes(&CHARACTERISTICS.to_le_bytes())
            .bytes(&u16::from(OTHER).to_le_bytes())
            .bytes(&u16::from(cores).to_le_bytes().repeat(3)),
    );
}

fn oem_strings(table: &mut Table, strings: &[String]) -> Result<(), SmbiosError> {
    let bad = strings.iter().find(|string| string.is_empty() || string.contains('\0'));
    if let Some(bad) = bad {
        return Err(SmbiosError::OemString(bad.clone()));
    }
    let count = u8::try_from(strings.len()).unwrap_or(u8::MAX);
    let structure = Structure::new(kind::OEM_STRINGS).bytes(&[count]);
    table.add(strings.iter().fold(structure, |structure, string| structure.text(string)));
    Ok(())
}

fn memory_structures(table: &mut Table, mib: u64) {
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_CORRECTION: u8 = 3;
    /// The size is in the extended field, in KiB and in MiB.
    const EXTENDED_KIB: u32 = 0x8000_0000;
    const EXTENDED_MIB: u16 = 0x7fff;
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    /// Bit 2: unknown.
    const DETAIL: u16 = 1 << 2;
    let bytes = mib.saturating_mul(1 << 20);
    let kib = u32::try_from(bytes >> 10).ok().filter(|&kib| kib < EXTENDED_KIB);
    let array = table.add(
        Structure::new(kind::MEMORY_ARRAY)
            .bytes(&[SYSTEM_BOARD, SYSTEM_MEMORY, NO_CORRECTION])
            .bytes(&kib.unwrap_or(EXTENDED_KIB).to_le_bytes())
            .bytes(&NO_HANDLE.to_le_bytes())
            .bytes(&1_u16.to_le_bytes())
            .bytes(&kib.map_or(bytes, |_| 0).to_le_bytes()),
    );
    let small = u16::try_from(mib).ok().filter(|&mib| mib < EXTENDED_MIB);
    let large = small.map_or(u32::try_from(mib).unwrap_or(u32::MAX), |_| 0);
    table.add(
        Structure::new(kind::MEMORY_DEVICE)
            .bytes(&array.to_le_bytes())
            .bytes(&NO_HANDLE.to_le_bytes())
            // Its widths are unknown.
            .bytes(&[0xff; 4])
            .bytes(&small.unwrap_or(EXTENDED_MIB).to_le_bytes())
            .bytes(&[DIMM, 0])
            .string("DIMM 0")
            .bytes(&[0, RAM])
            .bytes(&DETAIL.to_le_bytes())
            // Speed is unknown.
            .bytes(&[0; 2])
            .string(MANUFACTURER)
            // No serial number, asset tag or part number; the rank is unknown.
            .bytes(&[0; 4])
            .bytes(&large.to_le_bytes())
            // Speed and voltages are unknown.
            .bytes(&[0; 8]),
    );
    for (start, len) in layout::ranges(bytes) {
        table.add(
            Structure::new(kind::MAPPED_ADDRESS)
                // The addresses are in the extended fields.
                .bytes(&[0xff; 8])
                .bytes(&array.to_le_bytes())
                // One device makes a row.
                .bytes(&[1])
                .bytes(&start.to_le_bytes())
                .bytes(&(start + len).saturating_sub(1).to_le_bytes()),
        );
    }
}

#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    /// How many structures there are; their numbers are their handles.
    count: u16,
}

impl Table {
    /// Adds a structure and gives its handle.
    fn add(&mut self, structure: Structure) -> u16 {
        let Structure { mut formatted, strings, .. } = structure;
        let handle = self.count;
        self.count += 1;
        formatted[1] = u8::try_from(formatted.len()).unwrap_or(u8::MAX);
        formatted[2..4].copy_from_slice(&handle.to_le_bytes());
        self.bytes.extend(formatted);
        self.bytes.extend(&strings);
        // An empty string ends the strings, and where there are none there are two (6.1.3).
        self.bytes.extend(if strings.is_empty() { &[0, 0][..] } else { &[0] });
        handle
    }
}

/// One structure: fields of a fixed layout, and the strings that they refer to by number.
struct Structure {
    formatted: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    /// Begins with a header, whose length and handle come with [`Table::add`].
    fn new(kind: u8) -> Structure {
        Structure { formatted: vec![kind, 0, 0, 0], strings: Vec::new(), count: 0 }
    }

    fn bytes(mut self, bytes: &[u8]) -> Structure {
        self.formatted.extend(bytes);
        self
    }

    /// A string without a field of its own. It has been checked for NUL bytes.
    fn text(mut self, string: &str) -> Structure {
        self.strings.extend(string.bytes());
        self.strings.push(0);
        self.count = self.count.saturating_add(1);
        self
    }

    /// A field that is a string.
    fn string(self, string: &str) -> Structure {
        // What could end the list of strings is left out.
        let clean = string.replace('\0', "");
        if clean.is_empty() {
            return self.bytes(&[0]);
        }
        let structure = self.text(&clean);
        let number = structure.count;
        structure.bytes(&[number])
    }
}

#[cfg(test)]
mod tests;
