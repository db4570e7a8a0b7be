//! FUSE requests, as far as a file system that nobody changes has an answer to them.
//!
//! A guest's bytes are parsed here, once. Most of what Linux could ask is refused so that it does not ask again: a
//! guest that was told `ENOSYS` for OPEN, OPENDIR, FLUSH or GETXATTR goes on without them.

use std::ffi::CStr;
use std::io::{self, Read};
use std::sync::Arc;

use virtiofsd::fuse::{
    AttrOut, Dirent, EntryOut, FsOptions, InHeader, InitInCompat, InitInExt, InitOut,
    KERNEL_MINOR_VERSION, KERNEL_VERSION, Kstatfs, MIN_KERNEL_MINOR_VERSION, Opcode, OpenIn,
    OutHeader, ReadIn, StatfsOut,
};
use vm_memory::ByteValued;

use super::tree::{Node, ROOT, Tree, errno};
use crate::memory::MemoryMap;
use crate::virtio::file::read_at;
use crate::virtio::fs::server::FOR_EVER;
use crate::virtio::queue::{Chain, ChainReader, GuestSlice, QueueError, writable};

/// Most that is read at once. It is also told to the guest, in pages.
const MAX_READ: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
/// Directories of more bytes are read by a worker: each of their files has to be looked at. It is some hundred names in
/// most file systems.
const MAX_QUICK_DIRECTORY: u64 = 16 << 10;
/// Longest name that Linux sends (linux/fuse.h: `FUSE_NAME_MAX`).
const MAX_NAME: usize = 1024;

/// What was negotiated of this is used.
const WANTED: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::DO_READDIRPLUS)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::CACHE_SYMLINKS)
    .union(FsOptions::ZERO_MESSAGE_OPEN)
    .union(FsOptions::ZERO_MESSAGE_OPENDIR)
    .union(FsOptions::INIT_EXT);

/// Whether a request may take its time, or wait for a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// It is rather left undone.
    None,
    /// It may.
    Any,
}

/// What comes of a request that is right.
enum Answer {
    Bytes(Vec<u8>),
    /// So many, which are where the guest wants them.
    InPlace(usize),
    /// It would take too long.
    Later,
}

/// One request, taken apart.
struct Request<'m> {
    tree: &'m Tree,
    header: InHeader,
    body: ChainReader<'m>,
    /// Where the answer goes, behind its header.
    data: Vec<GuestSlice<'m>>,
    room: usize,
    patience: Patience,
}

/// Serves one request and gives the number of bytes written into its chain; none if it would take too long.
pub(super) fn serve(tree: &Tree, chain: &Chain, patience: Patience) -> Option<u32> {
    let memory: &MemoryMap = chain.memory();
    let Ok((header, body, buffers)) = parse(chain, memory) else {
        tracing::debug!("request outside guest memory, or cut short");
        return Some(0);
    };
    let opcode = Opcode::try_from(header.opcode).ok();
    if let Some(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt | Opcode::Destroy) = opcode
    {
        // No node is ever forgotten, and nobody waits for an answer.
        return Some(0);
    }
    let room: usize = buffers.iter().map(GuestSlice::len).fold(0, usize::saturating_add);
    let Some(room) = room.checked_sub(size_of::<OutHeader>()) else {
        tracing::debug!("request without room for a reply");
        return Some(0);
    };
    let data = part(&buffers, size_of::<OutHeader>(), room);
    let request = Request { tree, header, body, data, room, patience };
    let (error, length) = match request.answer(opcode) {
        Ok(Answer::Later) => return None,
        Ok(Answer::InPlace(length)) => (0, length),
        Ok(Answer::Bytes(bytes)) if bytes.len() > room => (libc::EINVAL, 0),
        Ok(Answer::Bytes(bytes)) => {
            write(&part(&buffers, size_of::<OutHeader>(), room), &bytes);
            (0, bytes.len())
        }
        Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), 0),
    };
    let len = u32::try_from(size_of::<OutHeader>() + length).unwrap_or(0);
    let reply = OutHeader { len, error: -error, unique: header.unique };
    write(&buffers, reply.as_slice());
    Some(len)
}

type Parts<'m> = (InHeader, ChainReader<'m>, Vec<GuestSlice<'m>>);

fn parse<'m>(chain: &Chain, memory: &'m MemoryMap) -> io::Result<Parts<'m>> {
    let mut body = ChainReader::new(memory, chain.clone()).map_err(io::Error::other)?;
    let header = body.read_obj()?;
    let buffers = writable(chain.clone(), memory).collect::<Result<_, QueueError>>();
    Ok((header, body, buffers.map_err(io::Error::other)?))
}

/// `count` bytes of the buffers, or as many as there are, from the byte at `from` on.
fn part<'m>(buffers: &[GuestSlice<'m>], mut from: usize, mut count: usize) -> Vec<GuestSlice<'m>> {
    let mut parts = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let skipped = from.min(buffer.len());
        from -= skipped;
        let taken = count.min(buffer.len() - skipped);
        count -= taken;
        if taken > 0 {
            // Within the buffer, so that it is no error.
            parts.extend(buffer.subslice(skipped, taken));
        }
    }
    parts
}

/// Writes into buffers, as far as they go.
fn write(buffers: &[GuestSlice<'_>], mut bytes: &[u8]) {
    for buffer in buffers {
        let (now, later) = bytes.split_at(bytes.len().min(buffer.len()));
        buffer.copy_from(now);
        bytes = later;
    }
}

impl Request<'_> {
    fn answer(mut self, opcode: Option<Opcode>) -> io::Result<Answer> {
        let Some(opcode) = opcode else { return Err(errno(libc::ENOSYS)) };
        match opcode {
            Opcode::Init => self.init(),
            Opcode::Lookup => self.lookup(),
            Opcode::Getattr => {
                let attr = self.tree.attr(&*self.node()?)?;
                let (attr_valid, attr_valid_nsec) = (FOR_EVER.as_secs(), 0);
                Ok(bytes(&[AttrOut { attr_valid, attr_valid_nsec, dummy: 0, attr }.as_slice()]))
            }
            Opcode::Readlink => Ok(bytes(&[&*self.tree.target(&*self.node()?)?])),
            Opcode::Read => self.read(),
            Opcode::Readdir => self.list(false),
            Opcode::Readdirplus => self.list(true),
            Opcode::Statfs => {
                let st = Kstatfs::from(self.tree.statfs()?);
                Ok(bytes(&[StatfsOut { st }.as_slice()]))
            }
            Opcode::Open => self.open(),
            Opcode::Setattr
            | Opcode::Symlink
            | Opcode::Mknod
            | Opcode::Mkdir
            | Opcode::Unlink
            | Opcode::Rmdir
            | Opcode::Rename
            | Opcode::Rename2
            | Opcode::Link
            | Opcode::Write
            | Opcode::Setxattr
            | Opcode::Removexattr
            | Opcode::Create
            | Opcode::TmpFile
            | Opcode::Fallocate
            | Opcode::CopyFileRange => Err(errno(libc::EROFS)),
            _ => Err(errno(libc::ENOSYS)),
        }
    }

    fn node(&self) -> io::Result<Arc<Node>> {
        let index = self.header.nodeid.checked_sub(1).and_then(|index| u32::try_from(index).ok());
        index.and_then(|index| self.tree.node(index)).ok_or_else(|| errno(libc::ESTALE))
    }

    /// What follows the header, in which nothing may be missing.
    fn body<T: ByteValued>(&mut self) -> io::Result<T> {
        self.body.read_obj().map_err(|_| errno(libc::EINVAL))
    }

    fn init(&mut self) -> io::Result<Answer> {
        let init: InitInCompat = self.body()?;
        let mut flags = u64::from(init.flags);
        if FsOptions::from_bits_truncate(flags).contains(FsOptions::INIT_EXT) {
            let more: InitInExt = self.body()?;
            flags |= u64::from(more.flags2) << 32;
        }
        let (major, minor) = (KERNEL_VERSION, KERNEL_MINOR_VERSION);
        if init.major > KERNEL_VERSION {
            // The guest asks again, for this version.
            return Ok(bytes(&[InitOut { major, minor, ..Default::default() }.as_slice()]));
        }
        if (init.major, init.minor) < (KERNEL_VERSION, MIN_KERNEL_MINOR_VERSION) {
            return Err(errno(libc::EPROTO));
        }
        let enabled = (FsOptions::from_bits_truncate(flags) & WANTED).bits();
        let [low, high] = [enabled, enabled >> 32].map(|half| half & u64::from(u32::MAX));
        let out = InitOut {
            major,
            minor,
            max_readahead: init.max_readahead,
            flags: u32::try_from(low).unwrap_or(0),
            flags2: u32::try_from(high).unwrap_or(0),
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: MAX_READ,
            time_gran: 1,
            max_pages: MAX_PAGES,
            ..Default::default()
        };
        Ok(bytes(&[out.as_slice()]))
    }

    fn lookup(&mut self) -> io::Result<Answer> {
        let mut name = vec![0; self.body.available_bytes().min(MAX_NAME + 1)];
        self.body.read_exact(&mut name)?;
        let name = CStr::from_bytes_until_nul(&name).map_err(|_| errno(libc::EINVAL))?;
        let directory = self.node()?;
        let entry = match self.tree.lookup(&directory, name) {
            Ok(node) => entry(self.tree, &node)?,
            // Programs look for files in many places: what is not there stays so, but at the top.
            Err(error) if error.kind() == io::ErrorKind::NotFound && directory.index() != ROOT => {
                EntryOut { entry_valid: FOR_EVER.as_secs(), ..Default::default() }
            }
            Err(error) => return Err(error),
        };
        Ok(bytes(&[entry.as_slice()]))
    }

    /// Not needed, after this answer: reads find the file by its node.
    fn open(&mut self) -> io::Result<Answer> {
        let open: OpenIn = self.body()?;
        let access = open.flags.cast_signed() & libc::O_ACCMODE;
        Err(errno(if access == libc::O_RDONLY { libc::ENOSYS } else { libc::EROFS }))
    }

    fn read(&mut self) -> io::Result<Answer> {
        let ReadIn { offset, size, .. } = self.body()?;
        let (open, end) = self.tree.file(&*self.node()?)?;
        let size = u64::from(size.min(MAX_READ)).min(end.saturating_sub(offset));
        let size = usize::try_from(size).unwrap_or(0).min(self.room);
        let waits = self.patience == Patience::Any || open.in_memory;
        let mut done = 0;
        while done < size {
            let at = offset.checked_add(done as u64).ok_or_else(|| errno(libc::EINVAL))?;
            match read_at(&open.file, &part(&self.data, done, size - done), at, waits) {
                // The file has been cut short.
                Ok(0) => return Err(errno(libc::EIO)),
                Ok(count) => done += count,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EOPNOTSUPP) if !waits => return Ok(Answer::Later),
                    _ => return Err(error),
                },
            }
        }
        Ok(Answer::InPlace(done))
    }

    /// A directory's entries from a position on, with all that LOOKUP would say of them or without. The position counts
    /// entries, of which the first two are the directory and its parent.
    fn list(&mut self, plus: bool) -> io::Result<Answer> {
        let ReadIn { offset, size, .. } = self.body()?;
        let directory = self.node()?;
        if self.patience == Patience::None
            && !self.tree.has_entries(&directory)
            && self.tree.attr(&directory)?.size > MAX_QUICK_DIRECTORY
        {
            return Ok(Answer::Later);
        }
        let entries = self.tree.entries(&directory)?;
        let room = self.room.min(usize::try_from(size.min(MAX_READ)).unwrap_or(0));
        let mut listing = Vec::with_capacity(room);
        for position in usize::try_from(offset).unwrap_or(usize::MAX)..entries.len() + 2 {
            let (node, name) = match position {
                0 => (Some(Arc::clone(&directory)), c"."),
                1 => (self.tree.node(directory.parent()), c".."),
                position => {
                    let (name, node) = &entries[position - 2];
                    (self.tree.node(*node), &**name)
                }
            };
            let node = node.ok_or_else(|| errno(libc::ESTALE))?;
            let entry = entry(self.tree, &node)?;
            let name = name.to_bytes();
            let dirent = Dirent {
                ino: entry.attr.ino,
                off: position as u64 + 1,
                namelen: u32::try_from(name.len()).unwrap_or(0),
                type_: (entry.attr.mode & libc::S_IFMT) >> 12,
            };
            let head = if plus { size_of::<EntryOut>() } else { 0 };
            let length = (head + size_of::<Dirent>() + name.len()).next_multiple_of(8);
            if listing.len() + length > room {
                break;
            }
            let end = listing.len() + length;
            if plus {
                // The guest has looked up the first two.
                let entry = if position < 2 { EntryOut::default() } else { entry };
                listing.extend_from_slice(entry.as_slice());
            }
            listing.extend_from_slice(dirent.as_slice());
            listing.extend_from_slice(name);
            listing.resize(end, 0);
        }
        Ok(Answer::Bytes(listing))
    }
}

fn bytes(parts: &[&[u8]]) -> Answer {
    Answer::Bytes(parts.concat())
}

fn entry(tree: &Tree, node: &Node) -> io::Result<EntryOut> {
    Ok(EntryOut {
        nodeid: u64::from(node.index()) + 1,
        entry_valid: FOR_EVER.as_secs(),
        attr_valid: FOR_EVER.as_secs(),
        attr: tree.attr(node)?,
        ..Default::default()
    })
}
