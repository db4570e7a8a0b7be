//! The device for a virtual machine in another process: the same sockets on the host, by the vhost-user protocol.
//!
//! That process has the queue of events to itself.

use std::io;
use std::mem;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::{EVENTS, RECEIVE, TRANSMIT, Vsock, VsockError, exchange, hear_host};
use crate::memory::{Memory, MemoryMap};
use crate::spec::VsockSpec;
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::vhost_user::{Client, Serving};
use crate::virtio::{DeviceConfig, DeviceError, Interrupt};

/// The queues that are served here.
const QUEUES: usize = EVENTS;
/// The largest that QEMU makes.
const MAX_QUEUE: u16 = 1024;
/// What the library calls events of the host's side; lower numbers are those of queues and the end.
const HOST_EVENT: u64 = QUEUES as u64 + 1;

/// Serves a vsock to another process, once, until that closes the connection. Dropping this waits for that, unless
/// nobody has connected yet.
pub struct VsockServer(#[allow(dead_code, reason = "it is only to be dropped")] Serving);

impl VsockServer {
    /// Serves to the process that listens, or will, at `socket`.
    ///
    /// # Errors
    /// As [`Vsock::new`].
    pub fn start(
        spec: &VsockSpec,
        connections: usize,
        socket: PathBuf,
    ) -> Result<Self, VsockError> {
        let mut vsock = Vsock::new(spec)?;
        vsock.limit(connections);
        let host_fds = vsock.host_fds();
        let backend = Backend(Mutex::new(State { vsock, next: [0; QUEUES], memory: None }));
        let client = Client { name: "vsock".to_owned(), socket };
        let serving = client.serve(backend, move |daemon| {
            // The queues are of one thread.
            for handler in daemon.get_epoll_handlers() {
                for fd in &host_fds {
                    let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
                    handler.register_listener(*fd, edges, HOST_EVENT)?;
                }
            }
            Ok(())
        });
        Ok(Self(serving.map_err(VsockError::Host)?))
    }
}

type Guest = GuestMemoryAtomic<MemoryMap>;
type Vring = VringMutex<Guest>;

struct Backend(Mutex<State>);

struct State {
    vsock: Vsock,
    /// Where the queues go on, unless there is a new driver.
    next: [u16; QUEUES],
    /// There once the other process has sent it.
    memory: Option<Guest>,
}

impl State {
    /// Does all that there is to do with queues that the other process leaves alone meanwhile.
    fn work(
        &mut self,
        receive: &mut VringState<Guest>,
        transmit: &mut VringState<Guest>,
    ) -> Result<(), DeviceError> {
        let Some(memory) = self.memory.as_ref().map(|memory| memory.memory().into_inner()) else {
            return Ok(());
        };
        let at = [&*receive, &*transmit].map(|ring| ring.get_queue().next_avail());
        if self.next != at {
            self.vsock.hub.clear();
        }
        let mut receive = Borrowed::new(RECEIVE, receive, &memory)?;
        let mut transmit = Borrowed::new(TRANSMIT, transmit, &memory)?;
        let Vsock { hub, again, .. } = &mut self.vsock;
        hear_host(hub)?;
        let done = exchange(hub, again, &mut receive.queue, &mut transmit.queue);
        self.next = [receive.give_back(), transmit.give_back()];
        done
    }
}

/// A queue in use.
struct Borrowed<'a> {
    queue: VirtQueue,
    ring: &'a mut VringState<Guest>,
    rung: Arc<Rung>,
}

impl<'a> Borrowed<'a> {
    /// A queue that is not well-formed is lost: the other process has to set it up anew.
    fn new(
        index: usize,
        ring: &'a mut VringState<Guest>,
        memory: &Memory,
    ) -> Result<Self, DeviceError> {
        let broken = |source: QueueError| source.in_queue(index);
        let empty = Queue::new(MAX_QUEUE).map_err(|error| broken(error.into()))?;
        let queue = mem::replace(ring.get_queue_mut(), empty);
        let rung = Arc::<Rung>::default();
        let number = u16::try_from(index).unwrap_or_default();
        let queue = VirtQueue::new(number, queue, Arc::clone(memory), Arc::clone(&rung) as _);
        Ok(Self { queue: queue.map_err(broken)?, ring, rung })
    }

    /// Gives it back, and says where it goes on.
    fn give_back(self) -> u16 {
        let next = self.queue.position().next_avail;
        *self.ring.get_queue_mut() = self.queue.into_inner();
        if self.rung.0.load(Ordering::Relaxed) {
            // Who cannot be told any more has gone.
            let _ = self.ring.signal_used_queue();
        }
        next
    }
}

/// Remembers that the guest is to be told of used buffers.
#[derive(Default)]
struct Rung(AtomicBool);

impl Interrupt for Rung {
    fn queue(&self, _index: u16) {
        self.0.store(true, Ordering::Relaxed);
    }
    fn config(&self) {}
}

impl Backend {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE.into()
    }

    fn features(&self) -> u64 {
        let common = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX]
            .map(|bit| 1 << bit);
        let own = self.state().vsock.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        common.iter().fold(own, |all, bit: &u64| all | bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The queues know.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(size).unwrap_or(0)];
        self.state().vsock.read_config(offset.into(), &mut data);
        data
    }

    fn update_memory(&self, memory: Guest) -> io::Result<()> {
        self.state().memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        let [receive, transmit] = vrings else { return Ok(()) };
        let (mut receive, mut transmit) = (receive.get_mut(), transmit.get_mut());
        let runs = |ring: &VringState<Guest>| ring.is_enabled() && ring.get_queue().ready();
        if !runs(&receive) || !runs(&transmit) {
            return Ok(());
        }
        self.state().work(&mut receive, &mut transmit).map_err(|error| {
            tracing::warn!(%error, "a guest has lost its vsock");
            // It ends the thread.
            io::Error::other(error)
        })
    }
}
