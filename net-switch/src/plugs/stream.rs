//! Frames in a stream, as QEMU's `-netdev stream` has them: each after its length, four bytes, big-endian.

use crate::port::MAX_FRAME;

/// The bytes of a length.
pub(super) const PREFIX: usize = 4;

/// More than [`MAX_FRAME`] bytes are said to follow: this is no such stream, or its reader has lost its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes")]
pub struct FrameTooLong(u32);

/// Puts the frames of a stream together.
#[derive(Debug)]
pub struct Decoder {
    /// Room for the longest frame and its length.
    buffer: Box<[u8]>,
    /// What has come and was not taken yet.
    start: usize,
    end: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { buffer: vec![0; PREFIX + MAX_FRAME].into(), start: 0, end: 0 }
    }
}

impl Decoder {
    /// Where to read to; never empty after [`Self::next_frame`] has answered `None`.
    pub fn room(&mut self) -> &mut [u8] {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        &mut self.buffer[self.end..]
    }

    /// Says how many bytes of the room were filled.
    pub fn filled(&mut self, bytes: usize) {
        self.end = self.buffer.len().min(self.end + bytes);
    }

    /// Takes the next frame, if all of it is there.
    ///
    /// # Errors
    /// It is too long. The stream is of no more use.
    pub fn next_frame(&mut self) -> Result<Option<&mut [u8]>, FrameTooLong> {
        let (length, rest) = match self.buffer[self.start..self.end].split_first_chunk() {
            Some((length, rest)) => (u32::from_be_bytes(*length), rest.len()),
            None => return Ok(None),
        };
        match usize::try_from(length) {
            Ok(length) if length > rest && length <= MAX_FRAME => Ok(None),
            Ok(length) if length <= MAX_FRAME => {
                let from = self.start + PREFIX;
                self.start = from + length;
                Ok(Some(&mut self.buffer[from..from + length]))
            }
            _ => Err(FrameTooLong(length)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_however_they_are_cut() {
        let frames = [vec![1; 14], vec![], vec![2; MAX_FRAME], vec![3; 1514], vec![4; MAX_FRAME]];
        let length = |frame: &Vec<u8>| u32::try_from(frame.len()).expect("short").to_be_bytes();
        let stream: Vec<u8> =
            frames.iter().flat_map(|frame| [&length(frame)[..], frame].concat()).collect();
        for step in [1, 3, 1000, 70_000, stream.len()] {
            let (mut decoder, mut left, mut got) = (Decoder::default(), &stream[..], Vec::new());
            while !left.is_empty() {
                let room = decoder.room();
                let (now, rest) = left.split_at(step.min(room.len()).min(left.len()));
                room[..now.len()].copy_from_slice(now);
                decoder.filled(now.len());
                left = rest;
                while let Some(frame) = decoder.next_frame().expect("short enough") {
                    got.push(frame.to_vec());
                }
            }
            assert!(got == frames, "in steps of {step}");
        }
    }

    #[test]
    fn a_length_beyond_all_frames_is_an_error() {
        let mut decoder = Decoder::default();
        decoder.room()[..4].copy_from_slice(b"GET ");
        decoder.filled(4);
        assert_eq!(decoder.next_frame(), Err(FrameTooLong(0x4745_5420)));
    }
}
