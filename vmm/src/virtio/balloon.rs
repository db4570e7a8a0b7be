//! The memory balloon (virtio 1.2, 5.5): memory that the guest does not use goes back to the host.
//!
//! There are two ways. Linux reports pages that have been free for a while by itself (free page reporting); that
//! needs nothing on the host. And the host can ask for a size of the balloon with [`BalloonHandle::set_target`]: the
//! guest then allocates that many pages and hands them over, until it is asked for fewer or runs out of memory.
//!
//! The guest takes a page back by touching it: the host then provides a zeroed one.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory, Le32};

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::queue::{Chain, GuestSlice, Position, Served, VirtQueue, writable};
use super::turn::{Again, Turn};
use super::{Activation, ActiveDevice, DeviceConfig, DeviceError, Interrupt, RestoreError};
use super::{SavedState, VirtioDevice};
use crate::memory::MemoryMap;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM (5.5.3): the guest may take pages back when it is out of memory.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING (5.5.3).
const F_REPORTING: u64 = 1 << 5;
/// Numbers of pages that the guest gives away (5.5.2).
const INFLATE: usize = 0;
/// Numbers of pages that it takes back.
const DEFLATE: usize = 1;
/// Free pages, as buffers. The specification numbers this queue 4, but Linux and QEMU count only
/// the queues whose feature is offered (`vm_find_vqs` in `drivers/virtio/virtio_mmio.c`).
const REPORTING: usize = 2;
const QUEUES: usize = 3;
const QUEUE_SIZE: u16 = 128;
/// The balloon counts in pages of 4 KiB, whatever the guest's are (5.5.6).
pub const PAGE_SIZE: u32 = 4096;
/// Limit on the page numbers read from one chain; Linux sends 256 at once (`VIRTIO_BALLOON_ARRAY_PFNS_MAX`). Any
/// others are ignored.
const MAX_PAGES: usize = 4096;
/// Layout of the saved state: [`Sizes`].
const STATE_VERSION: u16 = 1;

config_space! {
    /// 5.5.4; what would follow belongs to features that are not offered.
    struct Config {
        num_pages: Le32,
        actual: Le32,
    }
}

/// How large the balloon should be and is, in pages of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sizes {
    target: u32,
    /// What the guest says.
    actual: u32,
}

struct Shared {
    sizes: Mutex<Sizes>,
    changed: Condvar,
    again: Again,
}

impl Shared {
    /// A panic under the lock leaves two numbers.
    fn sizes(&self) -> MutexGuard<'_, Sizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's control over a balloon.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest to give away `pages` pages of [`PAGE_SIZE`] altogether. It may give fewer,
    /// or none without a driver.
    pub fn set_target(&self, pages: u32) {
        self.0.sizes().target = pages;
        self.0.again.ring();
    }

    /// How many pages of [`PAGE_SIZE`] the guest says it has given away.
    pub fn size(&self) -> u32 {
        self.0.sizes().actual
    }

    /// Waits until `reached` holds for the balloon's size in pages of [`PAGE_SIZE`], and says
    /// whether it did within `timeout`.
    pub fn wait_for_size(&self, timeout: Duration, mut reached: impl FnMut(u32) -> bool) -> bool {
        let sizes = self.0.sizes();
        let pending = |sizes: &mut Sizes| !reached(sizes.actual);
        let outcome = self.0.changed.wait_timeout_while(sizes, timeout, pending);
        !outcome.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// A balloon: without queues as `Balloon`, with them as `Balloon<Queues>`.
pub struct Balloon<Q = ()> {
    shared: Arc<Shared>,
    queues: Q,
}

/// The queues of an active balloon.
pub struct Queues {
    inflate: VirtQueue,
    deflate: VirtQueue,
    /// Only if the guest reports free pages.
    reporting: Option<VirtQueue>,
    interrupt: Arc<dyn Interrupt>,
    /// The target last announced to the guest.
    announced: u32,
}

/// A balloon, of which there is nothing to say.
pub struct BalloonSpec;

impl DeviceSpec for BalloonSpec {
    fn build(&self, _host: &mut Host<'_>) -> Result<Built, BuildError> {
        let balloon = Balloon::new().map_err(BuildError::host("balloon"))?;
        let handle = Handle::Balloon(balloon.handle());
        Ok((Box::new(balloon), handle))
    }
}

impl Balloon {
    /// Builds an empty balloon.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Balloon> {
        let shared =
            Shared { sizes: Mutex::default(), changed: Condvar::new(), again: Again::new()? };
        Ok(Balloon { shared: Arc::new(shared), queues: () })
    }
}

impl<Q> Balloon<Q> {
    /// The host's control over it.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }
}

impl<Q: Send> DeviceConfig for Balloon<Q> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }
    fn name(&self) -> String {
        "balloon".into()
    }
    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let sizes = *self.shared.sizes();
        let config = Config { num_pages: sizes.target.into(), actual: sizes.actual.into() };
        read_config_space(&config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at_actual = usize::try_from(offset) == Ok(std::mem::offset_of!(Config, actual));
        if let (true, Ok(actual)) = (at_actual, data.try_into()) {
            self.shared.sizes().actual = u32::from_le_bytes(actual);
            self.shared.changed.notify_all();
        }
    }
    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.shared.again.as_raw_fd()]
    }
    fn save(&self) -> SavedState {
        SavedState::encode(STATE_VERSION, &*self.shared.sizes())
    }
}

impl VirtioDevice for Balloon {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        *self.shared.sizes() = state.decode(STATE_VERSION)?;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn activate(
        self: Box<Self>,
        mut activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        match take_queues(&mut activation) {
            Ok(queues) => Ok(Box::new(Balloon { shared: self.shared, queues })),
            Err(error) => Err((self, error)),
        }
    }
}

fn take_queues(activation: &mut Activation) -> Result<Queues, DeviceError> {
    let reports = activation.features & F_REPORTING != 0;
    Ok(Queues {
        inflate: activation.take_queue(INFLATE)?,
        deflate: activation.take_queue(DEFLATE)?,
        reporting: reports.then(|| activation.take_queue(REPORTING)).transpose()?,
        interrupt: Arc::clone(&activation.interrupt),
        // The driver looks for itself when it starts. After a restore one interrupt may be one too
        // many, which is harmless.
        announced: 0,
    })
}

impl ActiveDevice for Balloon<Queues> {
    fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        let (queues, again) = (&mut self.queues, &self.shared.again);
        match index {
            INFLATE => again.serve_turn(&mut queues.inflate, inflate),
            // The pages come back when the guest touches them.
            DEFLATE => again.serve_turn(&mut queues.deflate, |_, _, _| Served::Done(0)),
            REPORTING => match &mut queues.reporting {
                Some(reporting) => again.serve_turn(reporting, report),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn host_event(&mut self) -> Result<(), DeviceError> {
        let target = self.shared.sizes().target;
        if target != self.queues.announced {
            self.queues.announced = target;
            self.queues.interrupt.config();
        }
        (0..QUEUES).try_for_each(|index| self.notify(index))
    }

    fn pause(&mut self) {}

    fn queue_positions(&self) -> Vec<Option<Position>> {
        let queues = &self.queues;
        let reporting = queues.reporting.as_ref().map(VirtQueue::position);
        vec![Some(queues.inflate.position()), Some(queues.deflate.position()), reporting]
    }

    fn reset(self: Box<Self>) -> Box<dyn VirtioDevice> {
        // The guest's next driver starts with an empty balloon; what the host wants stays.
        self.shared.sizes().actual = 0;
        self.shared.changed.notify_all();
        Box::new(Balloon { shared: self.shared, queues: () })
    }
}

/// Takes the pages whose numbers are in one chain. A number outside memory is ignored.
fn inflate(chain: Chain, memory: &MemoryMap, turn: &mut Turn) -> Served {
    let Ok(mut reader) = chain.reader(memory) else {
        return Served::Done(0);
    };
    // A truncated page number at the end is ignored.
    let mut numbers = vec![0; reader.available_bytes().min(4 * MAX_PAGES) & !3];
    if reader.read_exact(&mut numbers).is_err() {
        return Served::Done(0);
    }
    let pages = numbers.as_chunks().0.iter().map(|&number| u32::from_le_bytes(number));
    // All memory consists of whole pages.
    let pages = pages.filter(|&page| memory.address_in_range(address(page)));
    for (first, count) in runs(pages) {
        let len = usize::try_from(count * u64::from(PAGE_SIZE)).unwrap_or(usize::MAX);
        for slice in memory.get_slices(address(first), len).map_while(Result::ok) {
            give_back(&slice, turn);
        }
    }
    Served::Done(0)
}

fn address(page: u32) -> GuestAddress {
    GuestAddress(u64::from(page) * u64::from(PAGE_SIZE))
}

/// Joins page numbers that follow each other, up or down: Linux gives both.
fn runs(pages: impl Iterator<Item = u32>) -> impl Iterator<Item = (u32, u64)> {
    let mut pages = pages.peekable();
    std::iter::from_fn(move || {
        let mut first = pages.next()?;
        let mut end = u64::from(first) + 1;
        while let Some(page) = pages.next_if(|&page| {
            u64::from(page) == end || first.checked_sub(1).is_some_and(|before| page == before)
        }) {
            first = first.min(page);
            end = end.max(u64::from(page) + 1);
        }
        Some((first, end - u64::from(first)))
    })
}

/// Takes the free pages that one chain consists of, until they are used again.
fn report(chain: Chain, memory: &MemoryMap, turn: &mut Turn) -> Served {
    for slice in writable(chain, memory).map_while(Result::ok) {
        give_back(&slice, turn);
    }
    Served::Done(0)
}

/// Gives the whole pages inside `slice` back to the host. From then on they read as zero, or as at the machine's first
/// checkpoint: the guest counts on neither.
fn give_back(slice: &GuestSlice<'_>, turn: &mut Turn) {
    let page = usize::try_from(PAGE_SIZE).unwrap_or(usize::MAX);
    let guard = slice.ptr_guard_mut();
    // Guest and host pages are aligned alike: mappings begin at host pages.
    let start = guard.as_ptr().addr().next_multiple_of(page) - guard.as_ptr().addr();
    let len = slice.len().saturating_sub(start) & !(page - 1);
    turn.spend(len);
    if len == 0 {
        return;
    }
    // SAFETY: the range lies inside `slice`, which is guest memory and mapped for as long as the
    // guard lives. It is a private mapping, so this keeps it mapped and only drops its own pages;
    // nobody holds references into guest memory, which changes under everybody's hands anyway.
    let status =
        unsafe { libc::madvise(guard.as_ptr().add(start).cast(), len, libc::MADV_DONTNEED) };
    if status == 0 {
        slice.bitmap().mark_dirty(start, len);
    } else {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "cannot give guest memory back to the host");
    }
}

#[cfg(test)]
mod tests;
