//! The plain screen: memory beside the guest's own, which the firmware announces. It costs nothing unless it is drawn
//! on, and no exit even then.

use std::hash::{DefaultHasher, Hasher};

use vm_memory::{Bytes, GuestAddress};

use super::{Picture, Screen, rgb};
use crate::arch::layout;
use crate::memory::{self, Memory, MemoryError, MemoryMap};
use crate::spec::ScreenSpec;

/// What a pixel takes: blue, green, red, and nothing.
pub const PIXEL_BYTES: u16 = 4;
/// Where in a pixel its red, green and blue are.
const ORDER: [usize; 3] = [2, 1, 0];
/// What is looked at at once.
const CHUNK: usize = 256 << 10;

/// A frame buffer, at [`layout::FRAME_BUFFER_START`] for the guest. The memory lives as long as this does.
pub struct FrameBuffer {
    memory: Memory,
    width: u32,
    height: u32,
}

/// How much memory the pixels take.
pub fn bytes(spec: &ScreenSpec) -> u32 {
    u32::from(spec.width.get()) * u32::from(spec.height.get()) * u32::from(PIXEL_BYTES)
}

impl FrameBuffer {
    /// A black one.
    ///
    /// # Errors
    /// The host has not that much memory.
    pub fn new(spec: &ScreenSpec) -> Result<FrameBuffer, MemoryError> {
        let memory = memory::allocate_at(layout::FRAME_BUFFER_START, bytes(spec).into())?;
        let (width, height) = (spec.width.get().into(), spec.height.get().into());
        Ok(FrameBuffer { memory, width, height })
    }

    /// The guest's memory for it.
    pub fn memory(&self) -> &MemoryMap {
        &self.memory
    }

    /// All pixels, a chunk after the other. The guest may be drawing.
    fn chunks(&self, mut look: impl FnMut(&[u8])) {
        let len = usize::try_from(self.width * self.height * u32::from(PIXEL_BYTES))
            .unwrap_or(usize::MAX);
        let mut buffer = vec![0; CHUNK.min(len)];
        let mut address = GuestAddress(layout::FRAME_BUFFER_START);
        let mut rest = len;
        while rest > 0 {
            let chunk = &mut buffer[..rest.min(CHUNK)];
            if self.memory.read_slice(chunk, address).is_err() {
                // It is all there, from `new` on.
                return;
            }
            look(chunk);
            rest -= chunk.len();
            address.0 += chunk.len() as u64;
        }
    }
}

impl Screen for FrameBuffer {
    /// Whether something has been drawn cannot be told from drawing it black.
    fn picture(&self) -> Option<Picture> {
        let mut pixels = Vec::new();
        let mut drawn = false;
        self.chunks(|chunk| {
            drawn |= chunk.iter().any(|byte| *byte != 0);
            rgb(chunk, ORDER, &mut pixels);
        });
        drawn.then_some(Picture { width: self.width, height: self.height, rgb: pixels })
    }

    /// Nothing tells when a guest draws: this looks at all pixels.
    fn version(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.chunks(|chunk| hasher.write(chunk));
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::checkpoint::Backing;
    use crate::spec::{Pixels, ScreenKind};

    #[test]
    fn what_is_drawn_is_seen_until_it_is_cleared() {
        let pixels = |count: u64| Pixels::try_from(count).unwrap();
        let spec = ScreenSpec { kind: ScreenKind::Plain, width: pixels(65), height: pixels(1027) };
        let screen = FrameBuffer::new(&spec).unwrap();
        let black = screen.version();
        assert_eq!(screen.picture(), None);
        let write = |x: u64, y: u64, pixel: [u8; 4]| {
            let at = layout::FRAME_BUFFER_START + 4 * (y * 65 + x);
            screen.memory().write_slice(&pixel, GuestAddress(at)).unwrap();
        };
        write(1, 0, [1, 2, 3, 0xff]);
        write(64, 1026, [4, 5, 6, 0]);
        let drawn = screen.version();
        assert_ne!(drawn, black);
        assert_eq!(drawn, screen.version());
        let picture = screen.picture().expect("something is drawn");
        assert_eq!((picture.width, picture.height, picture.rgb.len()), (65, 1027, 65 * 1027 * 3));
        assert_eq!(picture.rgb[..9], [0, 0, 0, 3, 2, 1, 0, 0, 0]);
        assert!(picture.rgb.ends_with(&[0, 0, 0, 6, 5, 4]));
        Backing::default().clear(&[screen.memory()]).unwrap();
        assert_eq!((screen.version(), screen.picture()), (black, None));
    }
}
