//! A test run: its machines and networks, from setup to cleanup.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use firn_vmm::spec::{Cid, Number, VsockSpec};
use futures_util::future::join_all;
use tokio::task::JoinSet;

use crate::checkpoint::{Origin, Stack};
use crate::config::{MachineFile, NodeConfig, TestConfig};
use crate::descriptors::{self, Part};
use crate::error::{MachineError, Result};
use crate::kit::{Kit, KitName};
use crate::log::{Logger, Step};
use crate::machine::{Boot, Dirs, Machine, Source, hosts};
use crate::scratch::{State, StatePlace};
use crate::vlan::{Sockets, Vlan};

/// The options of a [`Driver`]; by default no kits, the current directory, a log on standard error, and state that is
/// removed at the end.
pub struct DriverOptions {
    /// The kits that complete nodes: see [`Driver::kits_needed`].
    pub kits: Vec<Kit>,
    /// The output directory.
    pub out_dir: PathBuf,
    /// The log.
    pub log: Logger,
    /// Where machines keep their state.
    pub state: StatePlace,
    /// Where relative paths of machine files start, if not at the machine's state directory; for machines run by hand.
    pub base: Option<PathBuf>,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self {
            kits: Vec::new(),
            out_dir: ".".into(),
            log: Logger::default(),
            state: StatePlace::default(),
            base: None,
        }
    }
}

/// A test run. Dropping it tells all machines to stop; [`Driver::close`] also waits until they have.
pub struct Driver {
    machines: Vec<Machine>,
    /// Machines created while the test runs.
    created: Mutex<Vec<Machine>>,
    vlans: Vec<Vlan>,
    sockets: Arc<Sockets>,
    log: Logger,
    global_timeout: Option<Duration>,
    out: PathBuf,
    base: Option<PathBuf>,
    vsock_offset: Option<u32>,
    checkpoints: Stack,
    /// They end before it does.
    forks: Mutex<Vec<Weak<Self>>>,
    /// What it goes on from, if it is a fork.
    origin: Mutex<Option<Origin>>,
    /// Removed last.
    state: Mutex<Option<State>>,
    /// Its machines belong to another driver now.
    replaced: AtomicBool,
}

/// The sources of a test's machines.
fn sources(test: &TestConfig, kits: &[Kit]) -> Result<Vec<Source>> {
    let hosts = hosts(&test.nodes);
    let of_node = |node: &NodeConfig| {
        let name = node.kit.as_str();
        let kit = kits.iter().find(|kit| kit.manifest.kit == name);
        let Some(boot) = Boot::new(node, kit, &hosts) else {
            let what = format!("{} boots the kit {name}, which was not given", node.name);
            return Err(MachineError::Usage(what).into());
        };
        Ok(Source::Node { node: Box::new(node.clone()), boot })
    };
    let files = (1..).zip(&test.files);
    let files =
        files.map(|(number, file)| Ok(Source::File { file: Box::new(file.clone()), number }));
    test.nodes.iter().map(of_node).chain(files).collect()
}

impl Driver {
    /// Creates the machines and networks of a test without starting any.
    ///
    /// # Errors
    /// If directories cannot be created, or a node needs a kit that is missing.
    pub fn new(test: &TestConfig, options: DriverOptions) -> Result<Self> {
        let DriverOptions { kits, out_dir, log, state, base } = options;
        let sources = sources(test, &kits)?;
        let state = State::new(&state)?;
        let out = std::path::absolute(&out_dir).map_err(MachineError::file("find", out_dir))?;
        let sockets = Arc::default();
        let mut driver = Self {
            machines: Vec::new(),
            created: Mutex::default(),
            vlans: test.vlans().into_iter().map(|number| Vlan::new(number, &sockets)).collect(),
            sockets,
            log,
            global_timeout: test.global_timeout,
            out,
            base,
            vsock_offset: test.vsock_offset,
            checkpoints: Stack::default(),
            forks: Mutex::default(),
            origin: Mutex::default(),
            state: Mutex::new(Some(state)),
            replaced: AtomicBool::new(false),
        };
        let parts = descriptors::parts(sources.len());
        for (source, part) in sources.into_iter().zip(parts) {
            let machine = driver.make(source, false, part)?;
            driver.machines.push(machine);
        }
        Ok(driver)
    }

    /// Replaces this driver by that of a changed test. Machines that have not changed keep running; others are stopped,
    /// recreated, and started again if they were running.
    ///
    /// # Errors
    /// Those of [`Self::new`], and the first error of a start.
    pub async fn replace(&self, test: &TestConfig, kits: &[Kit]) -> Result<Self> {
        let sources = sources(test, kits)?;
        let vlan = |number| {
            let there = self.vlans.iter().find(|vlan| vlan.number() == number);
            there.cloned().unwrap_or_else(|| Vlan::new(number, &self.sockets))
        };
        let mut driver = Self {
            machines: Vec::new(),
            created: Mutex::default(),
            vlans: test.vlans().into_iter().map(vlan).collect(),
            sockets: Arc::clone(&self.sockets),
            log: self.log.clone(),
            global_timeout: test.global_timeout,
            out: self.out.clone(),
            base: self.base.clone(),
            vsock_offset: test.vsock_offset.or(self.vsock_offset),
            checkpoints: Stack::default(),
            forks: Mutex::new(std::mem::take(&mut *lock(&self.forks))),
            origin: Mutex::new(lock(&self.origin).take()),
            state: Mutex::new(self.state().take()),
            replaced: AtomicBool::new(false),
        };
        self.replaced.store(true, Ordering::Release);
        self.checkpoints.end(None);
        self.sockets.keep(&driver.vlans);
        std::mem::swap(&mut *self.created(), &mut *driver.created());
        let (mut running, mut kept) = (Vec::new(), Vec::new());
        for old in &self.machines {
            if sources.iter().any(|source| old.is_of(source)) {
                kept.push(old.clone());
                continue;
            }
            if old.booted() {
                running.push(old.name().to_owned());
            }
            old.crash().await;
        }
        for source in sources {
            let same = kept.iter().find(|old| old.is_of(&source));
            let machine = match same {
                Some(old) => old.clone(),
                None => {
                    let old = self.machines.iter().find(|old| old.name() == source.name());
                    let part = old.map_or_else(descriptors::part, Machine::descriptors);
                    driver.make(source, false, part)?
                }
            };
            driver.machines.push(machine);
        }
        for machine in
            driver.machines.iter().filter(|new| running.iter().any(|old| old == new.name()))
        {
            machine.start(false).await?;
        }
        Ok(driver)
    }

    /// The driver of another world with these networks, whose machines are off.
    pub(crate) fn beside(&self, name: &str, origin: Origin) -> Result<Self> {
        let sockets = Arc::default();
        let vlan = |vlan: &Vlan| Vlan::new(vlan.number(), &sockets);
        let (vlans, sources) =
            (self.vlans.iter().map(vlan).collect(), origin.sources(&self.machines));
        let mut fork = Self {
            machines: Vec::new(),
            created: Mutex::default(),
            vlans,
            sockets,
            log: self.log.for_machine(name),
            global_timeout: None,
            out: self.out.clone(),
            base: self.base.clone(),
            vsock_offset: self.vsock_offset,
            checkpoints: Stack::default(),
            forks: Mutex::default(),
            origin: Mutex::new(Some(origin)),
            state: Mutex::new(Some(State::new(&StatePlace::New)?)),
            replaced: AtomicBool::new(false),
        };
        for (source, own) in sources {
            let machine = fork.make(source, false, descriptors::part())?;
            match own {
                true => fork.machines.push(machine),
                false => fork.created().push(machine),
            }
        }
        Ok(fork)
    }

    /// Makes a fork end when this does.
    ///
    /// # Errors
    /// The run is over.
    pub(crate) fn remember(&self, fork: &Arc<Self>) -> Result<()> {
        let mut forks = lock(&self.forks);
        if self.state().is_none() {
            return Err(MachineError::Usage("the run is over".to_owned()).into());
        }
        forks.retain(|fork| fork.strong_count() > 0);
        forks.push(Arc::downgrade(fork));
        Ok(())
    }

    fn make(&self, source: Source, keep: bool, descriptors: Arc<Part>) -> Result<Machine> {
        let (state, shared, keep) = match &*self.state() {
            Some(state) => state.machine(source.name(), keep)?,
            None => return Err(MachineError::Usage("the run is over".to_owned()).into()),
        };
        let dirs = Dirs {
            base: self.base.clone().unwrap_or_else(|| state.clone()),
            state,
            shared,
            out: self.out.clone(),
            keep,
            borrowed: false,
            by_hand: self.base.is_some(),
        };
        let mut node = source.describe(&dirs)?;
        let missing = |vlan: &&Number| !self.vlans.iter().any(|there| there.number() == **vlan);
        if let Some(vlan) = node.vlans.iter().find(missing) {
            let what = format!("{} is on vlan {vlan}, which this test does not have", node.name);
            return Err(MachineError::Usage(what).into());
        }
        if node.vsock.is_none() && node.own_vsock().is_none() {
            node.vsock = self.backdoor(&node, &dirs)?;
        }
        Machine::new(node, source, dirs, &self.vlans, &self.log, descriptors)
    }

    /// The vsock of a machine that sets none.
    fn backdoor(&self, node: &NodeConfig, dirs: &Dirs) -> Result<Option<VsockSpec>> {
        let Some(offset) = self.vsock_offset else { return Ok(None) };
        let cid = Cid::try_from(u64::from(offset) + u64::from(node.number));
        let cid = cid.map_err(|error| {
            MachineError::Usage(format!(
                "the vsock offset {offset} gives {} the CID {error}",
                node.name
            ))
        })?;
        Ok(Some(VsockSpec { cid, socket: dirs.state.join("vsock") }))
    }

    /// Adds a machine; [`Driver::close`] stops it too.
    ///
    /// # Errors
    /// If there is a machine of its name, it is on a vlan that this test does not have, or directories cannot be
    /// created.
    pub fn create_machine(&self, file: MachineFile, keep_state: bool) -> Result<Machine> {
        let mut created = self.created();
        let names = self.machines.iter().chain(&*created).map(Machine::name);
        if names.into_iter().any(|name| name == file.name()) {
            let what = format!("there is a machine {} already", file.name());
            return Err(MachineError::Usage(what).into());
        }
        let count = self.machines.len() + created.len() + 1;
        let number = u8::try_from(count).unwrap_or(u8::MAX);
        let source = Source::File { file: Box::new(file), number };
        let machine = self.make(source, keep_state, descriptors::part())?;
        created.push(machine.clone());
        Ok(machine)
    }

    /// Returns the kits that a test needs, each once.
    #[must_use]
    pub fn kits_needed(test: &TestConfig) -> Vec<KitName> {
        let nodes = test.nodes.iter().filter(|node| Boot::needs_kit(node));
        let kits: BTreeSet<KitName> = nodes.map(|node| node.kit).collect();
        kits.into_iter().collect()
    }

    /// The machines, sorted by name.
    #[must_use]
    pub fn machines(&self) -> &[Machine] {
        &self.machines
    }

    /// Returns the machine of this name.
    #[must_use]
    pub fn machine(&self, name: &str) -> Option<&Machine> {
        self.machines.iter().find(|machine| machine.name() == name)
    }

    /// The networks, sorted by number.
    #[must_use]
    pub fn vlans(&self) -> &[Vlan] {
        &self.vlans
    }

    /// The log.
    #[must_use]
    pub fn logger(&self) -> &Logger {
        &self.log
    }

    /// How long the whole test may take.
    #[must_use]
    pub fn global_timeout(&self) -> Option<Duration> {
        self.global_timeout
    }

    /// The directory of the run's state, unless the run was closed.
    #[must_use]
    pub fn state_dir(&self) -> Option<PathBuf> {
        self.state().as_ref().map(|state| Path::to_owned(state.path()))
    }

    /// Starts all machines without waiting for the guests to boot.
    ///
    /// # Errors
    /// That of the first machine, in order, that fails to start; the others are started anyway.
    pub async fn start_all(&self) -> Result<()> {
        let _step = self.log.nested("start all VMs");
        let starts = self.machines.iter().map(|machine| machine.start(false));
        join_all(starts).await.into_iter().collect()
    }

    /// Waits until all machines have powered off.
    ///
    /// # Errors
    /// The first machine's error.
    pub async fn join_all(&self) -> Result<()> {
        let _step = self.log.nested("wait for all VMs to finish");
        for machine in &self.machines {
            machine.wait_for_shutdown().await?;
        }
        Ok(())
    }

    /// Syncs the disks of all guests that are up.
    ///
    /// # Errors
    /// The first guest's error.
    pub async fn sync(&self) -> Result<()> {
        for machine in self.all_machines().iter().filter(|machine| machine.is_up()) {
            machine.sync().await?;
        }
        Ok(())
    }

    /// Begins a subtest in the log.
    #[must_use = "the subtest ends when this is dropped"]
    pub fn subtest(&self, name: &str) -> Step {
        self.log.subtest(name)
    }

    /// Stops all machines and removes the state directories unless they are kept. On return nothing of the run is left.
    pub async fn close(&self) {
        if self.state_dir().is_none() {
            return;
        }
        let _step = self.log.nested("cleanup");
        let forks = std::mem::take(&mut *lock(&self.forks));
        let forks = forks.iter().filter_map(Weak::upgrade);
        join_all(forks.map(|fork| async move { Box::pin(fork.close()).await })).await;
        self.checkpoints.end(None);
        let mut ends = JoinSet::new();
        for machine in self.all_machines() {
            ends.spawn(async move {
                if machine.booted() {
                    machine.log("kill machine");
                }
                machine.stop().await;
                machine.discard().await;
            });
        }
        ends.join_all().await;
        let origin = lock(&self.origin).take();
        let (state, sockets) = (self.state().take(), Arc::clone(&self.sockets));
        // There may be gigabytes.
        let _ = tokio::task::spawn_blocking(move || {
            sockets.close();
            drop((state, origin));
        })
        .await;
    }

    /// All machines, including those of [`Self::create_machine`].
    #[must_use]
    pub fn all_machines(&self) -> Vec<Machine> {
        let created = self.created();
        self.machines.iter().chain(&*created).cloned().collect()
    }

    pub(crate) fn checkpoints(&self) -> &Stack {
        &self.checkpoints
    }

    fn created(&self) -> MutexGuard<'_, Vec<Machine>> {
        lock(&self.created)
    }

    fn state(&self) -> MutexGuard<'_, Option<State>> {
        lock(&self.state)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Driver {
    fn drop(&mut self) {
        if *self.replaced.get_mut() {
            return;
        }
        for machine in self.all_machines() {
            machine.request_stop();
        }
        self.sockets.close();
    }
}
