//! What the machine protocol says of keys, buttons and pictures.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use firn_vmm::virtio::input::{BTN_EXTRA, BTN_LEFT, BTN_MIDDLE, BTN_RIGHT, BTN_SIDE};
use serde::Deserialize;
use serde_json::Value;

use super::{Machine, usage};
use crate::error::{MachineError, Result};
use crate::machine::Format;
use crate::machine::backend::Input;
use crate::machine::keyboard::{self, BadKey};

/// How long keys are held unless something else is said.
pub(super) const HOLD: Duration = Duration::from_millis(100);

/// The arguments of `send-key`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SendKey {
    keys: Vec<Key>,
    #[serde(rename = "hold-time")]
    hold_time: Option<u64>,
}

/// A key: a name, or a scan code of set 1.
#[derive(Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
enum Key {
    Qcode(String),
    Number(u8),
}

impl Key {
    fn code(&self) -> Result<u16, BadKey> {
        match self {
            Self::Qcode(name) => keyboard::key(name),
            Self::Number(scan) => {
                keyboard::scan_code(*scan).ok_or_else(|| BadKey::Scan(scan.to_string()))
            }
        }
    }
}

/// The arguments of `input-send-event`. There is one device of each kind.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SendEvent {
    #[serde(rename = "device")]
    _device: Option<Value>,
    #[serde(rename = "head")]
    _head: Option<Value>,
    events: Vec<Event>,
}

#[derive(Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
enum Event {
    Key { down: bool, key: Key },
    Btn { down: bool, button: Button },
    Abs { axis: Axis, value: u16 },
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Button {
    Left,
    Right,
    Middle,
    Side,
    Extra,
    WheelUp,
    WheelDown,
}

impl Button {
    /// Linux's number of it, or how far it turns the wheel.
    fn meaning(self) -> Result<u16, i16> {
        match self {
            Self::Left => Ok(BTN_LEFT),
            Self::Right => Ok(BTN_RIGHT),
            Self::Middle => Ok(BTN_MIDDLE),
            Self::Side => Ok(BTN_SIDE),
            Self::Extra => Ok(BTN_EXTRA),
            Self::WheelUp => Err(1),
            Self::WheelDown => Err(-1),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Axis {
    X,
    Y,
}

/// The arguments of `screendump`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ScreenDump {
    filename: String,
    #[serde(default)]
    format: FileFormat,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FileFormat {
    Png,
    #[default]
    Ppm,
}

fn arguments<T: for<'de> Deserialize<'de>>(command: &str, given: &Value) -> Result<T> {
    T::deserialize(given).map_err(|error| usage(&format!("{command}: {error}")))
}

impl Machine {
    /// Presses keys together, holds them, and releases them.
    pub(super) async fn qmp_send_key(&self, given: &Value) -> Result<()> {
        let SendKey { keys, hold_time } = arguments("send-key", given)?;
        let codes: Result<Vec<u16>, BadKey> = keys.iter().map(Key::code).collect();
        let codes = codes.map_err(|error| usage(&error.to_string()))?;
        let keyboard = self.keyboard().await?;
        self.hold(&*keyboard, codes, hold_time.map_or(HOLD, Duration::from_millis)).await
    }

    /// Presses or releases keys and buttons, and moves the pointer; it stays so.
    pub(super) async fn qmp_send_event(&self, given: &Value) -> Result<()> {
        let SendEvent { events, .. } = arguments("input-send-event", given)?;
        let mut place = [None; 2];
        for event in &events {
            match event {
                Event::Key { down, key } => {
                    let code = key.code().map_err(|error| usage(&error.to_string()))?;
                    self.keyboard().await?.key(code, *down);
                }
                Event::Btn { down, button } => match (button.meaning(), self.tablet().await?) {
                    (Ok(code), tablet) => tablet.button(code, *down),
                    (Err(steps), tablet) if *down => tablet.wheel(steps),
                    (Err(_), _) => {}
                },
                Event::Abs { axis, value } => {
                    place[usize::from(*axis == Axis::Y)] = Some(*value);
                    if let [Some(x), Some(y)] = place {
                        self.tablet().await?.move_to(x, y);
                        place = [None; 2];
                    }
                }
            }
        }
        match place {
            [None, None] => Ok(()),
            _ => Err(usage("input-send-event: a place has both axes, `x` and `y`")),
        }
    }

    /// Writes a picture of the screen.
    pub(super) async fn qmp_screendump(&self, given: &Value) -> Result<()> {
        let ScreenDump { filename, format } = arguments("screendump", given)?;
        let format = match format {
            FileFormat::Png => Format::Png,
            FileFormat::Ppm => Format::Ppm,
        };
        self.dump_screen(Path::new(&filename), format).await
    }

    /// What the human monitor's `sendkey` does.
    pub(super) async fn monitor_sendkey(&self, keys: &str, hold: Duration) -> Result<()> {
        let codes = keyboard::chord(keys)
            .map_err(|error| MachineError::Usage(format!("{}: sendkey: {error}", self.name())))?;
        let keyboard = self.keyboard().await?;
        self.hold(&*keyboard, codes, hold).await
    }

    /// The machine's tablet.
    async fn tablet(&self) -> Result<Arc<dyn Input>> {
        self.run()?;
        self.inner.backend.tablet().await?.ok_or_else(|| self.lacks("tablet"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn arguments_as_qemu_has_them() {
        let given =
            json!({"keys": [{"type": "qcode", "data": "ctrl"}, {"type": "number", "data": 0xd3}]});
        let SendKey { keys, hold_time } = arguments("send-key", &given).expect("valid");
        let codes: Vec<_> = keys.iter().map(|key| key.code().expect("a key")).collect();
        assert_eq!((codes, hold_time), (vec![29, 111], None));
        let given = json!({"device": "video0", "head": 1, "events": [
            {"type": "key", "data": {"down": true, "key": {"type": "qcode", "data": "a"}}},
            {"type": "btn", "data": {"down": false, "button": "wheel-up"}},
            {"type": "abs", "data": {"axis": "y", "value": 32767}},
        ]});
        let SendEvent { events, .. } = arguments("input-send-event", &given).expect("valid");
        assert!(matches!(events[0], Event::Key { down: true, .. }));
        assert!(matches!(events[1], Event::Btn { down: false, button: Button::WheelUp }));
        assert!(matches!(events[2], Event::Abs { axis: Axis::Y, value: 32767 }));
    }

    #[test]
    fn arguments_that_make_no_sense() {
        for (given, said) in [
            (json!({}), "send-key: missing field `keys`"),
            (json!({"keys": [{"type": "qcode"}]}), "send-key: missing field `data`"),
            (json!({"keys": [], "hold-time": -1}), "send-key: invalid value: integer `-1`"),
            (
                json!({"keys": [{"type": "number", "data": 256}]}),
                "send-key: invalid value: integer `256`",
            ),
        ] {
            let error =
                arguments::<SendKey>("send-key", &given).err().expect("invalid").to_string();
            assert!(error.starts_with(said), "{error}");
        }
        let rel = json!({"events": [{"type": "rel", "data": {"axis": "x", "value": 1}}]});
        let error = arguments::<SendEvent>("x", &rel).err().expect("invalid").to_string();
        assert_eq!(error, "x: unknown variant `rel`, expected one of `key`, `btn`, `abs`");
        let format = json!({"filename": "a", "format": "jpeg"});
        arguments::<ScreenDump>("screendump", &format).err().expect("invalid");
    }
}
