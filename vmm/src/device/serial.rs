//! The 16550A serial port, `/dev/ttyS0` in the guest.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// The port of COM1.
pub const PORT: u16 = 0x3f8;
/// How many ports it has.
pub const PORTS: u8 = 8;
/// The interrupt of COM1.
pub const GSI: u32 = 4;
/// How much input may wait for a guest that does not read.
const MAX_PENDING: usize = 64 << 10;

/// The guest does not read its serial console.
#[derive(Debug, Error)]
#[error("the guest does not read its serial console: {MAX_PENDING} bytes are waiting")]
pub struct InputFull;

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct State {
    uart: Serial<Line, NoEvents, Box<dyn Write + Send>>,
    /// Input that has found no room in the UART's 64-byte buffer yet.
    pending: VecDeque<u8>,
}

/// The serial port.
pub struct SerialPort(Mutex<State>);

impl SerialPort {
    /// A port that raises `interrupt` and writes what the guest sends to `output`.
    pub fn new(interrupt: EventFd, output: Box<dyn Write + Send>) -> SerialPort {
        let uart = Serial::new(Line(interrupt), output);
        SerialPort(Mutex::new(State { uart, pending: VecDeque::new() }))
    }

    /// Types `bytes` into the port.
    ///
    /// # Errors
    /// The guest has left too much input unread; nothing of `bytes` is taken then.
    pub fn input(&self, bytes: &[u8]) -> Result<(), InputFull> {
        let mut state = self.state();
        if state.pending.len() + bytes.len() > MAX_PENDING {
            return Err(InputFull);
        }
        state.pending.extend(bytes);
        state.refill();
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is plain registers: a panic elsewhere leaves them usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn refill(&mut self) {
        let room = self.uart.fifo_capacity();
        if room == 0 || self.pending.is_empty() {
            return;
        }
        let batch: Vec<u8> = self.pending.iter().copied().take(room).collect();
        // In loopback mode the UART takes nothing; the input then waits for the mode's end.
        if let Ok(taken) = self.uart.enqueue_raw_bytes(&batch) {
            self.pending.drain(..taken);
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state();
        let offset = u8::try_from(offset).unwrap_or(u8::MAX);
        for byte in data {
            *byte = state.uart.read(offset);
        }
        state.refill();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let offset = u8::try_from(offset).unwrap_or(u8::MAX);
        for &byte in data {
            // An output that cannot be written must not stop the guest; the driver's writer
            // reports its own trouble.
            if let Err(error) = state.uart.write(offset, byte) {
                tracing::debug!(?error, "serial output");
            }
        }
    }
}
