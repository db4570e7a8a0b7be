//! The log, in Python.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyException, PyGeneratorExit, PySystemExit, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::listen;
use firn::log::{Level, Logger, Step, printable};

/// The log of a run, or of a machine. A new one goes nowhere, until something is added.
#[pyclass(frozen, subclass, name = "Logger", module = "firn")]
pub(super) struct PyLogger(pub(super) Logger);

/// What upstream's logger takes beside a message: the machine that it is about.
type Attributes<'py> = Option<Bound<'py, PyDict>>;

/// The error, with the file that it is about.
fn about_file(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
}

#[pymethods]
impl PyLogger {
    /// Subclasses take what they like.
    #[new]
    #[pyo3(signature = (*_arguments, **_named))]
    fn new(_arguments: &Bound<'_, PyTuple>, _named: Option<&Bound<'_, PyDict>>) -> Self {
        Self(Logger::nowhere())
    }

    /// Writes to stderr as well, without what is less important than `level`.
    #[pyo3(signature = (level = "info"))]
    fn add_terminal(&self, level: &str) -> PyResult<()> {
        self.0.add_stderr(parse(level)?);
        Ok(())
    }

    /// Write to an XML file as well, which is complete after finish().
    ///
    /// Raises OSError if it cannot be written.
    fn add_xml(&self, path: PathBuf) -> PyResult<()> {
        Ok(self.0.add_xml(&path).map_err(|error| about_file(&path, &error))?)
    }

    /// Write a JUnit report as well: a case for the script, and one for each name of its subtests. It is written by
    /// finish().
    ///
    /// Raises OSError if it cannot be written.
    fn add_junit(&self, path: PathBuf) -> PyResult<()> {
        Ok(self.0.add_junit(&path).map_err(|error| about_file(&path, &error))?)
    }

    /// Writes to another log as well.
    fn add_log(&self, other: &Self) -> PyResult<()> {
        match self.0.add_log(&other.0) {
            true => Ok(()),
            false => Err(PyValueError::new_err("a log cannot be a part of itself")),
        }
    }

    /// Calls `listener` with kind, text and machine of all that happens, in a thread that waits or logs.
    fn add_listener(&self, listener: Py<PyAny>) {
        self.0.add_sink(listen::listener(listener));
    }

    /// Complete the files; nothing is logged afterwards.
    ///
    /// Raises OSError if one cannot be written.
    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        listen::deliver(py)?;
        Ok(self.0.finish()?)
    }

    /// Notes for the reports that the run fails; the terminal does not have it.
    fn fail(&self, why: &str) {
        self.0.fail(why);
    }

    /// Write a message, as info() does.
    ///
    /// attributes: more about it; `machine` names the machine that it is about.
    #[pyo3(signature = (message, attributes = None))]
    fn log(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.info(message, attributes)
    }

    /// Write a message that helps to find out why.
    ///
    /// attributes: more about it; `machine` names the machine that it is about.
    #[pyo3(signature = (message, attributes = None))]
    fn debug(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.say(message, attributes, |log, text| log.debug(text))
    }

    /// Write a message.
    ///
    /// attributes: more about it; `machine` names the machine that it is about.
    #[pyo3(signature = (message, attributes = None))]
    fn info(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.say(message, attributes, |log, text| log.info(text))
    }

    /// Write a message that somebody should look at though the test goes on.
    ///
    /// attributes: more about it; `machine` names the machine that it is about.
    #[pyo3(signature = (message, attributes = None))]
    fn warning(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.say(message, attributes, |log, text| log.warning(text))
    }

    /// Write an error of the test. In the log of a run this ends the script, too; see log_test_error().
    ///
    /// attributes: more about it; `machine` names the machine that it is about.
    #[pyo3(signature = (message, attributes = None))]
    fn error(&self, message: &Bound<'_, PyAny>, attributes: Attributes<'_>) -> PyResult<()> {
        self.log_test_error(message, attributes)
    }

    /// An error of the test. Does not end it, as [`Self::error`] may in subclasses.
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
    /// attributes: more about it; `machine` names the machine that it is about.
    #[pyo3(signature = (message, attributes = None))]
    fn nested(&self, message: &str, attributes: Attributes<'_>) -> PyResult<PyStep> {
        Ok(PyStep::new(self.about(attributes)?, message))
    }

    /// Group what happens inside a `with` block as a test case of its own in the reports.
    ///
    /// attributes: more about it; `machine` names the machine that it is about.
    #[pyo3(signature = (name, attributes = None))]
    fn subtest(&self, name: &str, attributes: Attributes<'_>) -> PyResult<PyStep> {
        let step = PyStep::new(self.about(attributes)?, name);
        Ok(PyStep { subtest: true, ..step })
    }

    /// Write a line as if the guest of `machine` had printed it on its serial console.
    fn log_serial(&self, py: Python<'_>, message: &str, machine: &str) -> PyResult<()> {
        self.0.serial(machine, message);
        listen::deliver(py).map(drop)
    }

    /// Show or hide on the terminal what guests print; files have it always.
    fn print_serial_logs(&self, enable: bool) {
        self.0.show_serial(enable);
    }

    /// Leave out on the terminal what is less important.
    ///
    /// level: a LogLevel, or its name.
    fn set_log_level(&self, level: &Bound<'_, PyAny>) -> PyResult<()> {
        let name: String = level.extract().or_else(|_| level.getattr("name")?.extract())?;
        self.0.set_level(parse(&name.to_lowercase())?);
        Ok(())
    }
}

impl PyLogger {
    /// The log of the machine that the attributes name.
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

/// Text without what would drive the terminal.
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

/// Why a step fails that `error` ends: by an exception, Ctrl-C, a signal, or an exit that says so.
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
