//! The seam to the monitor: its calls block, so they run on threads made for that.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use firn_net_switch::NetPort;
use firn_vmm::device::boot_timer::Mark;
use firn_vmm::device::serial::InputFull;
use firn_vmm::spec::{ConsolePortSpec, Mac, MachineSpec, NetSpec};
use firn_vmm::virtio::balloon::BalloonHandle;
use firn_vmm::virtio::build::Connect;
use firn_vmm::vm::{Event, HostSide, Vm, VmError};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::console::{Console, ConsoleWriter};

/// Most events of a machine, beside those that begin and end a boot, that are told.
const MAX_EVENTS: u32 = 1000;

/// A running virtual machine. Clones are handles to the same one; [`Monitor::stop`] ends it.
#[derive(Clone)]
pub(super) struct Monitor {
    vm: Arc<Mutex<Vm>>,
    paused: Arc<AtomicBool>,
}

/// What the host side of a machine is made of.
pub(super) struct Wiring {
    pub(super) console: Arc<Console>,
    /// The guest's end of `/dev/hvc0`.
    pub(super) hvc0: UnixStream,
    /// Its end of the agent's port.
    pub(super) agent: UnixStream,
    /// Where its cards are plugged in, in their order.
    pub(super) nets: Vec<Arc<dyn NetPort>>,
    /// Most files that it may have open.
    pub(super) descriptors: u64,
}

/// The other ends of a machine's devices.
struct Ends {
    hvc0: Option<UnixStream>,
    agent: Option<UnixStream>,
    nets: Vec<(Mac, Arc<dyn NetPort>)>,
}

impl Connect for Ends {
    fn console_port(&mut self, port: &ConsolePortSpec) -> io::Result<UnixStream> {
        let end = if port.name.is_none() { &mut self.hvc0 } else { &mut self.agent };
        end.take().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn net(&mut self, card: &NetSpec) -> io::Result<Arc<dyn NetPort>> {
        let own = self.nets.iter().position(|(mac, _)| *mac == card.mac);
        own.map(|at| self.nets.remove(at).1).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Monitor {
    /// Builds and starts a machine. Its events come out of the receiver.
    pub(super) async fn launch(
        spec: MachineSpec,
        wiring: Wiring,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Event>), VmError> {
        let (events, received) = mpsc::unbounded_channel();
        let count = AtomicU32::new(0);
        let host = HostSide {
            events: Box::new(move |event| {
                let last = matches!(
                    event,
                    Event::Booting
                        | Event::PowerOff
                        | Event::Reset
                        | Event::Halted
                        | Event::VcpuDied { .. }
                );
                // A guest could break and reset its devices for ever.
                if last || count.fetch_add(1, Ordering::Relaxed) < MAX_EVENTS {
                    // Nobody listens any more once the machine is being stopped.
                    let _ = events.send(event);
                }
            }),
            serial: Box::new(ConsoleWriter(wiring.console)),
            connect: Box::new(Ends {
                hvc0: Some(wiring.hvc0),
                agent: Some(wiring.agent),
                nets: spec.nets.iter().map(|card| card.mac).zip(wiring.nets).collect(),
            }),
            descriptors: wiring.descriptors,
        };
        let vm = blocking(move || {
            let mut vm = Vm::new(&spec, host)?;
            vm.start()?;
            Ok::<_, VmError>(vm)
        })
        .await?;
        let vm = Arc::new(Mutex::new(vm));
        Ok((Self { vm, paused: Arc::default() }, received))
    }

    /// Types into the serial console.
    pub(super) async fn serial_input(&self, bytes: Vec<u8>) -> Result<(), InputFull> {
        self.with(move |vm| vm.serial_input(&bytes)).await
    }

    /// Stops all processors and devices until [`Self::resume`].
    pub(super) async fn pause(&self) {
        self.paused.store(true, Ordering::Relaxed);
        self.with(|vm| vm.pause()).await;
    }

    /// Goes on after [`Self::pause`].
    pub(super) async fn resume(&self) {
        self.with(|vm| vm.resume()).await;
        self.paused.store(false, Ordering::Relaxed);
    }

    /// Whether it is paused.
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Puts the machine of a guest that has reset it back to where it was before its start.
    pub(super) async fn reset(&self) -> Result<(), VmError> {
        self.with(Vm::reset).await
    }

    /// Starts it after [`Self::reset`].
    pub(super) async fn start(&self) -> Result<(), VmError> {
        self.with(Vm::start).await
    }

    /// Presses the power button.
    pub(super) async fn power_button(&self) -> Result<(), VmError> {
        self.with(|vm| vm.power_button()).await
    }

    /// Ends the machine: on return none of its threads is left.
    pub(super) async fn stop(&self) {
        self.with(Vm::stop).await;
    }

    /// How many pages the guest's balloon has taken, if it has one.
    pub(super) async fn balloon(&self) -> Option<u32> {
        self.with(|vm| vm.balloon().map(BalloonHandle::size)).await
    }

    /// How many pages the balloon shall take; false if there is none.
    pub(super) async fn set_balloon(&self, pages: u32) -> bool {
        self.with(move |vm| vm.balloon().map(|balloon| balloon.set_target(pages)).is_some()).await
    }

    /// When the boot reached which stage.
    pub(super) async fn boot_marks(&self) -> Vec<Mark> {
        self.with(|vm| vm.boot_marks()).await
    }

    /// Does something with the machine that blocks.
    async fn with<T: Send + 'static>(&self, work: impl FnOnce(&mut Vm) -> T + Send + 'static) -> T {
        let vm = Arc::clone(&self.vm);
        blocking(move || work(&mut vm.lock().unwrap_or_else(PoisonError::into_inner))).await
    }
}

/// Runs what blocks; a panic in it goes on here.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Blocking work is never cancelled once it runs, only when the runtime ends before it began.
            Err(_) => std::future::pending().await,
        },
    }
}
