//! Checkpoints of a run, in Python.

use std::sync::Arc;

use firn::checkpoint::Checkpoint;
use firn::driver::Driver;
use firn::task::to_its_end;
use pyo3::prelude::*;

use super::wait::wait;

/// What all machines, networks and shared directories of a run were at some time, made by Driver.checkpoint().
///
/// Go back with rollback(), as often as wanted; or use it in a with statement, which goes back when it is left:
///
/// ```python
/// server.wait_for_unit("postgresql")
/// with driver.checkpoint("ready"):
///     server.succeed("rm -rf /var/lib/postgresql")
/// server.succeed("ls /var/lib/postgresql")    # it is there again
/// ```
///
/// Checkpoints are a stack: going back to one ends all that were made after it.
#[pyclass(frozen, name = "Checkpoint", module = "firn")]
pub(super) struct PyCheckpoint {
    driver: Arc<Driver>,
    checkpoint: Arc<Checkpoint>,
}

impl PyCheckpoint {
    pub(super) fn new(driver: Arc<Driver>, checkpoint: Checkpoint) -> Self {
        Self { driver, checkpoint: Arc::new(checkpoint) }
    }

    pub(super) fn shared(&self) -> Arc<Checkpoint> {
        Arc::clone(&self.checkpoint)
    }
}

#[pymethods]
impl PyCheckpoint {
    /// Its name in the log and in messages.
    #[getter]
    fn name(&self) -> &str {
        self.checkpoint.name()
    }

    /// Whether the run can still go back to it.
    #[getter]
    fn is_there(&self) -> bool {
        self.checkpoint.is_there()
    }

    /// Make all machines, networks and shared directories what they were, whatever became of them.
    ///
    /// For the guests no time has passed; with wall_clock=True, their clocks are then set to the present time. Machines
    /// made since are stopped, and connections between guests and the host end. A call that waits for a guest in
    /// another thread raises MachineError.
    ///
    /// Raises MachineError if the checkpoint is gone.
    #[pyo3(signature = (wall_clock = false))]
    fn rollback(&self, py: Python<'_>, wall_clock: bool) -> PyResult<()> {
        let (driver, checkpoint) = (Arc::clone(&self.driver), Arc::clone(&self.checkpoint));
        let back = async move {
            driver.roll_back(&checkpoint).await?;
            if wall_clock { driver.set_clocks().await } else { Ok(()) }
        };
        wait(py, to_its_end(back))
    }

    /// Give it up. The memory and disk space that it took are free.
    fn forget(&self) {
        self.checkpoint.forget();
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    /// Goes back, unless the run went further back already, and gives it up.
    fn __exit__(
        &self,
        py: Python<'_>,
        _exc_type: Option<Py<PyAny>>,
        _exc_value: Option<Py<PyAny>>,
        _traceback: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        if self.checkpoint.is_there() {
            self.rollback(py, false)?;
        }
        self.forget();
        Ok(())
    }

    fn __repr__(&self) -> String {
        format!("<checkpoint {}>", self.checkpoint.name())
    }
}
