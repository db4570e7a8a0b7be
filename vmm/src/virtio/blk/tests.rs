//! The device from the driver's side. What is in the images is looked at through the host's files.

mod images;
mod layers;
mod requests;
mod trouble;

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use tempfile::TempDir;

use super::*;
use crate::spec::DiskFormat;
use crate::virtio::testing::{DriverQueue, Guest, Part, Used};

const MIB: u64 = 1 << 20;
/// Status bytes (5.2.6).
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn spec(path: &Path, format: DiskFormat) -> DiskSpec {
    DiskSpec { image: path.to_owned(), format: Some(format), ..DiskSpec::default() }
}

/// A directory with the spec of an image of `mib` MiB in it that is yet to be made.
fn fresh(format: DiskFormat, mib: u64) -> (TempDir, DiskSpec) {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(&dir.path().join("disk"), format);
    spec.size = Some(mib.try_into().unwrap());
    (dir, spec)
}

/// A raw image of `mib` MiB in a file in memory.
fn in_memory(mib: u64) -> (File, DiskSpec) {
    let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(mib << 20).unwrap();
    let spec = spec(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref(), DiskFormat::Raw);
    (file, spec)
}

/// A disk and its driver.
struct Rig {
    guest: Guest,
    drivers: Vec<DriverQueue>,
    device: Box<dyn ActiveDevice>,
}

/// A request that was made available.
struct Offered {
    head: u16,
    status: u64,
}

/// What an honest driver negotiates.
const FEATURES: u64 = feature::FLUSH | feature::MQ | feature::DISCARD | feature::WRITE_ZEROES;

impl Rig {
    fn new(spec: &DiskSpec) -> Rig {
        Rig::with(spec, 1, FEATURES)
    }

    fn with(spec: &DiskSpec, cores: u8, features: u64) -> Rig {
        Rig::around(Blk::new(spec, cores).unwrap(), features)
    }

    fn around(blk: Blk, features: u64) -> Rig {
        let guest = Guest::new();
        let (drivers, activation) = guest.activation(&blk.queue_sizes(), features);
        let device = Box::new(blk).activate(activation).ok().unwrap();
        Rig { guest, drivers, device }
    }

    /// Offers a request on queue 0.
    fn offer(&mut self, kind: u32, sector: u64, output: &[u8], input: usize) -> Offered {
        self.offer_on(0, kind, sector, output, input)
    }

    fn offer_on(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        output: &[u8],
        input: usize,
    ) -> Offered {
        let header = header(kind, sector);
        let mut parts = vec![Part::Read(&header)];
        if !output.is_empty() {
            parts.push(Part::Read(output));
        }
        if input > 0 {
            parts.push(Part::Write(input));
        }
        parts.push(Part::Write(1));
        let head = self.drivers[queue].add(&parts);
        // The status is the last that was allocated.
        let status = self.guest.alloc(16) - 16;
        self.guest.write(status, &[0xee]);
        Offered { head, status }
    }

    /// Does one request and gives its status and the data before it.
    #[track_caller]
    fn request(&mut self, kind: u32, sector: u64, output: &[u8], input: usize) -> (u8, Vec<u8>) {
        let offered = self.offer(kind, sector, output, input);
        self.device.notify(0).unwrap();
        let mut used = self.wait(0);
        assert_eq!(used.head, offered.head);
        let status = self.guest.read(offered.status, 1)[0];
        match status {
            OK => assert_eq!(used.data.pop(), Some(OK), "the whole chain is written"),
            _ => assert_eq!(used.len, u32::from(input == 0), "no data is"),
        }
        (status, used.data)
    }

    /// The next chain that comes back on a queue.
    #[track_caller]
    fn wait(&mut self, queue: usize) -> Used {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(used) = self.drivers[queue].used() {
                return used;
            }
            assert!(Instant::now() < end, "the request does not come back");
            // The used ring is the guest's memory: nothing can wait for it.
            std::thread::yield_now();
        }
    }

    fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let (status, data) = self.request(0, sector, &[], len);
        assert_eq!(status, OK);
        data
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.request(1, sector, data, 0).0
    }

    fn zero(&mut self, sector: u64, count: u32) -> u8 {
        self.request(13, 0, &range(sector, count, 0), 0).0
    }

    fn flush(&mut self) -> u8 {
        self.request(4, 0, &[], 0).0
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// One part of a discard or write-zeroes request.
fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(count.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

/// Bytes that differ from place to place.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i / 512 * 7 + i) % 251).unwrap().wrapping_add(seed)).collect()
}
