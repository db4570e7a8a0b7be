//! EROFS as it is on disk. Numbers without another source are those of Linux' fs/erofs/erofs_fs.h.

/// Block size: the one that every kernel takes, whatever its version (`blkszbits`).
pub(super) const BLOCK: u64 = 1 << BLOCK_BITS;
const BLOCK_BITS: u8 = 12;

/// Where the superblock is (`EROFS_SUPER_OFFSET`).
pub(super) const SUPER_AT: u64 = 1024;
/// Its size without extensions (`struct erofs_super_block`).
pub(super) const SUPER_LEN: u64 = 128;
/// `EROFS_SUPER_MAGIC_V1`.
const MAGIC: u32 = 0xE0F5_E1E2;

/// Inodes are found by their place in units of this (`islotbits` in fs/erofs/super.c), which is
/// `struct erofs_inode_compact`'s size.
pub(super) const SLOT: u64 = 32;
const COMPACT: u64 = SLOT;
/// `struct erofs_inode_extended`.
const EXTENDED: u64 = 64;
/// `struct erofs_dirent`.
const DIRENT: usize = 12;

/// All files are as old as in a Nix store.
const TIME: u32 = 1;

/// Where a file's content is (`i_format`, from `EROFS_I_DATALAYOUT_BIT` on).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// In blocks of its own: `EROFS_INODE_FLAT_PLAIN`, the only one that Linux reads without a cache
    /// (`erofs_read_inode` in fs/erofs/inode.c gives `S_DAX`).
    Plain = 0,
    /// Behind its inode, in the same block: `EROFS_INODE_FLAT_INLINE`.
    Inline = 2,
}

/// An inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inode {
    pub(super) layout: Layout,
    pub(super) mode: u16,
    pub(super) links: u32,
    pub(super) size: u64,
    /// `i_u`: its first block, or a device's number.
    pub(super) place: u32,
    /// Its number for programs that know 32 bits only.
    pub(super) number: u32,
}

/// The length of an inode for a file of this size and number of links.
pub(super) fn inode_len(size: u64, links: u32) -> u64 {
    if size > u32::MAX.into() || links > u16::MAX.into() { EXTENDED } else { COMPACT }
}

/// Whether so much content has room behind such an inode.
pub(super) fn fits_inline(size: u64, links: u32) -> bool {
    inode_len(size, links) + size <= BLOCK
}

impl Inode {
    /// Writes it, and gives back its length.
    pub(super) fn write(&self, to: &mut [u8]) -> usize {
        let layout = (self.layout as u16) << 1;
        let (version, len) = match inode_len(self.size, self.links) {
            COMPACT => (0, 32),
            _ => (1, 64),
        };
        put(to, 0, (layout | version).to_le_bytes());
        put(to, 4, self.mode.to_le_bytes());
        put(to, 16, self.place.to_le_bytes());
        put(to, 20, self.number.to_le_bytes());
        match (u32::try_from(self.size), u16::try_from(self.links)) {
            // Its time is the superblock's. It belongs to root.
            (Ok(size), Ok(links)) => {
                put(to, 6, links.to_le_bytes());
                put(to, 8, size.to_le_bytes());
            }
            _ => {
                put(to, 8, self.size.to_le_bytes());
                put(to, 32, u64::from(TIME).to_le_bytes());
                put(to, 44, self.links.to_le_bytes());
            }
        }
        len
    }
}

/// A superblock.
pub(super) struct Super<'a> {
    pub(super) label: &'a str,
    /// The root's place in units of [`SLOT`].
    pub(super) root: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) uuid: [u8; 16],
}

impl Super<'_> {
    /// Writes it to an image that holds zeros there.
    pub(super) fn write(&self, to: &mut [u8]) {
        put(to, 0, MAGIC.to_le_bytes());
        put(to, 12, [BLOCK_BITS]);
        put(to, 14, self.root.to_le_bytes());
        put(to, 16, self.inodes.to_le_bytes());
        put(to, 24, u64::from(TIME).to_le_bytes());
        put(to, 36, self.blocks.to_le_bytes());
        put(to, 48, self.uuid);
        to[64..64 + self.label.len()].copy_from_slice(self.label.as_bytes());
    }
}

/// A device's number (`new_encode_dev` in include/linux/kdev_t.h).
pub(super) fn device_number(major: u32, minor: u32) -> Option<u32> {
    let fits = major < 1 << 12 && minor < 1 << 20;
    fits.then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// An entry's `file_type`: those of `EROFS_FT_REG_FILE` to `EROFS_FT_SYMLINK`.
pub(super) fn file_type(mode: u16) -> u8 {
    match u32::from(mode) & libc::S_IFMT {
        libc::S_IFREG => 1,
        libc::S_IFDIR => 2,
        libc::S_IFCHR => 3,
        libc::S_IFBLK => 4,
        libc::S_IFIFO => 5,
        libc::S_IFSOCK => 6,
        libc::S_IFLNK => 7,
        _ => 0,
    }
}

/// An entry of a directory.
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    /// Its inode's place in units of [`SLOT`].
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// Puts names, of these lengths, into a directory's blocks one after the other.
#[derive(Default)]
pub(super) struct Directory {
    full_blocks: u64,
    /// Of the last one.
    used: u64,
}

impl Directory {
    /// Whether the next name begins a block.
    pub(super) fn add(&mut self, name: usize) -> bool {
        let len = (DIRENT + name) as u64;
        let begins = self.used == 0 || self.used + len > BLOCK;
        if begins && self.used > 0 {
            self.full_blocks += 1;
            self.used = 0;
        }
        self.used += len;
        begins
    }

    pub(super) fn size(&self) -> u64 {
        self.full_blocks * BLOCK + self.used
    }
}

/// Writes entries, sorted by their names and not too many, as one of a directory's blocks, which holds zeros.
pub(super) fn write_block<'a>(to: &mut [u8], entries: impl ExactSizeIterator<Item = Entry<'a>>) {
    let mut name_at = entries.len() * DIRENT;
    for (index, entry) in entries.enumerate() {
        let at = index * DIRENT;
        let [low, high, ..] = name_at.to_le_bytes();
        put(to, at, entry.nid.to_le_bytes());
        put(to, at + 8, [low, high]);
        put(to, at + 10, [entry.file_type]);
        to[name_at..name_at + entry.name.len()].copy_from_slice(entry.name);
        name_at += entry.name.len();
    }
}

fn put<const N: usize>(to: &mut [u8], at: usize, bytes: [u8; N]) {
    to[at..at + N].copy_from_slice(&bytes);
}
