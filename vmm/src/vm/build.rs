//! Putting a machine together.

use std::io::Write;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};

use super::descriptors::Counts;
use super::{Event, VmError, host, kvm};
use crate::Cancel;
use crate::arch::{board, firmware, layout, params};
use crate::boot::kernel;
use crate::device::boot_timer::BootTimer;
use crate::device::panic::PanicDevice;
use crate::device::serial::SerialPort;
use crate::error::chain;
use crate::event_loop::new_event;
use crate::interrupt::SharedLine;
use crate::memory::window::{Window, Windows};
use crate::memory::{Memory, MemoryMap};
use crate::screen::plain::FrameBuffer;
use crate::spec::MachineSpec;
use crate::vcpu::{Buses, Group};
use crate::virtio::blk::DiskCheckpoint;
use crate::virtio::build::{BuildError, Built, Connect, Handle, Host, device_specs};
use crate::virtio::transport::mmio::MmioTransport;

/// Most virtio devices: no known test needs half as many.
const MAX_DEVICES: usize = 128;

/// Loads kernel, initrd and boot parameters into fresh memory; the kernel's entry point.
pub(super) fn load_kernel(spec: &MachineSpec, memory: &Memory) -> Result<u64, VmError> {
    let kernel = kernel::load_kernel(memory, &spec.kernel)?;
    let initrd = kernel::load_initrd(memory, &spec.initrd, &kernel)?;
    params::write(memory, &kernel, initrd, &spec.cmdline, spec.plain_screen())?;
    Ok(kernel.entry)
}

/// What the types of the spec cannot say: checked before anything is made.
pub(super) fn check(spec: &MachineSpec) -> Result<(), VmError> {
    let fail = |problem| Err(VmError::Spec { machine: spec.name.clone(), problem });
    let devices = device_specs(spec);
    if devices.len() > MAX_DEVICES {
        return fail(format!(
            "{} virtio devices; allowed are at most {MAX_DEVICES}",
            devices.len()
        ));
    }
    for device in devices {
        if let Err(error) = device.check() {
            return fail(chain(&error));
        }
    }
    for (index, share) in spec.shares.iter().enumerate() {
        if spec.shares[..index].iter().any(|other| other.tag == share.tag) {
            return fail(format!("two shares have the tag {:?}", share.tag));
        }
    }
    Ok(firmware::check(spec)?)
}

/// The pixels of its screen, if it is a plain one.
pub(super) fn frame_buffer(spec: &MachineSpec) -> Result<Option<Arc<FrameBuffer>>, VmError> {
    let screen = spec.plain_screen().map(FrameBuffer::new).transpose()?;
    Ok(screen.map(Arc::new))
}

/// Everything that lies in a guest as memory: its own, and the pixels of a plain screen.
pub(super) fn memories<'a>(
    memory: &'a Memory,
    frame_buffer: Option<&'a Arc<FrameBuffer>>,
) -> Vec<&'a MemoryMap> {
    let screen = frame_buffer.map(|frame_buffer| frame_buffer.memory());
    std::iter::once(&**memory).chain(screen).collect()
}

/// How many slots it takes.
pub(super) fn attach_memory(vm: &VmFd, memories: &[&MemoryMap]) -> Result<usize, VmError> {
    for (slot, region) in (0..).zip(memories.iter().flat_map(|memory| memory.iter())) {
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
    Ok(memories.iter().map(|memory| memory.num_regions()).sum())
}

/// Lets the guest read images, in the slots from `first_slot` on.
pub(super) fn attach_windows(
    vm: &VmFd,
    first_slot: usize,
    windows: &[Arc<Window>],
) -> Result<(), VmError> {
    for (slot, window) in (first_slot..).zip(windows) {
        let region = kvm_userspace_memory_region {
            slot: u32::try_from(slot).unwrap_or(u32::MAX),
            guest_phys_addr: window.start,
            memory_size: window.image.len(),
            userspace_addr: window.image.host_address().as_ptr() as u64,
            flags: KVM_MEM_READONLY,
        };
        // SAFETY: the image is mapped at these addresses for as long as it lives, which each vCPU, by what it dispatches
        // to, sees to for as long as it can run. The guest cannot write there.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(kvm("KVM_SET_USER_MEMORY_REGION"))
            .map_err(|error| BuildError::no_room(&window.tag, error))?;
    }
    Ok(())
}

pub(super) fn attach_serial(
    vm: &VmFd,
    buses: &mut Buses,
    output: Box<dyn Write + Send>,
    panic: Arc<PanicDevice>,
) -> Result<Arc<SerialPort>, VmError> {
    let interrupt = new_event().map_err(host("cannot make an eventfd"))?;
    board::connect_console(vm, &interrupt).map_err(kvm("KVM_IRQFD"))?;
    let serial = Arc::new(SerialPort::new(interrupt, output, panic));
    board::attach_console(buses, serial.clone())?;
    Ok(serial)
}

pub(super) fn attach_board(
    buses: &mut Buses,
    timer: Arc<BootTimer>,
    panic: Arc<PanicDevice>,
    group: Arc<Group>,
    events: Arc<dyn Fn(Event) + Send + Sync>,
) -> Result<(), VmError> {
    board::attach(buses, timer, panic, move |request| {
        group.request_stop();
        events(match request {
            board::Request::PowerOff => Event::PowerOff,
            board::Request::Reset => Event::Reset,
        });
    })?;
    Ok(())
}

/// The virtio devices in the order in which the guest finds them, each with the host's handle on it.
pub(super) fn build_devices(
    spec: &MachineSpec,
    connect: &mut dyn Connect,
    descriptors: u64,
    cancel: &Cancel,
    windows: Windows,
    frozen: &[DiskCheckpoint],
) -> Result<Vec<Built>, VmError> {
    let parts = Counts::of(spec).divide(descriptors);
    let mut host = Host {
        connect,
        cancel,
        cores: spec.cores.get(),
        share_descriptors: parts.share,
        vsock_connections: parts.vsock,
        windows,
        frozen: frozen.iter(),
    };
    let built = device_specs(spec).into_iter().map(|device| device.build(&mut host));
    Ok(built.collect::<Result<_, _>>()?)
}

pub(super) struct Attached {
    pub(super) transports: Vec<Arc<MmioTransport>>,
    pub(super) announced: Vec<firmware::MmioDevice>,
    pub(super) handles: Vec<Handle>,
}

pub(super) fn attach_devices(
    vm: &Arc<VmFd>,
    buses: &mut Buses,
    memory: &Memory,
    devices: Vec<Built>,
    events: &Arc<dyn Fn(Event) + Send + Sync>,
) -> Result<Attached, VmError> {
    let mut attached =
        Attached { transports: Vec::new(), announced: Vec::new(), handles: Vec::new() };
    let addresses = (0..).map(|index| layout::VIRTIO_MMIO_START + index * layout::VIRTIO_MMIO_SIZE);
    let lines = layout::VIRTIO_LINES.map(|line| Arc::new(SharedLine::new(vm.clone(), line)));
    for ((index, (device, handle)), address) in devices.into_iter().enumerate().zip(addresses) {
        let line = &lines[index % lines.len()];
        let events = events.clone();
        let on_failure = Arc::new(move |device: &str, error: &crate::virtio::DeviceError| {
            let (device, reason) = (device.to_owned(), chain(error));
            tracing::warn!(device, reason, "device failed");
            events(Event::DeviceFailed { device, reason });
        });
        let transport = MmioTransport::new(device, memory.clone(), line.clone(), on_failure)
            .map_err(host("cannot make an eventfd"))?;
        let transport = Arc::new(transport);
        transport.connect(vm, address).map_err(kvm("KVM_IOEVENTFD"))?;
        let size = u64::from(layout::VIRTIO_MMIO_SIZE);
        buses.mmio.claim(u64::from(address), size, transport.clone())?;
        attached.handles.push(handle);
        attached.transports.push(transport);
        attached.announced.push(firmware::MmioDevice { address, line: line.number() });
    }
    Ok(attached)
}
