//! One request (virtio 1.2, 5.2.6): what it says, and doing it.

use std::io;
use std::sync::Arc;

use vm_memory::Bytes;

use super::image::{Image, guard};
use super::{MAX_DISCARD_SECTORS, MAX_TRANSFER, MAX_ZERO_SECTORS, SECTOR, Serial};
use crate::memory::{Memory, MemoryMap};
use crate::virtio::DeviceError;
use crate::virtio::pool::Server;
use crate::virtio::queue::{Chain, GuestSlice, readable, writable};

/// Length of the header: type, reserved, sector.
const HEADER: usize = 16;
/// Length of one part of a discard or write-zeroes request: sector, count, flags.
const SEGMENT: usize = 16;
/// Most bytes that are copied on the ringing thread: what takes no longer than to wake a worker.
const MAX_QUICK: u64 = 64 << 10;
/// Most parts of such a request.
pub(super) const MAX_RANGES: u32 = 32;

/// Types of requests.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// The status that the guest gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// The only flag of a part: its space may go back to the host.
const UNMAP: u32 = 1;

/// What is needed of a disk to serve requests.
pub(super) struct Disk {
    pub(super) image: Arc<Image>,
    pub(super) serial: Serial,
    pub(super) read_only: bool,
    /// The driver will not flush: what was reported as written must be durable.
    pub(super) write_through: bool,
    pub(super) memory: Memory,
}

/// A chain, taken apart. The framing is the driver's affair (virtio 1.2, 2.7.4).
struct Request<'m> {
    kind: u32,
    sector: u64,
    output: Vec<GuestSlice<'m>>,
    input: Vec<GuestSlice<'m>>,
    status: GuestSlice<'m>,
    /// A buffer for data is outside memory: what a program has mapped of an image (`image = true`) and writes to a disk
    /// without the guest's cache.
    outside: bool,
}

// A failed request's chain does not go back: Linux looks at the status alone, which may still be
// that of the request before, and that is most often success.
impl Server for Disk {
    /// Fails if the chain has no place in memory for a header or for the status.
    fn serve(&self, chain: &Chain) -> Result<u32, DeviceError> {
        let request = Request::parse(chain, &self.memory)?;
        let (status, written) = self.execute(&request);
        request.finish(status, written)
    }

    fn serve_quickly(&self, chain: &Chain) -> Result<Option<u32>, DeviceError> {
        if !self.image.has_shortcut() {
            return Ok(None);
        }
        let request = Request::parse(chain, &self.memory)?;
        self.execute_quickly(&request)
            .map(|written| request.finish(Status::Ok, written))
            .transpose()
    }
}

impl<'m> Request<'m> {
    fn parse(chain: &Chain, memory: &'m MemoryMap) -> Result<Request<'m>, DeviceError> {
        let mut outside = false;
        let lacks = |what, outside| {
            DeviceError::Request(if outside { "a buffer is outside memory" } else { what })
        };
        // As far as they are in memory: from the header on, and down to the status.
        let mut output = Vec::new();
        for buffer in readable(chain.clone(), memory) {
            let Ok(buffer) = buffer else {
                outside = true;
                break;
            };
            output.push(buffer);
        }
        let mut header = [0; HEADER];
        if !take_front(&mut output, &mut header) {
            return Err(lacks("it has no header", outside));
        }
        let mut input = Vec::new();
        for buffer in writable(chain.clone(), memory) {
            let Ok(buffer) = buffer else {
                outside = true;
                input.clear();
                continue;
            };
            input.push(buffer);
        }
        let Some(status) = take_last_byte(&mut input) else {
            return Err(lacks("it has no place for a status", outside));
        };
        // imago wants none that are empty.
        output.retain(|buffer| !buffer.is_empty());
        input.retain(|buffer| !buffer.is_empty());
        let kind = le32(&header, 0);
        Ok(Request { kind, sector: le64(&header, 8), output, input, status, outside })
    }

    /// Tells the guest how it went, and says how many bytes of the chain are written, `written` being those of its
    /// input.
    fn finish(&self, status: Status, written: u64) -> Result<u32, DeviceError> {
        let written = u32::try_from(written).unwrap_or(u32::MAX - 1);
        self.status
            .write_obj(status as u8, 0)
            .map_err(|_| DeviceError::Request("the status is outside memory"))?;
        // What counts is the part from the beginning on that is sure to be written: the status,
        // which is at the very end, does only if all before it is.
        let whole = total(&self.input) == u64::from(written);
        Ok(written + u32::from(whole))
    }
}

impl Disk {
    /// Does what the request says: how it went, and how many bytes of its input are written.
    fn execute(&self, request: &Request<'_>) -> (Status, u64) {
        let done = |result: io::Result<()>, written| match result {
            Ok(()) => (Status::Ok, written),
            Err(error) => {
                let path = self.image.path().display();
                tracing::warn!(disk = %path, kind = request.kind, %error, "a request has failed");
                (Status::IoErr, 0)
            }
        };
        match request.kind {
            _ if request.outside => (Status::IoErr, 0),
            kind::IN => match self.range(request.sector, total(&request.input)) {
                Some((offset, len)) => done(guard(|| self.image.read(&request.input, offset)), len),
                None => (Status::IoErr, 0),
            },
            kind::OUT => match self.range(request.sector, total(&request.output)) {
                Some((offset, _)) if !self.read_only => {
                    done(guard(|| self.write(&request.output, offset)), 0)
                }
                _ => (Status::IoErr, 0),
            },
            // A disk that nobody writes to is always flushed.
            kind::FLUSH if self.read_only => (Status::Ok, 0),
            kind::FLUSH => done(guard(|| self.image.flush()), 0),
            kind::GET_ID => (Status::Ok, scatter(&request.input, &self.serial)),
            kind::DISCARD | kind::WRITE_ZEROES => (self.ranges(request), 0),
            _ => (Status::Unsupported, 0),
        }
    }

    /// The same for what can be done at once, and says how many bytes of the input are written. What fails may be half
    /// done: a worker does all of it again.
    fn execute_quickly(&self, request: &Request<'_>) -> Option<u64> {
        let range = |buffers| {
            self.range(request.sector, total(buffers)).filter(|range| range.1 <= MAX_QUICK)
        };
        match request.kind {
            _ if request.outside => None,
            kind::IN => {
                let (offset, len) = range(&request.input)?;
                self.image.read_at_once(&request.input, offset, len).then_some(len)
            }
            kind::OUT if !self.read_only && !self.write_through => {
                let (offset, len) = range(&request.output)?;
                self.image.write_at_once(&request.output, offset, len).then_some(0)
            }
            _ => None,
        }
    }

    fn write(&self, buffers: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        self.image.write(buffers, offset)?;
        if self.write_through { self.image.flush() } else { Ok(()) }
    }

    /// The range of bytes that `len` bytes from `sector` on are, if they are whole sectors of this
    /// disk and not too many.
    fn range(&self, sector: u64, len: u64) -> Option<(u64, u64)> {
        let offset = sector.checked_mul(SECTOR)?;
        let fits = len.is_multiple_of(SECTOR)
            && len <= MAX_TRANSFER
            && offset.checked_add(len)? <= self.image.size();
        fits.then_some((offset, len))
    }

    /// Discards or zeroes. All parts are checked before the first is done.
    fn ranges(&self, request: &Request<'_>) -> Status {
        let zeroes = request.kind == kind::WRITE_ZEROES;
        let len = total(&request.output);
        let segment = u64::try_from(SEGMENT).unwrap_or(u64::MAX);
        if self.read_only
            || len == 0
            || !len.is_multiple_of(segment)
            || len > u64::from(MAX_RANGES) * segment
        {
            return Status::IoErr;
        }
        let mut rest = request.output.clone();
        let mut parts = Vec::new();
        let mut part = [0; SEGMENT];
        while take_front(&mut rest, &mut part) {
            let (sector, count, flags) = (le64(&part, 0), le32(&part, 8), le32(&part, 12));
            // 5.2.6.2: flags that are not known, and unmapping in a discard, are not supported.
            if flags & !UNMAP != 0 || !zeroes && flags != 0 {
                return Status::Unsupported;
            }
            let most = if zeroes { MAX_ZERO_SECTORS } else { MAX_DISCARD_SECTORS };
            let end = sector.checked_add(u64::from(count));
            if count > most || end.is_none_or(|end| end > self.image.size() / SECTOR) {
                return Status::IoErr;
            }
            parts.push((sector * SECTOR, u64::from(count) * SECTOR, flags & UNMAP != 0));
        }
        let result = guard(|| {
            for &(offset, len, unmap) in &parts {
                match zeroes {
                    true => self.image.write_zeroes(offset, len, unmap)?,
                    false => self.image.discard(offset, len)?,
                }
            }
            if zeroes && self.write_through { self.image.flush() } else { Ok(()) }
        });
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                let path = self.image.path().display();
                tracing::warn!(disk = %path, kind = request.kind, %error, "a request has failed");
                Status::IoErr
            }
        }
    }
}

/// Bytes in `buffers`; a chain can name the same memory many times over.
fn total(buffers: &[GuestSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| u64::try_from(buffer.len()).unwrap_or(u64::MAX)).sum()
}

/// Moves the first bytes of `buffers` into `into`; false if there are not that many.
fn take_front(buffers: &mut Vec<GuestSlice<'_>>, into: &mut [u8]) -> bool {
    let mut have = 0;
    let mut used = 0;
    for buffer in buffers.iter_mut() {
        let count = buffer.len().min(into.len() - have);
        buffer.copy_to(&mut into[have..have + count]);
        have += count;
        if count < buffer.len() {
            match buffer.offset(count) {
                Ok(rest) => *buffer = rest,
                Err(_) => return false,
            }
            break;
        }
        used += 1;
    }
    buffers.drain(..used);
    have == into.len()
}

/// Takes the last byte off.
fn take_last_byte<'m>(buffers: &mut Vec<GuestSlice<'m>>) -> Option<GuestSlice<'m>> {
    while let Some(last) = buffers.pop() {
        if let Some(rest) = last.len().checked_sub(1) {
            let byte = last.offset(rest).ok()?;
            if rest > 0 {
                buffers.push(last.subslice(0, rest).ok()?);
            }
            return Some(byte);
        }
    }
    None
}

/// Copies as much of `data` as there is room for.
fn scatter(buffers: &[GuestSlice<'_>], mut data: &[u8]) -> u64 {
    let mut written = 0;
    for buffer in buffers {
        let (now, later) = data.split_at(data.len().min(buffer.len()));
        buffer.copy_from(now);
        data = later;
        written += u64::try_from(now.len()).unwrap_or(0);
    }
    written
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]))
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}
