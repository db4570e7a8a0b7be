//! From the guest's transmit queue into the network.

use firn_net_switch::{Frame, Header, MAX_FRAME, MIN_FRAME, NetPort};
use vm_memory::VolatileSlice;

use super::header;
use crate::memory::MemoryMap;
use crate::virtio::queue::{Chain, GuestSlice, Served, readable};
use crate::virtio::turn::Turn;

/// Sends the frame in one chain. What is no frame is dropped, as a cable would.
pub(super) fn transmit(
    chain: Chain,
    memory: &MemoryMap,
    port: &dyn NetPort,
    turn: &mut Turn,
) -> Served {
    if let Some((header, data)) = parse(chain, memory) {
        let frame = Frame { header, data: &data };
        turn.spend(frame.total_len());
        port.send(&frame);
    }
    Served::Done(0)
}

/// Finds header and frame, which the guest may cut into buffers as it likes (virtio 1.2, 2.7.4).
fn parse(chain: Chain, memory: &MemoryMap) -> Option<(Header, Vec<VolatileSlice<'_>>)> {
    let mut raw = [0; header::LEN];
    let mut missing = raw.len();
    let mut length = 0;
    let mut data = Vec::with_capacity(4);
    for buffer in readable(chain, memory) {
        let buffer = read_only(&buffer.ok()?);
        let start = raw.len() - missing;
        let count = buffer.copy_to(&mut raw[start..]);
        missing -= count;
        let rest = buffer.offset(count).ok()?;
        if rest.is_empty() {
            continue;
        }
        length += rest.len();
        if length > MAX_FRAME {
            return None;
        }
        data.push(rest);
    }
    (missing == 0 && length >= MIN_FRAME).then(|| (header::parse(raw), data))
}

/// The same bytes without the bitmap of written pages, as who only reads does not need it.
fn read_only<'a>(slice: &GuestSlice<'a>) -> VolatileSlice<'a> {
    let start = slice.ptr_guard_mut().as_ptr();
    // SAFETY: `slice` was bounds-checked when it was made, and the mapping it lies in outlives 'a.
    // Everybody reaches guest memory by volatile access or raw copies.
    unsafe { VolatileSlice::new(start, slice.len()) }
}
