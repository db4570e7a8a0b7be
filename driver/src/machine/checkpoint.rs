//! A machine's part in a checkpoint of the whole run.
//!
//! Every machine is frozen before any is kept, and switched off before any goes back, so that no frame is half way.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::MutexGuard;

use super::backend::{Checkpoints, Kept, Started};
use super::console::Mark;
use super::power::{Guest, Launched};
use super::session::Environment;
use super::{Machine, Run, Source, State, Status};
use crate::error::{End, MachineError, Result};

/// How long a guest's agent may take to answer after going back. Emulated guests are slow.
const BACK_WITHIN: Duration = Duration::from_secs(30);

/// What a machine was at a checkpoint.
pub(crate) struct Then {
    console: Mark,
    was: Was,
}

enum Was {
    /// Off since it was made; it may have ended before its first boot.
    Off(Option<Arc<End>>),
    Up(Up),
}

/// A machine that was up.
pub(super) struct Up {
    pub(super) kept: Kept,
    pub(super) how: How,
}

/// How a machine was up.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct How {
    paused: bool,
    allow_reboot: bool,
    boots: u32,
    /// The backdoor's shell was there, and waited for a command.
    shell: bool,
    /// Root's login environment, which the next command need not ask for.
    environment: Option<Environment>,
}

impl How {
    /// The same in a run that lets guests reset themselves, or not.
    pub(super) fn with_reboots(&self, allow_reboot: bool) -> Self {
        Self { allow_reboot, ..self.clone() }
    }
}

/// A machine that went back and stands still.
pub(crate) struct Back {
    pub(super) started: Started,
    pub(super) how: How,
}

impl Then {
    pub(super) fn up(&self) -> Option<&Up> {
        match &self.was {
            Was::Up(up) => Some(up),
            Was::Off(_) => None,
        }
    }
}

impl Machine {
    /// Keeps everybody else from starting, stopping, pausing or resuming it.
    pub(crate) async fn changing(&self) -> MutexGuard<'_, ()> {
        self.inner.changing.lock().await
    }

    /// # Errors
    /// [`MachineError::Usage`] if there can be no checkpoint of it now, and why.
    pub(crate) fn check_checkpoint(&self) -> Result<()> {
        let refuse = |why: &str| {
            Err(MachineError::Usage(format!("no checkpoint: {} {why}", self.name())).into())
        };
        if self.inner.backend.checkpoints().is_none() {
            return refuse("runs under QEMU, which firn cannot take back");
        }
        match self.status() {
            Status::Starting => refuse("is starting: wait until it takes commands"),
            Status::Stopping => {
                refuse("is ending: wait until it is off, as wait_for_shutdown() does")
            }
            Status::Running | Status::Paused if !self.connected() => refuse(
                "does not take commands yet: wait until it has booted, for example with wait_for_unit()",
            ),
            Status::Running | Status::Paused => Ok(()),
            Status::Off | Status::Ended => match self.written_image()? {
                Some(image) => refuse(&format!(
                    "is off, and what it writes to {} could not be taken back: start it before the checkpoint",
                    image.display()
                )),
                None => Ok(()),
            },
        }
    }

    /// An image of a disk that it could write to, if there is one already, or what is written is kept elsewhere.
    fn written_image(&self) -> Result<Option<PathBuf>> {
        let (_, disks) = self.devices()?;
        let mut images = disks.into_iter().filter(|disk| !disk.read_only).map(|disk| disk.image);
        let held = self.checkpoints()?.held();
        Ok(images.find(|image| held || image.exists()))
    }

    /// Stops its guest until [`Self::thaw`]; false if it stands still already.
    ///
    /// # Errors
    /// It has ended meanwhile.
    pub(crate) async fn freeze(&self) -> Result<bool> {
        if self.status() != Status::Running {
            return Ok(false);
        }
        self.inner.clock.pause();
        let frozen = self.inner.backend.pause().await;
        if frozen.is_err() {
            self.inner.clock.resume();
            self.run()?;
        }
        frozen.map(|()| true)
    }

    /// Lets the guest go on.
    pub(crate) async fn thaw(&self) -> Result<()> {
        self.inner.clock.resume();
        self.inner.backend.resume().await
    }

    /// Keeps what the machine, which is frozen, is.
    ///
    /// # Errors
    /// The host has no room, or a command is running over the backdoor.
    pub(crate) async fn keep(&self) -> Result<Then> {
        let console = self.inner.console.mark();
        let (run, paused) = match &*self.inner.state.borrow() {
            State::Running(run) => (run.clone(), false),
            State::Paused(run) => (run.clone(), true),
            State::Ended(end) => return Ok(Then { console, was: Was::Off(Some(Arc::clone(end))) }),
            _ => return Ok(Then { console, was: Was::Off(None) }),
        };
        let shell = run.access.shell();
        if shell.is_some_and(|shell| !shell.is_idle()) {
            let what =
                format!("no checkpoint: a command is running on {} over the backdoor", self.name());
            return Err(MachineError::Usage(what).into());
        }
        let Run { access, allow_reboot, boots, .. } = &run;
        let (allow_reboot, boots, environment) = (*allow_reboot, *boots, access.environment());
        let how = How { paused, allow_reboot, boots, shell: shell.is_some(), environment };
        let up = Up { kept: self.checkpoints()?.keep().await?, how };
        Ok(Then { console, was: Was::Up(up) })
    }

    /// Gives up what was kept of the machine, which has been frozen since then.
    pub(crate) async fn give_up(&self, then: &Then) {
        if let (Some(up), Some(checkpoints)) = (then.up(), self.inner.backend.checkpoints())
            && let Err(error) = checkpoints.give_up(&up.kept).await
        {
            tracing::debug!(machine = self.name(), %error, "a checkpoint of no use stays");
        }
    }

    /// Ends the guest. What it has written to its disks stays where it can be taken back.
    pub(crate) async fn cut(&self, end: End) {
        self.request_end(end);
        self.wait_for_end().await;
    }

    /// Makes the machine, which is off, what it was; None if that is off.
    ///
    /// # Errors
    /// KVM or the host refuse. The machine stays off.
    pub(crate) async fn go_back(&self, then: &Then) -> Result<Option<Back>> {
        self.inner.console.go_back(&then.console);
        match &then.was {
            Was::Off(end) => {
                // An earlier checkpoint of it may need what was only switched off. It had no image to write to then,
                // or there would not be this one.
                if !self.checkpoints()?.held() {
                    self.discard().await;
                    // Those which the start made, for the next one to make anew.
                    while let Some(image) = self.written_image()? {
                        std::fs::remove_file(&image)
                            .map_err(MachineError::file("remove", &image))?;
                    }
                }
                let state = end.clone().map_or(State::Off, State::Ended);
                self.inner.state.send_replace(state);
                Ok(None)
            }
            Was::Up(up) => {
                let dirs = self.dirs().clone();
                dirs.make()?;
                let started = self.checkpoints()?.go_back(&dirs, &up.kept).await?;
                Ok(Some(Back { started, how: up.how.clone() }))
            }
        }
    }

    /// Makes a fresh machine what another one of the same description was; None if that is off. `then` has to outlive
    /// it.
    ///
    /// # Errors
    /// KVM or the host refuse.
    pub(crate) async fn fork(&self, then: &Then) -> Result<Option<Back>> {
        let Was::Up(up) = &then.was else { return Ok(None) };
        let (dirs, console) = (self.dirs().clone(), Arc::clone(&self.inner.console));
        let started = self.checkpoints()?.fork(dirs, console, &up.kept).await?;
        Ok(Some(Back { started, how: up.how.clone() }))
    }

    /// Another machine of its description, which is off.
    pub(crate) fn source(&self) -> Source {
        Source::clone(&self.inner.source)
    }

    /// Lets a machine that went back go on.
    ///
    /// # Errors
    /// The host has no threads left; it ends then.
    pub(crate) async fn go_on(&self, back: Back) -> Result<()> {
        let Back { started, how: How { paused, allow_reboot, boots, shell, environment } } = back;
        let launched = Launched::new(started, Guest::Back { shell, environment });
        if paused {
            self.inner.clock.pause();
        }
        self.supervise_as(launched, |run| {
            let run = Run { allow_reboot, boots, ..run };
            if paused { State::Paused(run) } else { State::Running(run) }
        });
        if paused { Ok(()) } else { self.inner.backend.resume().await }
    }

    /// Waits until a machine that went on takes commands again. What keeps it from that, the next call says.
    pub(crate) async fn wait_until_back(&self) {
        if self.status() == Status::Running {
            let _ = self
                .inner
                .clock
                .timeout(BACK_WITHIN, self.unless_ended(self.await_session(true)))
                .await;
        }
    }

    /// Ends it for good if it was only switched off.
    pub(crate) async fn discard(&self) {
        if let Some(checkpoints) = self.inner.backend.checkpoints() {
            checkpoints.discard().await;
        }
    }

    /// The directories of the run that its guest may write to; and the shares that it may, but that are the user's.
    pub(crate) fn writable_dirs(&self) -> (Vec<PathBuf>, Vec<String>) {
        let dirs = self.dirs().clone();
        let node = &self.inner.node;
        let mut own =
            if node.exchange { vec![dirs.shared.clone(), dirs.exchange()] } else { Vec::new() };
        let mut others = Vec::new();
        for share in node.shares.iter().filter(|share| !share.read_only) {
            match share.source.starts_with(&dirs.state) || own.contains(&share.source) {
                true => own.push(share.source.clone()),
                false => others.push(format!("{} ({})", share.tag, share.source.display())),
            }
        }
        (own, others)
    }

    pub(super) fn checkpoints(&self) -> Result<&dyn Checkpoints> {
        self.inner.backend.checkpoints().ok_or_else(|| self.not_running())
    }
}
