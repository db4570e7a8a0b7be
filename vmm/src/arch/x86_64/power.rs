//! The registers by which a guest ends itself: ACPI sleep control, ACPI reset and the reset line
//! of the keyboard controller. The power button has none: its interrupt says it all.

use std::sync::Arc;

use crate::bus::{Bus, BusDevice, Overlap};

/// The first of the ports; none of the PC's own devices has one there.
pub const PORT: u16 = 0x600;
/// Sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u16 = PORT;
/// Sleep status register; it always reads as zero: nothing wakes a machine here.
pub const SLEEP_STATUS: u16 = PORT + 1;
/// Reset register (ACPI 6.5, 4.8.3.6).
pub const RESET: u16 = PORT + 2;
/// What to write to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// The sleep type that the DSDT's `\_S5_` names for power-off.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// The interrupt of the generic event device (ACPI 6.5, 5.6.9) that reports the power button.
pub const BUTTON_GSI: u32 = 5;

/// Bit 5 of the sleep control register: enter the state that bits 2 to 4 name.
const SLEEP_ENABLE: u8 = 1 << 5;
const PORTS: u64 = 3;
/// Command port of the PC's keyboard controller; Linux's `reboot=k` uses it.
const KEYBOARD_COMMAND: u64 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// How a guest ended itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Power off.
    PowerOff,
    /// Start again.
    Reset,
}

type Callback = Arc<dyn Fn(Request) + Send + Sync>;

/// Puts the registers on the port bus. `callback` runs on a vCPU thread.
///
/// # Errors
/// The ports are taken.
pub fn attach(
    ports: &mut Bus,
    callback: impl Fn(Request) + Send + Sync + 'static,
) -> Result<(), Overlap> {
    let callback: Callback = Arc::new(callback);
    ports.claim(u64::from(PORT), PORTS, Arc::new(AcpiRegisters(callback.clone())))?;
    ports.claim(KEYBOARD_COMMAND, 1, Arc::new(KeyboardReset(callback)))
}

struct AcpiRegisters(Callback);

impl BusDevice for AcpiRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let off = SLEEP_ENABLE | SLEEP_TYPE_OFF << 2;
        if offset == u64::from(SLEEP_CONTROL - PORT) && value == off {
            (self.0)(Request::PowerOff);
        } else if offset == u64::from(RESET - PORT) && value == RESET_VALUE {
            (self.0)(Request::Reset);
        }
    }
}

struct KeyboardReset(Callback);

impl BusDevice for KeyboardReset {
    /// The status register: no input waits and the controller takes commands.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&KEYBOARD_RESET) {
            (self.0)(Request::Reset);
        }
    }
}
