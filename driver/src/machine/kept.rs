//! A machine's part in worlds that are kept on disk.

use std::sync::Arc;

use firn_vmm::spec::MachineSpec;
use firn_vmm::vm::KeptVm;
use serde::{Deserialize, Serialize};

use super::checkpoint::How;
use super::{Back, Create, ExecOptions, Machine, Then};
use crate::config::BackendKind;
use crate::error::{MachineError, Result};

/// Waits until systemd, if that is there, has started everything that belongs to its default target.
const BOOTED: &str = "! test -d /run/systemd/system || systemctl is-system-running --wait";

/// What is kept of a machine beside what the monitor keeps.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeptMachine {
    name: String,
    how: How,
    /// Whether the cables of its cards were plugged in.
    links: Vec<bool>,
    /// What it has printed.
    console: String,
}

impl KeptMachine {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl Machine {
    /// Why it cannot be kept on disk, if that is so.
    pub(crate) fn unkeepable(&self) -> Result<Option<String>> {
        let name = self.name();
        if self.inner.node.backend() == BackendKind::Qemu {
            return Ok(Some(format!("{name} runs under QEMU")));
        }
        if self.booted() {
            return Ok(Some(format!("{name} has been started already")));
        }
        let dirs = self.dirs().clone();
        if dirs.keep || dirs.borrowed {
            return Ok(Some(format!("the state of {name} is kept after the run")));
        }
        let (_, disks) = self.devices()?;
        if let Some(disk) =
            disks.iter().find(|disk| !disk.read_only && !disk.image.starts_with(&dirs.state))
        {
            let image = disk.image.display();
            return Ok(Some(format!("{name} writes to {image}, which is not the run's alone")));
        }
        let (_, others) = self.writable_dirs();
        Ok(others.first().map(|share| format!("{name} can write to share {share}, which is yours")))
    }

    /// What it would be made of if it were started now.
    pub(crate) async fn spec(&self) -> Result<MachineSpec> {
        let dirs = self.dirs().clone();
        self.inner.source.spec(&self.inner.node, &dirs, &self.inner.log).await
    }

    /// Waits until its boot is done: it takes commands, and systemd has started what belongs to its default target.
    pub(crate) async fn wait_until_booted(&self) -> Result<()> {
        self.connect().await?;
        self.execute(BOOTED, ExecOptions::default()).await.map(drop)
    }

    /// Writes what a machine that was up was at a checkpoint to files.
    ///
    /// # Errors
    /// It was off, or had no room for an image; the files cannot be written.
    pub(crate) async fn write(&self, then: &Then, create: Create) -> Result<KeptMachine> {
        let Some(up) = then.up() else { return Err(self.not_running()) };
        if let Some(tag) = up.kept.by_virtiofs().first() {
            // The next run has an image there, or has no room either and boots.
            let name = self.name();
            let what = format!("{name} has share {tag} by virtio-fs, and not as an image");
            return Err(MachineError::Usage(what).into());
        }
        self.checkpoints()?.write(&up.kept, create).await?;
        Ok(KeptMachine {
            name: self.name().to_owned(),
            how: up.how.clone(),
            links: up.kept.links().to_vec(),
            console: self.inner.console.text(),
        })
    }

    /// Makes a machine that is off what one of another run was, as if it had been started with `allow_reboot`.
    ///
    /// # Errors
    /// KVM or the host refuse; it does not fit.
    pub(crate) async fn go_on_from(
        &self,
        kept: &KeptMachine,
        from: KeptVm,
        allow_reboot: bool,
    ) -> Result<Back> {
        let dirs = self.dirs().clone();
        dirs.make()?;
        let console = Arc::clone(&self.inner.console);
        console.begin_with(&kept.console);
        let started = self.checkpoints()?.go_on(dirs, console, from, &kept.links).await?;
        Ok(Back { started, how: kept.how.with_reboots(allow_reboot) })
    }

    /// Removes what a start from a kept world has left, for a boot.
    pub(crate) async fn begin_afresh(&self) -> Result<()> {
        self.stop().await;
        // It may not have come as far as to be this machine's.
        self.inner.backend.stop().await;
        self.cleanup_state_dir().await?;
        let shared = self.shared_dir();
        crate::private::remove(&shared)
            .and_then(|()| crate::private::make(&shared))
            .map_err(MachineError::file("make", &shared))?;
        self.inner.console.restart();
        Ok(())
    }
}
