//! Guests that break the rules.

use std::fs;
use std::os::unix::fs::symlink;

use proptest::prelude::*;
use virtiofsd::fuse::{InHeader, LinkIn, MkdirIn, MknodIn, Opcode, OutHeader, ReadIn, RenameIn};
use vm_memory::ByteValued;

use super::super::store::Filter;
use super::super::{Fs, server};
use super::client::{Mount, ROOT, answer, c_string};
use super::{share, spec};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Guest, HOSTILE_MEMORY, NEXT, Part, hostile_ring};

#[test]
fn no_name_leads_out_of_the_share() {
    let outer = tempfile::tempdir().unwrap();
    let inner = outer.path().join("share");
    fs::create_dir_all(inner.join("dir")).unwrap();
    fs::write(outer.path().join("secret"), "s").unwrap();
    fs::write(inner.join("file"), "x").unwrap();
    let mut mount = Mount::new(&spec(&inner));
    let file = mount.lookup(ROOT, "file").unwrap().nodeid;
    let dir = mount.lookup(ROOT, "dir").unwrap().nodeid;
    let refused = Some(libc::EINVAL);
    let absolute = outer.path().join("secret");
    let absolute = absolute.to_str().unwrap();
    for name in ["..", ".", "", "../secret", "dir/../../secret", "dir/", absolute] {
        let bytes = c_string(name);
        assert_eq!(mount.lookup(ROOT, name).err(), refused, "{name}");
        assert_eq!(mount.lookup(dir, name).err(), refused, "{name}");
        assert_eq!(mount.create(ROOT, name, 0o644).err(), refused, "{name}");
        assert_eq!(mount.mkdir(ROOT, name).err(), refused, "{name}");
        for opcode in [Opcode::Unlink, Opcode::Rmdir] {
            assert_eq!(mount.call(opcode, ROOT, &[&bytes]).err(), refused, "{name}");
        }
        let link = LinkIn { oldnodeid: file };
        let mknod = MknodIn { mode: libc::S_IFREG | 0o644, ..Default::default() };
        let mkdir = MkdirIn::default();
        let rename = RenameIn { newdir: ROOT };
        let target = c_string("target");
        let ordinary = c_string("file");
        let requests: [(Opcode, Vec<&[u8]>); 6] = [
            (Opcode::Link, vec![link.as_slice(), &bytes]),
            (Opcode::Mknod, vec![mknod.as_slice(), &bytes]),
            (Opcode::Mkdir, vec![mkdir.as_slice(), &bytes]),
            (Opcode::Rename, vec![rename.as_slice(), &bytes, &ordinary]),
            (Opcode::Rename, vec![rename.as_slice(), &ordinary, &bytes]),
            (Opcode::Symlink, vec![&bytes, &target]),
        ];
        for (opcode, body) in requests {
            assert_eq!(mount.call(opcode, ROOT, &body).err(), refused, "{name}");
        }
    }
    assert_eq!(fs::read(outer.path().join("secret")).unwrap(), b"s");
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
    assert_eq!(fs::read_dir(&inner).unwrap().count(), 2);
}

#[test]
fn the_host_follows_no_links() {
    let outer = tempfile::tempdir().unwrap();
    let inner = outer.path().join("share");
    fs::create_dir(&inner).unwrap();
    fs::write(outer.path().join("secret"), "s").unwrap();
    symlink("../secret", inner.join("to_file")).unwrap();
    symlink(outer.path(), inner.join("to_dir")).unwrap();
    let mut mount = Mount::new(&spec(&inner));
    let to_file = mount.lookup(ROOT, "to_file").unwrap();
    assert_eq!(to_file.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    let text = mount.call(Opcode::Readlink, to_file.nodeid, &[]);
    assert_eq!(text.unwrap(), b"../secret");
    let open = mount.open(to_file.nodeid, libc::O_RDONLY);
    assert_eq!(open.err(), Some(libc::EBADF));
    let to_dir = mount.lookup(ROOT, "to_dir").unwrap();
    let beyond = mount.lookup(to_dir.nodeid, "secret");
    assert_eq!(beyond.err(), Some(libc::ENOTDIR));
    let list = mount.open_as(Opcode::Opendir, to_dir.nodeid, 0);
    assert_eq!(list.err(), Some(libc::EBADF));
    assert_eq!(mount.mkdir(to_dir.nodeid, "new").err(), Some(libc::ENOTDIR));
    // Not even to create what the link names.
    symlink("../new", inner.join("dangling")).unwrap();
    assert!(mount.create(ROOT, "dangling", 0o644).is_err());
    assert!(!outer.path().join("new").exists());
}

#[test]
fn devices_cannot_be_made() {
    let (_directory, spec) = share();
    let mut mount = Mount::new(&spec);
    for (mode, rdev) in [(libc::S_IFBLK, 0x800), (libc::S_IFCHR, 0x101)] {
        let mknod = MknodIn { mode: mode | 0o666, rdev, ..Default::default() };
        let reply = mount.call(Opcode::Mknod, ROOT, &[mknod.as_slice(), &c_string("dev")]);
        assert_eq!(reply.err(), Some(libc::EPERM));
    }
    let fifo = MknodIn { mode: libc::S_IFIFO | 0o666, ..Default::default() };
    let reply = mount.call(Opcode::Mknod, ROOT, &[fifo.as_slice(), &c_string("fifo")]);
    assert!(reply.is_ok());
    // The guest's kernel serves it itself; the host would wait for a writer.
    let node = mount.lookup(ROOT, "fifo").unwrap().nodeid;
    assert_eq!(mount.open(node, libc::O_RDONLY).err(), Some(libc::EBADF));
}

#[test]
fn chains_without_room_for_a_reply_come_back_empty() {
    let (_directory, spec) = share();
    let mut mount = Mount::new(&spec);
    let read = ReadIn::default();
    let header = mount.header(Opcode::Read as u32, ROOT, size_of::<ReadIn>());
    let request = [header.as_slice(), read.as_slice()].concat();
    let chains: [&[Part<'_>]; 6] = [
        &[Part::Read(&request)],
        &[Part::Read(&request), Part::Write(15)],
        &[Part::Read(&request), Part::Write(0)],
        &[Part::Write(64)],
        &[Part::Read(&request[..8])],
        &[Part::Read(&[])],
    ];
    for parts in chains {
        mount.drivers[1].add(parts);
        let used = mount.settle(1);
        assert_eq!((used.len(), used[0].len), (1, 0), "{parts:?}");
    }
    assert!(mount.getattr(ROOT).is_ok());
}

#[test]
fn data_outside_memory_costs_the_request() {
    let (_directory, spec) = share();
    let guest = Guest::new();
    let (mut drivers, activation) = guest.activation(&[16, 16], 0);
    let mut device = Box::new(Fs::new(&spec).unwrap()).activate(activation).ok().unwrap();
    let header =
        InHeader { opcode: Opcode::Write as u32, unique: 7, len: 50, ..Default::default() };
    let driver = &mut drivers[1];
    let head = driver.add(&[Part::Read(header.as_slice()), Part::Read(b"data"), Part::Write(16)]);
    // Chains take descriptors in falling order.
    driver.set_descriptor(head - 1, 4 << 30, 4096, NEXT, head - 2);
    device.notify(1).unwrap();
    device.pause();
    let used = drivers[1].used().unwrap();
    let reply = *OutHeader::from_slice(&used.data).unwrap();
    assert_eq!((reply.len, reply.error, reply.unique), (16, -libc::EFAULT, 7));
}

#[test]
fn what_cannot_be_parsed_is_answered_with_an_error() {
    let (_directory, spec) = share();
    let mut mount = Mount::new(&spec);
    let unterminated = mount.call(Opcode::Lookup, ROOT, &[b"name"]);
    assert_eq!(unterminated, Err(libc::EINVAL));
    let short = mount.call(Opcode::Mknod, ROOT, &[b"abc"]);
    assert_eq!(short, Err(libc::EINVAL));
    let mut header = mount.header(9999, ROOT, 0);
    let parts = [Part::Read(header.as_slice()), Part::Write(64)];
    mount.drivers[1].add(&parts);
    let used = mount.settle(1);
    assert_eq!(answer(&used[0], header.unique), Err(libc::ENOSYS));
    header.len = u32::MAX;
    mount.drivers[1].add(&[Part::Read(header.as_slice()), Part::Write(64)]);
    let used = mount.settle(1);
    assert_eq!(answer(&used[0], header.unique), Err(libc::ENOMEM));
}

/// One request with anything in it.
#[derive(Clone, Debug)]
struct Request {
    opcode: u32,
    node: u64,
    len: Option<u32>,
    body: Vec<u8>,
    room: usize,
    queue: usize,
}

fn request() -> impl Strategy<Value = Request> {
    let node = prop_oneof![4 => 0..5_u64, 1 => any::<u64>()];
    // Small numbers are handles, flags and lengths that exist; letters make names.
    let byte = prop_oneof![4 => Just(0_u8), 2 => 1..4_u8, 2 => b'a'..b'd', 1 => any::<u8>()];
    let body = prop::collection::vec(byte, 0..128);
    let len = prop::option::weighted(0.2, any::<u32>());
    let opcode = prop_oneof![9 => 1..53_u32, 1 => any::<u32>()];
    let room = prop_oneof![1 => 0..32_usize, 2 => 32..512_usize, 1 => 4096..8192_usize];
    (opcode, node, len, body, room, 0..2_usize).prop_map(
        |(opcode, node, len, body, room, queue)| Request { opcode, node, len, body, room, queue },
    )
}

/// A guest can change a request after it was found to be quick.
#[test]
fn a_thread_of_the_process_serves_nothing_that_could_change_the_process() {
    let (directory, spec) = share();
    let root = fs::File::open(directory.path()).unwrap();
    let server = server::start(&spec, &root, &Filter::default(), u64::MAX).unwrap();
    let guest = Guest::new();
    let (mut driver, mut queue) = guest.queue(0, 256);
    let mut serve = |opcode: Opcode, body: &[u8]| {
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
            opcode: opcode as u32,
            nodeid: ROOT,
            ..Default::default()
        };
        driver.add(&[Part::Read(header.as_slice()), Part::Read(body), Part::Write(256)]);
        let chain = queue.pop().unwrap().expect("a request");
        let written = server.serve(&chain);
        queue.complete(chain.head_index(), written).unwrap();
        answer(&driver.used().unwrap(), 0)
    };
    let mkdir = MkdirIn { mode: 0o755, umask: 0 };
    let mkdir = [mkdir.as_slice(), b"dir\0"].concat();
    for (opcode, body) in [
        (Opcode::Init, &[0; 64][..]),
        (Opcode::Mkdir, &mkdir),
        (Opcode::Getxattr, b"\x08\0\0\0\0\0\0\0user.a\0"),
        (Opcode::Fsync, &[0; 16]),
        (Opcode::Read, &[0; 40]),
    ] {
        assert!(serve(opcode, body).is_err(), "{opcode:?}");
    }
    assert!(!directory.path().join("dir").exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_request_is_given_back(
        requests in prop::collection::vec(request(), 1..60),
        store in any::<bool>(),
    ) {
        let (directory, spec) = if store { super::store::store() } else { share() };
        fs::write(directory.path().join("a"), "text").unwrap();
        fs::create_dir(directory.path().join("b")).unwrap();
        let mut mount = Mount::new(&spec);
        mount.lookup(ROOT, "a").unwrap();
        mount.lookup(ROOT, "b").unwrap();
        assert!(store || mount.open_as(Opcode::Opendir, ROOT, 0).is_ok());
        for request in requests {
            let mut header = mount.header(request.opcode, request.node, request.body.len());
            header.len = request.len.unwrap_or(header.len);
            let parts = [
                Part::Read(header.as_slice()),
                Part::Read(&request.body),
                Part::Write(request.room),
            ];
            mount.drivers[request.queue].add(&parts);
            // A panic inside the server would be an error of the next call.
            let used = mount.settle(request.queue);
            prop_assert_eq!(used.len(), 1);
            let len = usize::try_from(used[0].len).unwrap();
            prop_assert!(len == 0 || len >= size_of::<OutHeader>());
            mount.device.host_event().unwrap();
        }
        let mut mount = mount.reboot();
        mount.init();
        prop_assert!(mount.getattr(ROOT).is_ok());
    }

    #[test]
    fn any_ring_is_survived(rings in [hostile_ring(), hostile_ring()], noise in any::<[u8; 32]>()) {
        let (_directory, spec) = share();
        let guest = Guest::with_memory(HOSTILE_MEMORY);
        let device: Box<dyn VirtioDevice> = Box::new(Fs::new(&spec).unwrap());
        let (mut drivers, activation) = guest.activation(&[16, 16], 0);
        for at in (0x8000..0x10000).step_by(noise.len()) {
            guest.write(at, &noise);
        }
        let Ok(mut device) = device.activate(activation) else {
            panic!("a share activates");
        };
        for (index, ring) in rings.iter().enumerate() {
            drivers[index].corrupt(ring);
            // The rules may have been broken; then the transport resets the device.
            drop(device.notify(index));
        }
        device.pause();
        drop(device.reset());
    }
}
