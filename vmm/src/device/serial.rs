//! The 16550A serial port, `/dev/ttyS0` in the guest.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use super::panic::PanicDevice;
use crate::bus::BusDevice;

/// How many bytes of input are kept for a guest that does not read.
const MAX_PENDING: usize = 64 << 10;

/// The data register, as long as bit 7 of the line control register leaves it that.
const DATA: u8 = 0;
const DIVISOR_LATCH: u8 = 1 << 7;
/// Interrupt enable register: interrupt when the transmitter is empty.
const TRANSMITTER_EMPTY: u8 = 1 << 1;

/// The guest does not read its serial console.
#[derive(Debug, Error)]
#[error("the guest does not read its serial console: {MAX_PENDING} bytes are waiting")]
pub struct InputFull;

#[derive(Clone)]
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Uart = Serial<Line, NoEvents, Output>;

struct State {
    uart: Uart,
    /// Input that has found no room in the UART's 64-byte buffer yet.
    pending: VecDeque<u8>,
}

/// Where the guest's output goes: it outlives each UART.
#[derive(Clone)]
struct Output(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

/// What [`SerialPort::save`] keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    /// The 16550A's registers in the order of [`SerialState`]'s fields.
    registers: [u8; 9],
    in_buffer: Vec<u8>,
    pending: Vec<u8>,
}

/// The serial port.
pub struct SerialPort {
    state: Mutex<State>,
    line: Line,
    output: Output,
    panic: Arc<PanicDevice>,
}

impl SerialPort {
    /// A port that raises `interrupt` and writes what the guest sends to `output`. `panic` gets what the kernel
    /// itself prints.
    pub fn new(
        interrupt: EventFd,
        output: Box<dyn Write + Send>,
        panic: Arc<PanicDevice>,
    ) -> SerialPort {
        let (line, output) = (Line(Arc::new(interrupt)), Output(Arc::new(Mutex::new(output))));
        let uart = Serial::new(line.clone(), output.clone());
        let state = Mutex::new(State { uart, pending: VecDeque::new() });
        SerialPort { state, line, output, panic }
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut state = self.state();
        state.uart = Serial::new(self.line.clone(), self.output.clone());
        state.pending.clear();
    }

    /// The registers, and the input that waits.
    pub fn save(&self) -> SerialPortState {
        let state = self.state();
        let uart = state.uart.state();
        SerialPortState {
            registers: [
                uart.baud_divisor_low,
                uart.baud_divisor_high,
                uart.interrupt_enable,
                uart.interrupt_identification,
                uart.line_control,
                uart.line_status,
                uart.modem_control,
                uart.modem_status,
                uart.scratch,
            ],
            in_buffer: uart.in_buffer,
            pending: state.pending.iter().copied().collect(),
        }
    }

    /// Takes back what [`SerialPort::save`] gave.
    pub fn restore(&self, saved: &SerialPortState) {
        let [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = saved.registers;
        let uart = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: saved.in_buffer.clone(),
        };
        let mut state = self.state();
        // It interrupts by itself if something is pending.
        match Serial::from_state(&uart, self.line.clone(), NoEvents, self.output.clone()) {
            Ok(uart) => state.uart = uart,
            Err(error) => tracing::warn!(?error, "the serial port starts anew"),
        }
        state.pending = saved.pending.iter().copied().take(MAX_PENDING).collect();
    }

    /// Types `bytes` into the port.
    ///
    /// # Errors
    /// The guest has left too much input unread; none of `bytes` is queued then.
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether a byte for the register at `offset` is sent by a kernel that waits until it has gone, as Linux does with
    /// its own messages. What programs send comes by interrupts.
    fn polled(&self, offset: u8) -> bool {
        let registers = self.uart.state();
        offset == DATA
            && registers.line_control & DIVISOR_LATCH == 0
            && registers.interrupt_enable & TRANSMITTER_EMPTY == 0
    }

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
            // Afterwards, so that a panic's line is in the output when it is reported.
            if state.polled(offset) {
                self.panic.printed(byte);
            }
        }
    }
}
