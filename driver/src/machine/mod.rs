//! A machine of a test, as its script sees it.
//!
//! A file for each family of calls: `power` (start to release), `exec`, `files`, `console`, `network`. A call that waits
//! for the guest is ended at once when the guest ends ([`Machine::unless_ended`]).

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use firn_gateway::Gateway;
use firn_net_switch::SwitchPort;
use firn_vmm::device::boot_timer::Mark;
use tokio::sync::{Mutex, watch};

use crate::config::{NodeConfig, Variables};
use crate::descriptors::Part;
use crate::error::{End, Error, MachineError, Result, Tail};
use crate::log::{Logger, Step};
use crate::private;
use crate::vlan::Vlan;

mod access;
mod bus;
mod console;
mod exec;
mod files;
mod inputs;
mod monitor;
mod network;
mod power;
mod qemu;
mod serial;
mod session;
mod setup;
mod units;
mod waits;

pub use console::Tap;
pub use exec::{DEFAULT_TIMEOUT, ExecOptions};
pub(crate) use setup::{Boot, Source, hosts};

use access::Access;
use console::Console;
use monitor::Monitor;
use session::Session;

/// A machine. Clones are handles to the same one.
#[derive(Clone)]
pub struct Machine {
    inner: Arc<Inner>,
}

struct Inner {
    /// For a machine file: as far as it was known when the machine was made.
    node: NodeConfig,
    source: Source,
    /// A script may give it others.
    dirs: std::sync::Mutex<Dirs>,
    log: Logger,
    /// How many files its guest may make this process open.
    descriptors: Arc<Part>,
    console: Arc<Console>,
    events: qemu::Events,
    /// Where its cards on vlans are plugged in, in the order of the node's vlans.
    ports: Vec<Arc<SwitchPort>>,
    /// The user network of a machine that runs.
    gateway: std::sync::Mutex<Option<Arc<Gateway>>>,
    state: watch::Sender<State>,
    /// The way by which the last call went.
    used: std::sync::Mutex<Option<Session>>,
    /// Of the last boot that has ended.
    boot_marks: std::sync::Mutex<Vec<Mark>>,
    /// Held while the machine is being started, so that two callers do not both do it.
    starting: Mutex<()>,
}

/// The directories of a machine.
#[derive(Clone, Debug)]
pub(crate) struct Dirs {
    /// Its own, for everything that belongs to the run.
    pub(crate) state: PathBuf,
    /// All machines' and the host's: `/tmp/shared` in the guest.
    pub(crate) shared: PathBuf,
    /// Where files for the user go.
    pub(crate) out: PathBuf,
    /// Where relative paths of a machine file start.
    pub(crate) base: PathBuf,
    /// The state outlives the run.
    pub(crate) keep: bool,
    /// The state is another machine's, which will remove it.
    pub(crate) borrowed: bool,
    /// The machine is run by hand: what its file says of SHARED_DIR is the environment's.
    pub(crate) by_hand: bool,
}

impl Dirs {
    /// The machine's own exchange directory: `/tmp/xchg` in the guest.
    pub(crate) fn exchange(&self) -> PathBuf {
        self.state.join("xchg")
    }

    /// Makes the machine's own directories, as far as they are not there.
    pub(crate) fn make(&self) -> Result<(), MachineError> {
        let failed = |source| MachineError::file("make", &self.state)(source);
        private::make(&self.state).map_err(failed)?;
        private::make_for_guests(&self.exchange()).map_err(failed)
    }

    /// The variables of a machine file: the environment as it is now, and these directories.
    pub(crate) fn variables(&self) -> Variables {
        let own = Variables::of_environment().with("TMPDIR", &self.state).with("USE_TMPDIR", "1");
        if self.by_hand { own } else { own.with("SHARED_DIR", &self.shared) }
    }
}

/// What a machine is doing.
#[derive(Clone)]
enum State {
    /// It was not started yet, or its end was taken note of.
    Off,
    Running(Run),
    /// It ended, and no call has taken note of it yet.
    Ended(Arc<End>),
}

/// A machine that runs.
#[derive(Clone)]
struct Run {
    monitor: Monitor,
    /// Asks the supervisor to end the machine.
    stop: watch::Sender<bool>,
    access: Access,
    allow_reboot: bool,
    /// How often the guest was started or has restarted itself.
    boots: u32,
}

impl Machine {
    pub(crate) fn new(
        node: NodeConfig,
        source: Source,
        dirs: Dirs,
        vlans: &[Vlan],
        log: &Logger,
        descriptors: Arc<Part>,
    ) -> Result<Self> {
        dirs.make()?;
        let plugged = node
            .vlans
            .iter()
            .filter_map(|number| vlans.iter().find(|vlan| vlan.number() == *number));
        let ports = plugged.map(|vlan| vlan.plug(&node.name)).collect();
        Ok(Self {
            inner: Arc::new(Inner {
                log: log.for_machine(&node.name),
                node,
                source,
                dirs: dirs.into(),
                descriptors,
                console: Arc::new(Console::new()),
                events: qemu::Events::new(),
                ports,
                gateway: std::sync::Mutex::default(),
                state: watch::Sender::new(State::Off),
                used: std::sync::Mutex::default(),
                boot_marks: std::sync::Mutex::default(),
                starting: Mutex::new(()),
            }),
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.node.name
    }

    /// What it was made from; of a machine file, with the variables as they were then.
    #[must_use]
    pub fn config(&self) -> &NodeConfig {
        &self.inner.node
    }

    /// Whether it was made from this.
    pub(crate) fn is_of(&self, source: &Source) -> bool {
        self.inner.source == *source
    }

    /// What it may have open, for a machine that takes its place.
    pub(crate) fn descriptors(&self) -> Arc<Part> {
        Arc::clone(&self.inner.descriptors)
    }

    /// The directory of its own state, removed when the run ends.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dirs().state.clone()
    }

    /// From its next start on it uses the state of another machine, in `dir`.
    pub fn set_state_dir(&self, dir: PathBuf) {
        let mut dirs = self.dirs();
        if dirs.state == dir {
            return;
        }
        if dirs.base == dirs.state {
            dirs.base.clone_from(&dir);
        }
        dirs.borrowed = true;
        dirs.state = dir;
    }

    /// The directory that all machines and the host share: `/tmp/shared` in the guest.
    #[must_use]
    pub fn shared_dir(&self) -> PathBuf {
        self.dirs().shared.clone()
    }

    /// From its next start on it shares this directory of the host instead.
    pub fn set_shared_dir(&self, dir: PathBuf) {
        self.dirs().shared = dir;
    }

    /// The directory for files that the user shall keep.
    #[must_use]
    pub fn out_dir(&self) -> PathBuf {
        self.dirs().out.clone()
    }

    /// From now on files for the user go there.
    pub fn set_out_dir(&self, dir: PathBuf) {
        self.dirs().out = dir;
    }

    /// Whether its state outlives the run.
    #[must_use]
    pub fn keeps_state(&self) -> bool {
        self.dirs().keep
    }

    fn dirs(&self) -> std::sync::MutexGuard<'_, Dirs> {
        self.inner.dirs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was started, and has not ended.
    #[must_use]
    pub fn booted(&self) -> bool {
        matches!(*self.inner.state.borrow(), State::Running(_))
    }

    /// Whether commands can be run in it at once.
    #[must_use]
    pub fn connected(&self) -> bool {
        matches!(&*self.inner.state.borrow(), State::Running(run) if run.access.session().is_some())
    }

    /// Whether it runs and commands can be run in it.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.connected()
    }

    /// The serial console's output byte by byte from now on, for a terminal.
    #[must_use]
    pub fn tap_console(&self) -> Arc<Tap> {
        self.inner.console.tap()
    }

    /// Writes a message about it to the log.
    pub fn log(&self, message: impl Display) {
        self.inner.log.info(message);
    }

    /// Begins a step in the log.
    #[must_use = "the step ends when this is dropped"]
    pub fn nested(&self, message: impl Display) -> Step {
        self.inner.log.nested(message)
    }

    /// Its log.
    #[must_use]
    pub fn logger(&self) -> &Logger {
        &self.inner.log
    }

    /// Runs `wait` to its end, or to that of the guest.
    ///
    /// # Errors
    /// What `wait` answers; [`MachineError::Ended`] if the guest ends, or has ended;
    /// [`MachineError::NotRunning`] if it was not started.
    async fn unless_ended<T>(&self, wait: impl Future<Output = Result<T>>) -> Result<T> {
        let mut state = self.inner.state.subscribe();
        tokio::select! {
            biased;
            answer = wait => answer,
            error = self.ended(&mut state) => Err(error),
        }
    }

    /// Waits until the machine does not run, and says so.
    async fn ended(&self, state: &mut watch::Receiver<State>) -> Error {
        // The sender lives in self, so there is always an answer.
        match state.wait_for(|state| !matches!(state, State::Running(_))).await.as_deref() {
            Ok(State::Ended(end)) => self.ended_error(end),
            _ => self.not_running(),
        }
    }

    fn ended_error(&self, end: &Arc<End>) -> Error {
        let error = MachineError::Ended {
            machine: self.name().to_owned(),
            end: Arc::clone(end),
            tail: self.tail(),
        };
        error.into()
    }

    fn not_running(&self) -> Error {
        MachineError::NotRunning { machine: self.name().to_owned() }.into()
    }

    fn tail(&self) -> Tail {
        self.inner.console.tail()
    }

    /// The run, if there is one.
    fn run(&self) -> Result<Run> {
        match &*self.inner.state.borrow() {
            State::Running(run) => Ok(run.clone()),
            State::Ended(end) => Err(self.ended_error(end)),
            State::Off => Err(self.not_running()),
        }
    }
}
