//! A run and its networks, in Python.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use firn_vmm::spec::Number;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::checkpoint::PyCheckpoint;
use super::duration::Timeout;
use super::errors::{exception, not_here};
use super::log::PyLogger;
use super::machine::PyMachine;
use super::wait::{hold_waiters, runtime, wait, wait_through_signals};
use firn::config::{ConfigError, MachineFile, Needs, NodeConfig, ScreenChoice, TestConfig};
use firn::driver::{Driver, DriverOptions};
use firn::error::{MachineError, chain};
use firn::kit::Kit;
use firn::scratch::StatePlace;
use firn::task::to_its_end;
use firn::vlan::Vlan;
use firn::worlds::Worlds;

/// How long an abandoned run may take to be made and removed.
const REMOVAL: Duration = Duration::from_secs(1);

/// The description of a test.
#[pyclass(frozen, name = "Test", module = "firn._firn")]
pub(super) struct PyTest(TestConfig);

#[pymethods]
impl PyTest {
    /// A test from a TOML file.
    #[staticmethod]
    fn from_toml_file(path: PathBuf) -> PyResult<Self> {
        TestConfig::from_toml_file(&path).map(Self).map_err(|e| senseless(&e))
    }

    /// A test from the JSON file of the NixOS test framework.
    #[staticmethod]
    fn from_driver_file(path: PathBuf) -> PyResult<Self> {
        TestConfig::from_driver_file(&path).map(Self).map_err(|e| senseless(&e))
    }

    /// A test made of machine files.
    #[staticmethod]
    fn from_start_scripts(
        scripts: Vec<PathBuf>,
        vlans: Vec<u8>,
        test_script: PathBuf,
    ) -> PyResult<Self> {
        let vlans = vlans.into_iter().map(|vlan| Number::try_from(u64::from(vlan)));
        let vlans = vlans
            .collect::<Result<_, _>>()
            .map_err(|e| PyValueError::new_err(format!("vlan {e}")))?;
        let files = scripts.iter().map(|path| MachineFile::read(path)).collect::<Result<_, _>>();
        files
            .and_then(|files| TestConfig::from_files(files, vlans, &test_script))
            .map(Self)
            .map_err(|e| senseless(&e))
    }

    /// The same test with its script taken from another file.
    fn with_script(&self, path: PathBuf) -> PyResult<Self> {
        let mut test = self.0.clone();
        test.replace_script(&path).map_err(|e| senseless(&e))?;
        Ok(Self(test))
    }

    /// The same test with these parts ("screen", "keyboard", "tablet") added to the machine of this variable, or to all
    /// machines, unless their descriptions set them.
    #[pyo3(signature = (parts, variable = None))]
    fn supplied(&self, parts: Vec<String>, variable: Option<&str>) -> PyResult<Self> {
        let mut test = self.0.clone();
        test.supply(variable, needs(&parts)?);
        Ok(Self(test))
    }

    /// The variables of the machines whose descriptions rule this part out.
    fn without(&self, part: &str) -> PyResult<Vec<String>> {
        let asked = needs(&[part])?;
        let lacks = |node: &NodeConfig| {
            asked.screen && node.screen == ScreenChoice::No
                || asked.keyboard && node.keyboard == Some(false)
                || asked.tablet && node.tablet == Some(false)
        };
        let files = self.0.files.iter().filter_map(|file| file.outline(1).ok());
        let all = self.0.nodes.iter().cloned().chain(files);
        Ok(all.filter(lacks).map(|node| node.variable()).collect())
    }

    /// The test's name.
    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    /// The machine files, by machine name.
    #[getter]
    fn files(&self) -> BTreeMap<String, PathBuf> {
        let files = self.0.files.iter();
        files.map(|file| (file.name().to_owned(), file.path().to_owned())).collect()
    }

    /// The script's text, its file, and the line on which it begins.
    #[getter]
    fn script(&self) -> (&str, &OsStr, usize) {
        let script = &self.0.script;
        (&script.text, script.file.as_os_str(), script.line)
    }

    /// The limit for the whole run, in seconds; None for no limit.
    #[getter]
    fn global_timeout(&self) -> Option<f64> {
        self.0.global_timeout.map(|time| time.as_secs_f64())
    }

    /// Whether ssh over vsock is set up for all machines.
    #[getter]
    fn ssh_backdoor(&self) -> bool {
        self.0.vsock_offset.is_some()
    }

    /// Whether the script begins after the boot of all machines.
    #[getter(from_boot)]
    fn boots_once(&self) -> bool {
        self.0.from_boot
    }

    /// The directory in which booted worlds are kept if the script begins after a boot, made; else None.
    fn worlds(&self, py: Python<'_>) -> PyResult<Option<PathBuf>> {
        let made = || {
            let worlds = Worlds::of_user()?;
            worlds.prepare().map(|()| worlds.path().to_owned())
        };
        let unusable = |error| exception(py, &MachineError::Usage(chain(&error)).into());
        self.0.from_boot.then(made).transpose().map_err(unusable)
    }

    /// The names of the machines' variables in the script.
    #[getter]
    fn variables(&self) -> Vec<String> {
        self.0.variables()
    }

    /// The numbers of the test's networks.
    #[getter]
    fn vlans(&self) -> Vec<u16> {
        // Of `u8` Python would make bytes.
        self.0.vlans().into_iter().map(|vlan| vlan.get().into()).collect()
    }

    /// The directories of the host that guests may write to, if they exist already.
    #[getter]
    fn writable(&self) -> Vec<PathBuf> {
        self.0.writable()
    }

    /// Builds the guest kits that machines boot and the cache lacks, and says so on stderr.
    fn build_kits(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            let build = |name| firn_kits::build(name, &|line| eprintln!("{line}")).map(drop);
            Driver::kits_needed(&self.0).into_iter().try_for_each(build)
        })
        .map_err(|error| exception(py, &MachineError::Usage(chain(&error)).into()))
    }
}

/// A test run.
#[pyclass(frozen, name = "Run", module = "firn._firn")]
pub(super) struct PyRun(Arc<Driver>);

/// A network: a virtual Ethernet segment that joins all machines with this vlan.
#[pyclass(frozen, name = "VLan", module = "firn")]
pub(super) struct PyVlan(Vlan);

#[pymethods]
impl PyVlan {
    /// The network's number.
    #[getter]
    fn nr(&self) -> u8 {
        self.0.number().get()
    }

    /// The process that forwards frames: this one.
    #[getter]
    fn pid(&self) -> u32 {
        std::process::id()
    }

    /// The directory through which programs outside plug in, such as QEMU and vde_plug; made on first use.
    ///
    /// In it, `ctl` is for VDE, and `stream` and `dgram` are for QEMU's -netdev of these names. Raises MachineError if it
    /// cannot be made.
    #[getter]
    fn socket_dir(&self, py: Python<'_>) -> PyResult<PathBuf> {
        py.detach(|| self.0.socket_dir()).map_err(|error| exception(py, &error.into()))
    }

    /// Raises NotHere. firn's networks have no process of their own.
    #[getter]
    fn process(&self, py: Python<'_>) -> PyResult<()> {
        Err(self.missing(py, "process of its own"))
    }

    /// Stop the network: from now on it forwards nothing.
    fn stop(&self) {
        self.0.stop();
    }

    fn __repr__(&self) -> String {
        format!("<vlan {}>", self.0.number())
    }
}

impl PyVlan {
    fn missing(&self, py: Python<'_>, what: &str) -> PyErr {
        let number = self.0.number();
        not_here(py, format!("vlan{number} has no {what}: firn's networks are in its process"))
    }
}

#[pymethods]
impl PyRun {
    #[new]
    #[pyo3(signature = (test, log, out_dir, kit_dirs = Vec::new(), named_state = false, keep_state = false, vsock_offset = None), text_signature = "(test, log, out_dir, kit_dirs=(), named_state=False, keep_state=False, vsock_offset=None)")]
    #[expect(clippy::too_many_arguments, reason = "Python calls it by keywords")]
    fn new(
        py: Python<'_>,
        test: &PyTest,
        log: &PyLogger,
        out_dir: PathBuf,
        kit_dirs: Vec<PathBuf>,
        named_state: bool,
        keep_state: bool,
        vsock_offset: Option<u32>,
    ) -> PyResult<Self> {
        let kits = kits_for(py, test, kit_dirs)?;
        let state = match named_state || keep_state {
            true => StatePlace::Named { keep: keep_state },
            false => StatePlace::New,
        };
        let options =
            DriverOptions { kits, out_dir, log: log.0.clone(), state, ..DriverOptions::default() };
        let mut test = test.0.clone();
        test.vsock_offset = vsock_offset.or(test.vsock_offset);
        Ok(Self(Arc::new(make(py, test, options)?)))
    }

    /// The machines, in the test's order.
    #[getter]
    fn machines(&self, py: Python<'_>) -> PyResult<Vec<Py<PyAny>>> {
        self.0.machines().iter().map(|machine| PyMachine::object(py, machine.clone())).collect()
    }

    /// The networks.
    #[getter]
    fn vlans(&self) -> Vec<PyVlan> {
        self.0.vlans().iter().cloned().map(PyVlan).collect()
    }

    /// The directory of all machines' state, as a string; None after the end.
    #[getter]
    fn state_dir(&self) -> Option<PathBuf> {
        self.0.state_dir()
    }

    /// The host's ends of the machines' vsocks, by machine name.
    #[getter]
    fn vsock_sockets(&self) -> HashMap<String, PathBuf> {
        let socket = |machine: &firn::Machine| {
            let vsock = machine.config().vsock.as_ref()?;
            Some((machine.name().to_owned(), vsock.socket.clone()))
        };
        self.0.all_machines().iter().filter_map(socket).collect()
    }

    /// Makes a machine from a machine file.
    #[pyo3(
        signature = (start_script, name = None, keep_state = false, parts = Vec::new()),
        text_signature = "($self, start_script, name=None, keep_state=False, parts=())"
    )]
    fn create_machine(
        &self,
        py: Python<'_>,
        start_script: PathBuf,
        name: Option<&str>,
        keep_state: bool,
        parts: Vec<String>,
    ) -> PyResult<Py<PyAny>> {
        let file = MachineFile::read(&start_script).map_err(|e| senseless(&e))?;
        self.create(py, file, name, keep_state, &parts)
    }

    /// Makes a machine from a machine file's JSON.
    #[pyo3(
        signature = (json, name = None, keep_state = false, parts = Vec::new()),
        text_signature = "($self, json, name=None, keep_state=False, parts=())"
    )]
    fn create_machine_of_json(
        &self,
        py: Python<'_>,
        json: &str,
        name: Option<&str>,
        keep_state: bool,
        parts: Vec<String>,
    ) -> PyResult<Py<PyAny>> {
        let file =
            MachineFile::parse(json, "create_machine".as_ref()).map_err(|e| senseless(&e))?;
        self.create(py, file, name, keep_state, &parts)
    }

    /// Makes a machine of a command of the shell that starts QEMU.
    #[pyo3(
        signature = (command, name = None, keep_state = false),
        text_signature = "($self, command, name=None, keep_state=False)"
    )]
    fn create_machine_of_command(
        &self,
        py: Python<'_>,
        command: &str,
        name: Option<&str>,
        keep_state: bool,
    ) -> PyResult<Py<PyAny>> {
        let file = MachineFile::start_command(command, "create_machine".as_ref())
            .map_err(|e| senseless(&e))?;
        self.create(py, file, name, keep_state, &[])
    }

    /// Start all machines that are not running, without waiting for the guests to boot.
    ///
    /// Raises MachineError if one cannot be started.
    fn start_all(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.start_all())
    }

    /// Wait until all machines are off, as Machine.wait_for_shutdown() does.
    fn join_all(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.join_all())
    }

    /// Brings all machines to the end of their boot, from disk if that was kept.
    fn boot_once(&self, py: Python<'_>, test: String, allow_reboot: bool) -> PyResult<()> {
        let driver = Arc::clone(&self.0);
        let worlds = Worlds::of_user()
            .map_err(|error| exception(py, &MachineError::Usage(chain(&error)).into()))?;
        wait(py, async move { driver.boot_once(&worlds, &test, allow_reboot).await })
    }

    /// Brings all machines to the end of their boot, from a directory if the world kept there fits.
    fn boot_from(&self, py: Python<'_>, directory: PathBuf, allow_reboot: bool) -> PyResult<()> {
        let driver = Arc::clone(&self.0);
        wait(py, async move { driver.boot_from(&directory, allow_reboot).await })
    }

    /// Boots all machines and keeps that in a directory.
    fn keep_boot(
        &self,
        py: Python<'_>,
        directory: PathBuf,
        test: String,
        allow_reboot: bool,
    ) -> PyResult<()> {
        let driver = Arc::clone(&self.0);
        wait(py, async move { driver.keep_boot(&directory, &test, allow_reboot).await })
    }

    /// Keeps what all machines and networks are.
    fn checkpoint(&self, py: Python<'_>, name: String) -> PyResult<PyCheckpoint> {
        let driver = Arc::clone(&self.0);
        let kept = wait(py, to_its_end(async move { driver.checkpoint(&name).await }))?;
        Ok(PyCheckpoint::new(Arc::clone(&self.0), kept))
    }

    /// Makes another world of a checkpoint, which goes on beside this one.
    fn fork(&self, py: Python<'_>, checkpoint: &PyCheckpoint, name: String) -> PyResult<Self> {
        let (driver, checkpoint) = (Arc::clone(&self.0), checkpoint.shared());
        let fork = async move { driver.fork(&checkpoint, &name).await };
        Ok(Self(wait(py, to_its_end(fork))?))
    }

    /// Its log.
    #[getter]
    fn logger(&self) -> PyLogger {
        PyLogger(self.0.logger().clone())
    }

    /// Sync the disks of all running guests.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, self.0.sync())
    }

    /// Replaces this run by that of a changed test.
    #[pyo3(signature = (test, kit_dirs = Vec::new()), text_signature = "($self, test, kit_dirs=())")]
    fn replace(&self, py: Python<'_>, test: &PyTest, kit_dirs: Vec<PathBuf>) -> PyResult<Self> {
        let kits = kits_for(py, test, kit_dirs)?;
        Ok(Self(Arc::new(wait(py, self.0.replace(&test.0, &kits))?)))
    }

    /// End all machines and remove their state, unless it is to be kept.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        wait_through_signals(py, self.0.close())
    }

    /// Ends everything after `timeout`, and this process by SIGTERM.
    fn terminate_after(&self, timeout: Timeout) -> PyResult<PyTimer> {
        let (driver, timeout) = (Arc::clone(&self.0), timeout.0);
        let timer = runtime()?.spawn(async move {
            tokio::time::sleep(timeout).await;
            let why = format!("Timeout of {} seconds reached, exiting", timeout.as_secs_f64());
            // From here on nobody can cancel it.
            tokio::spawn(terminate(driver, why));
        });
        Ok(PyTimer(timer.abort_handle()))
    }

    /// Ends everything now, and this process by SIGTERM.
    fn terminate(&self, py: Python<'_>, why: String) -> PyResult<()> {
        wait_through_signals(py, terminate(Arc::clone(&self.0), why))
    }
}

/// A timer that ends a run.
#[pyclass(frozen, name = "Timer", module = "firn._firn")]
pub(super) struct PyTimer(AbortHandle);

#[pymethods]
impl PyTimer {
    /// Cancels the timer.
    fn cancel(&self) {
        self.0.abort();
    }
}

impl PyRun {
    fn create(
        &self,
        py: Python<'_>,
        mut file: MachineFile,
        name: Option<&str>,
        keep_state: bool,
        parts: &[String],
    ) -> PyResult<Py<PyAny>> {
        if let Some(name) = name {
            file.rename(name).map_err(|e| senseless(&e))?;
        }
        file.supply(needs(parts)?);
        let made = self.0.create_machine(file, keep_state);
        PyMachine::object(py, made.map_err(|e| exception(py, &e))?)
    }
}

/// Makes a test's driver; a signal handler that raises aborts it.
fn make(py: Python<'_>, test: TestConfig, options: DriverOptions) -> PyResult<Driver> {
    let (sender, mut made) = mpsc::channel(1);
    // What an earlier run left may take a while to remove.
    runtime()?.spawn_blocking(move || {
        // Nobody waits for it if a signal has ended that: it is dropped.
        drop(sender.blocking_send(Driver::new(&test, options)));
    });
    let gone = || Err(MachineError::Usage("the run could not be made".to_owned()).into());
    let driver = wait(py, async { made.recv().await.unwrap_or_else(gone) });
    if driver.is_err() {
        // It removes what it has made.
        let _ = wait_through_signals(py, async { timeout(REMOVAL, made.recv()).await });
    }
    driver
}

/// A machine's parts by name.
fn needs(parts: &[impl AsRef<str>]) -> PyResult<Needs> {
    let mut needs = Needs::default();
    for part in parts {
        match part.as_ref() {
            "screen" => needs.screen = true,
            "keyboard" => needs.keyboard = true,
            "tablet" => needs.tablet = true,
            other => {
                return Err(PyValueError::new_err(format!("unknown part {other:?} of a machine")));
            }
        }
    }
    Ok(needs)
}

/// An error in what the user wrote.
fn senseless(error: &ConfigError) -> PyErr {
    PyValueError::new_err(chain(error))
}

/// The kits that a test needs: from `dirs`, or else from the cache.
fn kits_for(py: Python<'_>, test: &PyTest, dirs: Vec<PathBuf>) -> PyResult<Vec<Kit>> {
    let unusable = |e: &(dyn std::error::Error + 'static)| {
        exception(py, &MachineError::Usage(chain(e)).into())
    };
    let mut kits =
        dirs.into_iter().map(Kit::open).collect::<Result<Vec<_>, _>>().map_err(|e| unusable(&e))?;
    for name in Driver::kits_needed(&test.0) {
        if !kits.iter().any(|kit| kit.manifest.kit == name.as_str()) {
            let found = py.detach(|| firn_kits::lookup(name));
            kits.extend(found.map_err(|e| unusable(&e))?);
        }
    }
    Ok(kits)
}

async fn terminate(driver: Arc<Driver>, why: String) {
    hold_waiters();
    let log = driver.logger();
    log.error(why);
    driver.close().await;
    if let Err(error) = log.finish() {
        log.error(format_args!("the log's files are incomplete: {error}"));
    }
    // Does not return for a signal whose default is to end the process.
    let _ = signal_hook::low_level::emulate_default_handler(signal_hook::consts::SIGTERM);
}
