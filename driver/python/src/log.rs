//! The log, in Python.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyException, PyGeneratorExit, PySystemExit, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::listen;
use firn::log::{Level, Logger, Step, printable};

/// The log of a run or of a machine. A new one writes nowhere until an output is added.
#[pyclass(frozen, subclass, name = "Logger", module = "firn")]
pub(super) struct PyLogger(pub(super) Logger);

/// The attributes that upstream's logger takes with a message: the machine it is about.
type Attributes<'py> = Option<Bound<'py, PyDict>>;

/// The error, with the name of the file.
fn about_file(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
}

#[pymethods]
impl PyLogger {
    /// Subclasses may take any arguments.
    #[new]
    #[pyo3(signature = (*_arguments, **_named))]
    fn new(_arguments: &Bound<'_, PyTuple>, _named: Option<&Bound<'_, PyDict>>) -> Self {
        Self(Logger::nowhere())
    }

    /// Writes to stderr too, messages of `level` and above.
    #[pyo3(signature = (level = "info"))]
    fn add_terminal(&self, level: &str) -> PyResult<()> {
        self.0.add_stderr(parse(level)?);
        Ok(())
    }

    /// Write to an XML file too. It is complete after finish().
    ///
    /// Raises OSError if it cannot be written.
    fn add_xml(&self, path: PathBuf) -> PyResult<()> {
        Ok(self.0.add_xml(&path).map_err(|error| about_file(&path, &error))?)
    }

    /// Write a JUnit report too, with a test case for the script and one for each subtest's name. finish() writes it.
    ///
    /// Raises OSError if it cannot be written.
    fn add_junit(&self, path: PathBuf) -> PyResult<()> {
        Ok(self.0.add_junit(&path).map_err(|error| about_file(&path, &error))?)
    }

    /// Writes to another log too.
    fn add_log(&self, other: &Self) -> PyResult<()> {
        match self.0.add_log(&other.0) {
            true => Ok(()),
            false => Err(PyValueError::new_err("a log cannot write to itself")),
        }
    }

    /// Calls `listener` with kind, text and machine for each event, from a thread that waits or logs.
    fn add_listener(&self, listener: Py<PyAny>) {
        self.0.add_sink(listen::listener(listener));
    }

    /// Complete the log's files. Nothing is logged afterwards.
    ///
    /// Raises OSError if one cannot be written.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        listen::deliver(py)?;
        Ok(self.0.finish()?)
    }

    /// Records in the reports, not on the terminal, that the run fails.
    fn fail(&self, why: &str) {
        self.0.fail(why);
    }

    /// Log a message, as info() does.
    ///
    /// attributes: `machine` names the machine the message is about.
    #[pyo3(signature = (message, attributes = None))]
    fn log(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.info(message, attributes)
    }

    /// Log a message for debugging.
    ///
    /// attributes: `machine` names the machine the message is about.
    #[pyo3(signature = (message, attributes = None))]
    fn debug(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.say(message, attributes, |log, text| log.debug(text))
    }

    /// Log a message.
    ///
    /// attributes: `machine` names the machine the message is about.
    #[pyo3(signature = (message, attributes = None))]
    fn info(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.say(message, attributes, |log, text| log.info(text))
    }

    /// Log a warning.
    ///
    /// attributes: `machine` names the machine the message is about.
    #[pyo3(signature = (message, attributes = None))]
    fn warning(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.say(message, attributes, |log, text| log.warning(text))
    }

    /// Log an error of the test. In the log of a run this also ends the script; see log_test_error().
    ///
    /// attributes: `machine` names the machine the message is about.
    #[pyo3(signature = (message, attributes = None))]
    fn error(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.log_test_error(message, attributes)
    }

    /// Logs an error of the test without ending it, which [`Self::error`] may do in subclasses.
    #[pyo3(signature = (message, attributes = None))]
    fn log_test_error(
        &self,
        message: &Bound<'_, PyAny>,
        attributes: Attributes<'_>,
    ) -> PyResult<()> {
        self.say(message, attributes, |log, text| log.error(text))
    }

    /// Group what happens inside a `with` block: a step in the log, with how long it took.
    ///
    /// attributes: `machine` names the machine the message is about.
    #[pyo3(signature = (message, attributes = None))]
    fn nested(&self, message: &str, attributes: Attributes<'_>) -> PyResult<PyStep> {
        Ok(PyStep::new(self.about(attributes)?, message))
    }

    /// Group what a `with` block does as a test case of its own in the reports.
    ///
    /// attributes: `machine` names the machine the message is about.
    #[pyo3(signature = (name, attributes = None))]
    fn subtest(&self, name: &str, attributes: Attributes<'_>) -> PyResult<PyStep> {
        let step = PyStep::new(self.about(attributes)?, name);
        Ok(PyStep { subtest: true, ..step })
    }

    /// Log a line as if the guest of `machine` had printed it on its serial console.
    fn log_serial(&self, py: Python<'_>, message: &str, machine: &str) -> PyResult<()> {
        self.0.serial(machine, message);
        listen::deliver(py).map(drop)
    }

    /// Show or hide guests' console output on the terminal. Files always have it.
    fn print_serial_logs(&self, enable: bool) {
        self.0.show_serial(enable);
    }

    /// Hide less important messages on the terminal.
    ///
    /// level: a LogLevel, or its name.
    fn set_log_level(&self, level: &Bound<'_, PyAny>) -> PyResult<()> {
        let name: String = level.extract().or_else(|_| level.getattr("name")?.extract())?;
        self.0.set_level(parse(&name.to_lowercase())?);
        Ok(())
    }
}

impl PyLogger {
    /// The log of the machine named in the attributes.
    fn about(&self, attributes: Attributes<'_>) -> PyResult<Logger> {
        let machine = attributes.map(|all| all.get_item("machine")).transpose()?.flatten();
        Ok(match machine {
            Some(name) => self.0.for_machine(name.extract()?),
            None => self.0.clone(),
        })
    }

    fn say(
        &self,
        message: &Bound<'_, PyAny>,
        attributes: Attributes<'_>,
        say: impl FnOnce(&Logger, &str),
    ) -> PyResult<()> {
        say(&self.about(attributes)?, &message.str()?.to_string_lossy());
        listen::deliver(message.py()).map(drop)
    }
}

fn parse(level: &str) -> PyResult<Level> {
    level.parse().map_err(PyValueError::new_err)
}

/// The text without control characters.
#[pyfunction(name = "printable")]
pub(super) fn py_printable(text: &str) -> String {
    printable(text)
}

/// A step in the log, as a context manager.
#[pyclass(frozen, name = "Step", module = "firn")]
pub(super) struct PyStep {
    logger: Logger,
    message: String,
    subtest: bool,
    running: Mutex<Option<Step>>,
}

impl PyStep {
    pub(super) fn new(logger: Logger, message: &str) -> Self {
        let message = message.to_owned();
        Self { logger, message, subtest: false, running: Mutex::new(None) }
    }

    fn running(&self) -> MutexGuard<'_, Option<Step>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl PyStep {
    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        let step = match self.subtest {
            true => self.logger.subtest(&self.message),
            false => self.logger.nested(&self.message),
        };
        let before = self.running().replace(step);
        drop(before);
        listen::deliver(py).map(drop)
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: Bound<'_, PyAny>,
        error: Bound<'_, PyAny>,
        _traceback: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let step = self.running().take();
        if let Some(mut step) = step {
            if let Some(why) = failure(&error)? {
                step.fail(&why);
            }
            drop(step);
        }
        listen::deliver(py).map(drop)
    }
}

/// Why `error` makes a step fail: an exception, Ctrl-C, a signal, or an exit status.
fn failure(error: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
    if error.is_none() || error.is_instance_of::<PyGeneratorExit>() {
        return Ok(None);
    }
    if error.is_instance_of::<PySystemExit>() {
        let code = error.getattr("code")?;
        return Ok(code.is_truthy()?.then(|| format!("exit({code})")));
    }
    let text = error.str()?.to_string_lossy().into_owned();
    if error.is_instance_of::<PyException>() || !text.is_empty() {
        return Ok(Some(text));
    }
    Ok(Some(error.get_type().name()?.to_string_lossy().into_owned()))
}
