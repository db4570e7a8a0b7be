//! Turns: how the devices of a machine share its event thread.
//!
//! A guest that refills a ring as fast as the device empties it would keep the thread for ever. So
//! a device works for one [`Turn`], then rings [`Again`] and lets the others have theirs.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::DeviceError;
use super::queue::{Chain, Served, VirtQueue};
use crate::event_loop::new_event;
use crate::memory::MemoryMap;

/// Bytes moved in one turn: about a millisecond of copying.
const TURN_BYTES: usize = 4 << 20;
/// What a chain costs besides its bytes, so that empty ones end a turn too.
const CHAIN_COST: usize = 4096;

/// What is left of a turn.
pub struct Turn(usize);

impl Turn {
    /// Books `bytes` bytes moved.
    pub fn spend(&mut self, bytes: usize) {
        self.0 = self.0.saturating_sub(bytes);
    }

    /// Whether it is the others' turn.
    pub fn is_over(&self) -> bool {
        self.0 == 0
    }
}

/// How a device calls itself back to work: one of its
/// [`host_fds`](super::DeviceConfig::host_fds).
pub struct Again(EventFd);

impl Again {
    /// Nothing rung yet.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Again> {
        Ok(Again(new_event()?))
    }

    /// Serves `queue` for one turn, and comes back for another if there may be more.
    ///
    /// # Errors
    /// The guest broke the rules of the queue.
    pub fn serve_turn(
        &self,
        queue: &mut VirtQueue,
        mut serve: impl FnMut(Chain, &MemoryMap, &mut Turn) -> Served,
    ) -> Result<(), DeviceError> {
        let memory = Arc::clone(queue.memory());
        let index = queue.index();
        let mut turn = Turn(TURN_BYTES);
        let served = queue.serve(|chain| {
            if turn.is_over() {
                return Served::Stop;
            }
            turn.spend(CHAIN_COST);
            serve(chain, &memory, &mut turn)
        });
        served.map_err(|error| error.in_queue(index))?;
        if turn.is_over() {
            self.ring();
        }
        Ok(())
    }

    /// Makes the event thread call [`host_event`](super::ActiveDevice::host_event) soon.
    pub fn ring(&self) {
        // Nobody reads the counter, the edge is the message; the only error is a full counter,
        // after 2^64 - 2 rings.
        let _ = self.0.write(1);
    }
}

impl AsRawFd for Again {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Guest;

    #[test]
    fn a_turn_ends_and_is_followed_by_another() {
        let guest = Guest::new();
        let (mut driver, mut queue) = guest.queue(0, 2048);
        for _ in 0..1500 {
            driver.offer(0);
        }
        let again = Again::new().unwrap();
        let mut turn = || {
            let mut served = 0;
            let serve = |_, _: &_, _: &mut _| {
                served += 1;
                Served::Done(0)
            };
            again.serve_turn(&mut queue, serve).unwrap();
            // Reading resets the counter, so this tells whether it was rung in this turn.
            (served, again.0.read().is_ok())
        };
        assert_eq!(turn(), (1024, true));
        assert_eq!(turn(), (476, false));
    }
}
