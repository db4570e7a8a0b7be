//! A machine, in Python: a file for each family of its methods. `firn.machine` adds what is easier said in Python.

use std::path::PathBuf;

use pyo3::exceptions::PyAttributeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use super::errors::exception;
use super::listen;
use super::log::{PyLogger, PyStep};
use super::wait::wait;
use firn::error::{MachineError, Result};
use firn::machine::Machine;

mod arguments;
mod commands;
mod console;
mod files;
mod power;
mod screen;
mod units;
mod waits;

use arguments::path;
pub(super) use screen::read_picture;

/// A machine of a test.
#[pyclass(frozen, subclass, name = "Machine", module = "firn._firn")]
pub(super) struct PyMachine {
    /// None for an instance of a script's subclass that was made without a machine.
    machine: Option<Machine>,
    /// Called before each command.
    callbacks: Py<PyList>,
}

impl PyMachine {
    /// A machine, as scripts see it.
    pub(super) fn object(py: Python<'_>, machine: Machine) -> PyResult<Py<PyAny>> {
        let made = Self { machine: Some(machine), callbacks: PyList::empty(py).unbind() };
        let class = py.import("firn.machine")?.getattr("QemuMachine")?;
        Ok(class.call1((Py::new(py, made)?,))?.unbind())
    }

    /// The machine. If there is none the error is an AttributeError, so that a class whose `__getattr__` delegates to
    /// another machine works.
    fn machine(&self) -> PyResult<&Machine> {
        self.machine.as_ref().ok_or_else(|| {
            PyAttributeError::new_err(
                "this object stands for no machine: create_machine() makes one, and a class derived from QemuMachine \
                 takes over the machine that it is given",
            )
        })
    }

    /// Calls the callbacks, then waits for the machine's answer.
    fn call<'a, T, F>(&'a self, py: Python<'_>, work: impl FnOnce(&'a Machine) -> F) -> PyResult<T>
    where
        T: Send,
        F: Future<Output = Result<T>> + Send,
    {
        let machine = self.machine()?;
        for callback in self.callbacks.bind(py) {
            callback.call0()?;
        }
        wait(py, work(machine))
    }
}

#[pymethods]
impl PyMachine {
    /// An instance of a subclass stands for the first machine among its arguments, whatever its `__init__` does.
    #[new]
    #[pyo3(signature = (*args, **kwargs))]
    fn new(py: Python<'_>, args: Bound<'_, PyTuple>, kwargs: Option<Bound<'_, PyDict>>) -> Self {
        let named = kwargs.iter().flatten().map(|(_, value)| value);
        let given = args.iter().chain(named).find_map(|value| value.cast_into::<Self>().ok());
        match given.as_ref().map(Bound::get) {
            Some(given) => {
                Self { machine: given.machine.clone(), callbacks: given.callbacks.clone_ref(py) }
            }
            None => Self { machine: None, callbacks: PyList::empty(py).unbind() },
        }
    }

    /// Whether this object stands for a machine.
    #[getter]
    fn _made(&self) -> bool {
        self.machine.is_some()
    }

    /// The machine's name in the test; `variable` is the name of its variable in the script.
    #[getter]
    fn name(&self) -> PyResult<&str> {
        Ok(self.machine()?.name())
    }

    /// The name of the machine's variable in the script.
    #[getter]
    fn variable(&self) -> PyResult<String> {
        Ok(self.machine()?.config().variable())
    }

    /// The machine's state: "off", "starting", "running", "paused", "stopping", or "ended" until a call has noticed its
    /// end.
    #[getter]
    fn status(&self) -> PyResult<&'static str> {
        Ok(self.machine()?.status().as_str())
    }

    /// The machine's time in seconds. It stands still while the machine is paused.
    #[getter]
    fn _now(&self) -> PyResult<f64> {
        Ok(self.machine()?.clock().now().as_secs_f64())
    }

    /// Whether the machine was started and has not ended. Assigning False ends it at once.
    #[getter]
    fn booted(&self) -> PyResult<bool> {
        Ok(self.machine()?.booted())
    }

    #[setter]
    fn set_booted(&self, py: Python<'_>, booted: bool) -> PyResult<()> {
        let machine = self.machine()?;
        if booted == machine.booted() {
            return Ok(());
        }
        if booted {
            let what = format!(
                "{} is not running, and setting `booted` does not start it: call start()",
                machine.name()
            );
            return Err(exception(py, &MachineError::Usage(what).into()));
        }
        self.crash(py)
    }

    /// Whether the machine takes commands now.
    ///
    /// Assign False if the guest is about to boot again, by kexec or a reboot of its own: the next command then waits for
    /// the shell of the next boot, unless it is there already.
    #[getter]
    fn connected(&self) -> PyResult<bool> {
        Ok(self.machine()?.connected())
    }

    #[setter]
    fn set_connected(&self, connected: bool) -> PyResult<()> {
        if !connected {
            self.machine()?.disconnect();
        }
        Ok(())
    }

    /// The directory of the machine's state, a pathlib.Path; its disk images are there.
    ///
    /// An assignment takes effect at the next start. It may be another machine's directory.
    #[getter]
    fn state_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.machine()?.state_dir())
    }

    #[setter]
    fn set_state_dir(&self, dir: PathBuf) -> PyResult<()> {
        self.machine()?.set_state_dir(dir);
        Ok(())
    }

    /// The directory that all machines share with the host, a pathlib.Path; /tmp/shared in the guest.
    ///
    /// An assignment takes effect at the next start.
    #[getter]
    fn shared_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.machine()?.shared_dir())
    }

    #[setter]
    fn set_shared_dir(&self, dir: PathBuf) -> PyResult<()> {
        self.machine()?.set_shared_dir(dir);
        Ok(())
    }

    /// The output directory, a pathlib.Path. copy_from_machine() writes there.
    #[getter]
    fn out_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.machine()?.out_dir())
    }

    #[setter]
    fn set_out_dir(&self, dir: PathBuf) -> PyResult<()> {
        self.machine()?.set_out_dir(dir);
        Ok(())
    }

    /// Whether the machine's state is kept after the run: by -K or create_machine(keep_machine_state=True).
    #[getter]
    fn _keeps_state(&self) -> PyResult<bool> {
        Ok(self.machine()?.keeps_state())
    }

    /// The host's end of the guest's vsock, or None.
    #[getter]
    fn _vsock(&self) -> PyResult<Option<PathBuf>> {
        Ok(self.machine()?.config().vsock.as_ref().map(|vsock| vsock.socket.clone()))
    }

    /// Functions without arguments that are called before each command. A script may add to this list.
    #[getter]
    fn _callbacks(&self, py: Python<'_>) -> Py<PyList> {
        self.callbacks.clone_ref(py)
    }

    /// The log; messages are prefixed with the machine's name.
    #[getter]
    fn logger(&self) -> PyResult<PyLogger> {
        Ok(PyLogger(self.machine()?.logger().clone()))
    }

    /// Whether the machine runs and takes commands.
    fn is_up(&self) -> PyResult<bool> {
        Ok(self.machine()?.is_up())
    }

    /// Log a message about this machine.
    fn log(&self, py: Python<'_>, msg: &str) -> PyResult<()> {
        self.machine()?.log(msg);
        listen::deliver(py).map(drop)
    }

    /// Log a line as if the guest had printed it on its serial console.
    fn log_serial(&self, py: Python<'_>, msg: &str) -> PyResult<()> {
        let machine = self.machine()?;
        machine.logger().serial(machine.name(), msg);
        listen::deliver(py).map(drop)
    }

    /// Group what a `with` block does: a step in the log, with its duration.
    ///
    /// attrs: attributes of the step; `machine` may name another machine.
    #[pyo3(signature = (msg, attrs = None))]
    fn nested(&self, msg: &str, attrs: Option<Bound<'_, PyDict>>) -> PyResult<PyStep> {
        let logger = self.machine()?.logger();
        let other = attrs.map(|all| all.get_item("machine")).transpose()?.flatten();
        let logger = match other {
            Some(name) => logger.for_machine(name.extract()?),
            None => logger.clone(),
        };
        Ok(PyStep::new(logger, msg))
    }
}
