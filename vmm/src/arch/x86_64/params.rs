//! The zero page and the command line.

use linux_loader::bootparam::{boot_e820_entry, boot_params, screen_info};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{acpi, layout};
use crate::boot::kernel::{Initrd, Kernel};
use crate::memory::{self, MemoryMap};
use crate::screen::plain::{self, PIXEL_BYTES};
use crate::spec::ScreenSpec;

/// The zero page.
pub const ZERO_PAGE: u64 = 0x7000;
/// The command line.
const CMDLINE: u64 = 0x2_0000;
/// Room for it up to the next thing in low memory; the kernel itself takes 2,048 bytes
/// (`COMMAND_LINE_SIZE` in arch/x86/include/asm/setup.h).
pub const MAX_CMDLINE: usize = 2047;
/// What the monitor knows better than a kernel that would probe for it: how PCI is reached, namely
/// by [`super::pci`], and that looking for quirks of PCI devices early is in vain. It goes
/// before the spec's own arguments, so that those win.
const MACHINE_ARGUMENTS: &str = "pci=conf1,noearly";
/// `type_of_loader` for a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the kernel is loaded high.
const LOADED_HIGH: u8 = 1;

/// E820 types (ACPI 6.5, table 15.2).
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// `orig_video_isVGA` for a frame buffer as EFI leaves it (`VIDEO_TYPE_EFI` in include/uapi/linux/screen_info.h): the
/// kind that kernels of all configurations draw on.
const VIDEO_TYPE_EFI: u8 = 0x70;

/// The zero page could not be written.
#[derive(Debug, Error)]
pub enum ParamsError {
    /// The command line is too long.
    #[error("the kernel command line has {0} bytes, the kernel takes {MAX_CMDLINE}")]
    CmdlineTooLong(usize),
    /// The command line has a byte that ends it.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// Guest memory is too small for what the kernel must find.
    #[error("cannot write boot parameters")]
    Write(#[from] GuestMemoryError),
}

/// Writes the zero page, which announces the plain screen if there is one, and the command line, `cmdline` behind the
/// machine's own arguments.
///
/// # Errors
/// The command line cannot be passed to a kernel.
pub fn write(
    memory: &MemoryMap,
    kernel: &Kernel,
    initrd: Initrd,
    cmdline: &str,
    screen: Option<&ScreenSpec>,
) -> Result<(), ParamsError> {
    let cmdline = format!("{MACHINE_ARGUMENTS} {cmdline}");
    if cmdline.len() > MAX_CMDLINE {
        return Err(ParamsError::CmdlineTooLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(ParamsError::CmdlineNul);
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_obj(0_u8, GuestAddress(CMDLINE + cmdline.len() as u64))?;

    let mut params = boot_params { hdr: kernel.header, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= LOADED_HIGH;
    (params.hdr.cmd_line_ptr, params.ext_cmd_line_ptr) = split(CMDLINE);
    (params.hdr.ramdisk_image, params.ext_ramdisk_image) = split(initrd.start);
    (params.hdr.ramdisk_size, params.ext_ramdisk_size) = split(initrd.len);
    params.acpi_rsdp_addr = acpi::RSDP;
    params.screen_info = screen.map(screen_info).unwrap_or_default();
    let map = e820(memory, screen);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    for (entry, (addr, size, type_)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, type_ };
    }
    Ok(memory.write_obj(params, GuestAddress(ZERO_PAGE))?)
}

/// What the kernel is to know of a frame buffer.
fn screen_info(screen: &ScreenSpec) -> screen_info {
    let (lfb_base, ext_lfb_base) = split(layout::FRAME_BUFFER_START);
    let width = screen.width.get();
    screen_info {
        orig_video_isVGA: VIDEO_TYPE_EFI,
        lfb_width: width,
        lfb_height: screen.height.get(),
        lfb_depth: 32,
        lfb_base,
        ext_lfb_base,
        lfb_size: plain::bytes(screen),
        // The widest screen's fits.
        lfb_linelength: width * PIXEL_BYTES,
        blue_size: 8,
        blue_pos: 0,
        green_size: 8,
        green_pos: 8,
        red_size: 8,
        red_pos: 16,
        rsvd_size: 8,
        rsvd_pos: 24,
        pages: 1,
        ..Default::default()
    }
}

/// The memory map: (start, length, type).
fn e820(memory: &MemoryMap, screen: Option<&ScreenSpec>) -> Vec<(u64, u64, u32)> {
    let low_end = memory::low_end(memory);
    let mut map = vec![
        (0, layout::LOW_END, E820_RAM),
        (layout::ACPI_START, layout::HIGH_START - layout::ACPI_START, E820_RESERVED),
        (layout::HIGH_START, low_end - layout::HIGH_START, E820_RAM),
    ];
    let total: u64 =
        vm_memory::GuestMemory::iter(memory).map(vm_memory::GuestMemoryRegion::len).sum();
    if let Some(screen) = screen {
        map.push((layout::FRAME_BUFFER_START, plain::bytes(screen).into(), E820_RESERVED));
    }
    if total > low_end {
        map.push((layout::HOLE_END, total - low_end, E820_RAM));
    }
    map
}

/// The low and the high half, as the zero page wants addresses.
#[expect(clippy::cast_possible_truncation, reason = "each half is what is asked for")]
const fn split(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Pixels;

    fn kernel() -> Kernel {
        Kernel::unloaded(layout::HIGH_START)
    }

    #[test]
    fn the_specs_arguments_come_last_and_so_win() {
        let memory = memory::allocate(64).unwrap();
        write(&memory, &kernel(), Initrd::default(), "pci=conf1 quiet", None).unwrap();
        let mut text = [0; 34];
        memory.read_slice(&mut text, GuestAddress(CMDLINE)).unwrap();
        assert_eq!(&text, b"pci=conf1,noearly pci=conf1 quiet\0");
    }

    #[test]
    fn a_command_line_that_a_kernel_would_cut_is_refused() {
        let memory = memory::allocate(64).unwrap();
        let long = "x".repeat(MAX_CMDLINE);
        let error = write(&memory, &kernel(), Initrd::default(), &long, None).unwrap_err();
        assert!(matches!(error, ParamsError::CmdlineTooLong(_)));
        let error = write(&memory, &kernel(), Initrd::default(), "a\0b", None).unwrap_err();
        assert!(matches!(error, ParamsError::CmdlineNul));
    }

    #[test]
    fn the_memory_map_leaves_the_hole_and_the_bios_area_out() {
        let memory = memory::allocate(6144).unwrap();
        let map = e820(&memory, None);
        let usable: u64 = map.iter().filter(|part| part.2 == E820_RAM).map(|part| part.1).sum();
        assert_eq!(usable, (6144 << 20) - (layout::HIGH_START - layout::LOW_END));
        assert_eq!(map[2].0 + map[2].1, layout::HOLE_START);
        assert_eq!(map[3].0, layout::HOLE_END);
    }
    #[test]
    fn the_largest_screen_lies_in_the_hole() {
        let largest =
            ScreenSpec { width: Pixels::MAX, height: Pixels::MAX, ..ScreenSpec::default() };
        let memory = memory::allocate(6144).unwrap();
        let map = e820(&memory, Some(&largest));
        let at = map.iter().position(|part| part.0 == layout::FRAME_BUFFER_START).unwrap();
        assert_eq!(map[at].2, E820_RESERVED);
        assert!(map[at - 1].0 + map[at - 1].1 <= map[at].0);
        assert!(map[at].0 + map[at].1 <= layout::VIRTIO_MMIO_START.into());
        assert_eq!(map[at + 1].0, layout::HOLE_END);
        let line = screen_info(&largest).lfb_linelength;
        assert_eq!(line, 4096 * PIXEL_BYTES);
    }
}
