//! The address register of PCI's configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2), with
//! nothing on the bus: what is read at the data port is that of a floating bus, all ones.
//!
//! It is there because Linux on a machine without any such mechanism calls that fatal, on each
//! console and at each boot. That it finds this one costs five exits.

use std::sync::Arc;

use crate::bus::{Bus, BusDevice, Overlap};

const PORT: u64 = 0xcf8;
const PORTS: u64 = 4;
/// The register's enable bit. All other bits, with which a guest chooses among functions that are
/// not there, read as zero; so there is no state.
const ENABLED: u32 = 1 << 31;

/// Puts the register on the port bus.
///
/// # Errors
/// The ports are taken.
pub fn attach(ports: &mut Bus) -> Result<(), Overlap> {
    ports.claim(PORT, PORTS, Arc::new(ConfigAddress))
}

struct ConfigAddress;

impl BusDevice for ConfigAddress {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Only accesses of four bytes are meant for the register.
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(register) => *register = ENABLED.to_le_bytes(),
            Err(_) => data.fill(0xff),
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `pci_check_type1` in Linux's arch/x86/pci/direct.c looks for it.
    #[test]
    fn it_is_found_and_nothing_behind_it() {
        let mut ports = Bus::default();
        attach(&mut ports).unwrap();
        ports.write(PORT + 3, &[1]);
        ports.write(PORT, &ENABLED.to_le_bytes());
        let mut address = [0; 4];
        ports.read(PORT, &mut address);
        assert_eq!(u32::from_le_bytes(address), ENABLED);
        let mut data = [0; 4];
        ports.read(PORT + PORTS, &mut data);
        assert_eq!(data, [0xff; 4]);
        let mut byte = [0];
        ports.read(PORT + 1, &mut byte);
        assert_eq!(byte, [0xff]);
    }
}
