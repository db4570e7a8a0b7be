//! The keyboard and the screen.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use super::PyMachine;
use super::arguments::{DEFAULT, Pattern, seconds};
use crate::duration::Timeout;
use crate::errors::exception;
use crate::wait::wait;
use firn::error::MachineError;
use firn::machine::DEFAULT_DELAY;
use firn::ocr::{OcrError, Reader};
use firn::picture;

/// The default pause after a key.
const DELAY: Option<Timeout> = Some(Timeout(DEFAULT_DELAY));

#[pymethods]
impl PyMachine {
    /// Press a key, or several keys together, and release them.
    ///
    /// key: the key names of QEMU's sendkey, joined by `-`: "ret", "f1", "ctrl-alt-delete"; or scan codes: "0x2b"; or a
    /// character of a US keyboard: "A".
    /// delay: how long to wait afterwards, in seconds or a timedelta; 0.01 seconds by default.
    /// log: whether to log it as a step.
    ///
    /// Raises MachineError if there is no such key (the error suggests similar ones), if the machine is not running, or if
    /// it has no keyboard. A machine has one if the script calls this method by name, or with `keyboard = true`.
    ///
    ///     machine.send_key("ctrl-alt-f2")
    #[pyo3(
        signature = (key, delay = DELAY, log = Some(true)),
        text_signature = "($self, key, delay=0.01, log=True)"
    )]
    fn send_key(
        &self,
        py: Python<'_>,
        key: &str,
        delay: Option<Timeout>,
        log: Option<bool>,
    ) -> PyResult<()> {
        self.call(py, |machine| machine.send_key(key, seconds(delay), log.unwrap_or_default()))
    }

    /// Type a text on the (US) keyboard.
    ///
    /// delay: how long to wait after each character, in seconds or a timedelta; 0.01 seconds by default.
    ///
    /// Raises MachineError as send_key() does. If a character has no key, nothing is typed.
    ///
    ///     machine.send_chars("root\n")
    #[pyo3(
        signature = (chars, delay = DELAY),
        text_signature = "($self, chars, delay=0.01)"
    )]
    fn send_chars(&self, py: Python<'_>, chars: &str, delay: Option<Timeout>) -> PyResult<()> {
        self.call(py, |machine| machine.send_chars(chars, seconds(delay)))
    }

    /// Save what the screen shows as a PNG file. The picture is black if nothing has been shown yet.
    ///
    /// filename: gets ".png" if it has no dot, and is relative to `out_dir` if it has no slash.
    ///
    /// Raises MachineError if the directory does not exist, if the machine is not running, or if it has no screen. A
    /// machine has one if the script calls this method by name, or with `screen = "plain"`.
    fn screenshot(&self, py: Python<'_>, filename: PathBuf) -> PyResult<()> {
        let filename = filename.to_string_lossy();
        self.call(py, |machine| machine.screenshot(&filename))
    }

    /// Return the text on the screen.
    ///
    /// The text is exact if the screen shows a text console and the guest runs firn's agent. Everything else is read by
    /// `tesseract` (OCR), which takes seconds and makes mistakes.
    ///
    /// Raises MachineError if `tesseract` is not in PATH or fails, and when screenshot() does.
    fn get_screen_text(&self, py: Python<'_>) -> PyResult<String> {
        self.call(py, |machine| machine.get_screen_text())
    }

    /// Return the text on the screen as read in several ways: the exact text if there is one, then OCR of the picture as
    /// it is, of its dark text, and of its bright text.
    ///
    /// Raises MachineError when get_screen_text() does.
    fn get_screen_text_variants(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.call(py, |machine| machine.get_screen_text_variants())
    }

    /// Wait until a regular expression matches the text on the screen, in any of the variants of
    /// get_screen_text_variants(). A picture that does not change is read once.
    ///
    /// regex: as for re.search(), or compiled. OCR may put each word on a line of its own.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed when it runs out, and
    /// MachineError when get_screen_text() does or if the guest ends.
    #[pyo3(
        signature = (regex, timeout = DEFAULT),
        text_signature = "($self, regex, timeout=900)"
    )]
    fn wait_for_text(
        &self,
        py: Python<'_>,
        regex: Bound<'_, PyAny>,
        timeout: Timeout,
    ) -> PyResult<()> {
        let pattern = Pattern::new(py, &regex)?;
        let find = |text: &str| Ok(pattern.end_in(text)?.is_some());
        self.call(py, |machine| machine.wait_for_text(&pattern.shown, find, timeout.0))
    }
}

/// Reads the text in a PNG or PPM file; with `variants`, also of its dark and of its bright text.
#[pyfunction]
pub(crate) fn read_picture(py: Python<'_>, path: PathBuf, variants: bool) -> PyResult<Vec<String>> {
    let failed =
        |error: OcrError| MachineError::Usage(format!("{}: {error}", path.display())).into();
    let reader = Reader::find().map_err(|error| exception(py, &failed(error)))?;
    let picture = py.detach(|| picture::read(&path))?;
    wait(py, async {
        if !variants {
            return Ok(vec![reader.text(&picture).await.map_err(failed)?]);
        }
        reader.texts(Arc::new(picture)).await.map_err(failed)
    })
}
