//! A graphics card with one screen and without 3D (virtio 1.2, 5.7).
//!
//! The guest makes resources, draws on memory of its own, and says which is shown and what of it has changed. There are
//! two kinds. A blob *is* the guest's memory, and is looked at when somebody wants a picture: it costs no copies, no
//! memory of the host, and is saved with the guest. Linux makes these where it is told that it can (`VIRTIO_GPU_F_RESOURCE_BLOB`).
//! The other kind has a copy here, which the guest brings up to date by transfers.
//!
//! There is no EDID: Linux prefers the size that it is told with the scanout. The pointer's picture is not part of the
//! screen's, so nothing is done with what comes by the cursor queue.

mod board;
mod command;
mod resource;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_gpu::VIRTIO_GPU_F_RESOURCE_BLOB;
use virtio_bindings::virtio_ids::VIRTIO_ID_GPU;
use vm_memory::Le32;

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::queue::{Chain, Position, Served, VirtQueue};
use super::turn::{Again, Turn};
use super::{Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError};
use super::{SavedState, VirtioDevice};
use crate::memory::MemoryMap;
use crate::screen::{Picture, Screen};
use crate::spec::ScreenSpec;
use board::Board;
use command::{Command, Header};

/// Requests and their answers (5.7.2).
const CONTROL: usize = 0;
/// What the pointer looks like and where it is.
const CURSOR: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 16];
/// Most of the host's memory that resources take: copies of pixels, and lists of the guest's memory.
const MAX_BYTES: u64 = 64 << 20;
/// Most resources.
const MAX_RESOURCES: usize = 4096;
/// Layout of the saved state: [`board::SavedBoard`].
const STATE_VERSION: u16 = 1;

config_space! {
    /// 5.7.4.
    struct Config {
        events_read: Le32,
        events_clear: Le32,
        num_scanouts: Le32,
        num_capsets: Le32,
    }
}

/// What device and host look at.
#[derive(Default)]
struct Shared {
    board: Mutex<Board>,
    version: AtomicU64,
}

impl Shared {
    /// A panic under the lock may leave less booked than is there, nothing that does harm.
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) {
        self.version.fetch_add(1, Ordering::SeqCst);
    }
}

impl Screen for Shared {
    fn picture(&self) -> Option<Picture> {
        // The guest need not wait for all of it.
        let raw = self.board().raw()?;
        Some(raw.picture())
    }

    fn version(&self) -> u64 {
        self.version.load(Ordering::SeqCst)
    }
}

/// A graphics card: without queues as `Gpu`, with them as `Gpu<Queues>`.
pub struct Gpu<Q = ()> {
    spec: ScreenSpec,
    shared: Arc<Shared>,
    again: Again,
    queues: Q,
}

/// The queues of an active graphics card.
pub struct Queues {
    control: VirtQueue,
    cursor: VirtQueue,
}

impl DeviceSpec for ScreenSpec {
    fn build(&self, _host: &mut Host<'_>) -> Result<Built, BuildError> {
        let gpu = Gpu::new(self).map_err(BuildError::host("screen"))?;
        let handle = Handle::Screen(gpu.screen());
        Ok((Box::new(gpu), handle))
    }
}

impl Gpu {
    /// Builds one that shows nothing. The guest is told to prefer the size that `spec` gives.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(spec: &ScreenSpec) -> io::Result<Gpu> {
        Ok(Gpu { spec: *spec, shared: Arc::default(), again: Again::new()?, queues: () })
    }
}

impl<Q> Gpu<Q> {
    /// What it shows.
    pub fn screen(&self) -> Arc<dyn Screen> {
        self.shared.clone()
    }
}

impl<Q: Send> DeviceConfig for Gpu<Q> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_GPU
    }
    fn name(&self) -> String {
        "screen".into()
    }
    fn identity(&self) -> String {
        format!("{}x{}", self.spec.width, self.spec.height)
    }
    fn features(&self) -> u64 {
        1 << VIRTIO_GPU_F_RESOURCE_BLOB
    }
    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [none, one] = [0, 1].map(Le32::from);
        let config =
            Config { events_read: none, events_clear: none, num_scanouts: one, num_capsets: none };
        read_config_space(&config, offset, data);
    }
    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.again.as_raw_fd()]
    }
    /// Requests are short, and the guest waits for most: so it goes on with the answer, without a switch of threads.
    fn inline_queues(&self) -> u64 {
        1 << CONTROL
    }
    fn save(&self) -> SavedState {
        SavedState::encode(STATE_VERSION, &self.shared.board().save())
    }
}

impl VirtioDevice for Gpu {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let damaged = |_| RestoreError::Decode(postcard::Error::DeserializeBadEncoding);
        *self.shared.board() = Board::restore(state.decode(STATE_VERSION)?).map_err(damaged)?;
        self.shared.change();
        Ok(())
    }

    fn activate(
        self: Box<Self>,
        mut activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        let mut take = |index| activation.take_queue(index);
        match take(CONTROL).and_then(|control| Ok(Queues { control, cursor: take(CURSOR)? })) {
            Ok(queues) => {
                self.shared.board().memory = Some(activation.memory);
                let Gpu { spec, shared, again, .. } = *self;
                Ok(Box::new(Gpu { spec, shared, again, queues }))
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl ActiveDevice for Gpu<Queues> {
    fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        let (shared, spec) = (&self.shared, &self.spec);
        match index {
            CONTROL => self.again.serve_turn(&mut self.queues.control, |chain, memory, turn| {
                serve(&chain, memory, turn, shared, spec)
            }),
            CURSOR => self.again.serve_turn(&mut self.queues.cursor, |_, _, _| Served::Done(0)),
            _ => Ok(()),
        }
    }

    fn host_event(&mut self) -> Result<(), DeviceError> {
        [CONTROL, CURSOR].into_iter().try_for_each(|index| self.notify(index))
    }

    fn pause(&mut self) {}

    fn queue_positions(&self) -> Vec<Option<Position>> {
        vec![Some(self.queues.control.position()), Some(self.queues.cursor.position())]
    }

    fn reset(self: Box<Self>) -> Box<dyn VirtioDevice> {
        let Gpu { spec, shared, again, .. } = *self;
        // Who still looks keeps none of the guest's memory.
        *shared.board() = Board::default();
        shared.change();
        Box::new(Gpu { spec, shared, again, queues: () })
    }
}

/// Serves one request. Whatever is wrong with it, the guest gets an answer, if it has left room for one.
fn serve(
    chain: &Chain,
    memory: &MemoryMap,
    turn: &mut Turn,
    shared: &Shared,
    spec: &ScreenSpec,
) -> Served {
    let (Ok(mut reader), Ok(mut writer)) =
        (chain.clone().reader(memory), chain.clone().writer(memory))
    else {
        return Served::Done(0);
    };
    let Ok(header) = Header::read(&mut reader) else { return Served::Done(0) };
    turn.spend(reader.available_bytes());
    let answer = match Command::read(&header, &mut reader) {
        Ok(Command::DisplayInfo) => {
            header.display_info(spec.width.get().into(), spec.height.get().into())
        }
        Ok(command) => {
            let done = shared.board().execute(command, memory);
            if let Ok(done) = done {
                turn.spend(done.moved);
                if done.changed {
                    shared.change();
                }
            }
            header.plain_answer(done.map(|_| ()))
        }
        Err(refusal) => header.plain_answer(Err(refusal)),
    };
    match writer.write_all(&answer) {
        Ok(()) => Served::Done(u32::try_from(answer.len()).unwrap_or(u32::MAX)),
        Err(_) => Served::Done(0),
    }
}

#[cfg(test)]
mod tests;
