//! Checkpoints of a whole run: all machines, networks and shared directories go back together, as often as wanted.
//!
//! ```text
//! checkpoint: all machines stand still -> each is kept, and the networks, and the directories -> they go on
//! roll back:  all machines are switched off -> networks, directories and machines go back -> they go on
//! fork:       new networks, directories and machines are made what the old ones were -> they go on
//! ```
//!
//! Tests that each start from the same boot:
//!
//! ```no_run
//! # async fn run(driver: firn::Driver) -> firn::Result<()> {
//! let server = driver.machine("server").expect("the test has one");
//! server.succeed(&["systemctl start postgresql"], None).await?;
//! let ready = driver.checkpoint("ready").await?;
//! for spoil in ["rm -rf /etc", "systemctl stop postgresql"] {
//!     server.succeed(&[spoil], None).await?;
//!     driver.roll_back(&ready).await?;
//! }
//! # Ok(())
//! # }
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use firn_net_switch::{Addresses, Switch};
use futures_util::future::{join_all, try_join_all};

use crate::driver::Driver;
use crate::error::{End, MachineError, Result};
use crate::machine::{Machine, Status, Then};
use crate::scratch::Scratch;
use crate::task::blocking;

mod copy;
mod fork;

pub(crate) use fork::Origin;

/// What a run was at some time, to go back to with [`Driver::roll_back`]. Checkpoints are a stack: going back to one
/// ends all later ones.
pub struct Checkpoint(Arc<Inner>);

struct Inner {
    name: String,
    /// None once the run has gone back to an earlier one, or is over.
    world: Mutex<Option<Arc<World>>>,
}

pub(crate) struct World {
    machines: Vec<(Machine, Then)>,
    switches: Vec<(Switch, Addresses)>,
    dirs: Arc<Dirs>,
}

/// What was in the directories that guests write to.
struct Dirs {
    /// In the scratch directory each has its number.
    sources: Vec<PathBuf>,
    copies: Scratch,
}

/// The checkpoints of a run that there are, oldest first.
#[derive(Default)]
pub(crate) struct Stack(Mutex<Vec<Weak<Inner>>>);

impl Checkpoint {
    /// Its name, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Whether the run can still go back to it.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.0.world().is_some()
    }

    /// What it keeps, if it is there.
    pub(crate) fn world(&self) -> Option<Arc<World>> {
        self.0.world().clone()
    }

    /// Gives it up; what it took is free.
    pub fn forget(&self) {
        self.0.world().take();
    }
}

impl World {
    /// The machines, each with what it was.
    pub(crate) fn machines(&self) -> &[(Machine, Then)] {
        &self.machines
    }

    /// The copy of a directory that guests write to, if there was one.
    pub(crate) fn copy_of(&self, dir: &Path) -> Option<PathBuf> {
        self.dirs.pairs().find_map(|(source, copy)| (source == dir).then_some(copy))
    }
}

impl Inner {
    fn world(&self) -> MutexGuard<'_, Option<Arc<World>>> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stack {
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Inner>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, checkpoint: &Arc<Inner>) {
        let mut stack = self.lock();
        stack.retain(|there| there.strong_count() > 0);
        stack.push(Arc::downgrade(checkpoint));
    }

    /// Ends all that came after this one; without one, all.
    pub(crate) fn end(&self, after: Option<&Checkpoint>) {
        let mut stack = self.lock();
        let is =
            |there: &Weak<Inner>| after.is_some_and(|this| there.as_ptr() == Arc::as_ptr(&this.0));
        let kept = stack.iter().position(is).map_or(0, |at| at + 1);
        for ended in stack.drain(kept..).filter_map(|ended| ended.upgrade()) {
            ended.world().take();
        }
    }
}

/// Keeps what all machines, which are frozen, are.
async fn keep_all(machines: &[Machine]) -> Result<Vec<(Machine, Then)>> {
    // One that fails does not end the others: what they do meanwhile would be nobody's to take back.
    let kept = join_all(machines.iter().map(Machine::keep)).await;
    let (mut all, mut failed) = (Vec::new(), None);
    for (machine, kept) in machines.iter().zip(kept) {
        match kept {
            Ok(then) => all.push((machine.clone(), then)),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    let Some(error) = failed else { return Ok(all) };
    for (machine, then) in &all {
        machine.give_up(then).await;
    }
    Err(error)
}

impl Driver {
    /// Keeps what all machines, networks and shared directories are, to go back to as often as wanted. Machines stand
    /// still meanwhile. The first time their memory is copied, later only what has changed since.
    ///
    /// What the user shares with guests from directories outside of the run is not part of it.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if a machine is booting or ending, runs under QEMU, or has a command running over the
    /// backdoor; if there is no room. The run goes on as it was.
    pub async fn checkpoint(&self, name: &str) -> Result<Checkpoint> {
        let machines = self.all_machines();
        let _changing = join_all(machines.iter().map(Machine::changing)).await;
        machines.iter().try_for_each(Machine::check_checkpoint)?;
        let _step = self.logger().nested(format_args!("checkpoint {name}"));
        let (dirs, left): (Vec<_>, Vec<_>) = machines.iter().map(Machine::writable_dirs).unzip();
        for (machine, shares) in machines.iter().zip(left).filter(|(_, shares)| !shares.is_empty())
        {
            machine.log(format_args!(
                "not part of the checkpoint: what is in share {}",
                shares.join(", ")
            ));
        }
        let stands = join_all(machines.iter().map(Machine::freeze)).await;
        let frozen = machines.iter().zip(&stands).filter(|(_, stands)| matches!(stands, Ok(true)));
        let frozen: Vec<&Machine> = frozen.map(|(machine, _)| machine).collect();
        let kept = async {
            for one in stands {
                one?;
            }
            let dirs = blocking(move || Dirs::new(dirs.concat())).await?;
            Ok(World {
                dirs: Arc::new(dirs),
                switches: self
                    .vlans()
                    .iter()
                    .map(|vlan| (vlan.switch().clone(), vlan.switch().addresses()))
                    .collect(),
                machines: keep_all(&machines).await?,
            })
        };
        let kept: Result<World> = kept.await;
        let gone_on = join_all(frozen.into_iter().map(Machine::thaw)).await;
        let world = kept?;
        gone_on.into_iter().collect::<Result<()>>()?;
        let inner =
            Arc::new(Inner { name: name.to_owned(), world: Mutex::new(Some(Arc::new(world))) });
        self.checkpoints().push(&inner);
        Ok(Checkpoint(inner))
    }

    /// Makes the run what it was at the checkpoint, which stays there. For the guests no time has passed. Calls that
    /// wait for a guest end with [`MachineError::Ended`]; connections between guests and the host end; what the log
    /// says stays. A machine that was made after the checkpoint is stopped.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if the checkpoint is gone: nothing has happened then. The host refuses: the machines
    /// that could not go back are off.
    pub async fn roll_back(&self, to: &Checkpoint) -> Result<()> {
        let name = to.name();
        let gone = || {
            let what = format!(
                "checkpoint {name} is gone: the run went back to an earlier one, or has changed"
            );
            Err(MachineError::Usage(what).into())
        };
        let all = self.all_machines();
        // Out of its place, so that nobody goes back to it at the same time.
        let Some(world) = to.0.world().take() else { return gone() };
        let done =
            match world.machines.iter().all(|(machine, _)| all.iter().any(|one| one.is(machine))) {
                true => self.go_back(to, &world, &all).await,
                false => gone(),
            };
        *to.0.world() = Some(world);
        done
    }

    /// Sets the clocks of all guests that take commands to the present time.
    ///
    /// # Errors
    /// The first guest's error.
    pub async fn set_clocks(&self) -> Result<()> {
        for machine in self.who_answer() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let (seconds, millis) = (now.as_secs(), now.subsec_millis());
            // busybox takes whole seconds only.
            let set = format!("date -s @{seconds}.{millis:03} 2>/dev/null || date -s @{seconds}");
            machine.succeed(&[&set], None).await?;
        }
        Ok(())
    }

    /// Has all guests that take commands draw fresh random numbers, which the generation ID alone does not do for those
    /// without a driver for it.
    pub(crate) async fn reseed(&self) -> Result<()> {
        let machines = self.who_answer();
        let reseeded = machines.iter().map(async |machine| match machine.reseed().await {
            // How it ended is for whoever asks for it next.
            Err(_) if machine.status() != Status::Running => Ok(()),
            done => done,
        });
        try_join_all(reseeded).await.map(drop)
    }

    /// The machines that take commands. One that is paused would not answer.
    fn who_answer(&self) -> Vec<Machine> {
        let takes = |machine: &Machine| machine.status() == Status::Running && machine.is_up();
        self.all_machines().into_iter().filter(takes).collect()
    }

    async fn go_back(&self, to: &Checkpoint, world: &World, all: &[Machine]) -> Result<()> {
        let _step = self.logger().nested(format_args!("rolling back to checkpoint {}", to.name()));
        for machine in all {
            machine.cancel_start();
        }
        let _changing = join_all(all.iter().map(Machine::changing)).await;
        self.checkpoints().end(Some(to));
        let end = || End::WentBack(format!("checkpoint {}", to.name()));
        join_all(all.iter().map(|machine| {
            let known = world.machines.iter().any(|(one, _)| one.is(machine));
            machine.cut(if known { end() } else { End::Stopped })
        }))
        .await;
        for (switch, addresses) in &world.switches {
            switch.restore_addresses(addresses);
        }
        let dirs = Arc::clone(&world.dirs);
        blocking(move || dirs.put_back()).await?;
        let backs = world.machines.iter().map(|(machine, then)| machine.go_back(then));
        let backs = join_all(backs).await;
        let mut done = Ok(());
        for ((machine, _), back) in world.machines.iter().zip(backs) {
            let gone_on = match back {
                Ok(Some(back)) => machine.go_on(back).await,
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            done = done.and(gone_on);
        }
        join_all(world.machines.iter().map(|(machine, _)| machine.wait_until_back())).await;
        done
    }
}

impl Dirs {
    fn new(mut sources: Vec<PathBuf>) -> Result<Self, MachineError> {
        sources.sort();
        sources.dedup();
        sources.retain(|source| source.is_dir());
        let copies = Scratch::new().map_err(MachineError::file("make", std::env::temp_dir()))?;
        let dirs = Self { sources, copies };
        for (source, copy) in dirs.pairs() {
            let copied = fs::create_dir(&copy).and_then(|()| copy::mirror(source, &copy));
            copied
                .map_err(|error| {
                    let what = format!("its copy in {}: {error}", copy.display());
                    std::io::Error::new(error.kind(), what)
                })
                .map_err(MachineError::file("copy", source))?;
        }
        Ok(dirs)
    }

    fn put_back(&self) -> Result<(), MachineError> {
        self.pairs().filter(|(source, _)| source.is_dir()).try_for_each(|(source, copy)| {
            copy::mirror(&copy, source).map_err(MachineError::file("put back", source))
        })
    }

    /// Copies what was in some of them elsewhere: from each first of a pair, if it was there, to the second.
    fn copy_to(&self, pairs: &[(PathBuf, PathBuf)]) -> Result<(), MachineError> {
        for (source, copy) in self.pairs() {
            for (_, to) in pairs.iter().filter(|(from, _)| from == source) {
                let copied = fs::create_dir_all(to).and_then(|()| copy::mirror(&copy, to));
                copied.map_err(MachineError::file("make", to))?;
            }
        }
        Ok(())
    }

    fn pairs(&self) -> impl Iterator<Item = (&Path, PathBuf)> {
        let copy = |at: usize| self.copies.path().join(at.to_string());
        self.sources.iter().enumerate().map(move |(at, source)| (source.as_path(), copy(at)))
    }
}
