//! A test run: its machines and networks, from before the first start to after the last end.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::config::{MachineFile, NodeConfig, TestConfig};
use crate::error::{MachineError, Result};
use crate::kit::{Kit, KitName};
use crate::log::{Logger, Step};
use crate::machine::{Boot, Dirs, Machine, Source, hosts};
use crate::scratch::{State, StatePlace, make_dir};
use crate::vlan::Vlan;

/// What a [`Driver`] works with.
#[derive(Default)]
pub struct DriverOptions {
    /// The kits that fill in what nodes do not say: see [`Driver::kits_needed`].
    pub kits: Vec<Kit>,
    /// Where files for the user go.
    pub out_dir: PathBuf,
    /// The log.
    pub log: Logger,
    /// Where machines keep their state.
    pub state: StatePlace,
    /// Where relative paths of machine files start, if not at the machine's state directory.
    pub base: Option<PathBuf>,
}

/// A test run. Dropping it asks all machines to end; [`Driver::close`] also waits for that.
pub struct Driver {
    machines: Vec<Machine>,
    /// Made while the test runs.
    created: Mutex<Vec<Machine>>,
    vlans: Vec<Vlan>,
    log: Logger,
    global_timeout: Option<Duration>,
    out: PathBuf,
    base: Option<PathBuf>,
    /// Removed last.
    state: Mutex<Option<State>>,
}

impl Driver {
    /// Makes the machines and networks of a test; starts none.
    ///
    /// # Errors
    /// If directories cannot be made, or a node leaves out something and there is no kit.
    pub fn new(test: &TestConfig, options: DriverOptions) -> Result<Self> {
        let DriverOptions { kits, out_dir, log, state, base } = options;
        let state = State::new(&state)?;
        let out = std::path::absolute(&out_dir).map_err(MachineError::file("find", out_dir))?;
        let mut driver = Self {
            machines: Vec::new(),
            created: Mutex::default(),
            vlans: test.vlans().into_iter().map(Vlan::new).collect(),
            log,
            global_timeout: test.global_timeout,
            out,
            base,
            state: Mutex::new(Some(state)),
        };
        let hosts = hosts(&test.nodes);
        for node in &test.nodes {
            let name = node.kit.as_str();
            let kit = kits.iter().find(|kit| kit.manifest.kit == name);
            let Some(boot) = Boot::new(node, kit, &hosts) else {
                let what = format!("{} boots the kit {name}, and there is none", node.name);
                return Err(MachineError::Usage(what).into());
            };
            let machine = driver.make(node.clone(), Source::Node(boot), false)?;
            driver.machines.push(machine);
        }
        for (number, file) in (1..).zip(&test.files) {
            let machine = driver.make_from_file(file.clone(), number, false)?;
            driver.machines.push(machine);
        }
        Ok(driver)
    }

    fn make(&self, node: NodeConfig, source: Source, keep: bool) -> Result<Machine> {
        let (state, shared, keep) = match &*self.state() {
            Some(state) => state.machine(&node.name, keep)?,
            None => return Err(MachineError::Usage("the run is over".to_owned()).into()),
        };
        let dirs = Dirs {
            base: self.base.clone().unwrap_or_else(|| state.clone()),
            state,
            shared: make_dir(shared)?,
            out: self.out.clone(),
            keep,
        };
        Machine::new(node, source, dirs, &self.vlans, &self.log)
    }

    fn make_from_file(&self, file: MachineFile, number: u8, keep: bool) -> Result<Machine> {
        let missing = |vlan: &&u8| !self.vlans.iter().any(|there| there.number() == **vlan);
        if let Some(vlan) = file.vlans().iter().find(missing) {
            let what = format!("{} is on vlan {vlan}, which this test does not have", file.name());
            return Err(MachineError::Usage(what).into());
        }
        self.make(file.outline(number), Source::File(Box::new(file)), keep)
    }

    /// Makes one more machine; [`Driver::close`] ends it too.
    ///
    /// # Errors
    /// If there is a machine of its name, it is on a vlan that this test does not have, or directories cannot be
    /// made.
    pub fn create_machine(&self, file: MachineFile, keep_state: bool) -> Result<Machine> {
        let mut created = self.created.lock().unwrap_or_else(PoisonError::into_inner);
        let names = self.machines.iter().chain(&*created).map(Machine::name);
        if names.into_iter().any(|name| name == file.name()) {
            let what = format!("there is a machine {} already", file.name());
            return Err(MachineError::Usage(what).into());
        }
        let count = self.machines.len() + created.len() + 1;
        let number = u8::try_from(count).unwrap_or(u8::MAX);
        let machine = self.make_from_file(file, number, keep_state)?;
        created.push(machine.clone());
        Ok(machine)
    }

    /// The kits that a test needs, each once.
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

    /// The machine of this name.
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

    /// Where the run keeps its state, unless it was closed.
    #[must_use]
    pub fn state_dir(&self) -> Option<PathBuf> {
        self.state().as_ref().map(|state| Path::to_owned(state.path()))
    }

    /// Starts all machines; does not wait for the guests to come up.
    ///
    /// # Errors
    /// The first error of a start; the other machines are started all the same.
    pub async fn start_all(&self) -> Result<()> {
        let _step = self.log.nested("start all VMs");
        let mut starts = JoinSet::new();
        for machine in &self.machines {
            let machine = machine.clone();
            starts.spawn(async move { machine.start(false).await });
        }
        starts.join_all().await.into_iter().collect()
    }

    /// Waits until all machines have powered off.
    ///
    /// # Errors
    /// The first error of a wait.
    pub async fn join_all(&self) -> Result<()> {
        let _step = self.log.nested("wait for all VMs to finish");
        for machine in &self.machines {
            machine.wait_for_shutdown().await?;
        }
        Ok(())
    }

    /// Writes all guests' dirty data back, as far as they are up.
    ///
    /// # Errors
    /// The first error of a guest.
    pub async fn sync(&self) -> Result<()> {
        for machine in self.all().iter().filter(|machine| machine.is_up()) {
            machine.sync().await?;
        }
        Ok(())
    }

    /// Groups what a test does under a name in the log.
    #[must_use = "the subtest ends when this is dropped"]
    pub fn subtest(&self, name: &str) -> Step {
        self.log.nested(format_args!("subtest: {name}"))
    }

    /// Ends all machines and removes the state directories unless they are kept. On return nothing of the run is left.
    pub async fn close(&self) {
        if self.state_dir().is_none() {
            return;
        }
        let _step = self.log.nested("cleanup");
        let mut ends = JoinSet::new();
        for machine in self.all() {
            ends.spawn(async move {
                if machine.booted() {
                    machine.log("kill machine");
                }
                machine.stop().await;
            });
        }
        ends.join_all().await;
        let state = self.state().take();
        // Gigabytes may lie there.
        let _ = tokio::task::spawn_blocking(move || drop(state)).await;
    }

    /// All machines, those made by the script too.
    fn all(&self) -> Vec<Machine> {
        let created = self.created.lock().unwrap_or_else(PoisonError::into_inner);
        self.machines.iter().chain(&*created).cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        for machine in self.all() {
            machine.request_stop();
        }
    }
}
