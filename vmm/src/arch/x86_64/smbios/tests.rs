use super::*;
use crate::arch::layout::HIGH_START;
use crate::memory;

fn spec(name: &str, memory_mib: u64, oem_strings: &[String]) -> MachineSpec {
    MachineSpec {
        name: name.to_owned(),
        cores: 3_u64.try_into().unwrap(),
        memory: memory_mib.try_into().unwrap(),
        kernel: "kernel".into(),
        initrd: vec![],
        cmdline: String::new(),
        console_ports: vec![],
        nets: vec![],
        shares: vec![],
        disks: vec![],
        rng: false,
        balloon: false,
        vsock: None,
        oem_strings: oem_strings.to_vec(),
        screen: None,
        keyboard: false,
        tablet: false,
    }
}

/// A structure as a reader of the tables sees it.
struct Found {
    formatted: Vec<u8>,
    strings: Vec<String>,
}

/// Looks for the entry point as Linux does and takes the table apart.
fn read(memory: &MemoryMap) -> Vec<Found> {
    let mut entry = [0; ENTRY_POINT];
    memory.read_slice(&mut entry, GuestAddress(SMBIOS_START)).unwrap();
    assert_eq!(&entry[..5], b"_SM3_");
    assert_eq!(entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    let len = u32::from_le_bytes(entry[12..16].try_into().unwrap());
    let address = u64::from_le_bytes(entry[16..].try_into().unwrap());
    let mut table = vec![0; len.try_into().unwrap()];
    memory.read_slice(&mut table, GuestAddress(address)).unwrap();
    parse(&table)
}

fn parse(table: &[u8]) -> Vec<Found> {
    let mut found = Vec::new();
    let mut rest = table;
    while !rest.is_empty() {
        let (formatted, strings) = rest.split_at(rest[1].into());
        let end = strings.windows(2).position(|pair| pair == [0, 0]).expect("an end");
        let texts = strings[..end].split(|&byte| byte == 0).filter(|text| !text.is_empty());
        let strings_found = texts.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect();
        found.push(Found { formatted: formatted.to_vec(), strings: strings_found });
        rest = &strings[end + 2..];
    }
    found
}

fn kinds(found: &[Found]) -> Vec<u8> {
    found.iter().map(|structure| structure.formatted[0]).collect()
}

#[test]
fn the_tables_say_what_the_machine_is() {
    let memory = memory::allocate(64).unwrap();
    write(&memory, &spec("server", 6144, &[])).unwrap();
    let found = read(&memory);
    assert_eq!(kinds(&found), [0, 1, 3, 4, 16, 17, 19, 19, 32, 127]);
    // DSP0134 3.1: the lengths of each.
    let lengths: Vec<usize> = found.iter().map(|structure| structure.formatted.len()).collect();
    assert_eq!(lengths, [26, 27, 22, 48, 23, 40, 31, 31, 11, 4]);
    for (handle, structure) in (0_u16..).zip(&found) {
        assert_eq!(structure.formatted[2..4], handle.to_le_bytes());
    }
    // What systemd-detect-virt looks at.
    assert_ne!(found[0].formatted[0x13] & 0x10, 0, "a virtual machine");
    assert_eq!(found[1].strings[..2], ["firn", "firn virtual machine"]);
    assert_eq!(found[1].strings[3], "server");
    assert_eq!(found[3].formatted[0x23], 3, "cores");
    assert_eq!(found[5].formatted[12..14], 6144_u16.to_le_bytes());
    assert_eq!(found[7].formatted[15..23], layout::HOLE_END.to_le_bytes());
}

#[test]
fn machines_have_ids_of_their_own_that_stay() {
    assert_eq!(uuid("a"), uuid("a"));
    assert_ne!(uuid("a"), uuid("b"));
    for name in ["", "a", "server"] {
        assert_eq!((uuid(name)[7] >> 4, uuid(name)[8] >> 6), (8, 2));
    }
}

#[test]
fn large_memory_goes_into_the_extended_fields() {
    // More than a machine may have today.
    let mut table = Table::default();
    memory_structures(&mut table, 4 << 20);
    let found = parse(&table.bytes);
    assert_eq!(found[0].formatted[15..23], (4_u64 << 40).to_le_bytes());
    assert_eq!(found[1].formatted[12..14], 0x7fff_u16.to_le_bytes());
    assert_eq!(found[1].formatted[28..32], (4_u32 << 20).to_le_bytes());
}

#[test]
fn oem_strings_of_any_number_are_there_in_order() {
    let strings: Vec<String> = (0..600).map(|n| format!("text {n}")).collect();
    let memory = memory::allocate(64).unwrap();
    write(&memory, &spec("m", 64, &strings)).unwrap();
    let found = read(&memory);
    let oem: Vec<_> = found.iter().filter(|structure| structure.formatted[0] == 11).collect();
    assert_eq!(oem.iter().map(|one| one.formatted.len()).collect::<Vec<_>>(), [5; 3]);
    assert_eq!(oem.iter().map(|one| one.formatted[4]).collect::<Vec<_>>(), [255, 255, 90]);
    assert!(oem.iter().flat_map(|one| &one.strings).eq(&strings));
}

#[test]
fn what_does_not_fit_or_would_end_the_strings_is_refused() {
    let memory = memory::allocate(64).unwrap();
    let write = |string: String| write(&memory, &spec("m", 64, &[string]));
    write("x".repeat(60_000)).unwrap();
    let error = write("x".repeat(66_000)).unwrap_err();
    assert!(matches!(error, SmbiosError::TooLarge { .. }));
    let mut beyond = [0; 16];
    memory.read_slice(&mut beyond, GuestAddress(HIGH_START)).unwrap();
    assert_eq!(beyond, [0; 16]);
    for bad in ["", "a\0b"] {
        assert!(matches!(write(bad.to_owned()), Err(SmbiosError::OemString(_))));
    }
}
