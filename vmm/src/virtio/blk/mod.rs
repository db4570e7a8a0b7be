//! Disks: virtio-blk (virtio 1.2, 5.2) over raw and qcow2 images.
//!
//! ```text
//! queues --> Pool --> worker --> request --> Image --> imago --> preadv, pwritev, …
//!   ^                   |
//!   +--- used chains ---+
//! ```
//!
//! Data goes between the guest's memory and the host's file without a copy, but for compressed
//! clusters and copies on write of qcow2. One request takes no memory of the host but lists of its
//! buffers, and of clusters that it has to copy.
//!
//! **What survives.** A write is in the host's page cache when the guest is told of it: it survives
//! the end of firn in a raw image, in a qcow2 image only after a flush, for the tables are written
//! then. A flush survives a failure of the host's power, too. A driver that does not negotiate
//! `VIRTIO_BLK_F_FLUSH` gets a flush after each write (5.2.6.2).

mod check;
mod create;
mod image;
mod lock;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::config_space::read_config_space;
use super::pool::{Active, Pooled};
use super::{
    Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError, SavedState, VirtioDevice,
};
use crate::event_loop::new_event;
use crate::spec::DiskSpec;
pub use create::CreateError;
use image::Image;
pub use image::ImageError;

/// The unit of the protocol, in bytes, whatever the disk's own blocks are.
const SECTOR: u64 = 512;
/// Places in a queue.
const QUEUE_SIZE: u16 = 256;
/// Most queues: a request is short work for a vCPU and long work for a worker.
const MAX_QUEUES: u8 = 4;
/// Most buffers of a request: a full queue but the header and the status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Largest buffer, in bytes.
const MAX_SEGMENT: u32 = 1 << 20;
/// Most bytes of a request: what those two allow. It bounds how long a reset may wait for one.
const MAX_TRANSFER: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT as u64;
/// Most sectors of one part of a discard: 2 GiB.
const MAX_DISCARD_SECTORS: u32 = 4 << 20;
/// Most sectors of one part of a write-zeroes: 32 MiB, as it may have to write them.
const MAX_ZERO_SECTORS: u32 = 64 << 10;
/// Sectors of the blocks in which the host's file systems and qcow2 think, as a power of two.
const BLOCK_EXP: u8 = 3;
/// Room for a serial number (5.2.6, `VIRTIO_BLK_T_GET_ID`).
pub const SERIAL_LEN: usize = 20;
/// Layout version of [`SavedState`].
const STATE_VERSION: u16 = 1;

/// A serial number, filled up with zeroes.
type Serial = [u8; SERIAL_LEN];

/// Feature bits (5.2.3).
mod feature {
    pub(super) const SIZE_MAX: u64 = 1 << 1;
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Why a disk could not be set up.
#[derive(Debug, Error)]
pub enum BlkError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The host is out of descriptors.
    #[error("disk {}", path.display())]
    Host {
        /// The disk's image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a disk has to keep beside its queues' positions: nothing but proof that it is the same.
#[derive(Serialize, Deserialize)]
struct State {
    size: u64,
    read_only: bool,
}

/// A disk without queues.
pub struct Blk {
    image: Arc<Image>,
    serial: Serial,
    read_only: bool,
    queues: u8,
    config: [u8; 60],
    alarm: Arc<EventFd>,
}

impl Blk {
    /// Opens, locks and checks the image, made first if the spec says so, for a machine with
    /// `cores` vCPUs. Threads are started by the guest's first request.
    ///
    /// # Errors
    /// A bad serial number, or an image that is locked, damaged or cannot be opened or made.
    pub fn new(spec: &DiskSpec, cores: u8) -> Result<Blk, BlkError> {
        let mut serial = [0; SERIAL_LEN];
        for (byte, own) in serial.iter_mut().zip(spec.serial.iter().flat_map(|text| text.bytes())) {
            *byte = own;
        }
        let image = Arc::new(Image::open(spec)?);
        let alarm =
            new_event().map_err(|source| BlkError::Host { path: spec.image.clone(), source })?;
        let queues = cores.clamp(1, MAX_QUEUES);
        let config = config_space(image.size(), queues, spec.read_only);
        let read_only = spec.read_only;
        Ok(Blk { image, serial, read_only, queues, config, alarm: Arc::new(alarm) })
    }

    /// Writes back what is not in the host's file yet, for another process to open it.
    fn write_back(&self) {
        if let Err(error) = image::guard(|| self.image.write_back()) {
            let path = self.image.path().display();
            tracing::error!(disk = %path, %error, "a disk's tables cannot be written");
        }
    }
}

/// `struct virtio_blk_config` (5.2.4).
fn config_space(size: u64, queues: u8, read_only: bool) -> [u8; 60] {
    let mut config = [0; 60];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(size / SECTOR).to_le_bytes());
    put(8, &MAX_SEGMENT.to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &512_u32.to_le_bytes());
    put(24, &[BLOCK_EXP]);
    put(26, &(1_u16 << BLOCK_EXP).to_le_bytes());
    put(34, &u16::from(queues).to_le_bytes());
    if !read_only {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &request::MAX_RANGES.to_le_bytes());
        put(44, &(1_u32 << BLOCK_EXP).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &request::MAX_RANGES.to_le_bytes());
        put(56, &[1]);
    }
    config
}

impl DeviceConfig for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> String {
        format!("disk {}", self.image.path().display())
    }

    fn features(&self) -> u64 {
        use feature::{
            BLK_SIZE, DISCARD, FLUSH, MQ, RO, SEG_MAX, SIZE_MAX, TOPOLOGY, WRITE_ZEROES,
        };
        let always = SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | MQ;
        always | if self.read_only { RO } else { DISCARD | WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    fn host_fds(&self) -> Vec<RawFd> {
        vec![self.alarm.as_raw_fd()]
    }

    fn inline_queues(&self) -> u64 {
        // Taking chains off is all that the ringing thread does: by way of the event thread each
        // request would cost one more wake-up.
        (1 << self.queues) - 1
    }

    fn save(&self) -> SavedState {
        let state = State { size: self.image.size(), read_only: self.read_only };
        SavedState::encode(STATE_VERSION, &state)
    }
}

impl VirtioDevice for Blk {
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let state: State = state.decode(STATE_VERSION)?;
        if state.size != self.image.size() || state.read_only != self.read_only {
            tracing::error!(disk = self.name(), "the saved state is that of another disk");
            return Err(RestoreError::Decode(postcard::Error::SerdeDeCustom));
        }
        Ok(())
    }

    fn activate(
        self: Box<Self>,
        activation: Activation,
    ) -> Result<Box<dyn ActiveDevice>, (Box<dyn VirtioDevice>, DeviceError)> {
        let disk = request::Disk {
            image: Arc::clone(&self.image),
            serial: self.serial,
            read_only: self.read_only,
            write_through: activation.features & feature::FLUSH == 0,
            memory: activation.memory,
        };
        let alarm = Arc::clone(&self.alarm);
        Ok(Box::new(Active::new(*self, Box::new(disk), alarm, activation.queues)))
    }
}

impl Pooled for Blk {
    fn alarm(&self) -> &EventFd {
        &self.alarm
    }

    fn paused(&mut self) {
        self.write_back();
    }

    fn ended(&mut self) {
        self.write_back();
    }
}
