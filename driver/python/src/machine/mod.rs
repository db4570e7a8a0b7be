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
    /// None for an object of a script's class that was made without one.
    machine: Option<Machine>,
    /// What is called before each command.
    callbacks: Py<PyList>,
}

impl PyMachine {
    /// A machine as scripts have it.
    pub(super) fn object(py: Python<'_>, machine: Machine) -> PyResult<Py<PyAny>> {
        let made = Self { machine: Some(machine), callbacks: PyList::empty(py).unbind() };
        let class = py.import("firn.machine")?.getattr("QemuMachine")?;
        Ok(class.call1((Py::new(py, made)?,))?.unbind())
    }

    /// The machine. Without one the error is that of an attribute, so that a class whose `__getattr__` asks another
    /// machine works.
    fn machine(&self) -> PyResult<&Machine> {
        self.machine.as_ref().ok_or_else(|| {
            PyAttributeError::new_err(
                "this object stands for no machine: create_machine() makes one, and a class derived from QemuMachine \
                 takes over the machine that it is given",
            )
        })
    }

    /// Calls the callbacks, then waits for what the machine does.
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
    /// An object of a derived class stands for the first machine among the arguments, whatever its `__init__` does.
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

    /// Whether there is a machine behind this object.
    #[getter]
    fn _made(&self) -> bool {
        self.machine.is_some()
    }

    /// Its name in the test; `variable` is that of the script's variable.
    #[getter]
    fn name(&self) -> PyResult<&str> {
        Ok(self.machine()?.name())
    }

    /// The name of the script's variable for it.
    #[getter]
    fn variable(&self) -> PyResult<String> {
        Ok(self.machine()?.config().variable())
    }

    /// What it is doing: "off", "starting", "running", "paused", "stopping", or "ended", which it is until a call has
    /// taken note of its end.
    #[getter]
    fn status(&self) -> PyResult<&'static str> {
        Ok(self.machine()?.status().as_str())
    }

    /// Its time in seconds, which stands still while it is paused.
    #[getter]
    fn _now(&self) -> PyResult<f64> {
        Ok(self.machine()?.clock().now().as_secs_f64())
    }

    /// Whether it was started, and has not ended. Assigning False ends it at once.
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
            let what =
                format!("{} does not run, whatever `booted` is set to: start it", machine.name());
            return Err(exception(py, &MachineError::Usage(what).into()));
        }
        self.crash(py)
    }

    /// Whether commands can be run in it at once.
    ///
    /// Assigning False says that the guest is about to boot again, by kexec or a reboot of its own: the next command
    /// waits for the next boot's shell, unless that is there already.
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

    /// The directory of its own state, a pathlib.Path: its disk images are there.
    ///
    /// From its next start on it uses what is assigned, which may be another machine's.
    #[getter]
    fn state_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.machine()?.state_dir())
    }

    #[setter]
    fn set_state_dir(&self, dir: PathBuf) -> PyResult<()> {
        self.machine()?.set_state_dir(dir);
        Ok(())
    }

    /// The directory that all machines and the host share, a pathlib.Path: /tmp/shared in the guest.
    ///
    /// From its next start on it shares what is assigned.
    #[getter]
    fn shared_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.machine()?.shared_dir())
    }

    #[setter]
    fn set_shared_dir(&self, dir: PathBuf) -> PyResult<()> {
        self.machine()?.set_shared_dir(dir);
        Ok(())
    }

    /// The directory for files that the user keeps, a pathlib.Path: copy_from_machine() writes there.
    #[getter]
    fn out_dir(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        path(py, self.machine()?.out_dir())
    }

    #[setter]
    fn set_out_dir(&self, dir: PathBuf) -> PyResult<()> {
        self.machine()?.set_out_dir(dir);
        Ok(())
    }

    /// Whether its state outlives the run, as -K or create_machine(keep_machine_state=True) has it.
    #[getter]
    fn _keeps_state(&self) -> PyResult<bool> {
        Ok(self.machine()?.keeps_state())
    }

    /// Where the host reaches the guest's vsock ports, if it has any.
    #[getter]
    fn _vsock(&self) -> PyResult<Option<PathBuf>> {
        Ok(self.machine()?.config().vsock.as_ref().map(|vsock| vsock.socket.clone()))
    }

    /// What is called before each command: a list of functions without arguments, to which a script may add.
    #[getter]
    fn _callbacks(&self, py: Python<'_>) -> Py<PyList> {
        self.callbacks.clone_ref(py)
    }

    /// The log, with the machine's name before each message.
    #[getter]
    fn logger(&self) -> PyResult<PyLogger> {
        Ok(PyLogger(self.machine()?.logger().clone()))
    }

    /// Whether it runs and commands can be run in it at once.
    fn is_up(&self) -> PyResult<bool> {
        Ok(self.machine()?.is_up())
    }

    /// Write a message about it to the log.
    fn log(&self, py: Python<'_>, msg: &str) -> PyResult<()> {
        self.machine()?.log(msg);
        listen::deliver(py).map(drop)
    }

    /// Write a line to the log as if the guest had printed it on its serial console.
    fn log_serial(&self, py: Python<'_>, msg: &str) -> PyResult<()> {
        let machine = self.machine()?;
        machine.logger().serial(machine.name(), msg);
        listen::deliver(py).map(drop)
    }

    /// Group what happens inside a `with` block: a step in the log, with how long it took.
    ///
    /// attrs: more about the step; `machine` may name another machine.
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
