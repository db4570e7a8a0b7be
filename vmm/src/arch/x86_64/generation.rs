//! The generation ID ("Virtual Machine Generation ID", Microsoft, 2018; Linux's drivers/virt/vmgenid.c): random bytes in
//! memory, others for each life that a guest's past is continued with. When they change, the guest draws fresh entropy:
//! else two guests would go on with the same random numbers.

use acpi_tables::aml::{
    Device, Interrupt, Method, Name, Notify, ONE, Package, Path, ResourceTemplate,
};
use acpi_tables::{Aml, AmlSink};
use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::GENERATION_ID;
use crate::interrupt;
use crate::memory::MemoryMap;

/// The interrupt of the generic event device that says that it has changed.
const GSI: u32 = 3;
/// What a driver matches.
const ID: &str = "VM_Gen_Counter";
/// The `Notify` value for a changed ID.
const CHANGED: u8 = 0x80;

/// Writes another ID.
///
/// # Errors
/// Guest memory is too small. If the host has no random numbers, the ID stays.
pub fn write(memory: &MemoryMap) -> Result<(), GuestMemoryError> {
    let mut id = [0; 16];
    match getrandom::fill(&mut id) {
        Ok(()) => memory.write_slice(&id, GuestAddress(GENERATION_ID)),
        Err(error) => {
            tracing::error!(%error, "a guest gets no new generation ID");
            Ok(())
        }
    }
}

/// Says that the ID has changed.
///
/// # Errors
/// KVM refuses.
pub fn announce(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    interrupt::pulse(vm, GSI)
}

/// How the DSDT announces it, and the generic event device (ACPI 6.5, 5.6.9) that says that it has changed.
pub(super) struct Generation;

impl Aml for Generation {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (low, high) = (GENERATION_ID & 0xffff_ffff, GENERATION_ID >> 32);
        Device::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"FIRNVGID"),
                &Name::new("_CID".into(), &ID),
                &Name::new("_DDN".into(), &ID),
                &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
            ],
        )
        .to_aml_bytes(sink);
        let changed: Path = "VGEN".into();
        let interrupt = Interrupt::new(true, true, false, false, GSI);
        Device::new(
            "GED1".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ONE),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
                // The argument is the interrupt, and there is one only.
                &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&changed, &CHANGED)]),
            ],
        )
        .to_aml_bytes(sink);
    }
}
