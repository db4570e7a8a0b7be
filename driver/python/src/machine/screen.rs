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

/// What is waited after a key.
const DELAY: Option<Timeout> = Some(Timeout(DEFAULT_DELAY));

#[pymethods]
impl PyMachine {
    /// Press a key of the keyboard, or several together, and release them.
    ///
    /// key: names as QEMU's sendkey has them, with `-` between them: "ret", "f1", "ctrl-alt-delete"; or scan codes:
    /// "0x2b"; or a character of an American keyboard: "A".
    /// delay: seconds or a timedelta that are waited afterwards; 0.01 seconds by default.
    /// log: whether the log has a step for it.
    ///
    /// Raises MachineError if there is no such key, naming ones that are close, if the machine does not run, or if it
    /// has no keyboard. It gets one if its script calls this by name; else its description says `keyboard = true`.
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

    /// Type a text on the keyboard, an American one.
    ///
    /// delay: seconds or a timedelta that are waited after each character; 0.01 seconds by default.
    ///
    /// Raises MachineError as send_key() does; before anything is typed if a character has no key.
    ///
    ///     machine.send_chars("root\n")
    #[pyo3(
        signature = (chars, delay = DELAY),
        text_signature = "($self, chars, delay=0.01)"
    )]
    fn send_chars(&self, py: Python<'_>, chars: &str, delay: Option<Timeout>) -> PyResult<()> {
        self.call(py, |machine| machine.send_chars(chars, seconds(delay)))
    }

    /// Write what the screen shows to a PNG file: a black picture if nothing was shown yet.
    ///
    /// filename: ".png" is added to one without a dot; one without a slash goes to `out_dir`.
    ///
    /// Raises MachineError if there is no such directory, if the machine does not run, or if it has no screen. It gets
    /// one if its script calls this by name; else its description says `screen = "plain"`.
    fn screenshot(&self, py: Python<'_>, filename: PathBuf) -> PyResult<()> {
        let filename = filename.to_string_lossy();
        self.call(py, |machine| machine.screenshot(&filename))
    }

    /// Give what is written on the screen.
    ///
    /// That is the exact text where the screen shows a text console and the guest has firn's agent. Everything else is
    /// read in the picture by `tesseract`, which takes seconds and makes mistakes.
    ///
    /// Raises MachineError if `tesseract` is not in PATH or fails, and as screenshot() does.
    fn get_screen_text(&self, py: Python<'_>) -> PyResult<String> {
        self.call(py, |machine| machine.get_screen_text())
    }

    /// Give what is written on the screen, read in several ways: the exact text where there is one, then what is read in
    /// the picture as it is, and in ones that were made of its dark letters and of its bright ones.
    ///
    /// Raises MachineError as get_screen_text() does.
    fn get_screen_text_variants(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.call(py, |machine| machine.get_screen_text_variants())
    }

    /// Wait until a regular expression matches what is written on the screen, in one of the ways in which it is read: see
    /// get_screen_text_variants(). What does not change is read once.
    ///
    /// regex: as for re.search(), or a compiled one. Words that are read in a picture may stand on lines of their own.
    /// timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed after it, and
    /// MachineError as get_screen_text() does, or if the guest ends.
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

/// Reads a PNG or PPM file as it is, and with `variants` in other ways, too.
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
