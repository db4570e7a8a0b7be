//! A machine in firn's own monitor. Its calls block, so they run on threads made for that.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use firn_gateway::{Forward, Gateway, GatewaySpec};
use firn_net_switch::NetPort;
use firn_vmm::Cancel;
use firn_vmm::device::boot_timer::Mark;
use firn_vmm::screen::Screen;
use firn_vmm::spec::{ConsolePortSpec, Mac, MachineSpec, NetSpec};
use firn_vmm::virtio::balloon::BalloonHandle;
use firn_vmm::virtio::build::Connect;
use firn_vmm::vm::{self, HostSide, Vm, VmError};
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::{Backend, Checkpoints, Event, Input, Parts, Started};
use crate::config::PortForward;
use crate::error::{End, Error, MachineError, Result, chain};
use crate::machine::Dirs;
use crate::machine::console::{Console, ConsoleWriter};
use crate::machine::rfb::{self, Display};
use crate::machine::setup::Tags;
use crate::task::blocking;

mod checkpoints;

pub(in crate::machine) use checkpoints::Kept;

/// Most events of a machine, beside those that begin and end a boot, that are passed on.
const MAX_EVENTS: u32 = 1000;
/// The balloon counts in these.
const PAGE: u64 = 4096;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A machine of firn's own kind.
pub(super) struct Firn {
    parts: Parts,
    /// The user network of a machine that runs.
    gateway: Mutex<Option<Arc<Gateway>>>,
    running: Arc<Mutex<Option<Running>>>,
    /// Ends the start that is under way, or was last.
    cancel: Mutex<Cancel>,
    /// Of the last boot that has ended.
    boot_marks: Mutex<Vec<Mark>>,
    /// Held by checkpoints too: while there are any, a machine that ends is only switched off.
    held: Arc<()>,
    /// Holds it, too: a fork has its disks nowhere else.
    forked: Mutex<Option<Arc<()>>>,
    /// The shares that its guest has by virtio-fs because there was no room for them as images.
    by_virtiofs: Mutex<Tags>,
}

/// A virtual machine, from its start to its end or, if there are checkpoints of it, for longer.
struct Running {
    vm: Vm,
    /// It has ended, and is kept for checkpoints.
    off: bool,
    /// Where its events go.
    events: Arc<Mutex<mpsc::UnboundedSender<Event>>>,
    /// The host's ends of its ports.
    shell: UnixStream,
    agent: UnixStream,
    /// Serves viewers of its screen.
    viewers: Option<AbortHandle>,
    paused: bool,
    /// Its memory in bytes.
    memory: u64,
}

impl Firn {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            parts,
            gateway: Mutex::default(),
            running: Arc::default(),
            cancel: Mutex::default(),
            boot_marks: Mutex::default(),
            held: Arc::default(),
            forked: Mutex::default(),
            by_virtiofs: Mutex::default(),
        }
    }

    fn name(&self) -> String {
        self.parts.node.name.clone()
    }

    fn start_error(&self, source: impl Into<Cause>) -> MachineError {
        MachineError::Start { machine: self.name(), source: source.into() }
    }

    fn network_error(&self, what: &str, source: impl Into<Cause>) -> MachineError {
        let (machine, what) = (self.name(), what.to_owned());
        MachineError::Network { machine, what, source: source.into() }
    }

    fn monitor_error(&self, what: &'static str, source: VmError) -> MachineError {
        MachineError::Monitor { machine: self.name(), what, source: source.into() }
    }

    /// Does something with the machine that blocks.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Running) -> T + Send + 'static,
    ) -> Result<T> {
        let running = Arc::clone(&self.running);
        let done =
            blocking(move || lock(&running).as_mut().filter(|running| !running.off).map(work));
        let done = done.await;
        done.ok_or_else(|| MachineError::NotRunning { machine: self.name() }.into())
    }

    /// Has `make` make a virtual machine of the spec, and takes it over.
    async fn launch(
        &self,
        spec: MachineSpec,
        dirs: &Dirs,
        console: Arc<Console>,
        make: impl FnOnce(&MachineSpec, HostSide) -> Result<Vm, VmError> + Send + 'static,
    ) -> Result<Started> {
        let (shell, shell_guest) = UnixStream::pair().map_err(|e| self.start_error(e))?;
        let (agent, agent_guest) = UnixStream::pair().map_err(|e| self.start_error(e))?;
        let (sender, events) = mpsc::unbounded_channel();
        let sender = Arc::new(Mutex::new(sender));
        let host = HostSide {
            events: Box::new(passed_on(self.name(), Arc::clone(&sender))),
            serial: Box::new(ConsoleWriter(console)),
            connect: Box::new(Ends {
                shell: Some(shell_guest),
                agent: Some(agent_guest),
                nets: spec.nets.iter().map(|card| card.mac).zip(self.nets()).collect(),
            }),
            descriptors: self.parts.descriptors.monitor(),
            cancel: lock(&self.cancel).clone(),
        };
        let memory = spec.memory.get() << 20;
        let vm = blocking(move || make(&spec, host)).await.map_err(|e| self.start_error(e))?;
        let viewers = self.open_to_viewers(&vm, dirs);
        let running = Running {
            vm,
            off: false,
            events: sender,
            shell,
            agent,
            viewers,
            paused: false,
            memory,
        };
        let started = running.started(events).map_err(|e| self.start_error(e))?;
        *lock(&self.running) = Some(running);
        Ok(started)
    }

    /// Lets viewers see the screen, if there is one.
    fn open_to_viewers(&self, vm: &Vm, dirs: &Dirs) -> Option<AbortHandle> {
        let display = Display {
            name: self.name(),
            screen: vm.screen()?,
            keyboard: vm.keyboard().map(|hand| Arc::new(hand) as _),
            tablet: vm.tablet().map(|hand| Arc::new(hand) as _),
        };
        rfb::open(&dirs.state, display, &self.parts.log)
    }

    async fn first_start(&self, dirs: &Dirs, console: Arc<Console>) -> Result<Started> {
        let Parts { source, node, log, .. } = &self.parts;
        let mut spec = source.spec(node, dirs, log).await?;
        let mut by_virtiofs = Tags::new();
        loop {
            let error = match self.launch(spec, dirs, Arc::clone(&console), start_vm).await {
                Ok(started) => {
                    *lock(&self.by_virtiofs) = by_virtiofs;
                    return Ok(started);
                }
                Err(error) => error,
            };
            let Some((tag, why)) = no_room(&error) else { return Err(error) };
            if !source.mounts(node, dirs, &tag)? {
                return Err(self.start_error(NoRoom { tag, why }).into());
            }
            log.warning(format_args!("share {tag} comes by virtio-fs, not as an image: {why}"));
            by_virtiofs.insert(tag);
            spec = source.spec_again(node, dirs, &by_virtiofs).await?;
        }
    }

    /// Makes the user network, if the machine has one and it is not there. With `elsewhere` ports of the host that the
    /// machine names are another one's: it gets free ones.
    async fn open_user_network(&self, dirs: &Dirs, elsewhere: bool) -> Result<()> {
        if lock(&self.gateway).is_some() {
            return Ok(());
        }
        let Some(network) = self.parts.source.user_network(&self.parts.node, dirs)? else {
            return Ok(());
        };
        let spec = GatewaySpec {
            host_name: self.name(),
            restrict: network.restrict,
            host_loopback: network.host_loopback,
            descriptors: self.parts.descriptors.network(),
            ..GatewaySpec::default()
        };
        let failed = |source| self.network_error("cannot start its user network", source);
        let gateway = Gateway::new(spec).await.map_err(failed)?;
        for PortForward(forward) in &network.forward_ports {
            let mut forward = *forward;
            if elsewhere {
                forward.host.set_port(0);
            }
            let bound = match gateway.forward(forward).await {
                Ok(bound) => bound,
                Err(error) => {
                    // So that the ports that it has got are free on return.
                    gateway.close().await;
                    return Err(failed(error).into());
                }
            };
            if forward.host.port() == 0 {
                let guest = forward.guest;
                self.parts
                    .log
                    .info(format_args!("{bound} leads to {} port {guest}", forward.protocol));
            }
        }
        *lock(&self.gateway) = Some(Arc::new(gateway));
        Ok(())
    }

    /// Ends the user network. On return the host's ports are free.
    async fn close_user_network(&self) {
        let gateway = lock(&self.gateway).take();
        if let Some(gateway) = gateway {
            gateway.close().await;
        }
    }

    /// Where its cards are plugged in, in their order.
    fn nets(&self) -> Vec<Arc<dyn NetPort>> {
        let gateway = lock(&self.gateway).clone().map(|gateway| gateway as Arc<dyn NetPort>);
        let vlans = self.parts.ports.iter().map(|port| Arc::clone(port) as Arc<dyn NetPort>);
        gateway.into_iter().chain(vlans).collect()
    }
}

impl Backend for Firn {
    fn start(
        &self,
        dirs: Dirs,
        console: Arc<Console>,
        _may_reboot: bool,
    ) -> BoxFuture<'_, Result<Started>> {
        *lock(&self.cancel) = Cancel::default();
        Box::pin(async move {
            if !self.held() {
                self.discard().await;
            }
            self.open_user_network(&dirs, false).await?;
            let started = match self.start_kept(&dirs).await? {
                Some(started) => return Ok(started),
                None => self.first_start(&dirs, console).await,
            };
            if started.is_err() {
                self.close_user_network().await;
            }
            started
        })
    }

    fn cancel_start(&self) {
        lock(&self.cancel).cancel();
    }

    fn restart(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let restart = |running: &mut Running| {
                running.vm.reset()?;
                running.vm.start()?;
                if running.paused {
                    running.vm.pause();
                }
                Ok(())
            };
            let restarted = self.with(restart).await?;
            restarted.map_err(|error| self.monitor_error("cannot start it again", error).into())
        })
    }

    fn stop(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let held = self.held();
            let running = Arc::clone(&self.running);
            let marks = blocking(move || {
                let mut running = lock(&running);
                match held {
                    true => running.as_mut().map(Running::switch_off),
                    false => running.take().map(|mut running| running.end()),
                }
            });
            if let Some(marks) = marks.await {
                *lock(&self.boot_marks) = marks;
            }
            // The card of one that can go back stays plugged in there.
            if !held {
                self.close_user_network().await;
            }
        })
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.with(|running| {
            running.vm.pause();
            running.paused = true;
        }))
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let resume = |running: &mut Running| {
                // One that went back waits for its start.
                running.vm.start()?;
                running.vm.resume();
                running.paused = false;
                Ok(())
            };
            let resumed = self.with(resume).await?;
            resumed.map_err(|error| self.monitor_error("cannot resume it", error).into())
        })
    }

    fn press_power_button(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let pressed = self.with(|running| running.vm.power_button()).await?;
            pressed.map_err(|e| self.monitor_error("cannot press the power button", e).into())
        })
    }

    fn type_in(&self, bytes: Vec<u8>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let typed = self.with(move |running| running.vm.serial_input(&bytes)).await?;
            typed.map_err(|error| {
                let name = self.name();
                MachineError::Usage(format!("{name}: the serial console takes no input: {error}"))
                    .into()
            })
        })
    }

    fn links(&self) -> usize {
        self.parts.ports.len()
    }

    fn set_link(&self, card: usize, up: bool) {
        if let Some(port) = self.parts.ports.get(card) {
            port.set_link(up);
        }
    }

    fn forward(&self, forward: Forward) -> BoxFuture<'_, Result<SocketAddr>> {
        Box::pin(async move {
            let gateway = lock(&self.gateway).clone();
            let Some(gateway) = gateway else {
                let what = format!("{} has no user network to forward ports by", self.name());
                return Err(MachineError::Usage(what).into());
            };
            let bound = gateway.forward(forward).await;
            bound.map_err(|source| self.network_error("cannot forward a port", source).into())
        })
    }

    fn memory(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(self.with(|running| {
            let taken = running.vm.balloon().map(BalloonHandle::size)?;
            Some(running.memory.saturating_sub(u64::from(taken) * PAGE))
        }))
    }

    fn set_memory(&self, bytes: u64) -> BoxFuture<'_, Result<bool>> {
        Box::pin(self.with(move |running| {
            let pages = running.memory.saturating_sub(bytes) / PAGE;
            let pages = u32::try_from(pages).unwrap_or(u32::MAX);
            running.vm.balloon().map(|balloon| balloon.set_target(pages)).is_some()
        }))
    }

    fn keyboard(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Input>>>> {
        Box::pin(self.with(|running| running.vm.keyboard().map(|hand| Arc::new(hand) as _)))
    }

    fn tablet(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Input>>>> {
        Box::pin(self.with(|running| running.vm.tablet().map(|hand| Arc::new(hand) as _)))
    }

    fn screen(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Screen>>>> {
        Box::pin(self.with(|running| running.vm.screen()))
    }

    fn boot_marks(&self) -> Vec<Mark> {
        lock(&self.boot_marks).clone()
    }

    fn checkpoints(&self) -> Option<&dyn Checkpoints> {
        Some(self)
    }
}

/// There is no room for a share as an image, and how its guest mounts it is not for firn to say.
#[derive(Debug, thiserror::Error)]
#[error(
    "share {tag} cannot be an image: {why}; its guest mounts it by itself, so it has it by virtio-fs only with \
     `image = false` (NixOS: `virtualisation.firn.storeImage = false`)"
)]
struct NoRoom {
    tag: String,
    why: String,
}

/// The share for which there is no room as an image, if that is what an error of a start is about; and why.
fn no_room(error: &Error) -> Option<(String, String)> {
    let Error::Machine(MachineError::Start { source, .. }) = error else { return None };
    let (tag, why) = source.downcast_ref::<VmError>()?.no_room()?;
    Some((tag.to_owned(), chain(why)))
}

/// The other ends of a machine's devices.
struct Ends {
    shell: Option<UnixStream>,
    agent: Option<UnixStream>,
    nets: Vec<(Mac, Arc<dyn NetPort>)>,
}

impl Connect for Ends {
    fn console_port(&mut self, port: &ConsolePortSpec) -> io::Result<UnixStream> {
        let end = if port.name.is_none() { &mut self.shell } else { &mut self.agent };
        end.take().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn net(&mut self, card: &NetSpec) -> io::Result<Arc<dyn NetPort>> {
        let own = self.nets.iter().position(|(mac, _)| *mac == card.mac);
        own.map(|at| self.nets.remove(at).1).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

fn start_vm(spec: &MachineSpec, host: HostSide) -> Result<Vm, VmError> {
    let mut vm = Vm::new(spec, host)?;
    vm.start()?;
    Ok(vm)
}

impl Running {
    /// What a start gives to the machine.
    fn started(&self, events: mpsc::UnboundedReceiver<Event>) -> io::Result<Started> {
        let (shell, agent) = (self.shell.try_clone()?, Some(self.agent.try_clone()?));
        Ok(Started { events, shell, agent })
    }

    /// Ends it for good; returns when it reached which stage of its boot.
    fn end(&mut self) -> Vec<Mark> {
        self.close_to_viewers();
        self.vm.stop();
        self.vm.boot_marks()
    }

    fn close_to_viewers(&self) {
        if let Some(viewers) = &self.viewers {
            viewers.abort();
        }
    }
}

/// Passes the monitor's events on, as far as they matter.
fn passed_on(
    machine: String,
    events: Arc<Mutex<mpsc::UnboundedSender<Event>>>,
) -> impl Fn(vm::Event) + Send + Sync {
    let count = AtomicU32::new(0);
    move |event| {
        let event = match event {
            vm::Event::Booting => Event::Booting,
            vm::Event::PowerOff => Event::Ended(End::PoweredOff),
            vm::Event::Reset => Event::Ended(End::Reset),
            vm::Event::Halted => Event::Ended(End::Halted),
            vm::Event::VcpuDied { vcpu, reason } => Event::Ended(End::VcpuDied { vcpu, reason }),
            // A guest could break and reset its devices for ever.
            _ if count.fetch_add(1, Ordering::Relaxed) >= MAX_EVENTS => return,
            vm::Event::Panic { reason } => Event::Panicked(reason),
            vm::Event::DeviceFailed { device, reason } => {
                Event::Warning(format!("the guest lost {device}: {reason}"))
            }
            other => return tracing::debug!(machine, event = ?other, "event"),
        };
        // Nobody listens any more once the machine is being stopped.
        let _ = lock(&events).send(event);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
