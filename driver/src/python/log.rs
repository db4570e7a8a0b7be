//! The log, in Python.

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

use crate::log::{Logger, Step};

/// The log of a run, or of a machine.
#[pyclass(frozen, name = "Logger", module = "firn")]
pub(super) struct PyLogger(pub(super) Logger);

#[pymethods]
impl PyLogger {
    fn log(&self, message: &str) {
        self.0.info(message);
    }

    fn info(&self, message: &str) {
        self.0.info(message);
    }

    fn warning(&self, message: &str) {
        self.0.warning(message);
    }

    fn error(&self, message: &str) {
        self.0.error(message);
    }

    fn nested(&self, message: &str) -> PyStep {
        PyStep::new(self.0.clone(), message)
    }

    fn print_serial_logs(&self, enable: bool) {
        self.0.show_serial(enable);
    }
}

/// A step in the log, as a context manager.
#[pyclass(frozen, name = "Step", module = "firn")]
pub(super) struct PyStep {
    logger: Logger,
    message: String,
    running: Mutex<Option<Step>>,
}

impl PyStep {
    pub(super) fn new(logger: Logger, message: &str) -> Self {
        Self { logger, message: message.to_owned(), running: Mutex::new(None) }
    }

    fn replace(&self, step: Option<Step>) {
        let before = std::mem::replace(
            &mut *self.running.lock().unwrap_or_else(PoisonError::into_inner),
            step,
        );
        drop(before);
    }
}

#[pymethods]
impl PyStep {
    fn __enter__(&self) {
        self.replace(Some(self.logger.nested(&self.message)));
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, _args: &Bound<'_, pyo3::types::PyTuple>) {
        self.replace(None);
    }
}
