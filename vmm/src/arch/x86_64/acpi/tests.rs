use vm_memory::GuestMemory;

use super::*;
use crate::arch::layout;
use crate::memory;

fn bytes_at(memory: &MemoryMap, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

/// The table at `address`, whose bytes must add up to zero.
fn table(memory: &MemoryMap, address: u64) -> Vec<u8> {
    let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
    let bytes = bytes_at(memory, address, length as usize);
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    assert_eq!(sum, 0, "checksum of {}", String::from_utf8_lossy(&bytes[..4]));
    bytes
}

fn pointer(table: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
}

#[test]
fn the_root_pointer_leads_to_every_table() {
    let memory = memory::allocate(64).unwrap();
    let devices: Vec<_> =
        (0..19).map(|n| MmioDevice { address: 0xd000_0000 + n * 0x1000, line: 5 + n }).collect();
    write(&memory, 32, &devices).unwrap();
    let rsdp = bytes_at(&memory, RSDP, Rsdp::len());
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    let xsdt = table(&memory, pointer(&rsdp, 24));
    let fadt = table(&memory, pointer(&xsdt, 36));
    assert_eq!(&fadt[..4], b"FACP");
    let madt = table(&memory, pointer(&xsdt, 44));
    assert_eq!((&madt[..4], madt.len()), (&b"APIC"[..], 44 + 32 * 8 + 12));
    // X_DSDT (ACPI 6.5, table 5.9).
    let dsdt = table(&memory, pointer(&fadt, 140));
    assert_eq!(&dsdt[..4], b"DSDT");
    let devices = dsdt.windows(8).filter(|window| window == b"LNRO0005").count();
    assert_eq!(devices, 19);
    for device in [b"ACPI0013", b"QEMU0001", b"FIRNVGID"] {
        assert!(dsdt.windows(8).any(|window| window == device), "{device:?}");
    }
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let memory = memory::allocate(64).unwrap();
    let devices = vec![MmioDevice { address: 0xd000_0000, line: 5 }; 4000];
    assert!(matches!(write(&memory, 1, &devices), Err(AcpiError::TooLarge)));
    assert!(memory.check_range(GuestAddress(layout::HIGH_START), 1));
    assert_eq!(bytes_at(&memory, layout::HIGH_START, 16), [0; 16], "nothing past the area");
}
