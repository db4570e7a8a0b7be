//! From the start of a machine to its end.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use firn_vmm::device::boot_timer::Mark;
use firn_vmm::vm::{Event, VmError};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::timeout;

use super::access::Access;
use super::monitor::{Monitor, Wiring};
use super::session::Session;
use super::{DEFAULT_TIMEOUT, ExecOptions, Machine, Run, State};
use crate::error::{End, MachineError, Result, chain};
use crate::private;

/// A guest that ends takes its agent with it, sometimes a moment before its end is seen.
pub(super) const END_AFTER_LOSS: Duration = Duration::from_millis(1500);
/// A kernel that panicked goes on to print why.
const PRINT_AFTER_PANIC: Duration = Duration::from_millis(300);

/// What the supervisor of a machine holds between its start and its end.
struct Launched {
    monitor: Monitor,
    events: mpsc::UnboundedReceiver<Event>,
    /// The host's ends of the guest's console ports: hvc0, and the agent's.
    hvc0: Arc<UnixStream>,
    agent: UnixStream,
    /// Tells who reads hvc0 that another shell will come.
    left: Arc<Notify>,
}

impl Launched {
    /// The ways into a guest that has just been started.
    fn access(&self) -> Access {
        Access::new(Arc::clone(&self.hvc0), Arc::clone(&self.left))
    }
}

impl Machine {
    /// Starts it, if it does not run. Does not wait for the guest to come up. A guest that resets itself ends,
    /// unless `allow_reboot`.
    ///
    /// # Errors
    /// If the machine cannot be made.
    pub async fn start(&self, allow_reboot: bool) -> Result<()> {
        let _starting = self.inner.starting.lock().await;
        if self.booted() {
            return Ok(());
        }
        self.log("starting vm");
        self.inner.console.restart();
        self.open_user_network().await?;
        let launched = match self.launch().await {
            Ok(launched) => launched,
            Err(error) => {
                self.close_user_network().await;
                return Err(error);
            }
        };
        let (stop, stopped) = watch::channel(false);
        self.inner.state.send_replace(State::Running(Run {
            monitor: launched.monitor.clone(),
            stop,
            access: launched.access(),
            allow_reboot,
            boots: 1,
        }));
        tokio::spawn(self.clone().supervise(launched, stopped, allow_reboot));
        Ok(())
    }

    /// Writes the guest's dirty data back.
    ///
    /// # Errors
    /// As [`Machine::execute`].
    pub async fn sync(&self) -> Result<()> {
        let session = self.session().await?;
        self.answered(session.sync(), || "cannot sync".to_owned()).await
    }

    /// Starts it if need be and waits until commands can be run in it.
    ///
    /// # Errors
    /// If it cannot be started, or ends, or has ended by itself and no call has taken note of that yet.
    pub async fn connect(&self) -> Result<()> {
        self.session().await.map(drop)
    }

    /// Goes on from a backdoor in the initrd to the one of the system itself.
    ///
    /// # Errors
    /// As [`Machine::wait_for_unit`].
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

    /// Has the guest restart, and waits until it does; the guest may still come up when this returns.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if it was started without `allow_reboot`; else as [`Self::shutdown`].
    pub async fn reboot(&self) -> Result<()> {
        let session = self.session().await?;
        let Run { boots, allow_reboot, .. } = self.run()?;
        if !allow_reboot {
            return Err(MachineError::Usage(format!(
                "{} cannot reboot: it needs start(allow_reboot=True)",
                self.name()
            ))
            .into());
        }
        let again = async {
            // It may restart before it has answered.
            if let Err(error) = session.reboot().await
                && !error.lost()
            {
                return Err(self.session_error("cannot reboot".to_owned(), error).await);
            }
            let mut state = self.inner.state.subscribe();
            let booted = |state: &State| matches!(state, State::Running(run) if run.boots > boots);
            let _ = state.wait_for(booted).await;
            Ok(())
        };
        self.unless_ended(again).await
    }

    /// Powers it off and waits until that is done. Nothing if it is off.
    ///
    /// # Errors
    /// If the guest cannot be asked to, or ends otherwise.
    pub async fn shutdown(&self) -> Result<()> {
        if !self.booted() {
            self.inner.state.send_if_modified(forget_end);
            return Ok(());
        }
        let session = self.session_even_down().await?;
        self.ask_for_power_off(&session).await?;
        self.wait_for_shutdown().await
    }

    /// Has the guest power off, without waiting for it. One that ends before it has answered does what it shall.
    pub(super) async fn ask_for_power_off(&self, session: &Session) -> Result<()> {
        match self.unless_ended(async { Ok(session.power_off().await) }).await {
            Ok(Err(error)) if !error.lost() => {
                Err(self.session_error("cannot power off".to_owned(), error).await)
            }
            _ => Ok(()),
        }
    }

    /// Waits until it is off: has powered off, reset itself, or panicked. Nothing if it is off.
    ///
    /// # Errors
    /// If the guest ends otherwise.
    pub async fn wait_for_shutdown(&self) -> Result<()> {
        let _step = self.nested("waiting for the VM to power off");
        let mut state = self.inner.state.subscribe();
        let ended = state.wait_for(|state| !matches!(state, State::Running(_))).await;
        let end = match ended.as_deref() {
            Ok(State::Ended(end)) => Arc::clone(end),
            _ => return Ok(()),
        };
        drop(ended);
        self.inner.state.send_if_modified(forget_end);
        if end.is_off() { Ok(()) } else { Err(self.ended_error(&end)) }
    }

    /// Ends it at once, as if the power went. Nothing if it is off.
    pub async fn crash(&self) {
        if self.booted() {
            self.log("forced crash");
        }
        self.stop().await;
    }

    /// Ends it and removes its state, unless that shall be kept.
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

    /// Removes its state, kept or not; the next start makes it anew.
    ///
    /// # Errors
    /// [`MachineError::Usage`] if it runs; if files cannot be removed.
    pub async fn cleanup_state_dir(&self) -> Result<()> {
        let _starting = self.inner.starting.lock().await;
        if self.booted() {
            let what = format!("{} runs, and needs its state", self.name());
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
    /// If it does not run.
    pub async fn press_power_button(&self) -> Result<()> {
        let pressed = self.run()?.monitor.power_button().await;
        pressed.map_err(|error| {
            let (machine, what) = (self.name().to_owned(), "cannot press the power button");
            MachineError::Monitor { machine, what, source: error.into() }.into()
        })
    }

    /// Waits until it does not run, without taking note of how it ended.
    pub async fn wait_for_end(&self) {
        let mut state = self.inner.state.subscribe();
        // The sender lives in self.
        let _ = state.wait_for(|state| !matches!(state, State::Running(_))).await;
    }

    /// When its last boot, if that has ended, reached which stage.
    #[must_use]
    pub fn boot_marks(&self) -> Vec<Mark> {
        self.inner.boot_marks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Pulls the cable of the first vlan.
    pub fn block(&self) {
        self.set_link(false);
    }

    /// Plugs the cable of the first vlan in again.
    pub fn unblock(&self) {
        self.set_link(true);
    }

    fn set_link(&self, up: bool) {
        if let Some(port) = self.inner.ports.first() {
            port.set_link(up);
        }
    }

    /// Ends it, without a word, and waits until nothing of it is left.
    pub(crate) async fn stop(&self) {
        // One that is just being started is ended once it is.
        let _starting = self.inner.starting.lock().await;
        self.request_stop();
        self.wait_for_end().await;
        self.inner.state.send_if_modified(forget_end);
    }

    /// Asks for its end, without waiting for it.
    pub(crate) fn request_stop(&self) {
        if let State::Running(run) = &*self.inner.state.borrow() {
            run.stop.send_replace(true);
        }
    }

    async fn launch(&self) -> Result<Launched> {
        let start_error = |source: Box<dyn std::error::Error + Send + Sync>| MachineError::Start {
            machine: self.name().to_owned(),
            source,
        };
        let spec = self.prepare().await?;
        let (hvc0, hvc0_guest) = UnixStream::pair().map_err(|e| start_error(e.into()))?;
        let (agent, agent_guest) = UnixStream::pair().map_err(|e| start_error(e.into()))?;
        let wiring = Wiring {
            console: Arc::clone(&self.inner.console),
            hvc0: hvc0_guest,
            agent: agent_guest,
            nets: self.nets(),
            descriptors: self.inner.descriptors.monitor(),
        };
        let (monitor, events) =
            Monitor::launch(spec, wiring).await.map_err(|e| start_error(e.into()))?;
        Ok(Launched { monitor, events, hvc0: Arc::new(hvc0), agent, left: Arc::default() })
    }

    /// Sees a machine through to its end; a task of its own.
    async fn supervise(
        self,
        mut launched: Launched,
        mut stopped: watch::Receiver<bool>,
        allow_reboot: bool,
    ) {
        let (finish, finished) = watch::channel(false);
        let shown = tokio::spawn({
            let (machine, console) = (self.clone(), Arc::clone(&self.inner.console));
            let log = self.inner.log.clone();
            async move { console.show(machine.name(), &log, finished).await }
        });
        let mut again = false;
        let end = loop {
            let end = self.attend(&mut launched, &mut stopped, again).await;
            self.inner.events.ended(&end);
            if end != End::Reset || !allow_reboot {
                break end;
            }
            self.log("rebooting");
            if let Err(error) = self.reset(&mut launched).await {
                break End::Failed(chain(&error));
            }
            again = true;
        };
        launched.monitor.stop().await;
        *self.inner.boot_marks.lock().unwrap_or_else(PoisonError::into_inner) =
            launched.monitor.boot_marks().await;
        // The console's last lines come before whatever is said about the end.
        finish.send_replace(true);
        let _ = shown.await;
        if end != End::Stopped {
            self.log(&end);
        }
        self.close_user_network().await;
        self.inner.state.send_replace(State::Ended(Arc::new(end)));
    }

    /// Starts a machine again whose guest has reset it: the same one, with its disks and host's ends.
    async fn reset(&self, launched: &mut Launched) -> std::result::Result<(), VmError> {
        launched.monitor.reset().await?;
        // Whoever waits for the guest that is gone learns of it before the next one says anything.
        launched.left = Arc::default();
        let access = launched.access();
        self.inner.state.send_if_modified(|state| match state {
            State::Running(run) => {
                run.access.close();
                run.access = access;
                run.boots += 1;
                true
            }
            State::Off | State::Ended(_) => false,
        });
        launched.monitor.start().await
    }

    /// Serves a machine that runs until it ends, or shall. The agent's port may hold bytes of an earlier boot if it
    /// runs `again`.
    async fn attend(
        &self,
        launched: &mut Launched,
        stopped: &mut watch::Receiver<bool>,
        again: bool,
    ) -> End {
        let Launched { events, hvc0, agent, left, .. } = launched;
        tokio::select! {
            biased;
            _ = stopped.wait_for(|stop| *stop) => End::Stopped,
            end = self.attend_events(events) => end,
            never = self.attend_backdoor(hvc0, left) => match never {},
            never = self.attend_agent(agent, again) => match never {},
        }
    }

    async fn attend_events(&self, events: &mut mpsc::UnboundedReceiver<Event>) -> End {
        // What the vCPUs of an earlier boot had to say is over.
        while !matches!(events.recv().await, None | Some(Event::Booting)) {}
        while let Some(event) = events.recv().await {
            match event {
                Event::PowerOff => return End::PoweredOff,
                Event::Reset => return End::Reset,
                Event::Halted => return End::Halted,
                Event::VcpuDied { vcpu, reason } => return End::VcpuDied { vcpu, reason },
                Event::Panic { message } => {
                    let reset = async {
                        while !matches!(
                            events.recv().await,
                            None | Some(Event::Reset | Event::PowerOff)
                        ) {}
                    };
                    let _ = timeout(PRINT_AFTER_PANIC, reset).await;
                    return End::Panicked(message);
                }
                Event::DeviceFailed { device, reason } => {
                    self.inner.log.warning(format_args!("the guest lost {device}: {reason}"));
                }
                other => tracing::debug!(machine = self.name(), event = ?other, "event"),
            }
        }
        End::Failed("the monitor went away".into())
    }
}

/// Takes note of a machine's end.
fn forget_end(state: &mut State) -> bool {
    let ended = matches!(state, State::Ended(_));
    if ended {
        *state = State::Off;
    }
    ended
}
