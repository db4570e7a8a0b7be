//! A machine's screen, keyboard and pointer for viewers: the server's side of the Remote Framebuffer protocol, which
//! VNC viewers speak (RFC 6143, version 3.8), on a UNIX socket.
//!
//! Viewers ask for each picture, so one that reads slowly gets fewer of them, and costs nothing more.

mod area;
mod keysym;
mod message;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use firn_vmm::screen::{Picture, Screen};
use firn_vmm::socket::Listener;
use firn_vmm::virtio::input::{BTN_LEFT, BTN_MIDDLE, BTN_RIGHT, MAX_POSITION};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::error::chain;
use crate::log::Logger;
use crate::machine::backend::Input;
use crate::machine::keyboard;
use crate::{picture, viewers};
use area::Area;
use message::{DESKTOP_SIZE, EXTENDED_KEYS, Message, PixelFormat, invalid};

/// Most viewers at once; each may keep two pictures here.
const MAX_VIEWERS: usize = 8;
/// How often the screen is looked at, for a viewer that waits for it to change.
const PERIOD: Duration = Duration::from_millis(40);
/// How long a viewer may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(10);

const VERSION: &[u8; 12] = b"RFB 003.008\n";
/// The security type of those who need not say who they are (RFC 6143, 7.2.1): the socket is this user's alone.
const NO_SECURITY: u8 = 1;
/// The encoding of pixels as they are (7.7.1).
const RAW: i32 = 0;
/// A pointer's buttons, in RFB's order.
const BUTTONS: [u16; 3] = [BTN_LEFT, BTN_MIDDLE, BTN_RIGHT];

/// What a viewer is shown, and may touch.
#[derive(Clone)]
pub(super) struct Display {
    /// The machine's name.
    pub(super) name: String,
    pub(super) screen: Arc<dyn Screen>,
    pub(super) keyboard: Option<Arc<dyn Input>>,
    pub(super) tablet: Option<Arc<dyn Input>>,
}

/// Serves viewers at the socket in a machine's state directory until the task is aborted. If that is not possible, the log
/// says so: nothing that a test does depends on it.
pub(super) fn open(state: &Path, display: Display, log: &Logger) -> Option<AbortHandle> {
    match Listener::bind(&state.join(viewers::SOCKET)) {
        Ok(listener) => Some(tokio::spawn(serve(listener, display)).abort_handle()),
        Err(error) => {
            log.warning(format_args!("no viewer can see its screen: {}", chain(&error)));
            None
        }
    }
}

/// Serves viewers until it is dropped.
async fn serve(listener: Listener, display: Display) {
    viewers::serve(listener, MAX_VIEWERS, |stream| {
        let display = display.clone();
        async move {
            if let Err(error) = attend(stream, display).await {
                tracing::debug!(%error, "a viewer has left");
            }
        }
    })
    .await;
}

/// Serves one viewer until it leaves.
async fn attend(stream: UnixStream, display: Display) -> io::Result<()> {
    let (mut from, mut to) = stream.into_split();
    let picture = timeout(PATIENCE, greet(&mut from, &mut to, &display)).await??;

    // A message may be read half: what reads them must not be interrupted.
    let (heard, mut messages) = mpsc::channel(16);
    let mut reader = JoinSet::new();
    reader.spawn(async move {
        loop {
            let message = Message::read(&mut from).await;
            let last = message.is_err();
            if heard.send(message).await.is_err() || last {
                return;
            }
        }
    });

    let mut viewer = Viewer::new(display, picture);
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            message = messages.recv() => match message {
                Some(message) => viewer.hear(message?),
                None => return Ok(()),
            },
            _ = ticks.tick(), if viewer.wants.is_some() => {}
        }
        if let Some(update) = viewer.update() {
            to.write_all(&update).await?;
        }
    }
}

/// The beginning of the protocol (RFC 6143, 7.1 to 7.3). Returns the picture whose size the viewer knows.
async fn greet(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    display: &Display,
) -> io::Result<Picture> {
    to.write_all(VERSION).await?;
    let mut version = [0; VERSION.len()];
    from.read_exact(&mut version).await?;
    if version != *VERSION {
        return Err(invalid("another version than 3.8"));
    }
    to.write_all(&[1, NO_SECURITY]).await?;
    if from.read_u8().await? != NO_SECURITY {
        return Err(invalid("a type of security that was not offered"));
    }
    to.write_u32(0).await?;
    let _shared = from.read_u8().await?;
    let picture = display.screen.picture().unwrap_or_else(picture::black);
    let name = &display.name;
    let mut init = Vec::new();
    for pixels in [picture.width, picture.height] {
        init.extend(u16::try_from(pixels).unwrap_or(u16::MAX).to_be_bytes());
    }
    init.extend(PixelFormat::DEFAULT.to_bytes());
    init.extend(u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
    init.extend(name.as_bytes());
    to.write_all(&init).await?;
    Ok(picture)
}

struct Viewer {
    display: Display,
    format: PixelFormat,
    /// It follows when the screen's size changes.
    resizes: bool,
    /// It does not know yet that it may send keys by their scan codes.
    announce_keys: bool,
    /// What it wants to know, and whether only once that has changed.
    wants: Option<(Area, bool)>,
    /// What it has been sent.
    sent: Picture,
    /// Nothing of `sent` has been: it only has the right size.
    unsent: bool,
    /// The screen's version when it was last looked at, and where.
    seen: Option<(u64, Area)>,
    held: BTreeSet<u16>,
    buttons: u8,
}

impl Viewer {
    fn new(display: Display, picture: Picture) -> Self {
        Self {
            display,
            format: PixelFormat::DEFAULT,
            resizes: false,
            announce_keys: false,
            wants: None,
            sent: picture,
            unsent: true,
            seen: None,
            held: BTreeSet::new(),
            buttons: 0,
        }
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Format(format) => (self.format, self.unsent) = (format, true),
            Message::Encodings(encodings) => {
                self.resizes = encodings.contains(&DESKTOP_SIZE);
                self.announce_keys = encodings.contains(&EXTENDED_KEYS);
            }
            // All that was asked for is answered at once.
            Message::Update { changed, area } => {
                let changed = changed && self.wants.is_none_or(|(_, changed)| changed);
                self.wants = Some((area, changed));
            }
            Message::Symbol { symbol, down } => {
                if let Some(code) = keysym::code(symbol) {
                    self.key(code, down);
                }
            }
            Message::ScanCode { code, down } => {
                if let Some(code) = u8::try_from(code).ok().and_then(keyboard::scan_code) {
                    self.key(code, down);
                }
            }
            Message::Pointer { buttons, x, y } => self.pointer(buttons, x, y),
            Message::Other => {}
        }
    }

    fn key(&mut self, code: u16, down: bool) {
        let Some(keyboard) = &self.display.keyboard else { return };
        keyboard.key(code, down);
        if down {
            self.held.insert(code)
        } else {
            self.held.remove(&code)
        };
    }

    fn pointer(&mut self, buttons: u8, x: u16, y: u16) {
        let Some(tablet) = &self.display.tablet else { return };
        let scale = |at: u16, pixels: u32| {
            let at = u32::from(at) * u32::from(MAX_POSITION) / pixels.saturating_sub(1).max(1);
            u16::try_from(at).unwrap_or(MAX_POSITION)
        };
        tablet.move_to(scale(x, self.sent.width), scale(y, self.sent.height));
        let changed = buttons ^ self.buttons;
        self.buttons = buttons;
        for (bit, code) in BUTTONS.into_iter().enumerate() {
            if changed >> bit & 1 == 1 {
                tablet.button(code, buttons >> bit & 1 == 1);
            }
        }
        for (bit, steps) in [(3, 1), (4, -1)] {
            if changed & buttons >> bit & 1 == 1 {
                tablet.wheel(steps);
            }
        }
    }

    /// What to tell the viewer now, if anything.
    fn update(&mut self) -> Option<Vec<u8>> {
        let (asked, changed) = self.wants?;
        let seen = (self.display.screen.version(), asked);
        let still = changed && !self.unsent && self.seen == Some(seen);
        if still && !self.announce_keys {
            return None;
        }
        let picture = self.display.screen.picture().unwrap_or_else(picture::black);
        let mut update = Update::default();
        if std::mem::take(&mut self.announce_keys) {
            update.head(Area::default(), EXTENDED_KEYS);
        }
        let resized = (picture.width, picture.height) != (self.sent.width, self.sent.height);
        if resized && self.resizes {
            // It asks for the pixels next.
            update.head(Area::of(&picture), DESKTOP_SIZE);
            (self.sent, self.unsent) = (picture, true);
        } else {
            // Of a picture of another size it gets as much as fits into the size that it knows.
            let area = asked.common(Area::of(&self.sent));
            let area = area.and_then(|area| area.common(Area::of(&picture)));
            let areas = match area {
                Some(area) if changed && !self.unsent && !resized => {
                    area.changed(&self.sent, &picture)
                }
                area => area.into_iter().collect(),
            };
            for area in areas {
                update.pixels(area, &picture, self.format);
                if !resized {
                    area.copy(&picture, &mut self.sent);
                }
            }
            (self.seen, self.unsent) = (Some(seen), false);
        }
        if changed && update.count == 0 {
            return None;
        }
        self.wants = None;
        Some(update.finish())
    }
}

impl Drop for Viewer {
    /// Nobody is left to release what it holds.
    fn drop(&mut self) {
        for code in std::mem::take(&mut self.held) {
            self.key(code, false);
        }
        if let Some(tablet) = self.display.tablet.as_ref().filter(|_| self.buttons != 0) {
            BUTTONS.into_iter().for_each(|code| tablet.button(code, false));
        }
    }
}

/// A `FramebufferUpdate` (RFC 6143, 7.6.1).
#[derive(Default)]
struct Update {
    count: u16,
    rectangles: Vec<u8>,
}

impl Update {
    fn head(&mut self, area: Area, encoding: i32) {
        self.count += 1;
        for number in [area.x, area.y, area.width, area.height] {
            self.rectangles.extend(u16::try_from(number).unwrap_or(u16::MAX).to_be_bytes());
        }
        self.rectangles.extend(encoding.to_be_bytes());
    }

    fn pixels(&mut self, area: Area, picture: &Picture, format: PixelFormat) {
        self.head(area, RAW);
        for row in area.rows(picture) {
            format.append(row, &mut self.rectangles);
        }
    }

    fn finish(self) -> Vec<u8> {
        let mut message = vec![0, 0];
        message.extend(self.count.to_be_bytes());
        message.extend(self.rectangles);
        message
    }
}
