//! A test run: its machines and networks, from before the first start to after the last end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::config::{NodeConfig, TestConfig};
use crate::error::{MachineError, Result};
use crate::kit::Kit;
use crate::log::{Logger, Step};
use crate::machine::{Boot, Dirs, Machine, hosts};
use crate::scratch::{Scratch, make_dir};
use crate::vlan::Vlan;

/// What a [`Driver`] works with.
pub struct DriverOptions {
    /// The kit that fills in what nodes do not say; needed only if one leaves something out.
    pub kit: Option<Kit>,
    /// Where files for the user go.
    pub out_dir: PathBuf,
    /// The log.
    pub log: Logger,
}

/// A test run. Dropping it asks all machines to end; [`Driver::close`] also waits for that.
pub struct Driver {
    machines: Vec<Machine>,
    vlans: Vec<Vlan>,
    log: Logger,
    global_timeout: Option<Duration>,
    /// Removed last.
    scratch: std::sync::Mutex<Option<Scratch>>,
}

impl Driver {
    /// Makes the machines and networks of a test; starts none.
    ///
    /// # Errors
    /// If directories cannot be made, or a node leaves out something and there is no kit.
    pub fn new(test: &TestConfig, options: DriverOptions) -> Result<Self> {
        let DriverOptions { kit, out_dir, log } = options;
        let scratch = Scratch::new()
            .map_err(MachineError::file("make a directory in", std::env::temp_dir()))?;
        let shared = make_dir(scratch.path().join("shared-xchg"))?;
        let out = std::path::absolute(&out_dir).map_err(MachineError::file("find", out_dir))?;
        let vlans: Vec<Vlan> = test.vlans().into_iter().map(Vlan::new).collect();
        let hosts = hosts(&test.nodes);
        let machine = |node: &NodeConfig| {
            let Some(boot) = Boot::new(node, kit.as_ref(), &hosts) else {
                return Err(MachineError::Usage(format!(
                    "{} boots the kit, and there is none",
                    node.name
                ))
                .into());
            };
            let dirs = Dirs {
                state: scratch.path().join(format!("vm-state-{}", node.name)),
                shared: shared.clone(),
                out: out.clone(),
            };
            Machine::new(node.clone(), boot, dirs, &vlans, &log)
        };
        let machines = test.nodes.iter().map(machine).collect::<Result<_>>()?;
        Ok(Self {
            machines,
            vlans,
            log,
            global_timeout: test.global_timeout,
            scratch: std::sync::Mutex::new(Some(scratch)),
        })
    }

    /// Whether a test needs the kit.
    #[must_use]
    pub fn needs_kit(test: &TestConfig) -> bool {
        test.nodes.iter().any(Boot::needs_kit)
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
        self.scratch().as_ref().map(|scratch| Path::to_owned(scratch.path()))
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
        for machine in self.machines.iter().filter(|machine| machine.is_up()) {
            machine.sync().await?;
        }
        Ok(())
    }

    /// Groups what a test does under a name in the log.
    #[must_use = "the subtest ends when this is dropped"]
    pub fn subtest(&self, name: &str) -> Step {
        self.log.nested(format_args!("subtest: {name}"))
    }

    /// Ends all machines and removes the state directory. On return nothing of the run is left.
    pub async fn close(&self) {
        if self.state_dir().is_none() {
            return;
        }
        let _step = self.log.nested("cleanup");
        let mut ends = JoinSet::new();
        for machine in &self.machines {
            let machine = machine.clone();
            ends.spawn(async move {
                if machine.booted() {
                    machine.log("kill machine");
                }
                machine.stop().await;
            });
        }
        ends.join_all().await;
        let scratch = self.scratch().take();
        // Gigabytes may lie there.
        let _ = tokio::task::spawn_blocking(move || drop(scratch)).await;
    }

    fn scratch(&self) -> std::sync::MutexGuard<'_, Option<Scratch>> {
        self.scratch.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        for machine in &self.machines {
            machine.request_stop();
        }
    }
}
