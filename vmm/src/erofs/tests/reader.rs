//! Reads an image as Linux does, without anything of the writer.

/// An image.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

pub(super) const BLOCK: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inode {
    at: usize,
    len: usize,
    pub(super) layout: u16,
    pub(super) mode: u32,
    pub(super) links: u64,
    pub(super) size: u64,
    /// A block, or a device's number.
    pub(super) place: u64,
}

impl Reader<'_> {
    fn number(&self, at: usize, len: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(&self.0[at..at + len]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn root(&self) -> u64 {
        assert_eq!(self.number(1024, 4), 0xE0F5_E1E2);
        assert_eq!(self.number(1024 + 12, 1), 12, "block size");
        assert_eq!(self.number(1024 + 80, 4), 0, "features");
        self.number(1024 + 14, 2)
    }

    pub(super) fn label(&self) -> &[u8] {
        let label = &self.0[1024 + 64..1024 + 80];
        &label[..label.iter().position(|byte| *byte == 0).expect("a zero")]
    }

    pub(super) fn inode(&self, nid: u64) -> Inode {
        let at = usize::try_from(nid).unwrap() * 32;
        let format = u16::try_from(self.number(at, 2)).unwrap();
        let mode = u32::try_from(self.number(at + 4, 2)).unwrap();
        let extended = format & 1 == 1;
        let (len, links, size) = match extended {
            false => (32, self.number(at + 6, 2), self.number(at + 8, 4)),
            true => (64, self.number(at + 44, 4), self.number(at + 8, 8)),
        };
        let time = if extended { self.number(at + 32, 8) } else { self.number(1024 + 24, 8) };
        assert_eq!(time, 1);
        assert!(at % BLOCK + len <= BLOCK, "an inode in two blocks");
        let owners = if extended { self.number(at + 24, 8) } else { self.number(at + 24, 4) };
        assert_eq!(owners, 0);
        Inode { at, len, layout: format >> 1, mode, links, size, place: self.number(at + 16, 4) }
    }

    /// Where an inode's content is.
    pub(super) fn place(&self, inode: &Inode) -> usize {
        let size = usize::try_from(inode.size).unwrap();
        match inode.layout {
            0 => usize::try_from(inode.place).unwrap() * BLOCK,
            2 => {
                let at = inode.at + inode.len;
                assert!(at % BLOCK + size <= BLOCK, "inline data in two blocks");
                at
            }
            layout => panic!("layout {layout}"),
        }
    }

    pub(super) fn content(&self, inode: &Inode) -> &[u8] {
        let at = self.place(inode);
        &self.0[at..at + usize::try_from(inode.size).unwrap()]
    }

    /// The blocks of a directory: of each entry its name, inode and type.
    fn blocks(&self, directory: u64) -> Vec<Vec<(&[u8], u64, u64)>> {
        let inode = self.inode(directory);
        assert_eq!(inode.mode & libc::S_IFMT, libc::S_IFDIR);
        let at = self.place(&inode);
        let size = usize::try_from(inode.size).unwrap();
        let block = |start: usize| {
            let end = size.min(start + BLOCK);
            let base = at + start;
            let name_at = |index: usize| self.number(base + index * 12 + 8, 2);
            let count = usize::try_from(name_at(0)).unwrap() / 12;
            let entry = |index: usize| {
                let from = usize::try_from(name_at(index)).unwrap();
                let to = match index + 1 == count {
                    true => {
                        let room = &self.0[base + from..at + end];
                        from + room.iter().position(|byte| *byte == 0).unwrap_or(room.len())
                    }
                    false => usize::try_from(name_at(index + 1)).unwrap(),
                };
                let dirent = base + index * 12;
                let name = &self.0[base + from..base + to];
                (name, self.number(dirent, 8), self.number(dirent + 10, 1))
            };
            (0..count).map(entry).collect()
        };
        (0..size).step_by(BLOCK).map(block).collect()
    }

    pub(super) fn entries(&self, directory: u64) -> Vec<(&[u8], u64, u64)> {
        self.blocks(directory).concat()
    }

    /// Looks for a name by halves, first for its block, then in that.
    pub(super) fn lookup(&self, directory: u64, name: &[u8]) -> Option<u64> {
        let blocks = self.blocks(directory);
        let block = blocks.partition_point(|block| block[0].0 <= name).checked_sub(1)?;
        let found = blocks[block].binary_search_by_key(&name, |entry| entry.0).ok()?;
        Some(blocks[block][found].1)
    }
}
