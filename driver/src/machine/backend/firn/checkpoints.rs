//! Going back: what a machine keeps while there are checkpoints of it.

use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use firn_net_switch::NetPort;
use firn_vmm::Cancel;
use firn_vmm::device::boot_timer::Mark;
use firn_vmm::spec::MachineSpec;
use firn_vmm::vm::{Checkpoint, KeptVm, Vm, VmError};
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use super::{Firn, Running, lock};
use crate::error::{MachineError, Result};
use crate::machine::Dirs;
use crate::machine::backend::{Checkpoints, Create, Event, Parts, Started};
use crate::machine::console::Console;
use crate::machine::setup::Tags;
use crate::task::blocking;

/// What a machine was. While this exists, its end only switches it off.
pub(in crate::machine) struct Kept {
    checkpoint: Arc<Checkpoint>,
    /// Whether the cables of its cards were plugged in.
    links: Vec<bool>,
    /// The shares that its guest has by virtio-fs because there was no room for them as images.
    by_virtiofs: Tags,
    _held: Arc<()>,
}

impl Kept {
    /// Whether the cables of its cards were plugged in.
    pub(in crate::machine) fn links(&self) -> &[bool] {
        &self.links
    }

    /// The shares that its guest has by virtio-fs because there was no room for them as images.
    pub(in crate::machine) fn by_virtiofs(&self) -> &Tags {
        &self.by_virtiofs
    }
}

impl Checkpoints for Firn {
    fn keep(&self) -> BoxFuture<'_, Result<Kept>> {
        Box::pin(async {
            let checkpoint = self.with(|running| running.vm.checkpoint()).await?;
            let failed = |error| self.monitor_error("cannot make a checkpoint", error);
            Ok(Kept {
                checkpoint: Arc::new(checkpoint.map_err(failed)?),
                links: self.parts.ports.iter().map(|port| port.link_up()).collect(),
                by_virtiofs: lock(&self.by_virtiofs).clone(),
                _held: Arc::clone(&self.held),
            })
        })
    }

    fn give_up<'a>(&'a self, kept: &'a Kept) -> BoxFuture<'a, Result<()>> {
        let checkpoint = Arc::clone(&kept.checkpoint);
        Box::pin(self.with(move |running| running.vm.give_up(&checkpoint)))
    }

    fn go_back<'a>(&'a self, dirs: &'a Dirs, to: &'a Kept) -> BoxFuture<'a, Result<Started>> {
        Box::pin(async move {
            self.set_links(&to.links);
            let checkpoint = Arc::clone(&to.checkpoint);
            self.again(dirs, "cannot go back", move |running| running.vm.roll_back(&checkpoint))
                .await?
                .ok_or_else(|| MachineError::NotRunning { machine: self.name() }.into())
        })
    }

    fn fork<'a>(
        &'a self,
        dirs: Dirs,
        console: Arc<Console>,
        from: &'a Kept,
    ) -> BoxFuture<'a, Result<Started>> {
        Box::pin(async move {
            self.set_links(&from.links);
            self.open_user_network(&dirs, true).await?;
            let checkpoint = Arc::clone(&from.checkpoint);
            let forked = async {
                let Parts { source, node, .. } = &self.parts;
                let spec = source.spec_again(node, &dirs, &from.by_virtiofs).await?;
                let fork = move |spec: &MachineSpec, host| Vm::fork(spec, host, &checkpoint);
                self.launch(spec, &dirs, console, fork).await
            };
            let started = self.taken_over(forked.await).await?;
            *lock(&self.forked) = Some(Arc::clone(&self.held));
            lock(&self.by_virtiofs).clone_from(&from.by_virtiofs);
            Ok(started)
        })
    }

    fn write<'a>(&'a self, kept: &'a Kept, create: Create) -> BoxFuture<'a, Result<()>> {
        let checkpoint = Arc::clone(&kept.checkpoint);
        Box::pin(async move {
            let write = move |running: &mut Running| {
                running.vm.write_checkpoint(&checkpoint, &mut |name| create(name))
            };
            let written = self.with(write).await?;
            written.map_err(|error| self.monitor_error("cannot write a checkpoint", error).into())
        })
    }

    fn go_on(
        &self,
        dirs: Dirs,
        console: Arc<Console>,
        from: KeptVm,
        links: &[bool],
    ) -> BoxFuture<'_, Result<Started>> {
        *lock(&self.cancel) = Cancel::default();
        self.set_links(links);
        Box::pin(async move {
            self.open_user_network(&dirs, false).await?;
            let started = async {
                let (parts, make) =
                    (&self.parts, move |spec: &_, host| Vm::go_on(spec, host, &from));
                let spec = parts.source.spec(&parts.node, &dirs, &parts.log).await?;
                self.launch(spec, &dirs, console, make).await
            };
            self.taken_over(started.await).await
        })
    }

    fn held(&self) -> bool {
        Arc::strong_count(&self.held) > 1
    }

    fn discard(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let running = Arc::clone(&self.running);
            let ended = blocking(move || {
                let kept = lock(&running).take_if(|running| running.off);
                kept.map(|mut kept| kept.end()).is_some()
            });
            if ended.await {
                self.close_user_network().await;
            }
        })
    }
}

impl Firn {
    fn set_links(&self, links: &[bool]) {
        for (port, up) in self.parts.ports.iter().zip(links) {
            port.set_link(*up);
        }
    }

    /// Tells of the boot of a machine that goes on from another's life; without one, closes its user network.
    async fn taken_over(&self, started: Result<Started>) -> Result<Started> {
        if started.is_err() {
            self.close_user_network().await;
        } else if let Some(running) = &*lock(&self.running) {
            announce(&lock(&running.events));
        }
        started
    }

    /// Starts the machine that was only switched off, if there is one: on its disks lies what may be taken back.
    pub(super) async fn start_kept(&self, dirs: &Dirs) -> Result<Option<Started>> {
        let started = self.again(dirs, "cannot start it again", |running| running.vm.reset());
        let started = started.await?;
        if started.is_some() {
            self.with(|running| running.vm.start())
                .await?
                .map_err(|error| self.start_error(error))?;
        }
        Ok(started)
    }

    /// Does something with the machine that is there, whatever became of it, that makes it ready to start.
    async fn again(
        &self,
        dirs: &Dirs,
        what: &'static str,
        ready: impl FnOnce(&mut Running) -> Result<(), VmError> + Send + 'static,
    ) -> Result<Option<Started>> {
        let running = Arc::clone(&self.running);
        let made = blocking(move || {
            let mut running = lock(&running);
            let running = running.as_mut()?;
            if let Err(error) = ready(running) {
                return Some(Err(error));
            }
            let (sender, events) = mpsc::unbounded_channel();
            announce(&sender);
            *lock(&running.events) = sender;
            (running.off, running.paused) = (false, false);
            let started = drain(&running.shell)
                .and_then(|()| drain(&running.agent))
                .and_then(|()| running.started(events));
            Some(Ok(started))
        });
        let Some(made) = made.await else { return Ok(None) };
        let started = made.map_err(|error| self.monitor_error(what, error))?;
        let started = started.map_err(|error| self.start_error(error))?;
        if let Some(running) = &mut *lock(&self.running) {
            running.close_to_viewers();
            running.viewers = self.open_to_viewers(&running.vm, dirs);
        }
        Ok(Some(started))
    }
}

impl Running {
    /// Ends its guest, but keeps what it can go back with; returns when it reached which stage of its boot.
    pub(super) fn switch_off(&mut self) -> Vec<Mark> {
        self.close_to_viewers();
        self.vm.cut_power();
        self.off = true;
        self.vm.boot_marks()
    }
}

/// Tells of a boot: of a guest that goes on in the middle of its life the monitor does not.
pub(super) fn announce(events: &mpsc::UnboundedSender<Event>) {
    let _ = events.send(Event::Booting);
}

/// Throws away what an end that is over has sent.
fn drain(mut stream: &UnixStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
