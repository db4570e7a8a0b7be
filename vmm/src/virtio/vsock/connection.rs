//! One connection: a Unix stream on the host's side, packets with credit on the guest's.
//!
//! What the guest sends goes into the stream at once, or into a buffer if the stream has no room.
//! The guest may send no more than fits there. What the host sends stays in the stream until the
//! guest has room for it. So neither side can make firn hold more than [`BUFFER`] bytes.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, ReadVolatile, WriteVolatile};

use super::packet::{
    HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use crate::virtio::queue::GuestSlice;
use crate::virtio::transfer::{Moved, transfer};

/// What the guest may have under way in one connection, in bytes; Linux's own figure
/// (`VIRTIO_VSOCK_DEFAULT_BUF_SIZE`).
pub const BUFFER: u32 = 256 << 10;
/// So much newly free buffer is worth a packet that says so.
const CREDIT_STEP: u32 = BUFFER / 4;
/// Most data of one packet, as in Linux (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_DATA: usize = 64 << 10;

/// The two ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// On the host.
    pub host: u32,
    /// In the guest.
    pub guest: u32,
}

impl Ports {
    /// A header from host to guest.
    pub fn header(self, cid: u32, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: u64::from(cid),
            src_port: self.host,
            dst_port: self.guest,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Requested by the host; the guest has not answered yet.
    Requested,
    /// Both agreed.
    Established,
    /// Over; the guest may still have to be informed.
    Over,
}

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It does.
    Alive,
    /// It can be forgotten: both sides know that it is over.
    Gone,
}

/// What the guest is owed, beside data.
#[derive(Default)]
struct Owed {
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One connection.
pub struct Connection {
    stream: UnixStream,
    phase: Phase,
    owed: Owed,
    /// The stream may have something to read.
    readable: bool,
    /// The host will send no more.
    host_done: bool,
    /// The host will take no more.
    host_deaf: bool,
    /// [`SHUTDOWN_BOTH`], as far as the guest has said it.
    guest_shutdown: u32,
    /// The same, as last announced to the guest.
    announced_shutdown: u32,
    /// From the guest, for the stream. Never more than [`BUFFER`].
    buffer: VecDeque<u8>,
    /// Bytes from the guest that have left the buffer, modulo 2^32.
    forwarded: u32,
    /// Its value as last announced to the guest.
    announced_forwarded: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The guest was asked for credit and has given none since.
    asked_for_credit: bool,
    /// It is in the hub's list of those that have something for the guest.
    pub listed: bool,
}

impl Connection {
    /// The host's: asks the guest for it.
    pub fn to_guest(stream: UnixStream) -> Connection {
        let owed = Owed { request: true, ..Owed::default() };
        Connection::new(stream, Phase::Requested, owed)
    }

    /// The guest's, by its request: takes it.
    pub fn from_guest(stream: UnixStream, request: &Header) -> Connection {
        let owed = Owed { response: true, ..Owed::default() };
        let mut connection = Connection::new(stream, Phase::Established, owed);
        connection.take_credit(request);
        connection
    }

    fn new(stream: UnixStream, phase: Phase, owed: Owed) -> Connection {
        Connection {
            stream,
            phase,
            owed,
            readable: true,
            host_done: false,
            host_deaf: false,
            guest_shutdown: 0,
            announced_shutdown: 0,
            buffer: VecDeque::new(),
            forwarded: 0,
            announced_forwarded: 0,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            asked_for_credit: false,
            listed: false,
        }
    }

    /// The stream is ready for something; `hung_up` says that its other end is closed.
    pub fn on_ready(&mut self, hung_up: bool) {
        self.readable = true;
        self.host_deaf |= hung_up;
        if hung_up && self.phase == Phase::Requested {
            self.abort();
        }
        self.flush();
    }

    /// A packet of the guest. `data` is as long as its header says.
    pub fn on_packet(
        &mut self,
        header: &Header,
        data: &[GuestSlice<'_>],
        ports: Ports,
    ) -> Liveness {
        if header.op == op::RST {
            return Liveness::Gone;
        }
        if self.phase == Phase::Over {
            // Sent before the guest has heard of the end.
            return Liveness::Alive;
        }
        self.take_credit(header);
        match (self.phase, header.op) {
            (Phase::Requested, op::RESPONSE) => self.establish(ports),
            (Phase::Established, op::RW) => self.take_data(data, header.len),
            (Phase::Established, op::SHUTDOWN) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                self.flush();
            }
            (Phase::Established, op::CREDIT_UPDATE) => {}
            (Phase::Established, op::CREDIT_REQUEST) => self.owed.credit_update = true,
            _ => self.abort(),
        }
        Liveness::Alive
    }

    /// The next packet for the guest, if there is one. Data goes into `room`, which is not empty.
    pub fn next_packet(
        &mut self,
        ports: Ports,
        cid: u32,
        room: &mut [GuestSlice<'_>],
    ) -> Option<Header> {
        let mut header = ports.header(cid, 0);
        if std::mem::take(&mut self.owed.reset) {
            header.op = op::RST;
            return Some(header);
        }
        header.op = if std::mem::take(&mut self.owed.request) {
            op::REQUEST
        } else if std::mem::take(&mut self.owed.response) {
            op::RESPONSE
        } else if let Some(len) = self.read_into(room) {
            header.len = len;
            op::RW
        } else if let Some(flags) = self.pending_shutdown() {
            header.flags = flags;
            self.announced_shutdown = flags;
            op::SHUTDOWN
        } else if std::mem::take(&mut self.owed.credit_request) {
            op::CREDIT_REQUEST
        } else if std::mem::take(&mut self.owed.credit_update) {
            op::CREDIT_UPDATE
        } else {
            self.end_if_done();
            if !std::mem::take(&mut self.owed.reset) {
                return None;
            }
            header.op = op::RST;
            return Some(header);
        };
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
        self.announced_forwarded = self.forwarded;
        self.owed.credit_update = false;
        self.end_if_done();
        Some(header)
    }

    /// Whether there may be a packet for the guest.
    pub fn has_something(&mut self) -> bool {
        if self.wants_to_read() && self.credit() == 0 && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.owed.credit_request = true;
        }
        let owed = &self.owed;
        owed.reset
            || owed.request
            || owed.response
            || owed.credit_update
            || owed.credit_request
            || self.wants_to_read() && self.credit() > 0
            || self.pending_shutdown().is_some()
    }

    /// It is over and the guest knows.
    pub fn fate(&self) -> Liveness {
        if self.phase == Phase::Over && !self.owed.reset { Liveness::Gone } else { Liveness::Alive }
    }

    /// Ends it at once and resets the guest's end; buffered data is lost.
    pub fn abort(&mut self) {
        self.phase = Phase::Over;
        self.owed = Owed { reset: true, ..Owed::default() };
        self.buffer = VecDeque::new();
        // The peer sees it now, not when the guest has made room for a packet.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn establish(&mut self, ports: Ports) {
        self.phase = Phase::Established;
        // Nothing has been written before, so there is room.
        let answer = format!("OK {}\n", ports.host);
        match (&self.stream).write(answer.as_bytes()) {
            Ok(count) if count == answer.len() => {}
            _ => self.abort(),
        }
    }

    fn take_credit(&mut self, header: &Header) {
        let before = self.credit();
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > before {
            self.asked_for_credit = false;
        }
    }

    /// How many bytes the guest has room for (5.10.6.3). Impossible values count as none.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    fn take_data(&mut self, data: &[GuestSlice<'_>], len: u32) {
        let held = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
        if self.guest_shutdown & SHUTDOWN_SEND != 0 || len > BUFFER.saturating_sub(held) {
            return self.abort();
        }
        for slice in data {
            let written = self.write_through(slice);
            if self.host_deaf {
                break;
            }
            if !self.keep(slice, written) {
                return self.abort();
            }
        }
        if self.host_deaf {
            self.forwarded = self.forwarded.wrapping_add(held).wrapping_add(len);
            self.buffer.clear();
        } else {
            let now = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
            self.forwarded = self.forwarded.wrapping_add(held).wrapping_add(len).wrapping_sub(now);
        }
        self.offer_credit();
    }

    /// Writes to the stream what it has room for, if nothing waits before it.
    fn write_through(&mut self, slice: &GuestSlice<'_>) -> usize {
        let mut written = 0;
        while self.buffer.is_empty() && !self.host_deaf && written < slice.len() {
            let Ok(rest) = slice.offset(written) else { break };
            match transfer(|| (&self.stream).write_volatile(&rest)) {
                Moved::Bytes(count) => written += count,
                Moved::Later => break,
                Moved::Closed => self.host_deaf = true,
            }
        }
        written
    }

    /// Keeps what is behind the first `written` bytes for later.
    fn keep(&mut self, slice: &GuestSlice<'_>, written: usize) -> bool {
        let mut rest = vec![0; slice.len() - written];
        let copied = rest.is_empty() || slice.read_slice(&mut rest, written).is_ok();
        self.buffer.extend(rest);
        copied
    }

    /// Writes what the stream has room for, and closes it for writing when all is written and the
    /// guest has no more.
    fn flush(&mut self) {
        while !self.buffer.is_empty() && !self.host_deaf {
            match (&self.stream).write(self.buffer.as_slices().0) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    let count = u32::try_from(count).unwrap_or(u32::MAX);
                    self.forwarded = self.forwarded.wrapping_add(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.host_deaf = true,
            }
        }
        if self.host_deaf {
            let lost = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
            self.forwarded = self.forwarded.wrapping_add(lost);
            self.buffer.clear();
        }
        if self.buffer.is_empty() {
            // Only a burst needs the memory.
            self.buffer.shrink_to_fit();
            if self.guest_shutdown & SHUTDOWN_SEND != 0 {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
            self.host_done = true;
        }
        self.offer_credit();
        self.end_if_done();
    }

    fn offer_credit(&mut self) {
        let news = self.forwarded.wrapping_sub(self.announced_forwarded);
        self.owed.credit_update |= self.phase == Phase::Established && news >= CREDIT_STEP;
    }

    /// When both directions are closed and nothing is left to say, it is over (5.10.6.5).
    fn end_if_done(&mut self) {
        let guest_done = self.guest_shutdown & SHUTDOWN_SEND != 0 && self.buffer.is_empty();
        if self.phase == Phase::Established && guest_done && self.host_done {
            self.abort();
        }
    }

    fn wants_to_read(&self) -> bool {
        self.phase == Phase::Established && self.readable && !self.host_done
    }

    /// The shutdown of the host's end that is still to be announced to the guest.
    fn pending_shutdown(&self) -> Option<u32> {
        let done = if self.host_done { SHUTDOWN_SEND } else { 0 };
        let deaf = if self.host_deaf { SHUTDOWN_RECEIVE } else { 0 };
        let flags = done | deaf;
        (self.phase == Phase::Established && flags != self.announced_shutdown).then_some(flags)
    }

    /// Reads from the stream what the guest has room for.
    fn read_into(&mut self, room: &mut [GuestSlice<'_>]) -> Option<u32> {
        let mut received = 0;
        for slice in room {
            if !self.wants_to_read() {
                break;
            }
            let credit = usize::try_from(self.credit()).unwrap_or(usize::MAX);
            let Ok(mut part) = slice.subslice(0, slice.len().min(credit)) else { break };
            if part.is_empty() {
                // Reading nothing would look like the end.
                break;
            }
            match transfer(|| (&self.stream).read_volatile(&mut part)) {
                Moved::Bytes(count) if count > 0 => {
                    // A packet has at most `MAX_DATA` bytes.
                    let count32 = u32::try_from(count).unwrap_or(u32::MAX);
                    self.sent = self.sent.wrapping_add(count32);
                    received += count32;
                    if count < slice.len() {
                        break;
                    }
                }
                Moved::Later => self.readable = false,
                Moved::Bytes(_) | Moved::Closed => self.host_done = true,
            }
        }
        (received > 0).then_some(received)
    }
}
