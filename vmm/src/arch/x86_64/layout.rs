//! Where things lie in a guest: memory, devices, interrupt lines.
//!
//! ```text
//! 0x0000_0500  GDT                         | entry
//! 0x0000_7000  zero page (boot_params)     |
//! 0x0000_9000  page tables of the entry    |
//! 0x0002_0000  kernel command line         |
//! 0x000e_0000  ACPI tables, RSDP first     | acpi
//! 0x000e_fff0  generation ID               | generation
//! 0x000f_0000  SMBIOS tables               | smbios
//! 0x000f_fff0  reset vector                | entry
//! 0x0010_0000  kernel                      | boot::kernel
//!      ...     initrd, below the end of low memory
//! 0xc000_0000  hole: frame buffer, virtio-mmio, IOAPIC, LAPIC
//! 0x1_0000_0000 memory past 3 GiB
//!      ...     images that the host shares, each at a multiple of 1 GiB
//! ```

/// Where the conventional memory of the PC ends and its extended BIOS data area would begin.
pub const LOW_END: u64 = 0x9_fc00;
/// The BIOS area, in which Linux looks for the RSDP (`acpi_find_root_pointer`), also after kexec.
pub const ACPI_START: u64 = 0xe_0000;
/// Where room for ACPI tables ends.
pub const ACPI_END: u64 = GENERATION_ID;
/// The 16 bytes that tell the guest's present life from others with the same past.
pub const GENERATION_ID: u64 = SMBIOS_START - 16;
/// The segment in which Linux looks for the SMBIOS entry point (`dmi_scan_machine`).
pub const SMBIOS_START: u64 = 0xf_0000;
/// Where room for SMBIOS tables ends: the reset vector follows.
pub const SMBIOS_END: u64 = RESET_VECTOR;
/// Where a processor starts after a reset, seen from real mode: ffff:0 (Intel SDM 3, 10.1.4).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where memory above the BIOS area starts, and with it the kernel.
pub const HIGH_START: u64 = 0x10_0000;
/// Where the hole for devices starts: memory past this is moved above 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where the hole ends.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// The pixels of a plain screen; the largest there is ends before the first virtio-mmio device.
pub const FRAME_BUFFER_START: u64 = 0xc800_0000;
/// The first virtio-mmio device.
pub const VIRTIO_MMIO_START: u32 = 0xd000_0000;
/// Distance from one virtio-mmio device to the next.
pub const VIRTIO_MMIO_SIZE: u32 = 0x1000;
/// Registers of the IOAPIC; the in-kernel one of KVM is fixed there.
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// Registers of the local APIC after reset (Intel SDM 3, 11.4.1).
pub const LAPIC_START: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel needs for itself (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS_START: usize = 0xfffb_d000;

/// The interrupt lines that virtio devices share: the pins of the IOAPIC after those of the PC's own devices, the best
/// first. Those below 16 KVM passes to a PIC, too. Pin 8 is left out: KVM takes it for a PC's clock, of which it has to
/// know when each interrupt ends, so that every end is an exit.
///
/// KVM's IOAPIC has 24 pins, and a machine may have three dozen devices. Two other ways were
/// weighed: PCI with MSI-X makes the kernel walk a bus and program tables at each boot, and an
/// IOAPIC of our own with more pins makes each of the kernel's thousand accesses to it an exit.
/// Shared lines cost nothing at boot; later an interrupt costs one more read and write of registers
/// for each device that shares its line, which is two where there are all of 37.
pub const VIRTIO_LINES: [u32; 17] =
    [16, 17, 18, 19, 20, 21, 22, 23, 6, 7, 9, 10, 11, 12, 13, 14, 15];

/// Where memory lies in a guest that has `bytes` of it.
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START {
        vec![(0, bytes)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)]
    }
}

/// What the places of images are multiples of. Linux has page tables for memory that is added by so much at most, and
/// keeps books for each 128 MiB of it.
pub const WINDOW_ALIGNMENT: u64 = 1 << 30;

/// Where images may begin in a guest that has so many bytes of memory.
pub const fn windows_start(bytes: u64) -> u64 {
    if bytes <= HOLE_START { HOLE_END } else { HOLE_END + (bytes - HOLE_START) }
}
