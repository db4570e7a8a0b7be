//! Keys by their names in the X Window System (X11/keysymdef.h), by which viewers call them, as Linux numbers them
//! (linux/input-event-codes.h).

use crate::machine::keyboard;

/// Keys that type nothing, and those of the keypad: the first symbol of a run, and the keys from there on.
const RUNS: [(u32, &[u16]); 13] = [
    // BackSpace, Tab.
    (0xff08, &[14, 15]),
    // Return.
    (0xff0d, &[28]),
    // Pause, Scroll_Lock, Sys_Req.
    (0xff13, &[119, 70, 99]),
    // Escape.
    (0xff1b, &[1]),
    // Home, Left, Up, Right, Down, Prior, Next, End.
    (0xff50, &[102, 105, 103, 106, 108, 104, 109, 107]),
    // Print; Insert; Menu.
    (0xff61, &[99, 0, 110, 0, 0, 0, 127]),
    // Num_Lock.
    (0xff7f, &[69]),
    // KP_Enter; KP_Home, Left, Up, Right, Down, Prior, Next, End, Begin, Insert, Delete.
    (0xff8d, &[96, 0, 0, 0, 0, 0, 0, 0, 71, 75, 72, 77, 80, 73, 81, 79, 76, 82, 83]),
    // KP_Multiply, Add, Separator, Subtract, Decimal, Divide, 0 to 9.
    (0xffaa, &[55, 78, 121, 74, 83, 98, 82, 79, 80, 81, 75, 76, 77, 71, 72, 73]),
    // F1 to F12.
    (0xffbe, &[59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 87, 88]),
    // Shift_L, Shift_R, Control_L, Control_R, Caps_Lock; Meta, Alt and Super, left and right.
    (0xffe1, &[42, 54, 29, 97, 58, 0, 125, 126, 56, 100, 125, 126]),
    // Delete.
    (0xffff, &[111]),
    // ISO_Level3_Shift.
    (0xfe03, &[100]),
];

/// The key that has this symbol, on an American keyboard.
pub(super) fn code(symbol: u32) -> Option<u16> {
    let at = |keys: &[u16], index: u32| keys.get(usize::try_from(index).ok()?).copied();
    let named = RUNS.iter().find_map(|(first, keys)| at(keys, symbol.checked_sub(*first)?));
    // The symbols of ASCII are its codes.
    let typed = || {
        let character = char::from_u32(symbol)?;
        let name = keyboard::of_character(character).unwrap_or_else(|| character.to_string());
        keyboard::chord(&name).ok()?.pop()
    };
    named.filter(|code| *code != 0).or_else(typed)
}
