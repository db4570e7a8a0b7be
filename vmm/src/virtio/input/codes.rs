//! Linux's numbers of what an input device can say (linux/input-event-codes.h), which virtio takes over.

use std::ops::RangeInclusive;

use super::handle::Report;

/// What one report ends with.
const EV_SYN: u16 = 0;
/// Keys and buttons.
pub(super) const EV_KEY: u16 = 1;
/// Movements.
pub(super) const EV_REL: u16 = 2;
/// Places.
pub(super) const EV_ABS: u16 = 3;
/// Lamps.
pub(super) const EV_LED: u16 = 0x11;
/// The wheel.
pub(super) const REL_WHEEL: u16 = 8;
pub(super) const ABS_X: u16 = 0;
pub(super) const ABS_Y: u16 = 1;

/// The keyboard's: from `KEY_ESC` to the last that has a name in QEMU, `KEY_MEDIA` 226, and what shares its byte. The
/// guest reads the bitmap byte by byte, with an exit for each.
pub(super) const KEYS: RangeInclusive<u16> = 1..=231;
/// A tablet's button.
pub const BTN_LEFT: u16 = 0x110;
/// A tablet's button.
pub const BTN_RIGHT: u16 = 0x111;
/// A tablet's button.
pub const BTN_MIDDLE: u16 = 0x112;
/// A tablet's button.
pub const BTN_SIDE: u16 = 0x113;
/// A tablet's button.
pub const BTN_EXTRA: u16 = 0x114;
/// All of a tablet's buttons.
pub(super) const BUTTONS: RangeInclusive<u16> = BTN_LEFT..=BTN_EXTRA;
/// `LED_NUML`, `LED_CAPSL` and `LED_SCROLLL`.
pub(super) const LEDS: RangeInclusive<u16> = 0..=2;

/// `struct virtio_input_event` (virtio 1.2, 5.8.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    kind: u16,
    code: u16,
    value: i32,
}

impl Event {
    pub(super) fn bytes(self) -> [u8; 8] {
        let ([a, b], [c, d]) = (self.kind.to_le_bytes(), self.code.to_le_bytes());
        let [e, f, g, h] = self.value.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }
}

impl Report {
    /// How the guest is told.
    pub(super) fn events(self) -> Vec<Event> {
        let event = |kind, code, value| Event { kind, code, value };
        let mut events = match self {
            Report::Key { code, down } => vec![event(EV_KEY, code, i32::from(down))],
            Report::Repeat { code } => vec![event(EV_KEY, code, 2)],
            Report::Position { x, y } => {
                vec![event(EV_ABS, ABS_X, i32::from(x)), event(EV_ABS, ABS_Y, i32::from(y))]
            }
            Report::Wheel { steps } => vec![event(EV_REL, REL_WHEEL, i32::from(steps))],
        };
        events.push(event(EV_SYN, 0, 0));
        events
    }
}
