//! The entropy device (virtio 1.2, 5.4): fills the guest's buffers with random bytes.

use std::io::Write;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::queue::{Chain, Position, Served, VirtQueue};
use super::{Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError};
use super::{SavedState, VirtioDevice};
use crate::memory::MemoryMap;

/// Its one queue (5.4.2).
const REQUESTS: usize = 0;
const QUEUE_SIZE: u16 = 64;
/// Limit on the bytes that one chain gets. Linux asks for 64 (`drivers/char/hw_random/virtio-rng.c`); a longer
/// request gets less, which the specification allows.
const MAX_BYTES: usize = 64 << 10;
/// Layout of the saved state: nothing.
const STATE_VERSION: u16 = 1;

/// An entropy device: without queues as `Rng`, with them as `Rng<VirtQueue>`.
#[derive(Default)]
pub struct Rng<Queues = ()> {
    queues: Queues,
}

/// An entropy device, of which there is nothing to say.
pub struct RngSpec;

impl DeviceSpec for RngSpec {
    fn build(&self, _host: &mut Host<'_>) -> Result<Built, BuildError> {
        Ok((Box::new(Rng::new()), Handle::None))
    }
}

impl Rng {
    /// Builds the device; there is nothing to configure.
    pub fn new() -> Rng {
        Rng::default()
    }
}

impl<Queues: Send> DeviceConfig for Rng<Queues> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }
    fn name(&self) -> String {
        "rng".into()
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn save(&self) -> SavedState {
        SavedState::encode(STATE_VERSION, &())
    }
}

impl VirtioDevice for Rng {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state.decode(STATE_VERSION)
    }

    fn activate(
        self: Box<Self>,
        mut activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        match activation.take_queue(REQUESTS) {
            Ok(queues) => Ok(Box::new(Rng { queues })),
            Err(error) => Err((self, error)),
        }
    }
}

impl ActiveDevice for Rng<VirtQueue> {
    fn notify(&mut self, index: usize) -> Result<(), DeviceError> {
        let memory = Arc::clone(self.queues.memory());
        self.queues.serve(|chain| fill(chain, &memory)).map_err(|error| error.in_queue(index))
    }
    fn pause(&mut self) {}
    fn queue_positions(&self) -> Vec<Option<Position>> {
        vec![Some(self.queues.position())]
    }
    fn reset(self: Box<Self>) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new())
    }
}

/// Fills one chain. A chain without writable memory comes back empty.
fn fill(chain: Chain, memory: &MemoryMap) -> Served {
    let Ok(mut writer) = chain.writer(memory) else {
        return Served::Done(0);
    };
    let mut bytes = vec![0; writer.available_bytes().min(MAX_BYTES)];
    match getrandom::fill(&mut bytes).map(|()| writer.write_all(&bytes)) {
        Ok(Ok(())) => Served::Done(u32::try_from(bytes.len()).unwrap_or(u32::MAX)),
        _ => Served::Done(0),
    }
}

#[cfg(test)]
mod tests;
