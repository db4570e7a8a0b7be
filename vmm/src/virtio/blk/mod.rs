//! Disks: virtio-blk (virtio 1.2, 5.2) over raw and qcow2 images.
//!
//! ```text
//! queues --> Pool --> worker --> request --> Image --> imago --> preadv, pwritev, …
//!   ^                   |
//!   +--- used chains ---+
//! ```
//!
//! What need not wait for the host's disk, of a raw image, is done on the thread that rings, past the workers and imago.
//!
//! Data goes between the guest's memory and the host's file without a copy, but for compressed
//! clusters and copies on write of qcow2. One request takes no memory of the host but lists of its
//! buffers, and of clusters that it has to copy.
//!
//! **What survives.** A write is in the host's page cache when it is reported to the guest: it survives the end of
//! firn in a raw image, in a qcow2 image only after a flush, for the tables are written then. A flush survives a
//! failure of the host's power, too. A driver that does not negotiate `VIRTIO_BLK_F_FLUSH` gets a flush after each
//! write (5.2.6.2).

mod check;
mod create;
mod image;
mod layer;
mod lock;
mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Le16, Le32, Le64};
use vmm_sys_util::eventfd::EventFd;

use super::build::{BuildError, Built, DeviceSpec, Handle, Host};
use super::config_space::{config_space, read_config_space};
use super::pool::{Active, Pooled};
use super::{
    Activation, ActiveDevice, DeviceConfig, DeviceError, RestoreError, SavedState, VirtioDevice,
};
use crate::Cancel;
use crate::event_loop::new_event;
use crate::extents::Extents;
use crate::spec::DiskSpec;
pub use create::{CreateError, create_image};
pub use image::ImageError;
use image::{Frozen, Image};

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
    /// The host is out of descriptors, or of room.
    #[error("disk {}", path.display())]
    Host {
        /// The disk's image.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BlkError {
    fn host(spec: &DiskSpec) -> impl Fn(io::Error) -> Self {
        |source| Self::Host { path: spec.image.clone(), source }
    }
}

/// A disk's state besides its queues' positions: only what proves that it is the same.
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
    config: Config,
    alarm: Arc<EventFd>,
}

impl DeviceSpec for DiskSpec {
    fn check(&self) -> Result<(), BuildError> {
        DiskSpec::check(self).map_err(|(key, problem)| {
            let device = "disk";
            BuildError::Spec { device, key, problem }
        })
    }

    fn build(&self, host: &mut Host<'_>) -> Result<Built, BuildError> {
        let image = match host.frozen.next() {
            Some(DiskCheckpoint(frozen)) => Image::borrow(frozen).map_err(BlkError::host(self))?,
            None => Image::open(self, host.cancel).map_err(BlkError::Image)?,
        };
        let disk = Blk::with_image(self, host.cores, image)?;
        let handle = DiskHandle(Arc::clone(&disk.image));
        Ok((Box::new(disk), Handle::Disk(handle)))
    }
}

/// Puts a disk back to earlier contents.
#[derive(Clone)]
pub struct DiskHandle(Arc<Image>);

/// What a disk held at some time.
pub struct DiskCheckpoint(Frozen);

/// Makes the image of a disk, which is not there, and has it hold what [`DiskHandle::write`] has written.
///
/// # Errors
/// It is there; there is no room; the file is damaged, or of a disk of another size.
pub(crate) fn make_image(spec: &DiskSpec, extents: &Extents, from: &File) -> Result<(), BlkError> {
    if spec.image.symlink_metadata().is_ok() {
        return Err(BlkError::host(spec)(io::ErrorKind::AlreadyExists.into()));
    }
    // What a file system would bring is in the file.
    let plain = DiskSpec { label: None, ..spec.clone() };
    let image = Image::open(&plain, &Cancel::default())?;
    image.fill(extents, from).map_err(BlkError::host(spec))
}

impl DiskHandle {
    /// Keeps what the disk of a paused machine holds. From now on its image stays as it is until [`Self::merge`].
    ///
    /// # Errors
    /// The image cannot be written, or there is no room for what will be written from now on.
    pub fn checkpoint(&self) -> io::Result<DiskCheckpoint> {
        self.0.freeze().map(DiskCheckpoint)
    }

    /// Gives up a checkpoint since which the machine has been paused: the disk is as it was before.
    pub fn give_up(&self, checkpoint: &DiskCheckpoint) {
        self.0.unfreeze(&checkpoint.0);
    }

    /// Whether the disk can still go back there: it has not gone back further.
    #[must_use]
    pub fn has(&self, checkpoint: &DiskCheckpoint) -> bool {
        self.0.has(&checkpoint.0)
    }

    /// Puts the disk of a machine that does not run back to what it held then.
    ///
    /// # Errors
    /// It has gone back further already, or there is no room.
    pub fn roll_back(&self, to: &DiskCheckpoint) -> io::Result<()> {
        self.0.thaw(&to.0)
    }

    /// Writes what the disk held at a checkpoint of its own to an empty file.
    ///
    /// # Errors
    /// The image cannot be read, or the file not written.
    pub(crate) fn write(&self, checkpoint: &DiskCheckpoint, to: &File) -> io::Result<Extents> {
        self.0.write_frozen(&checkpoint.0, to)
    }

    /// Writes to the image of a machine that does not run what was written since its first checkpoint. No checkpoint
    /// can be gone back to then.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn merge(&self) -> io::Result<()> {
        self.0.merge()
    }
}

impl Blk {
    /// Opens, locks and checks the image, made first if the spec says so, for a machine with
    /// `cores` vCPUs. Threads are started by the guest's first request.
    ///
    /// # Errors
    /// A bad serial number, or an image that is locked, damaged or cannot be opened or made.
    pub fn new(spec: &DiskSpec, cores: u8) -> Result<Blk, BlkError> {
        Blk::with_image(spec, cores, Image::open(spec, &Cancel::default())?)
    }

    fn with_image(spec: &DiskSpec, cores: u8, image: Image) -> Result<Blk, BlkError> {
        let mut serial = [0; SERIAL_LEN];
        for (byte, own) in serial.iter_mut().zip(spec.serial.iter().flat_map(|text| text.bytes())) {
            *byte = own;
        }
        let image = Arc::new(image);
        let alarm = new_event().map_err(BlkError::host(spec))?;
        let queues = cores.clamp(1, MAX_QUEUES);
        let config = Config::new(image.size(), queues, spec.read_only);
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

config_space! {
    /// `struct virtio_blk_config` (5.2.4).
    struct Config {
        capacity: Le64,
        size_max: Le32,
        seg_max: Le32,
        geometry: [u8; 4],
        blk_size: Le32,
        physical_block_exp: u8,
        alignment_offset: u8,
        min_io_size: Le16,
        opt_io_size: Le32,
        writeback: u8,
        unused0: u8,
        num_queues: Le16,
        max_discard_sectors: Le32,
        max_discard_seg: Le32,
        discard_sector_alignment: Le32,
        max_write_zeroes_sectors: Le32,
        max_write_zeroes_seg: Le32,
        write_zeroes_may_unmap: u8,
        unused1: [u8; 3],
    }
}

impl Config {
    fn new(size: u64, queues: u8, read_only: bool) -> Config {
        let if_writable = |value: u32| if read_only { 0 } else { value };
        Config {
            capacity: (size / SECTOR).into(),
            size_max: MAX_SEGMENT.into(),
            seg_max: MAX_SEGMENTS.into(),
            geometry: [0; 4],
            blk_size: 512.into(),
            physical_block_exp: BLOCK_EXP,
            alignment_offset: 0,
            min_io_size: (1 << BLOCK_EXP).into(),
            opt_io_size: 0.into(),
            writeback: 0,
            unused0: 0,
            num_queues: u16::from(queues).into(),
            max_discard_sectors: if_writable(MAX_DISCARD_SECTORS).into(),
            max_discard_seg: if_writable(request::MAX_RANGES).into(),
            discard_sector_alignment: if_writable(1 << BLOCK_EXP).into(),
            max_write_zeroes_sectors: if_writable(MAX_ZERO_SECTORS).into(),
            max_write_zeroes_seg: if_writable(request::MAX_RANGES).into(),
            write_zeroes_may_unmap: u8::from(!read_only),
            unused1: [0; 3],
        }
    }
}

impl DeviceConfig for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> String {
        format!("disk {}", self.image.path().display())
    }

    /// Its serial number: where its image lies may have changed.
    fn identity(&self) -> String {
        let serial = self.serial.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(serial).into_owned()
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
        // The ringing thread takes chains off and does what takes no longer than that: by way of the event thread each
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
            let disk = |size: u64, read_only| {
                let kind = if read_only { "a read-only disk" } else { "a disk" };
                format!("{kind} of {size} bytes")
            };
            return Err(RestoreError::OtherDevice {
                found: disk(state.size, state.read_only),
                expected: disk(self.image.size(), self.read_only),
            });
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
