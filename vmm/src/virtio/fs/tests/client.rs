//! A guest that speaks FUSE through the device's queues.

use virtiofsd::fuse::{
    AttrOut, CreateIn, EntryOut, GetattrIn, GetxattrIn, InHeader, InitInCompat, InitInExt, InitOut,
    MkdirIn, Opcode, OpenIn, OpenOut, OutHeader, ReadIn, ReleaseIn, SetattrIn, SetxattrIn, WriteIn,
    WriteOut,
};
use vm_memory::ByteValued;

use super::super::Fs;
use crate::spec::ShareSpec;
use crate::virtio::testing::{DriverQueue, Guest, Part, Used};
use crate::virtio::{ActiveDevice, VirtioDevice};

/// Node of the share's directory (FUSE protocol: `FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;
/// Room for the largest reply without data.
const ROOM: usize = 512;

/// A mounted share.
pub struct Mount {
    pub guest: Guest,
    /// The urgent queue and the request queue.
    pub drivers: Vec<DriverQueue>,
    pub device: Box<dyn ActiveDevice>,
    /// Who asks.
    pub uid: u32,
    pub gid: u32,
    unique: u64,
}

/// A request that was answered with this positive errno.
pub type Reply<T> = Result<T, i32>;

impl Mount {
    pub fn new(spec: &ShareSpec) -> Mount {
        let mut mount = Mount::activate(Box::new(Fs::new(spec).unwrap()));
        mount.init();
        mount
    }

    /// Activates without INIT, as after a restore.
    pub fn activate(device: Box<dyn VirtioDevice>) -> Mount {
        let guest = Guest::new();
        let (drivers, activation) = guest.activation(&device.queue_sizes(), 0);
        let Ok(device) = device.activate(activation) else {
            panic!("a share activates");
        };
        Mount { guest, drivers, device, uid: 0, gid: 0, unique: 0 }
    }

    pub fn init(&mut self) -> InitOut {
        let init = InitInCompat { major: 7, minor: 38, max_readahead: 1 << 17, flags: u32::MAX };
        let ext = InitInExt { flags2: u32::MAX, ..Default::default() };
        let reply = self.call(Opcode::Init, 0, &[init.as_slice(), ext.as_slice()]);
        object(&reply.unwrap())
    }

    /// Resets the device and activates what comes back, with new queues.
    pub fn reboot(self) -> Mount {
        Mount::activate(self.device.reset())
    }

    pub fn header(&mut self, opcode: u32, node: u64, body: usize) -> InHeader {
        self.unique += 1;
        InHeader {
            len: u32::try_from(size_of::<InHeader>() + body).unwrap(),
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.uid.into(),
            gid: self.gid.into(),
            ..Default::default()
        }
    }

    /// Makes a request available without ringing.
    pub fn offer(&mut self, opcode: Opcode, node: u64, body: &[&[u8]], room: usize) -> u16 {
        let body = body.concat();
        let header = self.header(opcode as u32, node, body.len());
        let parts = [Part::Read(header.as_slice()), Part::Read(&body), Part::Write(room)];
        self.drivers[1].add(&parts)
    }

    /// Rings and waits until nothing is under way.
    pub fn settle(&mut self, queue: usize) -> Vec<Used> {
        self.device.notify(queue).unwrap();
        self.device.pause();
        self.drivers[queue].all_used()
    }

    pub fn call(&mut self, opcode: Opcode, node: u64, body: &[&[u8]]) -> Reply<Vec<u8>> {
        self.call_with_room(opcode, node, body, ROOM)
    }

    pub fn call_with_room(
        &mut self,
        opcode: Opcode,
        node: u64,
        body: &[&[u8]],
        room: usize,
    ) -> Reply<Vec<u8>> {
        let head = self.offer(opcode, node, body, room);
        let mut used = self.settle(1);
        assert_eq!(used.len(), 1);
        let used = used.remove(0);
        assert_eq!(used.head, head);
        assert!(self.guest.interrupt.take_queue(1) > 0);
        answer(&used, self.unique)
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Reply<EntryOut> {
        let reply = self.call(Opcode::Lookup, parent, &[&c_string(name)])?;
        Ok(object(&reply))
    }

    pub fn getattr(&mut self, node: u64) -> Reply<AttrOut> {
        let reply = self.call(Opcode::Getattr, node, &[GetattrIn::default().as_slice()])?;
        Ok(object(&reply))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Reply<OpenOut> {
        self.open_as(Opcode::Open, node, flags)
    }

    pub fn open_as(&mut self, opcode: Opcode, node: u64, flags: i32) -> Reply<OpenOut> {
        let open = OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
        Ok(object(&self.call(opcode, node, &[open.as_slice()])?))
    }

    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Reply<(EntryOut, OpenOut)> {
        let create = CreateIn {
            flags: (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL).cast_unsigned(),
            mode: libc::S_IFREG | mode,
            ..Default::default()
        };
        let reply = self.call(Opcode::Create, parent, &[create.as_slice(), &c_string(name)])?;
        let (entry, open) = reply.split_at(size_of::<EntryOut>());
        Ok((object(entry), object(open)))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str) -> Reply<EntryOut> {
        let mkdir = MkdirIn { mode: 0o755, umask: 0 };
        let reply = self.call(Opcode::Mkdir, parent, &[mkdir.as_slice(), &c_string(name)])?;
        Ok(object(&reply))
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Reply<Vec<u8>> {
        self.read_as(Opcode::Read, node, fh, offset, size)
    }

    pub fn read_as(
        &mut self,
        opcode: Opcode,
        node: u64,
        fh: u64,
        offset: u64,
        size: u32,
    ) -> Reply<Vec<u8>> {
        let read = ReadIn { fh, offset, size, ..Default::default() };
        let room = size_of::<OutHeader>() + usize::try_from(size).unwrap();
        self.call_with_room(opcode, node, &[read.as_slice()], room)
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Reply<u32> {
        self.write_as(0, node, fh, offset, data)
    }

    /// With flags of the write (FUSE protocol: `FUSE_WRITE_…`).
    pub fn write_as(
        &mut self,
        write_flags: u32,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
    ) -> Reply<u32> {
        let size = u32::try_from(data.len()).unwrap();
        let write = WriteIn { fh, offset, size, write_flags, ..Default::default() };
        let reply = self.call(Opcode::Write, node, &[write.as_slice(), data])?;
        Ok(object::<WriteOut>(&reply).size)
    }

    /// Changes what `valid` names (FUSE protocol: `FATTR_…`).
    pub fn setattr(&mut self, node: u64, valid: u32, attr: SetattrIn) -> Reply<AttrOut> {
        let attr = SetattrIn { valid, ..attr };
        Ok(object(&self.call(Opcode::Setattr, node, &[attr.as_slice()])?))
    }

    pub fn set_xattr(&mut self, node: u64, name: &str, value: &[u8]) -> Reply<()> {
        let size = u32::try_from(value.len()).unwrap();
        let set = SetxattrIn { size, ..Default::default() };
        let body = [set.as_slice(), &c_string(name), value];
        self.call(Opcode::Setxattr, node, &body).map(drop)
    }

    pub fn xattr(&mut self, node: u64, name: &str) -> Reply<Vec<u8>> {
        let get = GetxattrIn { size: 100, ..Default::default() };
        self.call(Opcode::Getxattr, node, &[get.as_slice(), &c_string(name)])
    }

    pub fn xattrs(&mut self, node: u64) -> Reply<Vec<u8>> {
        let get = GetxattrIn { size: 200, ..Default::default() };
        self.call(Opcode::Listxattr, node, &[get.as_slice()])
    }

    pub fn release(&mut self, node: u64, fh: u64) -> Reply<()> {
        let release = ReleaseIn { fh, ..Default::default() };
        self.call(Opcode::Release, node, &[release.as_slice()]).map(drop)
    }

    /// The contents of a file of the share's directory.
    pub fn cat(&mut self, name: &str) -> Reply<Vec<u8>> {
        let node = self.lookup(ROOT, name)?.nodeid;
        let fh = self.open(node, libc::O_RDONLY)?.fh;
        let data = self.read(node, fh, 0, 4096)?;
        self.release(node, fh)?;
        Ok(data)
    }
}

/// What follows the header of the reply to request `unique`.
pub fn answer(used: &Used, unique: u64) -> Reply<Vec<u8>> {
    let (header, body) = used.data.split_at(size_of::<OutHeader>());
    let header: OutHeader = object(header);
    assert_eq!(header.unique, unique);
    assert_eq!(header.len, used.len);
    match header.error {
        0 => Ok(body.to_vec()),
        error => Err(-error),
    }
}

pub fn c_string(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

pub fn object<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut object = T::default();
    object.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    object
}

/// The first entry of a listing (linux/fuse.h: `fuse_dirent`): its name, the position behind it, and the rest.
pub fn dirent(listing: &[u8]) -> (Vec<u8>, u64, &[u8]) {
    let position = u64::from_le_bytes(listing[8..16].try_into().unwrap());
    let len = u32::from_le_bytes(listing[16..20].try_into().unwrap());
    let end = 24 + usize::try_from(len).unwrap();
    (listing[24..end].to_vec(), position, &listing[end.next_multiple_of(8)..])
}
