//! Forks: other worlds that go on from a checkpoint of a run, at the same time as the run.
//!
//! A fork copies the world, not a machine: its machines have the names, addresses and identities of the run's, and
//! networks of their own. So nothing in a guest has to change.

use std::sync::Arc;

use futures_util::future::{join_all, try_join_all};

use super::{Checkpoint, World};
use crate::driver::Driver;
use crate::error::{MachineError, Result};
use crate::machine::{Machine, Source};
use crate::task::blocking;

/// What a fork began with; nothing of it goes before the fork does.
pub(crate) struct Origin(Arc<World>);

impl Origin {
    /// The sources of its machines, each with whether it is one of `own`.
    pub(crate) fn sources(&self, own: &[Machine]) -> Vec<(Source, bool)> {
        let is_own = |machine: &Machine| own.iter().any(|one| one.is(machine));
        let machines = self.0.machines.iter().map(|(machine, _)| machine);
        machines.map(|machine| (machine.source(), is_own(machine))).collect()
    }
}

impl Driver {
    /// Makes another world of a checkpoint, which goes on from there while this run does too: the same machines with
    /// the same names and addresses, on networks of their own. It shares with this run the memory that neither changes,
    /// and what lay on disks. In the log, its name precedes those of its machines. [`Driver::close`] ends it, and so
    /// does the end of this run.
    ///
    /// A port of the host that leads to a guest is a free one in the fork, which the log names. What guests share with
    /// directories of the user's is shared by all worlds.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if the checkpoint is gone; the host has no room, or no descriptors left.
    pub async fn fork(&self, from: &Checkpoint, name: &str) -> Result<Arc<Self>> {
        let Some(world) = from.world() else {
            let what = format!("checkpoint {} is gone: it cannot be forked", from.name());
            return Err(MachineError::Usage(what).into());
        };
        let _step = self.logger().nested(format_args!("fork {name} of checkpoint {}", from.name()));
        let fork = Arc::new(self.beside(name, Origin(Arc::clone(&world)))?);
        self.remember(&fork)?;
        let begun = fork.begin(&world).await;
        if begun.is_err() {
            fork.close().await;
        }
        begun.map(|()| fork)
    }

    /// Makes the machines, which are off, what those of the world were.
    async fn begin(&self, world: &World) -> Result<()> {
        let machines = self.all_machines();
        let changing = join_all(machines.iter().map(Machine::changing)).await;
        let pairs = || world.machines.iter().zip(&machines);
        let dirs = pairs().flat_map(|((from, _), to)| {
            let [from, to] = [from, to].map(|machine| machine.writable_dirs().0);
            from.into_iter().zip(to)
        });
        let (dirs, copies) = (dirs.collect::<Vec<_>>(), Arc::clone(&world.dirs));
        blocking(move || copies.copy_to(&dirs)).await?;
        let backs = try_join_all(pairs().map(|((_, then), to)| to.fork(then))).await?;
        for (machine, back) in machines.iter().zip(backs) {
            if let Some(back) = back {
                machine.go_on(back).await?;
            }
        }
        join_all(machines.iter().map(Machine::wait_until_back)).await;
        drop(changing);
        self.reseed().await
    }
}
