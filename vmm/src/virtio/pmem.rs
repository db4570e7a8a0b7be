//! Memory of the host's in the guest (virtio 1.2, 5.19): a share that nobody changes, as an image of a file system.
//!
//! The guest maps it, and reads and executes what is there without exits and without a copy of its own. All machines of
//! the process have the same memory; see [`Window`].

use std::io::{Read, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use vm_memory::Le64;

use super::build::{BuildError, Built, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::queue::{Chain, Position, Served, VirtQueue};
use super::{Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError};
use super::{SavedState, VirtioDevice, fs};
use crate::Cancel;
use crate::erofs;
use crate::memory::MemoryMap;
use crate::memory::window::{Window, Windows};
use crate::spec::ShareSpec;

/// Its one queue (5.19.2).
const REQUESTS: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH (5.19.6): what was written is to last. Nothing can be.
const FLUSH: u32 = 0;
/// Answers (5.19.6): done, and not done.
const OK: u32 = 0;
const FAILED: u32 = 1;
/// Layout of the saved state: [`Contents`].
const STATE_VERSION: u16 = 1;

config_space! {
    /// 5.19.4.
    struct Config {
        start: Le64,
        size: Le64,
    }
}

/// What a guest relies on: it may have any of it in its caches, and its own page tables lead there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Contents {
    start: u64,
    len: u64,
    digest: u128,
}

/// An image: without queues as `Pmem`, with them as `Pmem<VirtQueue>`.
pub struct Pmem<Queues = ()> {
    window: Arc<Window>,
    queues: Queues,
}

/// Makes the device for a share that is an image.
pub(super) fn build(share: &ShareSpec, host: &mut Host<'_>) -> Result<Built, BuildError> {
    let device = Pmem::new(share, &mut host.windows, host.cancel)?;
    let window = Arc::clone(&device.window);
    Ok((Box::new(device), Handle::Window(window)))
}

impl Pmem {
    /// Makes an image of a share's directory, or finds that of another machine, and a place for it in the guest.
    ///
    /// # Errors
    /// The directory cannot be read, there is [no room](BuildError::NoRoom) for it, or it is cancelled.
    pub fn new(
        share: &ShareSpec,
        windows: &mut Windows,
        cancel: &Cancel,
    ) -> Result<Self, BuildError> {
        let (root, filter) = fs::open_store(share)?;
        let image = erofs::common_image(&root, &share.source, &share.tag, &filter, cancel);
        let image = image.map_err(|error| match error.is_no_room() {
            true => BuildError::no_room(&share.tag, error),
            false => BuildError::Image { tag: share.tag.to_string(), source: error.into() },
        })?;
        let placed = windows.place(&share.tag, image);
        let window = placed.map_err(|error| BuildError::no_room(&share.tag, error))?;
        Ok(Self { window, queues: () })
    }
}

impl<Queues> Pmem<Queues> {
    fn contents(&self) -> Contents {
        let Window { start, image, .. } = &*self.window;
        Contents { start: *start, len: image.len(), digest: image.digest() }
    }
}

impl<Queues: Send> DeviceConfig for Pmem<Queues> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }
    fn name(&self) -> String {
        format!("image {}", self.window.tag)
    }
    fn identity(&self) -> String {
        self.window.tag.clone()
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Contents { start, len, .. } = self.contents();
        read_config_space(&Config { start: start.into(), size: len.into() }, offset, data);
    }
    fn inline_queues(&self) -> u64 {
        // There is nothing to do.
        1
    }
    fn save(&self) -> SavedState {
        SavedState::encode(STATE_VERSION, &self.contents())
    }
}

impl VirtioDevice for Pmem {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let saved: Contents = state.decode(STATE_VERSION)?;
        if saved == self.contents() { Ok(()) } else { Err(RestoreError::OtherContents) }
    }

    fn activate(
        self: Box<Self>,
        mut activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        match activation.take_queue(REQUESTS) {
            Ok(queues) => Ok(Box::new(Pmem { window: self.window, queues })),
            Err(error) => Err((self, error)),
        }
    }
}

impl ActiveDevice for Pmem<VirtQueue> {
    fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        let memory = Arc::clone(self.queues.memory());
        self.queues.serve(|chain| answer(chain, &memory)).map_err(|error| error.in_queue(index))
    }
    fn pause(&mut self) {}
    fn queue_positions(&self) -> Vec<Option<Position>> {
        vec![Some(self.queues.position())]
    }
    fn reset(self: Box<Self>) -> Box<dyn VirtioDevice> {
        Box::new(Pmem { window: self.window, queues: () })
    }
}

/// Answers one request. Without room for the answer it comes back empty.
fn answer(chain: Chain, memory: &MemoryMap) -> Served {
    let mut kind = [0; 4];
    let asked = chain.clone().reader(memory).ok().and_then(|mut reader| {
        reader.read_exact(&mut kind).ok()?;
        Some(u32::from_le_bytes(kind))
    });
    let result = if asked == Some(FLUSH) { OK } else { FAILED };
    let written = chain.writer(memory).map(|mut writer| writer.write_all(&result.to_le_bytes()));
    match written {
        Ok(Ok(())) => Served::Done(4),
        _ => Served::Done(0),
    }
}

#[cfg(test)]
mod tests;
