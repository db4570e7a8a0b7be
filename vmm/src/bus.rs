//! Dispatch of port and memory-mapped accesses to the devices that claimed the addresses.

use std::collections::BTreeMap;
use std::sync::Arc;

use thiserror::Error;

/// A device with registers. Called on vCPU threads, several at a time.
pub trait BusDevice: Send + Sync {
    /// Reads registers from `offset` on into all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes registers from `offset` on.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices want the same addresses.
#[derive(Debug, Error)]
#[error("the address range {start:#x} to {end:#x} is taken or empty")]
pub struct Overlap {
    start: u64,
    end: u64,
}

/// One address space. It is complete before the guest runs, so that accesses need no lock.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Reserves `len` addresses starting at `start` for `device`.
    ///
    /// # Errors
    /// Some of them are taken.
    pub fn claim(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let end = start.saturating_add(len);
        let before = self.devices.range(..end).next_back();
        if len == 0 || before.is_some_and(|(&other, (other_len, _))| other + other_len > start) {
            return Err(Overlap { start, end });
        }
        self.devices.insert(start, (len, device));
        Ok(())
    }

    /// Reads; where there is no device all bits are one, as on a floating bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; where there is no device nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &Arc<dyn BusDevice>)> {
        let (&start, (size, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - start;
        // Only the first byte has to be inside: a string instruction repeats one port.
        (offset < *size && len > 0).then_some((offset, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_that_claimed_the_address() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.claim(0x3f8, 8, device.clone()).unwrap();
        bus.write(0x3fa, &[1, 2]);
        bus.write(0x400, &[3]);
        bus.write(0x3f7, &[4]);
        assert_eq!(*device.0.lock().unwrap(), vec![(2, vec![1, 2])]);
        let mut data = [0; 2];
        bus.read(0x3ff, &mut data);
        assert_eq!(data, [7, 7]);
        bus.read(0x400, &mut data);
        assert_eq!(data, [0xff, 0xff]);
    }

    #[test]
    fn overlapping_claims_are_refused() {
        let mut bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.claim(0x1000, 0x1000, device.clone()).unwrap();
        assert!(bus.claim(0x1fff, 1, device.clone()).is_err());
        assert!(bus.claim(0x800, 0x801, device.clone()).is_err());
        assert!(bus.claim(0x800, 0, device.clone()).is_err());
        bus.claim(0x2000, 0x1000, device.clone()).unwrap();
        bus.claim(0x0, 0x1000, device).unwrap();
    }
}
