//! The log, in Python.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::log::{Level, Logger, Step};

/// The log of a run, or of a machine.
#[pyclass(frozen, name = "Logger", module = "firn")]
pub(super) struct PyLogger(pub(super) Logger);

/// What upstream's logger takes beside a message: the machine that it is about.
type Attributes<'py> = Option<Bound<'py, PyDict>>;

/// The error, with the file that it is about.
fn about_file(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
}

#[pymethods]
impl PyLogger {
    /// A log on stderr, without what is less important than `level`.
    #[new]
    #[pyo3(signature = (level = "info"))]
    fn new(level: &str) -> PyResult<Self> {
        let level: Level = level.parse().map_err(PyValueError::new_err)?;
        Ok(Self(Logger::stderr_from(level)))
    }

    fn add_xml(&self, path: PathBuf) -> PyResult<()> {
        Ok(self.0.add_xml(&path).map_err(|error| about_file(&path, &error))?)
    }

    fn add_junit(&self, path: PathBuf) -> PyResult<()> {
        Ok(self.0.add_junit(&path).map_err(|error| about_file(&path, &error))?)
    }

    fn finish(&self) -> PyResult<()> {
        Ok(self.0.finish()?)
    }

    #[pyo3(signature = (message, attributes = None))]
    fn log(&self, message: &str, attributes: Attributes<'_>) -> PyResult<()> {
        self.about(attributes)?.info(message);
        Ok(())
    }

    #[pyo3(signature = (message, attributes = None))]
    fn debug(&self, message: &str, attributes: Attributes<'_>) -> PyResult<()> {
        self.about(attributes)?.debug(message);
        Ok(())
    }

    #[pyo3(signature = (message, attributes = None))]
    fn info(&self, message: &str, attributes: Attributes<'_>) -> PyResult<()> {
        self.about(attributes)?.info(message);
        Ok(())
    }

    #[pyo3(signature = (message, attributes = None))]
    fn warning(&self, message: &str, attributes: Attributes<'_>) -> PyResult<()> {
        self.about(attributes)?.warning(message);
        Ok(())
    }

    #[pyo3(signature = (message, attributes = None))]
    fn error(&self, message: &str, attributes: Attributes<'_>) -> PyResult<()> {
        self.about(attributes)?.error(message);
        Ok(())
    }

    #[pyo3(signature = (message, attributes = None))]
    fn nested(&self, message: &str, attributes: Attributes<'_>) -> PyResult<PyStep> {
        Ok(PyStep::new(self.about(attributes)?, message))
    }

    #[pyo3(signature = (name, attributes = None))]
    fn subtest(&self, name: &str, attributes: Attributes<'_>) -> PyResult<PyStep> {
        let step = PyStep::new(self.about(attributes)?, name);
        Ok(PyStep { subtest: true, ..step })
    }

    fn log_serial(&self, message: &str, machine: &str) {
        self.0.serial(machine, message);
    }

    fn print_serial_logs(&self, enable: bool) {
        self.0.show_serial(enable);
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
    fn __enter__(&self) {
        let step = match self.subtest {
            true => self.logger.subtest(&self.message),
            false => self.logger.nested(&self.message),
        };
        let before = self.running().replace(step);
        drop(before);
    }

    fn __exit__(
        &self,
        _kind: Bound<'_, PyAny>,
        error: Bound<'_, PyAny>,
        _traceback: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let step = self.running().take();
        if let Some(mut step) = step
            && error.is_instance_of::<PyException>()
        {
            step.fail(error.str()?.to_str()?);
        }
        Ok(())
    }
}
