//! QEMU's screen, and what is typed and pointed with, by its machine protocol.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use firn_vmm::screen::{Picture, Screen};
use firn_vmm::virtio::input::BTN_LEFT;
use serde_json::{Value, json};

use super::protocol::{ANSWER_WITHIN, Qmp, QmpError};
use crate::machine::backend::Input;
use crate::machine::keyboard;
use crate::picture;

/// Nothing tells that a screen has changed, so it is taken to have done so after this long.
const CHANGES_EVERY: Duration = Duration::from_millis(200);

/// A screen.
pub(super) struct QemuScreen {
    qmp: Qmp,
    /// Where QEMU may write pictures.
    dir: PathBuf,
    /// When it is taken to have changed last, and how often.
    changed: Mutex<(Instant, u64)>,
}

impl QemuScreen {
    pub(super) fn new(qmp: Qmp, dir: PathBuf) -> Self {
        Self { qmp, dir, changed: Mutex::new((Instant::now(), 0)) }
    }

    /// A picture of it; QEMU says why there is none.
    pub(super) fn take(&self) -> Result<Picture, QmpError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("screen{}.ppm", COUNT.fetch_add(1, Ordering::Relaxed));
        let path = self.dir.join(name);
        let arguments = json!({"filename": &path});
        self.qmp.call("screendump", &arguments, ANSWER_WITHIN)?;
        let picture = picture::read(&path);
        // What is left goes with the machine's directory.
        let _ = std::fs::remove_file(&path);
        Ok(picture?)
    }
}

impl Screen for QemuScreen {
    fn picture(&self) -> Option<Picture> {
        let picture = self.take();
        picture.inspect_err(|error| tracing::debug!(%error, "no picture of the screen")).ok()
    }

    fn version(&self) -> u64 {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if changed.0.elapsed() > CHANGES_EVERY {
            *changed = (Instant::now(), changed.1 + 1);
        }
        changed.1
    }
}

/// A keyboard and a pointer.
pub(super) struct QemuInput(pub(super) Qmp);

impl QemuInput {
    fn send(&self, events: &Value) {
        self.0.post("input-send-event", &json!({"events": events}));
    }
}

impl Input for QemuInput {
    fn key(&self, code: u16, down: bool) {
        let key = match keyboard::name_of(code) {
            Some(name) => json!({"type": "qcode", "data": name}),
            // Those without a name have the same number in both.
            None => json!({"type": "number", "data": code}),
        };
        self.send(&json!([{"type": "key", "data": {"down": down, "key": key}}]));
    }

    fn button(&self, code: u16, down: bool) {
        let names = ["left", "right", "middle", "side", "extra"];
        if let Some(name) = code.checked_sub(BTN_LEFT).and_then(|at| names.get(usize::from(at))) {
            self.send(&json!([{"type": "btn", "data": {"down": down, "button": name}}]));
        }
    }

    fn move_to(&self, x: u16, y: u16) {
        let axis = |axis, value| json!({"type": "abs", "data": {"axis": axis, "value": value}});
        self.send(&json!([axis("x", x), axis("y", y)]));
    }

    fn wheel(&self, steps: i16) {
        let button = if steps > 0 { "wheel-up" } else { "wheel-down" };
        for _ in 0..steps.unsigned_abs() {
            for down in [true, false] {
                self.send(&json!([{"type": "btn", "data": {"down": down, "button": button}}]));
            }
        }
    }
}
