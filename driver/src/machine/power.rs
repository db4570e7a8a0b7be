//! From the start of a machine to its end.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use firn_vmm::device::boot_timer::Mark;
use serde_json::json;
use tokio::sync::{mpsc, watch};

use super::access::{Access, By};
use super::backend::{Event, Started};
use super::session::{Environment, Session};
use super::{DEFAULT_TIMEOUT, ExecOptions, Machine, Run, State, Status};
use crate::error::{End, MachineError, Result, chain};
use crate::private;
use crate::task::to_its_end;

/// A guest that ends takes its agent with it, sometimes a moment before its end is seen.
pub(super) const END_AFTER_LOSS: Duration = Duration::from_millis(1500);
/// A kernel that panicked goes on to print why.
const PRINT_AFTER_PANIC: Duration = Duration::from_millis(300);
/// A guest that was told to restart and has not done so for so long may never do it.
const SLOW_REBOOT: Duration = Duration::from_secs(60);
/// The reason for a panic that is not on the serial console.
const UNKNOWN_REASON: &str = "its kernel printed no reason on the serial console";

/// A supervised machine, between its start and its end.
pub(super) struct Launched {
    events: mpsc::UnboundedReceiver<Event>,
    /// The host's ends of the guest's console ports: hvc0, and the agent's.
    hvc0: Arc<UnixStream>,
    agent: Option<UnixStream>,
    guest: Guest,
}

/// What is to be expected of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// It boots.
    Fresh,
    /// It boots again: its ports may hold bytes of the earlier boot.
    Again,
    /// It goes on after going back to a checkpoint, where its agent may be in the middle of anything.
    Back {
        /// The backdoor's shell waits for a command.
        shell: bool,
        /// What root's environment is there, if the agent has said it.
        environment: Option<Environment>,
    },
}

impl Launched {
    pub(super) fn new(Started { events, shell, agent }: Started, guest: Guest) -> Self {
        Self { events, hvc0: Arc::new(shell), agent, guest }
    }
}

impl Machine {
    /// Starts the machine unless it is running. Does not wait for the guest to boot. Without `allow_reboot`, a guest
    /// that resets itself ends.
    ///
    /// # Errors
    /// If the machine cannot be created.
    pub async fn start(&self, allow_reboot: bool) -> Result<()> {
        let machine = self.clone();
        to_its_end(async move {
            let _changing = machine.inner.changing.lock().await;
            if machine.status() == Status::Stopping {
                machine.wait_for_end().await;
            }
            if machine.booted() {
                return Ok(());
            }
            machine.start_now(allow_reboot).await
        })
        .await
    }

    async fn start_now(&self, allow_reboot: bool) -> Result<()> {
        self.log("starting vm");
        let before = self.inner.state.send_replace(State::Starting);
        self.inner.console.restart();
        let (dirs, console) = (self.dirs().clone(), Arc::clone(&self.inner.console));
        let started = match self.inner.backend.start(dirs, console, allow_reboot).await {
            Ok(started) => started,
            Err(error) => {
                self.inner.state.send_replace(before);
                return Err(error);
            }
        };
        let launched = Launched::new(started, Guest::Fresh);
        self.supervise_as(launched, |run| State::Running(Run { allow_reboot, ..run }));
        Ok(())
    }

    /// Takes a machine that was started into the state that `becomes` makes of its run, and attends to it.
    pub(super) fn supervise_as(&self, launched: Launched, becomes: impl FnOnce(Run) -> State) {
        let (stop, stopped) = watch::channel(None);
        let back = matches!(launched.guest, Guest::Back { .. });
        let access = Access::new(Arc::clone(&launched.hvc0), back);
        let number = self.inner.runs.fetch_add(1, Ordering::Relaxed);
        let before = self.inner.state.borrow().end();
        let run = Run { number, before, stop, access, allow_reboot: false, boots: 1 };
        let state = becomes(run);
        let allow_reboot = state.run().is_some_and(|run| run.allow_reboot);
        self.inner.state.send_replace(state);
        tokio::spawn(self.clone().supervise(launched, stopped, allow_reboot));
    }

    /// Freezes the guest until [`Self::resume`]: its vCPUs, its devices, and the timeouts of all calls that wait for
    /// it. Afterwards its clock shows the right time, so over the backdoor shell, where the guest's `timeout` ends
    /// commands, one that was running may end early. Does nothing if it is paused.
    ///
    /// # Errors
    /// [`MachineError::NotRunning`] or [`MachineError::Ended`] if it is not running.
    pub async fn pause(&self) -> Result<()> {
        let machine = self.clone();
        to_its_end(async move {
            let _changing = machine.inner.changing.lock().await;
            machine.run()?;
            if machine.status() == Status::Paused {
                return Ok(());
            }
            let inner = &machine.inner;
            machine.freeze().await?;
            let stands = inner.state.send_if_modified(|state| match state {
                State::Running(run) => {
                    *state = State::Paused(run.clone());
                    true
                }
                _ => false,
            });
            if !stands {
                // It has ended meanwhile.
                inner.clock.resume();
                return machine.run().map(drop);
            }
            inner.events.tell("STOP", &json!({}));
            Ok(())
        })
        .await
    }

    /// Resumes a guest after [`Self::pause`]. Does nothing if it is running.
    ///
    /// # Errors
    /// Those of [`Self::pause`].
    pub async fn resume(&self) -> Result<()> {
        let machine = self.clone();
        to_its_end(async move {
            let _changing = machine.inner.changing.lock().await;
            machine.run()?;
            if machine.status() != Status::Paused {
                return Ok(());
            }
            let inner = &machine.inner;
            inner.backend.resume().await?;
            inner.state.send_if_modified(|state| match state {
                State::Paused(run) => {
                    *state = State::Running(run.clone());
                    true
                }
                _ => false,
            });
            inner.clock.resume();
            inner.events.tell("RESUME", &json!({}));
            Ok(())
        })
        .await
    }

    /// Writes the guest's dirty data back.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub async fn sync(&self) -> Result<()> {
        let session = self.session().await?;
        self.answered(session.sync(), || "cannot sync".to_owned()).await
    }

    /// Has the guest draw fresh random numbers: it is a copy of another's.
    pub(crate) async fn reseed(&self) -> Result<()> {
        let session = self.session().await?;
        self.answered(session.reseed(), || "cannot reseed its random numbers".to_owned()).await
    }

    /// Starts the machine if it is off, and waits until it takes commands.
    ///
    /// # Errors
    /// If it cannot be started, ends, or has ended by itself without a call having noticed.
    pub async fn connect(&self) -> Result<()> {
        self.session().await.map(drop)
    }

    /// Continues from a backdoor in the initrd to that of the system itself.
    ///
    /// # Errors
    /// Those of [`Machine::wait_for_unit`].
    pub async fn switch_root(&self) -> Result<()> {
        self.wait_for_unit("initrd.target", None, DEFAULT_TIMEOUT).await?;
        let session = self.session().await?;
        let switch = "systemctl isolate --no-block initrd-switch-root.target";
        let options = ExecOptions { check_output: false, ..ExecOptions::default() };
        self.execute(switch, options).await?;
        self.unless_ended(async {
            self.left(&session).await;
            Ok(())
        })
        .await?;
        self.connect().await
    }

    /// Reboots the guest and waits until it restarts; it may still be booting when this returns. Uses Ctrl+Alt+Delete
    /// if there is a keyboard.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if it was started without `allow_reboot`; otherwise those of [`Self::shutdown`].
    pub async fn reboot(&self) -> Result<()> {
        // QEMU's guests need not have a driver for the keyboard that they have.
        let typed = self.booted() && !(self.connected() && self.inner.backend.monitor().is_some());
        let keyboard = match typed {
            true => self.inner.backend.keyboard().await?,
            false => None,
        };
        let session = match keyboard {
            Some(_) => None,
            None => Some(self.session().await?),
        };
        let Run { boots, allow_reboot, .. } = self.run()?;
        if !allow_reboot {
            return Err(MachineError::Usage(format!(
                "{} cannot reboot: it needs start(allow_reboot=True)",
                self.name()
            ))
            .into());
        }
        let again = async {
            match session {
                None => self.send_key("ctrl-alt-delete", None, true).await?,
                // It may restart before it has answered.
                Some(session) => match session.reboot().await {
                    Err(error) if !error.lost() => {
                        return Err(self.session_error("cannot reboot".to_owned(), error).await);
                    }
                    _ => {}
                },
            }
            let mut state = self.inner.state.subscribe();
            let booted = |state: &State| state.run().is_some_and(|run| run.boots > boots);
            let mut restarts = std::pin::pin!(state.wait_for(booted));
            // Going on would mean talking to the system that is to restart.
            if self.inner.clock.timeout(SLOW_REBOOT, &mut restarts).await.is_none() {
                self.log(format_args!(
                    "the guest has not restarted for {} seconds; where Ctrl+Alt+Delete is ignored it never will",
                    SLOW_REBOOT.as_secs()
                ));
                let _ = restarts.await;
            }
            Ok(())
        };
        self.unless_ended(again).await
    }

    /// Powers the machine off and waits until it is. Does nothing if it is off.
    ///
    /// # Errors
    /// If the guest cannot be asked to, or ends in another way.
    pub async fn shutdown(&self) -> Result<()> {
        match self.status() {
            Status::Off | Status::Starting | Status::Ended => {
                self.inner.state.send_if_modified(forget_end);
                return Ok(());
            }
            Status::Running | Status::Paused => {
                let session = self.session_even_down().await?;
                self.ask_for_power_off(&session).await?;
            }
            // It is ending by itself.
            Status::Stopping => {}
        }
        self.wait_for_shutdown().await
    }

    /// Makes the guest power off without waiting for it. A guest that ends before it has answered is fine.
    pub(super) async fn ask_for_power_off(&self, session: &Session) -> Result<()> {
        match self.unless_ended(async { Ok(session.power_off().await) }).await {
            Ok(Err(error)) if !error.lost() => {
                Err(self.session_error("cannot power off".to_owned(), error).await)
            }
            _ => Ok(()),
        }
    }

    /// Waits until the machine is off: it powered off, reset itself, or panicked. Returns at once if it is off.
    ///
    /// # Errors
    /// If the guest ends in another way.
    pub async fn wait_for_shutdown(&self) -> Result<()> {
        let _step = self.nested("waiting for the VM to power off");
        let mut state = self.inner.state.subscribe();
        let ended = state.wait_for(State::is_over).await;
        let end = match ended.as_deref() {
            Ok(State::Ended(end)) => Arc::clone(end),
            _ => return Ok(()),
        };
        drop(ended);
        self.inner.state.send_if_modified(forget_end);
        if end.is_off() { Ok(()) } else { Err(self.ended_error(&end)) }
    }

    /// Stops the machine at once, as if the power failed. Does nothing if it is off.
    pub async fn crash(&self) {
        if self.booted() {
            self.log("forced crash");
        }
        self.stop().await;
    }

    /// Stops the machine and removes its state, unless that is to be kept.
    ///
    /// # Errors
    /// If files cannot be removed.
    pub async fn release(&self) -> Result<()> {
        self.stop().await;
        if self.dirs().keep || self.dirs().borrowed {
            return Ok(());
        }
        self.cleanup_state_dir().await
    }

    /// Removes its state even if it is to be kept; the next start creates it anew.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if it is running; if files cannot be removed.
    pub async fn cleanup_state_dir(&self) -> Result<()> {
        let _changing = self.inner.changing.lock().await;
        if self.booted() {
            let what = format!("{} is running and needs its state", self.name());
            return Err(MachineError::Usage(what).into());
        }
        let own = {
            let dirs = self.dirs();
            dirs.by_hand && dirs.keep
        };
        if own {
            let what = format!("the state of {} is in a directory of yours", self.name());
            return Err(MachineError::Usage(what).into());
        }
        let dir = self.state_dir();
        // Gigabytes may lie there.
        let removed = tokio::task::spawn_blocking(move || private::remove(&dir));
        let removed = removed.await.map_err(std::io::Error::other).flatten();
        removed.map_err(|e| MachineError::file("remove", self.state_dir())(e).into())
    }

    /// Presses the power button: a guest with systemd-logind, or another that listens, powers off.
    ///
    /// # Errors
    /// If it is not running.
    pub async fn press_power_button(&self) -> Result<()> {
        self.run()?;
        self.inner.backend.press_power_button().await
    }

    /// Waits until it is not running, without acknowledging its end.
    pub async fn wait_for_end(&self) {
        let mut state = self.inner.state.subscribe();
        // The sender lives in self.
        let _ = state.wait_for(State::is_over).await;
    }

    /// When its latest boot reached its stages, once that has ended.
    #[must_use]
    pub fn boot_marks(&self) -> Vec<Mark> {
        self.inner.backend.boot_marks()
    }

    /// Stops it without logging, and waits until nothing of it is left.
    pub(crate) async fn stop(&self) {
        // A machine that is being started is stopped once its start has succeeded or failed.
        self.cancel_start();
        let _changing = self.inner.changing.lock().await;
        self.request_stop();
        self.wait_for_end().await;
        self.inner.state.send_if_modified(forget_end);
    }

    /// Has a start that is under way fail soon.
    pub(crate) fn cancel_start(&self) {
        if self.status() == Status::Starting {
            self.inner.backend.cancel_start();
        }
    }

    /// Asks it to end, without waiting.
    pub(crate) fn request_stop(&self) {
        self.request_end(End::Stopped);
    }

    pub(super) fn request_end(&self, end: End) {
        if let Some(run) = self.inner.state.borrow().run() {
            run.stop.send_replace(Some(end));
        }
    }

    /// Supervises a machine until its end, as a task of its own.
    async fn supervise(
        self,
        mut launched: Launched,
        mut stopped: watch::Receiver<Option<End>>,
        allow_reboot: bool,
    ) {
        let (finish, finished) = watch::channel(false);
        let shown = tokio::spawn({
            let (machine, console) = (self.clone(), Arc::clone(&self.inner.console));
            let log = self.inner.log.clone();
            let from = console.position(launched.guest == Guest::Fresh);
            async move {
                let name = log.prefix().unwrap_or(machine.name());
                console.show(name, &log, from, finished).await
            }
        });
        let end = loop {
            let end = self.attend(&mut launched, &mut stopped).await;
            self.inner.events.ended(&end);
            if end != End::Reset || !allow_reboot {
                break end;
            }
            self.log("rebooting");
            if let Err(error) = self.reset(&launched).await {
                break End::Failed(chain(&error));
            }
            launched.guest = Guest::Again;
        };
        let run = self.inner.state.send_replace(State::Stopping);
        // Calls that waited for a paused machine now wait for its end.
        self.inner.clock.resume();
        self.inner.backend.stop().await;
        // The console's last lines come before any message about the end.
        finish.send_replace(true);
        let _ = shown.await;
        if !matches!(end, End::Stopped | End::WentBack(_)) {
            self.log(&end);
        }
        if let Some(run) = run.run() {
            run.access.abandon();
        }
        self.inner.state.send_replace(State::Ended(Arc::new(end)));
    }

    /// Restarts a machine that its guest has reset: the same one, with its disks and the host's ends.
    async fn reset(&self, launched: &Launched) -> Result<()> {
        // Calls that wait for the old guest end before the new one says anything.
        let access = Access::new(Arc::clone(&launched.hvc0), false);
        self.inner.state.send_if_modified(|state| {
            let Some(run) = state.run_mut() else { return false };
            run.access.close();
            run.access = access;
            run.boots += 1;
            true
        });
        self.inner.backend.restart().await
    }

    /// Serves a running machine until it ends or is told to.
    async fn attend(
        &self,
        launched: &mut Launched,
        stopped: &mut watch::Receiver<Option<End>>,
    ) -> End {
        let Launched { events, hvc0, agent, guest } = launched;
        tokio::select! {
            biased;
            stop = stopped.wait_for(Option::is_some) => {
                stop.ok().as_deref().cloned().flatten().unwrap_or(End::Stopped)
            }
            end = self.attend_events(events) => end,
            never = self.attend_way(By::Shell, Some(hvc0), guest) => match never {},
            never = self.attend_way(By::Agent, agent.as_ref(), guest) => match never {},
        }
    }

    async fn attend_events(&self, events: &mut mpsc::UnboundedReceiver<Event>) -> End {
        // Events of an earlier boot's vCPUs are obsolete.
        while !matches!(events.recv().await, None | Some(Event::Booting)) {}
        while let Some(event) = events.recv().await {
            match event {
                Event::Booting => {}
                Event::Warning(what) => self.inner.log.warning(what),
                Event::Told(event) => self.inner.events.pass_on(event),
                Event::Ended(end) => return end,
                Event::Panicked(mut reason) => {
                    let end = async {
                        loop {
                            match events.recv().await {
                                None | Some(Event::Ended(_)) => break,
                                Some(Event::Panicked(later)) => reason = reason.take().or(later),
                                Some(_) => {}
                            }
                        }
                    };
                    self.inner.clock.timeout(PRINT_AFTER_PANIC, end).await;
                    return End::Panicked(reason.unwrap_or_else(|| UNKNOWN_REASON.to_owned()));
                }
            }
        }
        End::Failed("the monitor went away".into())
    }
}

/// Acknowledges a machine's end.
fn forget_end(state: &mut State) -> bool {
    let ended = matches!(state, State::Ended(_));
    if ended {
        *state = State::Off;
    }
    ended
}
