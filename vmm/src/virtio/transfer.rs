//! Moving bytes between guest memory and sockets of the host.

use std::io::ErrorKind;

use vm_memory::VolatileMemoryError;

/// What became of one buffer.
pub enum Moved {
    /// So many bytes, of which there may be fewer than there was room for.
    Bytes(usize),
    /// The socket has no room, or nothing to read.
    Later,
    /// The host's end is closed.
    Closed,
}

/// Does one transfer and sorts what the socket says to it.
pub fn transfer(mut io: impl FnMut() -> Result<usize, VolatileMemoryError>) -> Moved {
    loop {
        return match io() {
            Ok(count) => Moved::Bytes(count),
            Err(VolatileMemoryError::IOError(error)) => match error.kind() {
                ErrorKind::Interrupted => continue,
                ErrorKind::WouldBlock => Moved::Later,
                _ => Moved::Closed,
            },
            Err(_) => Moved::Closed,
        };
    }
}
