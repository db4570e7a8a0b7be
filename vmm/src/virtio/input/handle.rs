//! The host's hand on an input device, and what waits for the guest.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::super::turn::Again;
use super::Kind;

/// Most reports that wait for a guest; with two for each character this is a page of text. Beyond it nothing is pressed
/// or moved any more.
const MAX_WAITING: usize = 4096;
/// The highest coordinate of a tablet, in both directions.
pub const MAX_POSITION: u16 = 32767;

/// What the guest is told at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Report {
    /// A key or button went down or up.
    Key { code: u16, down: bool },
    /// A key that is down types once more.
    Repeat { code: u16 },
    /// The pointer is there.
    Position { x: u16, y: u16 },
    /// The wheel was turned, away from the user if positive.
    Wheel { steps: i16 },
}

/// What the guest has yet to hear, and what it will then believe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Waiting {
    pub(super) reports: VecDeque<Report>,
    /// Keys and buttons that are down once all reports are heard.
    down: BTreeSet<u16>,
}

impl Waiting {
    /// A key goes down or up, if it is not there already. It goes up whether there is room or not: nothing hangs.
    /// One that is down already repeats, once for however many the guest has yet to hear of.
    fn key(&mut self, code: u16, down: bool) {
        if down && self.down.contains(&code) {
            let repeat = Report::Repeat { code };
            if self.reports.back() != Some(&repeat) {
                self.push(repeat);
            }
            return;
        }
        let changes = match down {
            true => self.reports.len() < MAX_WAITING && self.down.insert(code),
            false => self.down.remove(&code),
        };
        if changes {
            self.reports.push_back(Report::Key { code, down });
        }
    }

    /// The pointer is where it was last said to be: a guest need not hear of the places before.
    fn position(&mut self, x: u16, y: u16) {
        if let Some(Report::Position { .. }) = self.reports.back() {
            self.reports.pop_back();
        }
        self.push(Report::Position { x: x.min(MAX_POSITION), y: y.min(MAX_POSITION) });
    }

    fn push(&mut self, report: Report) {
        if self.reports.len() < MAX_WAITING {
            self.reports.push_back(report);
        }
    }

    pub(super) fn release_all(&mut self) {
        let up = std::mem::take(&mut self.down);
        self.reports.extend(up.into_iter().map(|code| Report::Key { code, down: false }));
    }
}

pub(super) struct Shared {
    pub(super) kind: Kind,
    waiting: Mutex<Waiting>,
    pub(super) again: Again,
}

impl Shared {
    pub(super) fn new(kind: Kind, again: Again) -> Self {
        Self { kind, waiting: Mutex::default(), again }
    }

    /// A panic under the lock leaves reports that are whole.
    pub(super) fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's hand on a keyboard or tablet. What it does waits for the guest; a guest that does not look for long
/// misses what is done then, but never that a key was released. Nothing here blocks.
#[derive(Clone)]
pub struct InputHandle(pub(super) Arc<Shared>);

impl InputHandle {
    fn change(&self, change: impl FnOnce(&mut Waiting)) {
        change(&mut self.0.waiting());
        self.0.again.ring();
    }

    /// Presses or releases the key that Linux numbers `code` (`KEY_…` of linux/input-event-codes.h). A key that is
    /// down already repeats, as Linux does not do that by itself here; one that the device lacks is ignored.
    pub fn key(&self, code: u16, down: bool) {
        if self.0.kind.has_key(code) {
            self.change(|waiting| waiting.key(code, down));
        }
    }

    /// The same of a tablet's button (`BTN_…`).
    pub fn button(&self, code: u16, down: bool) {
        self.key(code, down);
    }

    /// Moves a tablet's pointer: 0 is left and top, [`MAX_POSITION`] right and bottom.
    pub fn move_to(&self, x: u16, y: u16) {
        if self.0.kind == Kind::Tablet {
            self.change(|waiting| waiting.position(x, y));
        }
    }

    /// Turns a tablet's wheel, away from the user if `steps` are positive.
    pub fn wheel(&self, steps: i16) {
        if self.0.kind == Kind::Tablet && steps != 0 {
            self.change(|waiting| waiting.push(Report::Wheel { steps }));
        }
    }

    /// Releases whatever is down.
    pub fn release_all(&self) {
        self.change(Waiting::release_all);
    }
}
