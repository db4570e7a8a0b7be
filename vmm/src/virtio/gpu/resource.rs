//! Resources: pictures that the guest has made, and the memory that they come from.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_gpu as wire;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::command::Refusal;
use crate::memory::MemoryMap;

/// Most parts of one resource's memory; as many as QEMU takes.
pub(super) const MAX_ENTRIES: usize = 16384;
/// What a pixel takes, in each format there is.
pub(super) const PIXEL: u32 = 4;
/// Most pixels of a resource or scanout: what [`super::MAX_BYTES`] hold.
const MAX_PIXELS: u64 = super::MAX_BYTES / PIXEL as u64;

/// A part of a resource or scanout, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rect {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
}

impl Rect {
    /// Whether it is something, and lies within what is `width` and `height` large.
    pub(super) fn is_inside(&self, width: u32, height: u32) -> bool {
        let fits = |at: u32, len: u32, end| {
            len > 0 && at.checked_add(len).is_some_and(|reached| reached <= end)
        };
        fits(self.x, self.width, width) && fits(self.y, self.height, height)
    }
}

/// How pixels lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layout {
    pub(super) format: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    /// Bytes from one row to the next.
    pub(super) stride: u32,
    /// Where the first row begins.
    pub(super) offset: u32,
}

impl Layout {
    /// Rows without gaps.
    pub(super) fn packed(format: u32, width: u32, height: u32) -> Layout {
        Layout { format, width, height, stride: width.saturating_mul(PIXEL), offset: 0 }
    }

    /// Makes sure that there is such a picture, and that it is not too large.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        let pixels = u64::from(self.width) * u64::from(self.height);
        let row = u64::from(self.width) * u64::from(PIXEL);
        match order(self.format) {
            Some(_) if (1..=MAX_PIXELS).contains(&pixels) && row <= self.stride.into() => Ok(()),
            _ => Err(Refusal::Parameter),
        }
    }

    /// Where the pixel at `x` and `y` begins.
    pub(super) fn at(&self, x: u32, y: u32) -> u64 {
        let row = u64::from(self.stride) * u64::from(y);
        u64::from(self.offset) + row + u64::from(x) * u64::from(PIXEL)
    }

    /// Where the last pixel ends.
    pub(super) fn end(&self) -> u64 {
        self.at(self.width, self.height.saturating_sub(1))
    }
}

/// Where in a pixel red, green and blue are. The formats are named by the order of their bytes.
pub(super) fn order(format: u32) -> Option<[usize; 3]> {
    match format {
        wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_B8G8R8A8_UNORM
        | wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM => Some([2, 1, 0]),
        wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_A8R8G8B8_UNORM
        | wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_X8R8G8B8_UNORM => Some([1, 2, 3]),
        wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_R8G8B8A8_UNORM
        | wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_R8G8B8X8_UNORM => Some([0, 1, 2]),
        wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_A8B8G8R8_UNORM
        | wire::virtio_gpu_formats_VIRTIO_GPU_FORMAT_X8B8G8R8_UNORM => Some([3, 2, 1]),
        _ => None,
    }
}

/// A part of a resource's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) address: u64,
    pub(super) length: u32,
}

/// The guest's memory for a resource, from scattered parts.
#[derive(Debug, Default)]
pub(super) struct Backing {
    /// Each with the offset at which it ends.
    parts: Vec<(u64, Entry)>,
}

impl Backing {
    pub(super) fn new(entries: &[Entry]) -> Backing {
        let mut end = 0;
        let part = |entry: &Entry| {
            end += u64::from(entry.length);
            (end, *entry)
        };
        Backing { parts: entries.iter().map(part).collect() }
    }

    pub(super) fn len(&self) -> u64 {
        self.parts.last().map_or(0, |(end, _)| *end)
    }

    /// What it takes on the host.
    pub(super) fn cost(&self) -> u64 {
        (self.parts.len() * size_of::<(u64, Entry)>()) as u64
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        self.parts.iter().map(|(_, entry)| *entry).collect()
    }

    /// Whether all of it is memory.
    pub(super) fn is_in(&self, memory: &MemoryMap) -> bool {
        self.parts.iter().all(|(_, Entry { address, length })| {
            let length = usize::try_from(*length).unwrap_or(usize::MAX);
            memory.check_range(GuestAddress(*address), length)
        })
    }

    /// Copies what is at `offset`. What is behind the end, or outside memory, leaves `buffer` as it is.
    pub(super) fn read(&self, memory: &MemoryMap, offset: u64, mut buffer: &mut [u8]) {
        let first = self.parts.partition_point(|(end, _)| *end <= offset);
        let mut offset = offset;
        for (end, entry) in &self.parts[first..] {
            // It lies within the part, for those before end at it or earlier.
            let skipped = u64::from(entry.length) - (end - offset);
            let rest = usize::try_from(end - offset).unwrap_or(usize::MAX);
            let (chunk, others) = buffer.split_at_mut(rest.min(buffer.len()));
            if let Some(address) = entry.address.checked_add(skipped) {
                // The guest has been told whether it is memory.
                let _ = memory.read_slice(chunk, GuestAddress(address));
            }
            if others.is_empty() {
                return;
            }
            (offset, buffer) = (*end, others);
        }
    }
}

/// Where a resource's pixels are.
#[derive(Debug)]
pub(super) enum Pixels {
    /// On the host, packed: what the guest has transferred of its memory.
    Host { layout: Layout, bytes: Vec<u8> },
    /// In the guest's memory itself (a blob), so many bytes.
    Guest { size: u64 },
}

/// A picture, or memory for one.
#[derive(Debug)]
pub(super) struct Resource {
    pub(super) pixels: Pixels,
    pub(super) backing: Option<Backing>,
}

impl Resource {
    /// What it takes on the host.
    pub(super) fn cost(&self) -> u64 {
        let pixels = match &self.pixels {
            Pixels::Host { bytes, .. } => bytes.len() as u64,
            Pixels::Guest { .. } => 0,
        };
        pixels + self.backing.as_ref().map_or(0, Backing::cost)
    }

    /// Copies a row of pixels that begins at `offset`.
    pub(super) fn row(&self, memory: &MemoryMap, offset: u64, buffer: &mut [u8]) {
        match &self.pixels {
            Pixels::Host { bytes, .. } => {
                let at = usize::try_from(offset).unwrap_or(usize::MAX);
                if let Some(row) = bytes.get(at..).and_then(|rest| rest.get(..buffer.len())) {
                    buffer.copy_from_slice(row);
                }
            }
            Pixels::Guest { .. } => {
                if let Some(backing) = &self.backing {
                    backing.read(memory, offset, buffer);
                }
            }
        }
    }
}
