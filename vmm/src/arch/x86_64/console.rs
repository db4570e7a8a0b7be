//! Where the serial console is: COM1.

/// Its first port.
pub const PORT: u16 = 0x3f8;
/// How many ports it has.
pub const PORTS: u8 = 8;
/// Its interrupt.
pub const GSI: u32 = 4;
