//! The screen: pictures of it, and the text on it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use firn_vmm::screen::{Picture, Screen};
use futures_util::StreamExt;
use tokio::task::spawn_blocking;

use super::session::Session;
use super::{ExecOptions, Machine, Status};
use crate::error::{Error, MachineError, Result};
use crate::ocr::{OcrError, Reader};
use crate::picture;
use crate::retry::retry;

/// How many pictures' texts are remembered: a blinking cursor makes two pictures of one.
const KEPT: usize = 4;
/// How often a console's text is polled, and how long that may take.
const CONSOLE_PAUSE: Duration = Duration::from_secs(1);
const CONSOLE_LIMIT: Duration = Duration::from_secs(5);
/// Prints the size of the text console in the foreground, and its characters, with `?` for those that are not ASCII.
const CONSOLE: &str = r"od -An -tu1 -N2 /dev/vcsa && LC_ALL=C tr -c '\n -~' '?' < /dev/vcs";

/// How a picture is written to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As the web has it.
    Png,
    /// As QEMU's monitor has it unless told otherwise.
    Ppm,
}

/// The texts of the latest pictures.
#[derive(Default)]
struct Memory(Mutex<VecDeque<(Arc<Picture>, Vec<String>)>>);

impl Memory {
    fn lock(&self) -> MutexGuard<'_, VecDeque<(Arc<Picture>, Vec<String>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn knows(&self, picture: &Picture) -> bool {
        self.lock().iter().any(|(known, _)| **known == *picture)
    }

    fn keep(&self, picture: Arc<Picture>, texts: Vec<String>) {
        let mut kept = self.lock();
        kept.truncate(KEPT - 1);
        kept.push_front((picture, texts));
    }

    fn last(&self) -> Vec<String> {
        self.lock().front().map(|(_, texts)| texts.clone()).unwrap_or_default()
    }
}

impl Machine {
    /// Saves what the screen shows as a PNG file: a black picture if nothing was shown yet. `.png` is added to a name
    /// without a dot; a name without a slash is relative to [`Machine::out_dir`].
    ///
    /// # Errors
    /// [`MachineError::Usage`] if it has no screen or the directory does not exist; if the file cannot be written; if
    /// it is not running.
    pub async fn screenshot(&self, filename: &str) -> Result<()> {
        let mut name = filename.to_owned();
        if !name.contains('.') {
            name.push_str(".png");
        }
        let path = if name.contains('/') { PathBuf::from(name) } else { self.out_dir().join(name) };
        let _step = self.nested(format_args!("making screenshot {}", path.display()));
        self.dump_screen(&path, Format::Png).await
    }

    /// Saves what the screen shows to this file.
    ///
    /// # Errors
    /// Those of [`Self::screenshot`].
    pub async fn dump_screen(&self, path: &Path, format: Format) -> Result<()> {
        let screen = self.screen().await?;
        let (name, path) = (self.name().to_owned(), path.to_owned());
        let write = move || {
            let picture = screen.picture();
            let shown = picture.is_some();
            let picture = picture.unwrap_or_else(picture::black);
            let failed = |action| MachineError::file(action, &path);
            let bytes = match format {
                Format::Png => picture::png(&picture).map_err(failed("make"))?,
                Format::Ppm => picture::ppm(&picture),
            };
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            if let Some(dir) = dir.filter(|dir| !dir.is_dir()) {
                let (file, dir) = (path.display(), dir.display());
                let what = format!("{name}: cannot write {file}: there is no directory {dir}");
                return Err(MachineError::Usage(what));
            }
            std::fs::write(&path, bytes).map_err(failed("write"))?;
            Ok(shown)
        };
        let gone = |_| MachineError::Usage("the picture was not written".to_owned());
        if !spawn_blocking(write).await.map_err(gone)?? {
            self.log("the screen shows nothing yet: the picture is black");
        }
        Ok(())
    }

    /// The text on the screen: that of the text console it shows, or else what OCR reads in the picture.
    ///
    /// # Errors
    /// If OCR is not available or fails; if it has no screen or is not running.
    pub async fn get_screen_text(&self) -> Result<String> {
        let (reader, screen) = (self.reader()?, self.screen().await?);
        let read = async {
            let Some(picture) = screen.picture() else { return Ok(String::new()) };
            match self.console_text(&picture).await {
                Some(text) => Ok(text),
                None => reader.text(&picture).await.map_err(|e| self.unreadable(&e)),
            }
        };
        self.unless_ended(Box::pin(read)).await
    }

    /// The text on the screen, read in several ways: the text of the text console, if it shows one, then what OCR reads
    /// in the picture as it is and in ones prepared for reading.
    ///
    /// # Errors
    /// Those of [`Self::get_screen_text`].
    pub async fn get_screen_text_variants(&self) -> Result<Vec<String>> {
        let (reader, screen) = (self.reader()?, self.screen().await?);
        let read = async {
            let Some(picture) = screen.picture().map(Arc::new) else {
                return Ok(vec![String::new()]);
            };
            let exact = self.console_text(&picture).await;
            let read = reader.texts(picture).await.map_err(|e| self.unreadable(&e))?;
            Ok(exact.into_iter().chain(read).collect())
        };
        self.unless_ended(Box::pin(read)).await
    }

    /// Waits until `find` finds a match in one of the variants of the screen's text. `what` is for the log.
    ///
    /// # Errors
    /// Those of [`Self::get_screen_text`] and of `find`; [`Error::Assertion`] if nothing is found within `timeout`.
    pub async fn wait_for_text(
        &self,
        what: &str,
        find: impl Fn(&str) -> Result<bool> + Sync,
        timeout: Duration,
    ) -> Result<()> {
        let _step = self.nested(format_args!("waiting for {what} to appear on screen"));
        let (reader, screen) = (self.reader()?, self.screen().await?);
        let (find, screen, clock) = (&find, &*screen, &self.inner.clock);
        let memory = &Memory::default();
        let read = |last: bool| async move {
            if self.read_new(reader, screen, memory, find).await? {
                return Ok(Some(()));
            }
            if last {
                self.log(format_args!("Last OCR attempt failed. Text was: {:?}", memory.last()));
            }
            Ok(None)
        };
        // Reading a picture takes so long that a console may have shown it meanwhile.
        let exact = async {
            let mut version = None;
            loop {
                let now = screen.version();
                if version != Some(now)
                    && let Some(picture) = screen.picture()
                    && let Some(text) = self.console_text(&picture).await
                {
                    version = Some(now);
                    if find(&text)? {
                        return Ok(());
                    }
                }
                clock.sleep(CONSOLE_PAUSE).await;
            }
        };
        let found = async {
            tokio::select! {
                biased;
                found = Box::pin(exact) => found,
                found = Box::pin(retry(clock, read, timeout)) => found,
            }
        };
        self.unless_ended(Box::pin(found)).await
    }

    /// Reads a picture unless it is known already; returns whether there is a match.
    async fn read_new(
        &self,
        reader: &Reader,
        screen: &dyn Screen,
        memory: &Memory,
        find: &(impl Fn(&str) -> Result<bool> + Sync),
    ) -> Result<bool> {
        let Some(picture) = screen.picture().map(Arc::new) else { return Ok(false) };
        if memory.knows(&picture) {
            return Ok(false);
        }
        let (mut texts, mut failed) = (Vec::new(), None);
        let mut variants = std::pin::pin!(reader.variants(Arc::clone(&picture)));
        while let Some((_, text)) = variants.next().await {
            match text {
                Ok(text) if find(&text)? => return Ok(true),
                Ok(text) => texts.push(text),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) => Err(self.unreadable(&error)),
            None => {
                memory.keep(picture, texts);
                Ok(false)
            }
        }
    }

    /// The text of the guest's text console, read by the agent if there is one, if the picture shows it.
    async fn console_text(&self, picture: &Picture) -> Option<String> {
        if self.status() != Status::Running {
            return None;
        }
        let session = self.run().ok()?.access.session();
        let Some(Session::Agent(_)) = session else { return None };
        let options = ExecOptions { timeout: Some(CONSOLE_LIMIT), ..ExecOptions::default() };
        // It is large, and would be so several times in who waits for it.
        let command = Box::pin(self.execute(CONSOLE, options));
        let look = self.inner.clock.timeout(CONSOLE_LIMIT, command);
        let (0, output) = look.await?.ok()? else { return None };
        let (size, text) = output.split_once('\n')?;
        let columns: usize = size.split_whitespace().nth(1)?.parse().ok()?;
        if !picture::shows(picture, columns, text.as_bytes()) {
            return None;
        }
        let lines = text.as_bytes().chunks(columns).map(String::from_utf8_lossy);
        Some(lines.map(|line| format!("{}\n", line.trim_end())).collect())
    }

    fn reader(&self) -> Result<&'static Reader> {
        Reader::find().map_err(|error| self.unreadable(&error))
    }

    fn unreadable(&self, error: &OcrError) -> Error {
        MachineError::Usage(format!("{}: {error}", self.name())).into()
    }

    /// The machine's screen.
    pub(super) async fn screen(&self) -> Result<Arc<dyn Screen>> {
        self.run()?;
        self.inner.backend.screen().await?.ok_or_else(|| self.lacks("screen"))
    }
}
