//! Keys by the names of QEMU's `sendkey`, and characters by the keys of a US keyboard.

use std::sync::Arc;
use std::time::Duration;

use super::Machine;
use super::backend::Input;
use crate::error::{MachineError, Result};

mod names;
#[cfg(test)]
mod tests;

use names::KEYS;

/// Most keys of a chord.
const MAX_CHORD: usize = 16;
/// Up to here the scan codes of set 1 are Linux's key codes, even those without a name.
const SAME_SCANS: u8 = 0x58;
/// The shortest and longest time that a key is held. Programs that poll must see it, and graphical ones repeat a key
/// that is held for some 250 ms.
const HOLD: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(100)];
/// The default pause after each key.
pub const DEFAULT_DELAY: Duration = Duration::from_millis(10);
/// How many similar names are suggested for an unknown key.
const SUGGESTIONS: usize = 6;
/// How similar they must be, from 0 to 1 (Jaro-Winkler).
const ALIKE: f64 = 0.75;
/// Aliases of keys.
const ELSEWHERE: [(&str, &str); 10] = [
    ("control", "ctrl"),
    ("del", "delete"),
    ("enter", "ret"),
    ("escape", "esc"),
    ("pagedown", "pgdn"),
    ("pageup", "pgup"),
    ("return", "ret"),
    ("space", "spc"),
    ("super", "meta_l"),
    ("windows", "meta_l"),
];

/// Scan codes of keys whose names depend on the layout, with what they type without and with shift.
const SYMBOLS: [(u8, [char; 2]); 11] = [
    (0x0c, ['-', '_']),
    (0x0d, ['=', '+']),
    (0x1a, ['[', '{']),
    (0x1b, [']', '}']),
    (0x27, [';', ':']),
    (0x28, ['\'', '"']),
    (0x29, ['`', '~']),
    (0x2b, ['\\', '|']),
    (0x33, [',', '<']),
    (0x34, ['.', '>']),
    (0x35, ['/', '?']),
];
/// What the digit keys type with shift; their scan codes start at 2.
const DIGITS: &str = "!@#$%^&*()";

/// Why a key cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::machine) enum BadKey {
    #[error("there is no key `{name}`{}", close(close_to))]
    Unknown { name: String, close_to: Vec<&'static str> },
    #[error(
        "`{0}` has an empty name: `-` stands between the names of keys, and the key itself is `minus`"
    )]
    Empty(String),
    #[error("`{0}` has more than {MAX_CHORD} keys")]
    TooMany(String),
    #[error(
        "there is no key with the scan code {0}: they go from 0x01 to 0xff, with 0x80 and the second byte for an \
             extended one"
    )]
    Scan(String),
    #[error("an American keyboard has no key for {0:?}")]
    Character(char),
}

fn close(names: &[&str]) -> String {
    match names {
        [] => ": names are those of QEMU's sendkey, `ret` or `ctrl-alt-f2`".to_owned(),
        names => format!("; close to it: {}", names.join(", ")),
    }
}

/// Linux's key codes of a chord: `ctrl-alt-delete`, `0x2b`.
pub(super) fn chord(text: &str) -> Result<Vec<u16>, BadKey> {
    let names: Vec<&str> = text.split('-').collect();
    if names.len() > MAX_CHORD {
        return Err(BadKey::TooMany(text.to_owned()));
    }
    let code = |name: &&str| match *name {
        "" => Err(BadKey::Empty(text.to_owned())),
        name => key(name),
    };
    names.iter().map(code).collect()
}

/// Linux's code of one key.
pub(super) fn key(name: &str) -> Result<u16, BadKey> {
    if let Some(hex) = name.strip_prefix("0x").or_else(|| name.strip_prefix("0X")) {
        let scan = u8::from_str_radix(hex, 16).ok();
        return scan.and_then(scan_code).ok_or_else(|| BadKey::Scan(name.to_owned()));
    }
    // QEMU has this one as well.
    let name = if name == "<" { "less" } else { name };
    let found = KEYS.binary_search_by_key(&name, |key| key.name);
    found.map(|at| KEYS[at].code).map_err(|_| unknown(name))
}

/// The name of the key that Linux numbers `code`.
pub(super) fn name_of(code: u16) -> Option<&'static str> {
    KEYS.iter().find(|key| key.code == code).map(|key| key.name)
}

/// Linux's code of the key with a scan code of set 1.
pub(super) fn scan_code(scan: u8) -> Option<u16> {
    let named = KEYS.iter().find(|key| key.scan == Some(scan)).map(|key| key.code);
    named.or_else(|| (1..=SAME_SCANS).contains(&scan).then_some(scan.into()))
}

fn unknown(name: &str) -> BadKey {
    let lower = name.to_lowercase();
    let likeness = |key: &str| match ELSEWHERE.contains(&(&*lower, key)) {
        true => 2.0,
        false if lower.len() > 1 && key.contains(&lower) => 1.0,
        // A single letter is similar to too many.
        false if key.len() == 1 => 0.0,
        false => strsim::jaro_winkler(&lower, key),
    };
    let keys = KEYS.iter().map(|key| (likeness(key.name), key.name));
    let mut close: Vec<_> = keys.filter(|(likeness, _)| *likeness > ALIKE).collect();
    close.sort_by(|a, b| b.0.total_cmp(&a.0));
    close.truncate(SUGGESTIONS);
    let close_to = close.into_iter().map(|(_, name)| name).collect();
    BadKey::Unknown { name: name.to_owned(), close_to }
}

/// The chord that types a character; None if the character is itself the key's name.
pub(super) fn of_character(character: char) -> Option<String> {
    let shifted = |scan: u8| format!("shift-0x{scan:02X}");
    match character {
        ' ' => return Some("spc".to_owned()),
        '\n' => return Some("ret".to_owned()),
        'A'..='Z' => return Some(format!("shift-{}", character.to_ascii_lowercase())),
        _ => {}
    }
    if let Some((scan, _)) = (2..).zip(DIGITS.chars()).find(|(_, typed)| *typed == character) {
        return Some(shifted(scan));
    }
    let symbol = SYMBOLS.iter().find(|(_, typed)| typed.contains(&character));
    symbol.map(|(scan, [plain, _])| match *plain == character {
        true => format!("0x{scan:02X}"),
        false => shifted(*scan),
    })
}

/// All names of keys with Linux's codes; some keys have two names.
pub fn keys() -> impl Iterator<Item = (&'static str, u16)> {
    KEYS.iter().map(|key| (key.name, key.code))
}

/// All characters that are not themselves the name of a key, with the chords that type them.
#[must_use]
pub fn characters() -> Vec<(char, String)> {
    (' '..='~').chain(['\n']).filter_map(|typed| Some((typed, of_character(typed)?))).collect()
}

/// The chord that a script means: key names, or a character.
fn meant(key: &str) -> String {
    let mut characters = key.chars();
    let only = characters.next().filter(|_| characters.as_str().is_empty());
    only.and_then(of_character).unwrap_or_else(|| key.to_owned())
}

/// Keys that are down. Dropping this releases them, as a wait may be interrupted.
struct Held<'a> {
    keyboard: &'a dyn Input,
    down: Vec<u16>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.down.iter().rev().for_each(|code| self.keyboard.key(*code, false));
    }
}

impl Machine {
    /// Presses keys together, `ctrl-alt-delete`, or the key that types a character, and waits for `delay` afterwards.
    /// `log` is whether that is a step in the log.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if there is no such key, or the machine has no keyboard; if it does not run.
    pub async fn send_key(&self, key: &str, delay: Option<Duration>, log: bool) -> Result<()> {
        let key = meant(key);
        let _step = log.then(|| self.nested(format_args!("sending key {}", quoted(&key))));
        let keyboard = self.keyboard().await?;
        let codes = chord(&key).map_err(|error| self.bad_key(&error))?;
        self.type_chord(&*keyboard, codes, delay.unwrap_or_default()).await
    }

    /// Types on a US keyboard, with `delay` after each character.
    ///
    /// # Errors
    /// Those of [`Self::send_key`]. If a character has no key, nothing is typed.
    pub async fn send_chars(&self, chars: &str, delay: Option<Duration>) -> Result<()> {
        let _step = self.nested(format_args!("sending keys {}", quoted(chars)));
        let keyboard = self.keyboard().await?;
        let keys = chars.chars().map(|typed| match typed {
            '\t' => chord("tab"),
            typed => {
                let name = of_character(typed).unwrap_or_else(|| typed.to_string());
                chord(&name).map_err(|_| BadKey::Character(typed))
            }
        });
        let keys = keys.collect::<Result<Vec<_>, _>>().map_err(|error| self.bad_key(&error))?;
        for codes in keys {
            self.type_chord(&*keyboard, codes, delay.unwrap_or_default()).await?;
        }
        Ok(())
    }

    /// Presses keys in order, holds them, releases them, and waits.
    async fn type_chord(
        &self,
        keyboard: &dyn Input,
        codes: Vec<u16>,
        delay: Duration,
    ) -> Result<()> {
        let [least, most] = HOLD;
        self.hold(keyboard, codes, delay.clamp(least, most)).await?;
        self.unless_ended(async {
            self.inner.clock.sleep(delay).await;
            Ok(())
        })
        .await
    }

    /// Presses keys in order, holds them for that long, and releases them.
    pub(super) async fn hold(
        &self,
        keyboard: &dyn Input,
        codes: Vec<u16>,
        time: Duration,
    ) -> Result<()> {
        let press = async {
            // Keys pressed while the machine is paused would be released before it resumes.
            self.inner.clock.sleep(Duration::ZERO).await;
            let held = Held { keyboard, down: codes };
            held.down.iter().for_each(|code| keyboard.key(*code, true));
            self.inner.clock.sleep(time).await;
            drop(held);
            Ok(())
        };
        self.unless_ended(press).await
    }

    /// The machine's keyboard.
    pub(super) async fn keyboard(&self) -> Result<Arc<dyn Input>> {
        self.run()?;
        self.inner.backend.keyboard().await?.ok_or_else(|| self.lacks("keyboard"))
    }

    /// The error of a call that needs a part which the machine lacks.
    pub(super) fn lacks(&self, part: &str) -> crate::Error {
        let value = if part == "screen" { "\"plain\"" } else { "true" };
        let name = self.name();
        MachineError::Usage(format!(
            "{name} has no {part}: a machine gets one if its test's script calls what needs it by name; where that \
             cannot be seen, its description says `{part} = {value}`, in Nix `virtualisation.firn.{part} = {value}`"
        ))
        .into()
    }

    fn bad_key(&self, error: &BadKey) -> crate::Error {
        MachineError::Usage(format!("{}: {error}", self.name())).into()
    }
}

/// A text as in upstream's log: Python's repr.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut shown = String::from(quote);
    for character in text.chars() {
        match character {
            '\'' | '"' if character != quote => shown.push(character),
            _ => shown.extend(character.escape_debug()),
        }
    }
    shown.push(quote);
    shown
}
