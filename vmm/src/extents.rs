//! Files that hold what is not zero of something larger, guest memory or a disk, without relying on holes: whoever
//! copies or packs them need not know of any.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

/// In blocks of so many bytes zeros are looked for.
const BLOCK: usize = 4096;
/// How much is read at once.
const CHUNK: usize = 1 << 20;

/// Where what a file holds, one part after the other, belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Extents {
    /// The size of the whole in bytes.
    size: u64,
    /// Offsets and lengths of the parts.
    parts: Vec<(u64, u64)>,
}

/// A part of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Where it belongs.
    pub(crate) at: u64,
    pub(crate) len: u64,
    /// Where in the file it is.
    pub(crate) from: u64,
}

impl Part {
    /// Its end in the whole.
    pub(crate) fn end(&self) -> u64 {
        self.at + self.len
    }
}

/// Writes such a file.
pub(crate) struct Writer<W> {
    to: W,
    extents: Extents,
    /// So many bytes of zeros between two parts are written, too.
    gap: u64,
}

impl<W: Write> Writer<W> {
    /// For something of `size` bytes; `to` is empty.
    pub(crate) fn new(to: W, size: u64) -> Self {
        Self { to, extents: Extents { size, parts: Vec::new() }, gap: 0 }
    }

    /// The same, but with parts that are further apart from each other than `gap` bytes, so that there are fewer.
    pub(crate) fn with_gaps(to: W, size: u64, gap: u64) -> Self {
        Self { gap, ..Self::new(to, size) }
    }

    /// Writes what is at `at` of the whole, without its blocks of zeros.
    pub(crate) fn put(&mut self, at: u64, content: &[u8]) -> io::Result<()> {
        let mut start = 0;
        for end in (BLOCK..content.len()).step_by(BLOCK).chain([content.len()]) {
            let block = end.next_multiple_of(BLOCK) - BLOCK;
            if content[block..end].iter().all(|byte| *byte == 0) {
                self.part(at + start as u64, &content[start..block])?;
                start = end;
            }
        }
        self.part(at + start as u64, &content[start..])
    }

    fn part(&mut self, at: u64, content: &[u8]) -> io::Result<()> {
        if content.is_empty() {
            return Ok(());
        }
        let len = content.len() as u64;
        match self.extents.parts.last_mut() {
            Some((start, held)) if (*start + *held..=*start + *held + self.gap).contains(&at) => {
                let gap = at - (*start + *held);
                *held += gap + len;
                io::copy(&mut io::repeat(0).take(gap), &mut self.to)?;
            }
            _ => self.extents.parts.push((at, len)),
        }
        self.to.write_all(content)
    }

    /// Where what was written belongs.
    pub(crate) fn finish(mut self) -> io::Result<Extents> {
        self.to.flush()?;
        Ok(self.extents)
    }
}

impl Extents {
    /// The size of the whole in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The parts of the whole that `from` holds, one after the other in the file.
    ///
    /// # Errors
    /// The file is not the one, or is damaged.
    pub(crate) fn parts_of(&self, from: &File) -> io::Result<Vec<Part>> {
        let bad = |what: &str| Err(io::Error::new(ErrorKind::InvalidData, what));
        let mut parts = Vec::with_capacity(self.parts.len());
        let mut held: u64 = 0;
        for &(at, len) in &self.parts {
            if len == 0 || at.checked_add(len).is_none_or(|end| end > self.size) {
                return bad("a part of it belongs nowhere");
            }
            parts.push(Part { at, len, from: held });
            held = held.saturating_add(len);
        }
        if from.metadata()?.len() != held {
            return bad("it has another length than it should");
        }
        Ok(parts)
    }

    /// Calls `each` with what `from` holds, and where in the whole it belongs.
    ///
    /// # Errors
    /// The file is not the one, or is damaged; nothing was called then unless it was cut short meanwhile. `each` fails.
    pub(crate) fn read(
        &self,
        from: &File,
        mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        for part in self.parts_of(from)? {
            let mut done = 0;
            while done < part.len {
                let len = usize::try_from(part.len - done).map_or(CHUNK, |rest| rest.min(CHUNK));
                let chunk = &mut buffer[..len];
                from.read_exact_at(chunk, part.from + done)?;
                each(part.at + done, chunk)?;
                done += len as u64;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(content: &[(u64, &[u8])], size: u64) -> (Extents, File) {
        let file = tempfile::tempfile().unwrap();
        let mut writer = Writer::new(&file, size);
        content.iter().for_each(|(at, content)| writer.put(*at, content).unwrap());
        (writer.finish().unwrap(), file)
    }

    fn whole(extents: &Extents, file: &File) -> io::Result<Vec<u8>> {
        let mut whole = vec![0; usize::try_from(extents.size).unwrap()];
        extents.read(file, |at, content| {
            let at = usize::try_from(at).unwrap();
            whole[at..at + content.len()].copy_from_slice(content);
            Ok(())
        })?;
        Ok(whole)
    }

    #[test]
    fn zeros_take_no_room() {
        let mut content = vec![0; 10 * BLOCK + 512];
        content[BLOCK] = 1;
        content[3 * BLOCK - 1] = 2;
        content[5 * BLOCK..6 * BLOCK].fill(3);
        content[10 * BLOCK + 511] = 4;
        let (head, tail) = content.split_at(6 * BLOCK);
        let parts = [(0, head), (head.len() as u64, tail)];
        let (extents, file) = written(&parts, content.len() as u64);
        let block = BLOCK as u64;
        assert_eq!(extents.parts, [(block, 2 * block), (5 * block, block), (10 * block, 512)]);
        assert_eq!(file.metadata().unwrap().len(), 4 * block + 512 - block);
        assert!(whole(&extents, &file).unwrap() == content);
    }

    #[test]
    fn short_gaps_are_filled() {
        let block = BLOCK as u64;
        let content: Vec<u8> =
            [1, 0, 0, 2, 0, 0, 0, 3].iter().flat_map(|byte| [*byte; BLOCK]).collect();
        let file = tempfile::tempfile().unwrap();
        let mut writer = Writer::with_gaps(&file, 16 * block, 2 * block);
        writer.put(0, &content).unwrap();
        writer.put(10 * block, &content[..BLOCK]).unwrap();
        // What comes late is not put before what is there.
        writer.put(4 * block, &content[..BLOCK]).unwrap();
        let extents = writer.finish().unwrap();
        let parts = [(0, 4 * block), (7 * block, 4 * block), (4 * block, block)];
        assert_eq!(extents.parts, parts);
        let found = whole(&extents, &file).unwrap();
        assert!(found[..4 * BLOCK] == content[..4 * BLOCK]);
        let blocks: Vec<u8> = found.chunks(BLOCK).map(|block| block[0]).collect();
        assert_eq!(blocks, [1, 0, 0, 2, 1, 0, 0, 3, 0, 0, 1, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (extents, file) = written(&[(0, &[1; 2 * BLOCK]), (1 << 20, &[2; BLOCK])], 2 << 20);
        for parts in [vec![(0, 0)], vec![(u64::MAX, 2)], vec![(2 << 20, 1)], vec![(0, 3 << 20)]] {
            let bad = Extents { parts, ..extents.clone() };
            assert!(bad.read(&file, |_, _| panic!("nothing is used")).is_err());
        }
        for len in [0, 3 * BLOCK as u64 - 1, 3 * BLOCK as u64 + 1] {
            file.set_len(len).unwrap();
            let error = extents.read(&file, |_, _| panic!("nothing is used")).unwrap_err();
            assert!(error.to_string().contains("another length"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn everything_comes_back(blocks in prop::collection::vec(0_u8..3, 1..40), odd in 1..BLOCK) {
            let mut content: Vec<u8> = blocks.iter().flat_map(|byte| [*byte; BLOCK]).collect();
            content.truncate(content.len() - BLOCK + odd);
            let (extents, file) = written(&[(0, &content)], content.len() as u64);
            prop_assert!(whole(&extents, &file).unwrap() == content);
        }
    }
}
