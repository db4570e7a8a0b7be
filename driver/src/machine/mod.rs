//! A machine of a test, as its script sees it.
//!
//! A file for each family of calls: `power` (start to release), `exec`, `files`, `console`, `network`. A call that
//! waits for the guest ends at once when the guest ends ([`Machine::unless_ended`]).

use std::fmt::{self, Display};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};

use tokio::sync::{Mutex, watch};

use crate::config::{BackendKind, NodeConfig, Variables};
use crate::descriptors::Part;
use crate::error::{End, Error, MachineError, Result, Tail};
use crate::log::{Logger, Step};
use crate::private;
use crate::vlan::Vlan;
use firn_agent_client::Clock;

mod access;
mod backend;
mod bus;
mod checkpoint;
mod console;
mod exec;
mod files;
mod inputs;
mod kept;
mod keyboard;
mod network;
mod power;
mod qmp;
mod rfb;
mod screen;
mod serial;
mod session;
mod setup;
mod units;
mod waits;

pub(crate) use backend::Create;
pub(crate) use checkpoint::{Back, Then};
pub use console::Tap;
pub(crate) use exec::quote;
pub use exec::{DEFAULT_TIMEOUT, ExecOptions};
pub(crate) use kept::KeptMachine;
pub use keyboard::{DEFAULT_DELAY, characters, keys};
pub use screen::Format;
pub(crate) use setup::{Boot, Source, hosts};

use access::Access;
use backend::{Backend, Parts, backend_for};
use console::Console;
use session::Session;

/// A machine. Clones are handles to the same one.
#[derive(Clone)]
pub struct Machine {
    inner: Arc<Inner>,
}

struct Inner {
    /// For a machine file: as far as it was known when the machine was made.
    node: Arc<NodeConfig>,
    source: Arc<Source>,
    /// What runs it.
    backend: Box<dyn Backend>,
    /// Its clock, which measures the deadlines of all calls.
    clock: Clock,
    /// A script may give it others.
    dirs: std::sync::Mutex<Dirs>,
    log: Logger,
    /// How many files its guest may make this process open.
    descriptors: Arc<Part>,
    console: Arc<Console>,
    events: qmp::Events,
    state: watch::Sender<State>,
    /// The way that the last call took.
    used: std::sync::Mutex<Option<Session>>,
    /// How often it was started or went back.
    runs: AtomicU64,
    /// Held while the machine is being started, stopped, paused or resumed, so that two callers do not both do it.
    changing: Mutex<()>,
}

/// The directories of a machine.
#[derive(Clone, Debug)]
pub(crate) struct Dirs {
    /// Its own, for everything that belongs to the run.
    pub(crate) state: PathBuf,
    /// Shared by all machines and the host: `/tmp/shared` in the guest.
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

    /// Creates the machine's own directories if they are missing.
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
///
/// ```text
/// Off --start()--> Starting --> Running <--pause(), resume()--> Paused
///  ^                  ^            |                              |
///  |                  |            +--> Stopping (also of itself) <-+
///  |               start()                |
///  +--a call takes note-------- Ended <---+
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Not started yet, or its end was acknowledged.
    Off,
    /// Being assembled.
    Starting,
    /// Its guest runs.
    Running,
    /// Its guest is frozen, and its clock with it.
    Paused,
    /// It has ended or was told to, and is being cleaned up.
    Stopping,
    /// It ended, and no call has acknowledged that yet.
    Ended,
}

impl Status {
    /// One word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Ended => "ended",
        }
    }
}

impl Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A [`Status`], with what belongs to it.
#[derive(Clone)]
enum State {
    Off,
    Starting,
    Running(Run),
    Paused(Run),
    Stopping,
    Ended(Arc<End>),
}

impl State {
    fn status(&self) -> Status {
        match self {
            Self::Off => Status::Off,
            Self::Starting => Status::Starting,
            Self::Running(_) => Status::Running,
            Self::Paused(_) => Status::Paused,
            Self::Stopping => Status::Stopping,
            Self::Ended(_) => Status::Ended,
        }
    }

    /// The guest, if it is running or paused.
    fn run(&self) -> Option<&Run> {
        match self {
            Self::Running(run) | Self::Paused(run) => Some(run),
            Self::Off | Self::Starting | Self::Stopping | Self::Ended(_) => None,
        }
    }

    fn run_mut(&mut self) -> Option<&mut Run> {
        match self {
            Self::Running(run) | Self::Paused(run) => Some(run),
            Self::Off | Self::Starting | Self::Stopping | Self::Ended(_) => None,
        }
    }

    /// How the last run ended, if no call took note of that.
    fn end(&self) -> Option<Arc<End>> {
        match self {
            Self::Running(run) | Self::Paused(run) => run.before.clone(),
            Self::Ended(end) => Some(Arc::clone(end)),
            Self::Off | Self::Starting | Self::Stopping => None,
        }
    }

    /// Whether nothing of it is left.
    fn is_over(&self) -> bool {
        matches!(self, Self::Off | Self::Ended(_))
    }
}

/// A guest from its machine's start to its end.
#[derive(Clone)]
struct Run {
    /// Tells it from other runs of the machine.
    number: u64,
    /// How the run before it ended, if no call took note of that.
    before: Option<Arc<End>>,
    /// Asks the supervisor to end the machine, in this way.
    stop: watch::Sender<Option<End>>,
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
        let own = node.backend() == BackendKind::Firn;
        let plugged = node
            .vlans
            .iter()
            .filter_map(|number| vlans.iter().find(|vlan| own && vlan.number() == *number));
        let ports = plugged.map(|vlan| vlan.plug(&node.name)).collect();
        let (node, source) = (Arc::new(node), Arc::new(source));
        let (log, clock) = (log.for_machine(&node.name), Clock::new());
        let backend = backend_for(Parts {
            node: Arc::clone(&node),
            source: Arc::clone(&source),
            log: log.clone(),
            descriptors: Arc::clone(&descriptors),
            ports,
            vlans: vlans.to_vec(),
        });
        Ok(Self {
            inner: Arc::new(Inner {
                node,
                source,
                backend,
                console: Arc::new(Console::new(clock.clone())),
                clock,
                dirs: dirs.into(),
                log,
                descriptors,
                events: qmp::Events::new(own),
                state: watch::Sender::new(State::Off),
                used: std::sync::Mutex::default(),
                runs: AtomicU64::new(0),
                changing: Mutex::new(()),
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

    /// Whether both are the same one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Whether it was made from this.
    pub(crate) fn is_of(&self, source: &Source) -> bool {
        *self.inner.source == *source
    }

    /// Its share of open files, for a machine that replaces it.
    pub(crate) fn descriptors(&self) -> Arc<Part> {
        Arc::clone(&self.inner.descriptors)
    }

    /// The directory of its own state, removed when the run ends.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dirs().state.clone()
    }

    /// Uses another machine's state, in `dir`, from the next start on.
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

    /// Shares this directory of the host instead, from the next start on.
    pub fn set_shared_dir(&self, dir: PathBuf) {
        self.dirs().shared = dir;
    }

    /// The output directory.
    #[must_use]
    pub fn out_dir(&self) -> PathBuf {
        self.dirs().out.clone()
    }

    /// Sets the output directory.
    pub fn set_out_dir(&self, dir: PathBuf) {
        self.dirs().out = dir;
    }

    /// Whether its state is kept after the run.
    #[must_use]
    pub fn keeps_state(&self) -> bool {
        self.dirs().keep
    }

    fn dirs(&self) -> std::sync::MutexGuard<'_, Dirs> {
        self.inner.dirs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its state.
    #[must_use]
    pub fn status(&self) -> Status {
        self.inner.state.borrow().status()
    }

    /// Its time since it was created, which stands still while it is paused.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.inner.clock
    }

    /// Whether it was started and has not ended.
    #[must_use]
    pub fn booted(&self) -> bool {
        matches!(self.status(), Status::Running | Status::Paused | Status::Stopping)
    }

    /// Whether it takes commands now.
    #[must_use]
    pub fn connected(&self) -> bool {
        self.inner.state.borrow().run().is_some_and(|run| run.access.session().is_some())
    }

    /// Whether it is running and takes commands.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.connected()
    }

    /// The serial console's output byte by byte from now on, for a terminal.
    #[must_use]
    pub fn tap_console(&self) -> Arc<Tap> {
        self.inner.console.tap()
    }

    /// Logs a message about it.
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

    /// Runs `wait` until it ends or the guest does.
    ///
    /// # Errors
    /// Those of `wait`; [`MachineError::Ended`] if the guest ends or has ended; [`MachineError::NotRunning`] if it was
    /// not started.
    async fn unless_ended<T>(&self, wait: impl Future<Output = Result<T>>) -> Result<T> {
        let mut state = self.inner.state.subscribe();
        tokio::select! {
            biased;
            answer = wait => answer,
            error = self.ended(&mut state) => Err(error),
        }
    }

    /// Waits until nothing of the machine's present run is left; returns the reason.
    async fn ended(&self, state: &mut watch::Receiver<State>) -> Error {
        let number = state.borrow().run().map(|run| run.number);
        let is_over = |state: &State| {
            // Another run may have begun already.
            state.is_over()
                || number.is_some() && state.run().is_some_and(|run| Some(run.number) != number)
        };
        // The sender lives in self, so there is always an answer.
        let state = state.wait_for(is_over).await.ok();
        match state.and_then(|state| state.end()) {
            Some(end) => self.ended_error(&end),
            None => self.not_running(),
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
            State::Running(run) | State::Paused(run) => Ok(run.clone()),
            State::Ended(end) => Err(self.ended_error(end)),
            State::Off | State::Starting | State::Stopping => Err(self.not_running()),
        }
    }
}
