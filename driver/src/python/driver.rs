//! A run and its networks, in Python.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::duration::Timeout;
use super::errors::exception;
use super::log::PyLogger;
use super::machine::PyMachine;
use super::wait::{hold_waiters, runtime, wait, wait_through_signals};
use crate::config::TestConfig;
use crate::driver::{Driver, DriverOptions};
use crate::error::{MachineError, chain};
use crate::kit::{self, Kit};
use crate::vlan::Vlan;

/// A test run.
#[pyclass(frozen, name = "Driver", module = "firn")]
pub(super) struct PyDriver {
    driver: Arc<Driver>,
    test: TestConfig,
}

/// A network.
#[pyclass(frozen, name = "VLan", module = "firn")]
pub(super) struct PyVlan(Vlan);

#[pymethods]
impl PyVlan {
    #[getter]
    fn nr(&self) -> u8 {
        self.0.number()
    }

    fn __repr__(&self) -> String {
        format!("<vlan {}>", self.0.number())
    }
}

#[pymethods]
impl PyDriver {
    #[new]
    #[pyo3(signature = (test_file, out_dir = PathBuf::from("."), kit_dirs = Vec::new()))]
    fn new(
        py: Python<'_>,
        test_file: PathBuf,
        out_dir: PathBuf,
        kit_dirs: Vec<PathBuf>,
    ) -> PyResult<Self> {
        let test =
            TestConfig::from_toml_file(&test_file).map_err(|e| PyValueError::new_err(chain(&e)))?;
        let mut kits = Vec::new();
        for dir in kit_dirs {
            kits.push(open_kit(dir).map_err(|e| exception(py, &e.into()))?);
        }
        for name in Driver::kits_needed(&test) {
            if !kits.iter().any(|kit| kit.manifest.kit == name.as_str()) {
                let found = py.detach(|| kit::lookup(name));
                kits.extend(
                    found.map_err(|e| exception(py, &MachineError::Usage(chain(&e)).into()))?,
                );
            }
        }
        let options = DriverOptions { kits, out_dir, ..DriverOptions::default() };
        let driver = Driver::new(&test, options).map_err(|e| exception(py, &e))?;
        Ok(Self { driver: Arc::new(driver), test })
    }

    #[getter]
    fn name(&self) -> &str {
        &self.test.name
    }

    /// The script's text, its file, and the line of the file on which it begins.
    #[getter]
    fn script(&self) -> (&str, PathBuf, usize) {
        let script = &self.test.script;
        (&script.text, script.file.clone(), script.line)
    }

    #[getter]
    fn global_timeout(&self) -> Option<f64> {
        self.test.global_timeout.map(|time| time.as_secs_f64())
    }

    #[getter]
    fn machines(&self) -> Vec<PyMachine> {
        self.driver.machines().iter().cloned().map(PyMachine).collect()
    }

    #[getter]
    fn vlans(&self) -> Vec<PyVlan> {
        self.driver.vlans().iter().cloned().map(PyVlan).collect()
    }

    #[getter]
    fn logger(&self) -> PyLogger {
        PyLogger(self.driver.logger().clone())
    }

    #[getter]
    fn state_dir(&self) -> Option<PathBuf> {
        self.driver.state_dir()
    }

    fn start_all(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.driver.start_all())
    }

    fn join_all(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.driver.join_all())
    }

    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.driver.sync())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        wait_through_signals(py, self.driver.close())
    }

    /// After `timeout` everything is ended, and this process by SIGTERM.
    fn terminate_after(&self, timeout: Timeout) -> PyResult<()> {
        runtime()?.spawn(terminate(Arc::clone(&self.driver), timeout.0));
        Ok(())
    }
}

/// The kit in `dir`.
fn open_kit(dir: PathBuf) -> Result<Kit, MachineError> {
    let path = dir.join("manifest.json");
    let json = std::fs::read(&path).map_err(MachineError::file("read", &path))?;
    let manifest =
        serde_json::from_slice(&json).map_err(|e| MachineError::file("read", &path)(e.into()))?;
    Ok(Kit { dir, manifest })
}

async fn terminate(driver: Arc<Driver>, timeout: Duration) {
    tokio::time::sleep(timeout).await;
    hold_waiters();
    driver
        .logger()
        .error(format_args!("Timeout of {} seconds reached, exiting", timeout.as_secs_f64()));
    driver.close().await;
    // Does not return for a signal whose default is to end the process.
    let _ = signal_hook::low_level::emulate_default_handler(signal_hook::consts::SIGTERM);
}
