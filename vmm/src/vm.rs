//! One machine: put together here, and only here.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use firn_net_switch::NetPort;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::cpuid::{self, Place};
use crate::arch::x86_64::entry;
use crate::boot::{acpi, kernel, params};
use crate::bus::Overlap;
use crate::device::panic::PanicWatch;
use crate::device::power;
use crate::device::serial::{self, InputFull, SerialPort};
use crate::error::chain;
use crate::event_loop::{EventLoop, EventThread};
use crate::interrupt::SharedLine;
use crate::memory::{self, Memory};
use crate::spec::{MAX_CORES, MIN_MEMORY_MIB, MachineSpec};
use crate::vcpu::{Buses, Group, Vcpu};
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::transport::mmio::{MmioEvents, MmioTransport};
use crate::virtio::{VirtioDevice, blk, console, fs, net, rng, vsock};

/// Pins of the IOAPIC that virtio devices share: the first ones are those of the PC's own devices,
/// and the IOAPIC ends at pin 23.
const VIRTIO_GSIS: std::ops::RangeInclusive<u32> = 6..=23;
/// Most virtio devices. KVM takes 1,000 doorbells, of which a device has at most seven; nobody is
/// known to want more than half as many.
const MAX_DEVICES: usize = 128;

/// What happens to a running machine. More kinds will come.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Its vCPUs have started.
    Booting,
    /// Its kernel has panicked.
    Panic {
        /// The kernel's reason.
        message: String,
    },
    /// It has asked to be started again; its vCPUs have ended.
    Reset,
    /// It has powered off; its vCPUs have ended.
    PowerOff,
    /// A vCPU cannot go on; all have ended.
    VcpuDied {
        /// Which.
        vcpu: u8,
        /// Why, as a sentence for people.
        reason: String,
    },
    /// A device has been taken from the guest because of what the guest did to it.
    DeviceFailed {
        /// The device's name.
        device: String,
        /// What the guest did.
        reason: String,
    },
}

/// The host's ends of what a machine is connected to.
pub struct HostSide {
    /// Hears of everything that happens to the machine, on the machine's threads: it must not
    /// block, nor call back into the machine.
    pub events: Box<dyn Fn(Event) + Send + Sync>,
    /// Takes what the guest writes to its serial console, on a vCPU's thread and often byte by
    /// byte: it must not block.
    pub serial: Box<dyn Write + Send>,
    /// One for each of [`MachineSpec::console_ports`].
    pub console_ports: Vec<UnixStream>,
    /// One for each of [`MachineSpec::nets`].
    pub nets: Vec<Arc<dyn NetPort>>,
}

/// A machine could not be built or driven.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// The spec asks for something that cannot be.
    #[error("machine {machine}: {problem}")]
    Spec {
        /// The machine.
        machine: String,
        /// What is wrong, and what would be right.
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
    Image(#[from] kernel::ImageError),
    /// The boot parameters are wrong.
    #[error(transparent)]
    Params(#[from] params::ParamsError),
    /// The ACPI tables cannot be written.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// A vCPU cannot be set up.
    #[error("vCPU")]
    Entry(#[from] entry::EntryError),
    /// Two devices want the same addresses.
    #[error(transparent)]
    Bus(#[from] Overlap),
    /// A share cannot be served.
    #[error(transparent)]
    Share(#[from] fs::FsError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] blk::BlkError),
    /// A vsock device cannot be served.
    #[error(transparent)]
    Vsock(#[from] vsock::VsockError),
    /// A console cannot be served.
    #[error("console")]
    Console(#[from] console::ConsoleError),
    /// The host is out of something.
    #[error("{operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn kvm(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { operation, source }
}

fn host(operation: &'static str) -> impl Fn(io::Error) -> VmError {
    move |source| VmError::Host { operation, source }
}

/// The threads of a machine that has started.
struct Running {
    vcpus: Vec<JoinHandle<()>>,
    /// Ends when dropped.
    _events: EventThread,
}

enum Phase {
    Built { vcpus: Vec<Vcpu>, event_loop: EventLoop },
    Running(Running),
    Stopped,
}

/// One machine. Dropping it stops it and leaves nothing behind.
pub struct Vm {
    name: String,
    phase: Phase,
    group: Arc<Group>,
    serial: Arc<SerialPort>,
    transports: Vec<Arc<MmioTransport>>,
    balloon: Option<BalloonHandle>,
    events: Arc<dyn Fn(Event) + Send + Sync>,
    // Last, so that they are dropped last: the vCPUs and devices above use them.
    _vm: Arc<VmFd>,
    _memory: Memory,
}

impl Vm {
    /// Builds a machine: everything is allocated and loaded, nothing runs.
    ///
    /// # Errors
    /// What is wrong with the spec, its files or the host.
    pub fn new(spec: &MachineSpec, host_side: HostSide) -> Result<Vm, VmError> {
        check(spec, &host_side)?;
        let memory = memory::allocate(spec.memory_mib)?;
        let kernel = kernel::load_kernel(&memory, &spec.kernel)?;
        let initrd = kernel::load_initrd(&memory, &spec.initrd, &kernel)?;
        params::write(&memory, &kernel, initrd, &spec.cmdline)?;

        let kvm_fd = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let vm = Arc::new(create_vm(&kvm_fd, &memory)?);
        let group = Arc::new(Group::default());
        let events: Arc<dyn Fn(Event) + Send + Sync> = Arc::from(host_side.events);

        let mut buses = Buses::default();
        let serial = attach_serial(&vm, &mut buses, host_side.serial, events.clone())?;
        attach_power(&mut buses, group.clone(), events.clone())?;
        let mut devices = build_devices(spec, host_side.console_ports, host_side.nets)?;
        let balloon = add_balloon(spec, &mut devices)?;
        check_count(spec, devices.len())?;
        let attached = attach_devices(&vm, &mut buses, &memory, devices, &events)?;
        acpi::write(&memory, spec.cores, &attached.announced)?;

        let subscribers = attached.transports.iter().map(|transport| {
            Box::new(MmioEvents(transport.clone()))
                as Box<dyn event_manager::MutEventSubscriber + Send>
        });
        let event_loop = EventLoop::new(subscribers).map_err(host("cannot watch devices"))?;
        entry::write_tables(&memory).map_err(entry::EntryError::from)?;
        entry::write_reset_vector(&memory).map_err(entry::EntryError::from)?;
        let buses = Arc::new(buses);
        let vcpus = create_vcpus(&kvm_fd, &vm, spec.cores, kernel.entry, &buses, &group)?;
        Ok(Vm {
            name: spec.name.clone(),
            phase: Phase::Built { vcpus, event_loop },
            group,
            serial,
            transports: attached.transports,
            balloon,
            events,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Starts it: one thread a vCPU and one for the devices. Does nothing if it has started
    /// before.
    ///
    /// # Errors
    /// The process can have no more threads.
    pub fn start(&mut self) -> Result<(), VmError> {
        let (vcpus, event_loop) = match std::mem::replace(&mut self.phase, Phase::Stopped) {
            Phase::Built { vcpus, event_loop } => (vcpus, event_loop),
            other => {
                self.phase = other;
                return Ok(());
            }
        };
        let spawn_error = host("cannot start a thread");
        let events = event_loop.spawn(format!("{}-dev", self.name)).map_err(&spawn_error)?;
        (self.events)(Event::Booting);
        let mut running = Running { vcpus: Vec::new(), _events: events };
        for vcpu in vcpus {
            match self.spawn_vcpu(vcpu) {
                Ok(thread) => running.vcpus.push(thread),
                Err(error) => {
                    self.phase = Phase::Running(running);
                    self.stop();
                    return Err(spawn_error(error));
                }
            }
        }
        self.phase = Phase::Running(running);
        Ok(())
    }

    fn spawn_vcpu(&self, mut vcpu: Vcpu) -> io::Result<JoinHandle<()>> {
        let events = self.events.clone();
        let group = self.group.clone();
        Builder::new().name(format!("{}-cpu{}", self.name, vcpu.index())).spawn(move || {
            if let Err(reason) = vcpu.run() {
                group.request_stop();
                events(Event::VcpuDied { vcpu: vcpu.index(), reason });
            }
        })
    }

    /// Stops all vCPUs and devices; what is in flight is finished first. Nothing if it is not
    /// running.
    pub fn pause(&self) {
        if let Phase::Running(_) = self.phase {
            self.group.pause();
            for transport in &self.transports {
                transport.pause();
            }
        }
    }

    /// Goes on after [`Vm::pause`].
    pub fn resume(&self) {
        if let Phase::Running(_) = self.phase {
            for transport in &self.transports {
                transport.resume();
            }
            self.group.resume();
        }
    }

    /// Ends the machine as if its power went: on return none of its threads runs and its devices
    /// have let go of everything outside. Nothing if it has ended.
    pub fn stop(&mut self) {
        self.group.request_stop();
        if let Phase::Running(running) = std::mem::replace(&mut self.phase, Phase::Stopped) {
            for thread in running.vcpus {
                if thread.join().is_err() {
                    tracing::error!(machine = self.name, "a vCPU thread panicked");
                }
            }
        }
        for transport in &self.transports {
            transport.reset();
        }
    }

    /// The host's hand on the balloon, if the spec has one.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.balloon.as_ref()
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

/// What the types of the spec cannot say.
fn check(spec: &MachineSpec, host: &HostSide) -> Result<(), VmError> {
    let fail = |problem| Err(VmError::Spec { machine: spec.name.clone(), problem });
    if !(1..=MAX_CORES).contains(&spec.cores) {
        return fail(format!("{} cores; allowed are 1 to {MAX_CORES}", spec.cores));
    }
    if spec.memory_mib < MIN_MEMORY_MIB {
        return fail(format!(
            "{} MiB of memory; allowed are {MIN_MEMORY_MIB} MiB and more",
            spec.memory_mib
        ));
    }
    if spec.console_ports.len() != host.console_ports.len() {
        return fail("the host's side does not match the console ports".to_owned());
    }
    if spec.nets.len() != host.nets.len() {
        return fail("the host's side does not match the network cards".to_owned());
    }
    for (index, share) in spec.shares.iter().enumerate() {
        if spec.shares[..index].iter().any(|other| other.tag == share.tag) {
            return fail(format!("two shares have the tag {:?}", share.tag));
        }
    }
    Ok(())
}

fn create_vm(kvm_fd: &Kvm, memory: &Memory) -> Result<VmFd, VmError> {
    let vm = kvm_fd.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    vm.set_tss_address(memory::KVM_TSS_START).map_err(kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is one mapping of exactly this size, and `Vm` drops its memory after
        // the VM and its vCPUs.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(vm)
}

fn attach_serial(
    vm: &VmFd,
    buses: &mut Buses,
    output: Box<dyn Write + Send>,
    events: Arc<dyn Fn(Event) + Send + Sync>,
) -> Result<Arc<SerialPort>, VmError> {
    let interrupt = EventFd::new(EFD_NONBLOCK).map_err(host("cannot make an eventfd"))?;
    vm.register_irqfd(&interrupt, serial::GSI).map_err(kvm("KVM_IRQFD"))?;
    let output = PanicWatch::new(output, move |message| events(Event::Panic { message }));
    let serial = Arc::new(SerialPort::new(interrupt, Box::new(output)));
    buses.ports.claim(u64::from(serial::PORT), u64::from(serial::PORTS), serial.clone())?;
    Ok(serial)
}

fn attach_power(
    buses: &mut Buses,
    group: Arc<Group>,
    events: Arc<dyn Fn(Event) + Send + Sync>,
) -> Result<(), VmError> {
    power::attach(&mut buses.ports, move |request| {
        group.request_stop();
        events(match request {
            power::Request::PowerOff => Event::PowerOff,
            power::Request::Reset => Event::Reset,
        });
    })?;
    Ok(())
}

/// The virtio devices in the order in which the guest finds them.
fn build_devices(
    spec: &MachineSpec,
    console_ports: Vec<UnixStream>,
    nets: Vec<Arc<dyn NetPort>>,
) -> Result<Vec<Box<dyn VirtioDevice>>, VmError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    if !spec.console_ports.is_empty() {
        devices.push(Box::new(console::Console::new(&spec.console_ports, console_ports)?));
    }
    if spec.rng {
        devices.push(Box::new(rng::Rng::new()));
    }
    for (card, port) in spec.nets.iter().zip(nets) {
        let card = net::Net::new(card, port).map_err(host("cannot make an eventfd"))?;
        devices.push(Box::new(card));
    }
    for share in &spec.shares {
        devices.push(Box::new(fs::Fs::new(share)?));
    }
    for disk in &spec.disks {
        devices.push(Box::new(blk::Blk::new(disk, spec.cores)?));
    }
    if let Some(spec) = &spec.vsock {
        devices.push(Box::new(vsock::Vsock::new(spec)?));
    }
    Ok(devices)
}

fn add_balloon(
    spec: &MachineSpec,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
) -> Result<Option<BalloonHandle>, VmError> {
    if !spec.balloon {
        return Ok(None);
    }
    let balloon = Balloon::new().map_err(host("cannot make an eventfd"))?;
    let handle = balloon.handle();
    devices.push(Box::new(balloon));
    Ok(Some(handle))
}

fn check_count(spec: &MachineSpec, wanted: usize) -> Result<(), VmError> {
    if wanted > MAX_DEVICES {
        let problem = format!("{wanted} virtio devices; allowed are at most {MAX_DEVICES}");
        return Err(VmError::Spec { machine: spec.name.clone(), problem });
    }
    Ok(())
}

struct Attached {
    transports: Vec<Arc<MmioTransport>>,
    announced: Vec<acpi::MmioDevice>,
}

fn attach_devices(
    vm: &Arc<VmFd>,
    buses: &mut Buses,
    memory: &Memory,
    devices: Vec<Box<dyn VirtioDevice>>,
    events: &Arc<dyn Fn(Event) + Send + Sync>,
) -> Result<Attached, VmError> {
    let mut attached = Attached { transports: Vec::new(), announced: Vec::new() };
    let addresses = (0..).map(|index| memory::VIRTIO_MMIO_START + index * memory::VIRTIO_MMIO_SIZE);
    let lines: Vec<_> = VIRTIO_GSIS.map(|gsi| SharedLine::new(vm.clone(), gsi)).collect();
    for ((index, device), address) in devices.into_iter().enumerate().zip(addresses) {
        let line = &lines[index % lines.len()];
        let sharer = u8::try_from(index / lines.len()).unwrap_or(u8::MAX);
        let events = events.clone();
        let on_failure = Arc::new(move |device: &str, error: &crate::virtio::DeviceError| {
            let (device, reason) = (device.to_owned(), chain(error));
            tracing::warn!(device, reason, "device failed");
            events(Event::DeviceFailed { device, reason });
        });
        let transport = MmioTransport::new(device, memory.clone(), line.pin(sharer), on_failure)
            .map_err(host("cannot make an eventfd"))?;
        let transport = Arc::new(transport);
        transport.connect(vm, address).map_err(kvm("KVM_IOEVENTFD"))?;
        let size = u64::from(memory::VIRTIO_MMIO_SIZE);
        buses.mmio.claim(u64::from(address), size, transport.clone())?;
        attached.transports.push(transport);
        attached.announced.push(acpi::MmioDevice { address, gsi: line.gsi() });
    }
    Ok(attached)
}

/// Makes the vCPUs; the first one will enter the kernel at `entry`.
fn create_vcpus(
    kvm_fd: &Kvm,
    vm: &VmFd,
    cores: u8,
    entry: u64,
    buses: &Arc<Buses>,
    group: &Arc<Group>,
) -> Result<Vec<Vcpu>, VmError> {
    let supported = kvm_fd
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_deadline = kvm_fd.check_extension(Cap::TscDeadlineTimer);
    let mut vcpus = Vec::new();
    for index in 0..cores {
        let fd = vm.create_vcpu(u64::from(index)).map_err(kvm("KVM_CREATE_VCPU"))?;
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let place = Place { vcpu: index, cores, tsc_khz, tsc_deadline };
        let cpuid = cpuid::adapt(&supported, place);
        fd.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))?;
        entry::set_msrs(&fd)?;
        if index == 0 {
            entry::set_registers(&fd, entry, params::ZERO_PAGE)?;
        }
        vcpus.push(Vcpu::new(fd, index, buses.clone(), group.clone()));
    }
    Ok(vcpus)
}
