//! One machine: put together here, and only here.
//!
//! ```text
//! new, restore, fork --> Built --start()--> Running --stop()--> Stopped
//!                    ^                   | |
//!                    +----- reset() -----+ +--cut_power()--> Off
//!                    +----- reset(), roll_back() -------------+
//! ```

mod build;
mod checkpoint;
mod descriptors;
mod kept;
mod state;

use std::error::Error;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{Kvm, VmFd};
use thiserror::Error;

use crate::Cancel;
use crate::arch::{ArchError, board, entry, firmware, params, vcpu};
use crate::boot::image::LoadError;
use crate::bus::Overlap;
use crate::device::boot_timer::{BootTimer, Mark};
use crate::device::panic::PanicDevice;
use crate::device::serial::{InputFull, SerialPort};
use crate::event_loop::{EventLoop, EventThread, Subscriber};
use crate::memory::checkpoint::Backing;
use crate::memory::window::Windows;
use crate::memory::{self, Memory};
use crate::screen::Screen;
use crate::screen::plain::FrameBuffer;
use crate::spec::MachineSpec;
use crate::thread;
use crate::vcpu::{Buses, Ending, Group, Vcpu, Watch};
use crate::virtio::RestoreError;
use crate::virtio::balloon::BalloonHandle;
use crate::virtio::blk::DiskCheckpoint;
use crate::virtio::build::{BuildError, Connect, Handle};
use crate::virtio::input::{self, InputHandle};
use crate::virtio::transport::mmio::{MmioEvents, MmioTransport};
pub use checkpoint::Checkpoint;
pub use descriptors::Parts as DescriptorParts;
pub use kept::{KeptVm, fingerprint};
pub use state::VmState;

/// What happens to a running machine. More kinds will come.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Its vCPUs have started, to boot the kernel.
    Booting,
    /// Its kernel has panicked.
    Panic {
        /// The kernel's reason, if the serial console has shown it yet; else another event may follow.
        reason: Option<String>,
    },
    /// It has asked to be started again; its vCPUs have ended.
    Reset,
    /// It has powered off; its vCPUs have ended.
    PowerOff,
    /// It has halted for good: all vCPUs wait with interrupts off; they have ended.
    Halted,
    /// A vCPU cannot go on; all have ended.
    VcpuDied {
        /// Which.
        vcpu: u8,
        /// Why, for a message.
        reason: String,
    },
    /// A device stopped working because its driver in the guest broke the rules.
    DeviceFailed {
        /// The device's name.
        device: String,
        /// What the guest did.
        reason: String,
    },
}

/// The host's ends of what a machine is connected to.
pub struct HostSide {
    /// Called for every event, on the machine's threads: it must not block or call back into the machine.
    pub events: Box<dyn Fn(Event) + Send + Sync>,
    /// Takes what the guest writes to its serial console, on a vCPU's thread and often byte by
    /// byte: it must not block.
    pub serial: Box<dyn Write + Send>,
    /// Provides the host's end of each device that has one; `Box::new(())` where there is none.
    pub connect: Box<dyn Connect>,
    /// How many files the machine may have open in this process, including those that the guest opens on its shares
    /// and sockets, so that no guest starves other machines or the process itself. What [`Self::connect`] provides is
    /// not counted.
    pub descriptors: u64,
    /// Ends [`Vm::new`] before it is done.
    pub cancel: Cancel,
}

/// A machine could not be built or driven.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// The spec asks for something impossible.
    #[error("machine {machine}: {problem}")]
    Spec {
        /// The machine.
        machine: String,
        /// What is wrong, and what is allowed.
        problem: String,
    },
    /// KVM refused a call.
    #[error("KVM: {operation}")]
    Kvm {
        /// The call.
        operation: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// There is no guest memory.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// A kernel or initrd cannot be used.
    #[error(transparent)]
    Image(#[from] LoadError),
    /// The boot parameters are wrong.
    #[error(transparent)]
    Params(#[from] params::ParamsError),
    /// What firmware would have left cannot be written.
    #[error(transparent)]
    Firmware(#[from] firmware::FirmwareError),
    /// A processor cannot be set up.
    #[error(transparent)]
    Processor(#[from] ArchError),
    /// Two devices want the same addresses.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// A device cannot be built.
    #[error(transparent)]
    Device(#[from] BuildError),
    /// The state of the processors cannot be read or written.
    #[error("cannot save or restore processors")]
    State(#[source] ArchError),
    /// A saved machine does not fit.
    #[error("machine {machine}: cannot be restored: {problem}")]
    Saved {
        /// The machine.
        machine: String,
        /// What does not fit.
        problem: String,
    },
    /// A device rejects its saved state.
    #[error("machine {machine}: cannot be restored: {device}")]
    SavedDevice {
        /// The machine.
        machine: String,
        /// The device.
        device: String,
        /// Why not.
        #[source]
        source: RestoreError,
    },
    /// The host refused something.
    #[error("{operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl VmError {
    /// The share that could be given to the guest by virtio-fs, where there is no room for it as an image; and why.
    #[must_use]
    pub fn no_room(&self) -> Option<(&str, &(dyn Error + Send + Sync + 'static))> {
        match self {
            Self::Device(BuildError::NoRoom { tag, source }) => Some((tag, &**source)),
            _ => None,
        }
    }
}

pub(crate) fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { operation, source }
}

fn host(operation: &'static str) -> impl Fn(io::Error) -> VmError {
    move |source| VmError::Host { operation, source }
}

/// How far a machine has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing runs, and [`Vm::start`] can come.
    Built,
    Running,
    /// Its threads wait.
    Paused,
    /// Its power was cut; it can be reset or go back to a checkpoint.
    Off,
    /// For good.
    Stopped,
}

/// One machine. Dropping it stops it and leaves nothing behind.
pub struct Vm {
    spec: MachineSpec,
    phase: Phase,
    vcpu_threads: Vec<JoinHandle<()>>,
    /// Until the first start.
    event_loop: Option<EventLoop>,
    /// Ends when dropped.
    event_thread: Option<EventThread>,
    vcpus: Vec<Arc<Vcpu>>,
    group: Arc<Group>,
    serial: Arc<SerialPort>,
    panic: Arc<PanicDevice>,
    transports: Vec<Arc<MmioTransport>>,
    /// What is announced to the guest.
    announced: Vec<firmware::MmioDevice>,
    handles: Vec<Handle>,
    timer: Arc<BootTimer>,
    events: Arc<dyn Fn(Event) + Send + Sync>,
    kvm: Kvm,
    // Last, so that they are dropped last: the vCPUs and devices above use them.
    vm: Arc<VmFd>,
    memory: Memory,
    frame_buffer: Option<Arc<FrameBuffer>>,
    backing: Backing,
    /// The next start begins a boot, and does not go on with one.
    boots: bool,
}

impl Vm {
    /// Builds a machine: everything is allocated and loaded, nothing runs.
    ///
    /// # Errors
    /// What is wrong with the spec, its files or the host.
    pub fn new(spec: &MachineSpec, host_side: HostSide) -> Result<Vm, VmError> {
        build::check(spec)?;
        let memory = memory::allocate(spec.memory.get())?;
        let entry = build::load_kernel(spec, &memory)?;
        let frame_buffer = build::frame_buffer(spec)?;
        let vm = Vm::assemble(spec, host_side, memory, frame_buffer, &[])?;
        vm.prepare_entry(entry)?;
        Ok(vm)
    }

    /// Everything but what is in memory and in the first vCPU's registers.
    fn assemble(
        spec: &MachineSpec,
        host_side: HostSide,
        memory: Memory,
        frame_buffer: Option<Arc<FrameBuffer>>,
        frozen: &[DiskCheckpoint],
    ) -> Result<Vm, VmError> {
        let kvm_fd = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let vm = Arc::new(vcpu::create_vm(&kvm_fd)?);
        let slots = build::attach_memory(&vm, &build::memories(&memory, frame_buffer.as_ref()))?;
        let group = Arc::new(Group::default());
        let timer = Arc::new(BootTimer::default());
        let HostSide { events, serial, mut connect, descriptors, cancel } = host_side;
        let events: Arc<dyn Fn(Event) + Send + Sync> = Arc::from(events);

        let mut buses = Buses::default();
        let on_panic = events.clone();
        let panic = PanicDevice::new(move |reason| on_panic(Event::Panic { reason }));
        let panic = Arc::new(panic);
        let serial = build::attach_serial(&vm, &mut buses, serial, panic.clone())?;
        let (on_request, marks) = (events.clone(), timer.clone());
        build::attach_board(&mut buses, marks, panic.clone(), group.clone(), on_request)?;
        // Before the devices: KVM may not have as many, and disks are made for a machine that can be.
        let vcpus = vcpu::create_vcpus(&kvm_fd, &vm, spec.cores.get())?;
        let windows = Windows::new(spec.memory.get() << 20, vcpu::address_bits(&kvm_fd)?);
        let devices =
            build::build_devices(spec, connect.as_mut(), descriptors, &cancel, windows, frozen)?;
        let attached = build::attach_devices(&vm, &mut buses, &memory, devices, &events)?;
        buses.windows = attached.handles.iter().filter_map(Handle::window).collect();
        build::attach_windows(&vm, slots, &buses.windows)?;

        let subscribers = attached
            .transports
            .iter()
            .map(|transport| Box::new(MmioEvents(transport.clone())) as Subscriber);
        let transports = attached.transports.clone();
        let remind = move || transports.iter().for_each(|transport| transport.remind());
        let watch = Watch::new(group.clone(), remind).map_err(host("cannot make a timer"))?;
        let subscribers = subscribers.chain([Box::new(watch) as Subscriber]);
        let event_loop = EventLoop::new(subscribers).map_err(host("cannot watch devices"))?;
        let buses = Arc::new(buses);
        let vcpus = (0..)
            .zip(vcpus)
            .map(|(index, fd)| Vcpu::new(fd, index, buses.clone(), group.clone(), timer.clone()))
            .map(Arc::new)
            .collect();
        Ok(Vm {
            spec: spec.clone(),
            phase: Phase::Built,
            vcpu_threads: Vec::new(),
            event_loop: Some(event_loop),
            event_thread: None,
            vcpus,
            group,
            serial,
            panic,
            transports: attached.transports,
            announced: attached.announced,
            handles: attached.handles,
            timer,
            events,
            kvm: kvm_fd,
            vm,
            memory,
            frame_buffer,
            backing: Backing::default(),
            boots: true,
        })
    }

    /// Lets the first vCPU enter the kernel at `entry`.
    fn prepare_entry(&self, entry: u64) -> Result<(), VmError> {
        firmware::write(&self.memory, &self.spec, &self.announced)?;
        if let Some(first) = self.vcpus.first() {
            entry::set_registers(&first.fd(), entry)?;
        }
        Ok(())
    }

    /// Starts it: one thread a vCPU and one for the devices. Does nothing if it has started
    /// before.
    ///
    /// # Errors
    /// The process can have no more threads.
    pub fn start(&mut self) -> Result<(), VmError> {
        if self.phase != Phase::Built {
            return Ok(());
        }
        let spawn_error = host("cannot start a thread");
        if let Some(event_loop) = self.event_loop.take() {
            let thread = event_loop.spawn(format!("{}-dev", self.spec.name));
            self.event_thread = Some(thread.map_err(&spawn_error)?);
        }
        // Those of a restored machine wait for this.
        for transport in &self.transports {
            transport.resume();
        }
        if std::mem::take(&mut self.boots) {
            (self.events)(Event::Booting);
        }
        self.phase = Phase::Running;
        for vcpu in &self.vcpus {
            match self.spawn_vcpu(vcpu.clone()) {
                Ok(thread) => self.vcpu_threads.push(thread),
                Err(error) => {
                    self.stop();
                    return Err(spawn_error(error));
                }
            }
        }
        Ok(())
    }

    fn spawn_vcpu(&self, vcpu: Arc<Vcpu>) -> io::Result<JoinHandle<()>> {
        let events = self.events.clone();
        let group = self.group.clone();
        thread::spawn(format!("{}-cpu{}", self.spec.name, vcpu.index()), move || {
            let event = match vcpu.run() {
                Ok(Ending::Stopped) => return,
                Ok(Ending::Halted) => Event::Halted,
                Err(reason) => Event::VcpuDied { vcpu: vcpu.index(), reason },
            };
            group.request_stop();
            events(event);
        })
    }

    /// Stops all vCPUs and devices; requests in flight are finished first. Does nothing if it is not running.
    pub fn pause(&mut self) {
        if self.phase != Phase::Running {
            return;
        }
        self.group.pause();
        for vcpu in &self.vcpus {
            vcpu.tell_of_pause();
        }
        for transport in &self.transports {
            transport.pause();
        }
        self.phase = Phase::Paused;
    }

    /// Goes on after [`Vm::pause`]. The guest's clock has kept running.
    pub fn resume(&mut self) {
        if self.phase != Phase::Paused {
            return;
        }
        for transport in &self.transports {
            transport.resume();
        }
        self.group.resume();
        self.phase = Phase::Running;
    }

    /// Presses the power button for a moment. What happens then is up to the guest.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn power_button(&self) -> Result<(), VmError> {
        board::press_power_button(&self.vm).map_err(kvm("KVM_IRQ_LINE"))
    }

    /// Puts it back to where [`Vm::new`] left it, for another [`Vm::start`]: vCPUs, devices and
    /// memory are as after power-on, the kernel is loaded again. Disks, and what else is on the
    /// host's side, stay. Not after [`Vm::stop`].
    ///
    /// # Errors
    /// The kernel or initrd cannot be loaded any more, or KVM refuses; it is stopped then.
    pub fn reset(&mut self) -> Result<(), VmError> {
        if self.phase == Phase::Stopped {
            let problem = "it has been stopped".to_owned();
            return Err(VmError::Spec { machine: self.spec.name.clone(), problem });
        }
        self.end_vcpus();
        let renewed = self.renew();
        match renewed {
            Ok(()) => self.phase = Phase::Built,
            Err(_) => self.stop(),
        }
        renewed
    }

    fn renew(&mut self) -> Result<(), VmError> {
        for transport in &self.transports {
            transport.reset();
        }
        self.serial.reset();
        self.panic.reset();
        let memories = build::memories(&self.memory, self.frame_buffer.as_ref());
        self.backing.clear(&memories).map_err(host("cannot clear guest memory"))?;
        let entry = build::load_kernel(&self.spec, &self.memory)?;
        self.power_on_state()?;
        self.prepare_entry(entry)?;
        self.timer.restart();
        self.group.rearm();
        self.boots = true;
        Ok(())
    }

    fn end_vcpus(&mut self) {
        self.group.request_stop();
        for thread in self.vcpu_threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(machine = self.spec.name, "a vCPU thread panicked");
            }
        }
    }

    /// Ends the guest as if its power failed, but keeps what it ran on for [`Vm::reset`] or [`Vm::roll_back`]. Does
    /// nothing after [`Vm::stop`].
    pub fn cut_power(&mut self) {
        if self.phase == Phase::Stopped {
            return;
        }
        self.end_vcpus();
        for transport in &self.transports {
            transport.reset();
        }
        self.phase = Phase::Off;
    }

    /// Ends the machine as if its power failed. On return none of its threads runs and its devices have released
    /// everything outside. Does nothing if it has ended.
    pub fn stop(&mut self) {
        self.end_vcpus();
        self.event_thread = None;
        self.event_loop = None;
        for transport in &self.transports {
            transport.reset();
        }
        self.merge_disks();
        self.phase = Phase::Stopped;
    }

    /// The host's control over the balloon, if the spec has one.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.handles.iter().find_map(|handle| match handle {
            Handle::Balloon(balloon) => Some(balloon),
            _ => None,
        })
    }

    /// The screen, if the spec has one. It can be looked at for longer than the machine runs.
    pub fn screen(&self) -> Option<Arc<dyn Screen>> {
        let plain = self.frame_buffer.clone().map(|screen| screen as Arc<dyn Screen>);
        plain.or_else(|| {
            self.handles.iter().find_map(|handle| match handle {
                Handle::Screen(screen) => Some(screen.clone()),
                _ => None,
            })
        })
    }

    /// The host's hand on the keyboard, if the spec has one.
    pub fn keyboard(&self) -> Option<InputHandle> {
        self.input(input::Kind::Keyboard)
    }

    /// The host's hand on the tablet, if the spec has one.
    pub fn tablet(&self) -> Option<InputHandle> {
        self.input(input::Kind::Tablet)
    }

    fn input(&self, wanted: input::Kind) -> Option<InputHandle> {
        self.handles.iter().find_map(|handle| match handle {
            Handle::Input(kind, input) if *kind == wanted => Some(input.clone()),
            _ => None,
        })
    }

    /// The stages of the boot that have been reached, in order.
    pub fn boot_marks(&self) -> Vec<Mark> {
        self.timer.marks()
    }

    /// Types `bytes` into the serial console.
    ///
    /// # Errors
    /// The guest has left too much input unread.
    pub fn serial_input(&self, bytes: &[u8]) -> Result<(), InputFull> {
        self.serial.input(bytes)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
