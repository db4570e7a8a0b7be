//! Drivers that keep to no rule, at each of the monitor's devices.
//!
//! A guest's driver has registers, memory and doorbells. What it does with them is made up: register accesses of any
//! kind and order, chains that are right or nearly so, loops, buffers outside memory, and resets in the middle of it.
//! The host's side sends something now and then. In the end the device must serve a driver that does it right.

mod rig;
#[path = "../../../src/ring.rs"]
mod ring;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use bolero::check;
use firn_net_switch::{Header, NetPort, OwnedFrame, Switch};
use firn_vmm::Cancel;
use firn_vmm::memory::window::Windows;
use firn_vmm::spec::{
    CachePolicy, ConsolePortSpec, DiskFormat, DiskMib, DiskSpec, Mac, NetSpec, ScreenSpec,
    ShareSpec, VsockSpec,
};
use firn_vmm::virtio::VirtioDevice;
use firn_vmm::virtio::balloon::Balloon;
use firn_vmm::virtio::blk::Blk;
use firn_vmm::virtio::console::Console;
use firn_vmm::virtio::fs::Fs;
use firn_vmm::virtio::gpu::Gpu;
use firn_vmm::virtio::input::{Input, Kind};
use firn_vmm::virtio::net::Net;
use firn_vmm::virtio::pmem::Pmem;
use firn_vmm::virtio::rng::Rng;
use firn_vmm::virtio::vsock::Vsock;
use rig::{Chain, Rig, Step};

/// Inputs of an ordinary test run.
const ITERATIONS: usize = 2000;
/// The same for devices that rest on files.
const FEWER: usize = 500;

/// Runs drivers against devices that `make` gives, whose requests begin with what `request` makes of some bytes and
/// the queue's number. `outside` is what the host's side does.
fn drive<H>(
    iterations: usize,
    make: impl Fn() -> (Box<dyn VirtioDevice>, H) + std::panic::RefUnwindSafe,
    request: fn(u16, &[u8]) -> Vec<u8>,
    outside: impl Fn(&mut H, &[u8]) + std::panic::RefUnwindSafe,
) {
    let input = check!().with_iterations(iterations).with_type::<(bool, Vec<Step>)>();
    input.for_each(|(started, steps)| {
        let (device, mut host) = make();
        let mut rig = Rig::new(device, request);
        if *started {
            rig.set_up(0);
        }
        for step in steps {
            if let Some(bytes) = rig.run(step) {
                outside(&mut host, bytes);
            }
        }
        rig.still_serves();
    });
}

/// Requests that are nothing but bytes.
fn bytes(_queue: u16, bytes: &[u8]) -> Vec<u8> {
    bytes.to_vec()
}

/// The byte at `at`, below `limit`.
fn small(bytes: &[u8], at: usize, limit: u8) -> u8 {
    bytes.get(at).map_or(0, |byte| byte % limit)
}

fn rest(bytes: &[u8], from: usize) -> &[u8] {
    bytes.get(from..).unwrap_or_default()
}

#[test]
fn what_is_right_is_served() {
    let mut rig = Rig::new(Box::new(Rng::new()), bytes);
    rig.set_up(0);
    for count in 1..40 {
        rig.run(&Step::Chain(0, Chain::right(Vec::new(), 8), true));
        assert_eq!(rig.used(), count);
    }
}

#[test]
fn rng() {
    drive(ITERATIONS, || (Box::new(Rng::new()), ()), bytes, |(), _| {});
}

#[test]
fn balloon() {
    let make = || {
        let balloon = Balloon::new().expect("descriptors");
        let handle = balloon.handle();
        (Box::new(balloon) as Box<dyn VirtioDevice>, handle)
    };
    // Numbers of pages, of which the guest has 256.
    let request = |queue, bytes: &[u8]| match queue {
        0 | 1 => bytes.iter().flat_map(|page| u32::from(*page).to_le_bytes()).collect(),
        _ => bytes.to_vec(),
    };
    drive(ITERATIONS, make, request, |handle, bytes| {
        handle.set_target(bytes.iter().map(|byte| u32::from(*byte)).sum());
    });
}

#[test]
fn input() {
    for kind in [Kind::Keyboard, Kind::Tablet] {
        let make = || {
            let input = Input::new(kind).expect("descriptors");
            let handle = input.handle();
            (Box::new(input) as Box<dyn VirtioDevice>, handle)
        };
        drive(ITERATIONS, make, bytes, |handle, bytes| {
            for pair in bytes.chunks(2) {
                let code = u16::from(small(pair, 0, 255));
                match small(pair, 1, 6) {
                    0 => handle.release_all(),
                    1 => handle.move_to(code * 200, code),
                    2 => handle.wheel(1),
                    what => handle.key(code + u16::from(what & 1) * 0x100, what < 5),
                }
            }
        });
    }
}

#[test]
fn gpu() {
    let make = || {
        let gpu = Gpu::new(&ScreenSpec::default()).expect("descriptors");
        let screen = gpu.screen();
        (Box::new(gpu) as Box<dyn VirtioDevice>, screen)
    };
    drive(ITERATIONS, make, gpu_request, |screen, _| {
        if let Some(picture) = screen.picture() {
            let pixels = u64::from(picture.width) * u64::from(picture.height);
            assert_eq!(picture.rgb.len() as u64, 3 * pixels);
        }
    });
}

/// A header with a fence (virtio 1.2, 5.7.6.7), and words that are small: numbers of resources, places and sizes. Some
/// are larger, and entries of a resource's memory are where the guest has some.
fn gpu_request(_queue: u16, bytes: &[u8]) -> Vec<u8> {
    const FIRST: u16 = 0x100;
    const KINDS: u8 = 14;
    let kind = u32::from(FIRST + u16::from(small(bytes, 0, KINDS)));
    let mut request = [kind, 1, 7, 0, 0, 0].map(u32::to_le_bytes).concat();
    for word in rest(bytes, 1) {
        let word = match u32::from(*word) {
            small @ 0..=199 => small % 6,
            // Formats.
            word @ 200..=215 => word - 80,
            // Sizes, and places in memory.
            word @ 216..=250 => (word - 215) << 8,
            word => u32::MAX - word,
        };
        request.extend(word.to_le_bytes());
    }
    request
}

#[test]
fn console() {
    let make = || {
        let names = [None, Some("org.firn.agent".to_owned())];
        let ports = names.map(|name| ConsolePortSpec { name });
        let (ours, theirs): (Vec<_>, Vec<_>) =
            ports.iter().map(|_| UnixStream::pair().expect("descriptors")).unzip();
        for end in ours.iter().chain(&theirs) {
            end.set_nonblocking(true).expect("it is a socket");
        }
        let console =
            Console::new(ports.into_iter().zip(theirs).collect()).expect("ports that are right");
        (Box::new(console) as Box<dyn VirtioDevice>, ours)
    };
    // Of a control message: the port, what of it, and a value (virtio 1.2, 5.3.6.2).
    let request = |queue, bytes: &[u8]| match queue {
        3 => [small(bytes, 0, 3), 0, 0, 0, small(bytes, 1, 9), 0, small(bytes, 2, 2), 0].to_vec(),
        _ => bytes.to_vec(),
    };
    drive(ITERATIONS, make, request, |ends, bytes| {
        let at = usize::from(small(bytes, 0, 2));
        if bytes.len() % 8 == 7 {
            ends.truncate(at);
        } else if let Some(end) = ends.get_mut(at) {
            // It is full when the guest does not read.
            let _ = end.write(bytes);
        }
    });
}

#[test]
fn net() {
    let make = || {
        let switch = Switch::new("fuzz");
        let (card, other) = (switch.add_port("guest"), switch.add_port("other"));
        let spec = NetSpec { mac: Mac([0x52, 0x54, 0, 0x12, 1, 1]) };
        let net = Net::new(&spec, Arc::new(card)).expect("descriptors");
        (Box::new(net) as Box<dyn VirtioDevice>, (switch, other))
    };
    // A header (virtio 1.2, 5.1.6) and the start of a frame to everybody.
    let request = |_, bytes: &[u8]| {
        let mut frame =
            vec![small(bytes, 0, 4), small(bytes, 1, 6), small(bytes, 2, 100), 0, 100, 0];
        frame.extend([small(bytes, 3, 60), 0, small(bytes, 4, 60), 0, 0, 0]);
        frame.extend([0xff; 6]);
        frame.extend([0x52, 0x54, 0, 0x12, 1, 1, 0x08, 0]);
        frame.extend_from_slice(rest(bytes, 5));
        frame
    };
    drive(ITERATIONS, make, request, |(_, other), bytes| {
        let data = [&[0xff; 6], &[2; 6], &[8, 0][..], bytes].concat();
        OwnedFrame { header: Header::default(), data }.lend(|frame| other.send(frame));
    });
}

#[test]
fn vsock() {
    const CID: u8 = 3;
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("vsock");
    let make = || {
        let spec =
            VsockSpec { cid: u64::from(CID).try_into().expect("in range"), socket: socket.clone() };
        let vsock = Vsock::new(&spec).expect("the place is free");
        (Box::new(vsock) as Box<dyn VirtioDevice>, Vec::new())
    };
    // Addresses, ports, length, type, operation, flags, credit (virtio 1.2, 5.10.6); the host's ports count from 2^30.
    let request = |_, bytes: &[u8]| {
        let data = rest(bytes, 6);
        let mut packet = Vec::new();
        packet.extend(u64::from(CID).to_le_bytes());
        packet.extend(2_u64.to_le_bytes());
        packet.extend(u32::from(small(bytes, 0, 4)).to_le_bytes());
        packet.extend([small(bytes, 1, 4), 0, 0, small(bytes, 2, 2) * 0x40]);
        packet.extend([u8::try_from(data.len()).unwrap_or(u8::MAX), 0, 0, 0]);
        packet.extend([1, 0, small(bytes, 3, 9), 0, small(bytes, 4, 4), 0, 0, 0]);
        packet.extend([small(bytes, 5, 255), 1, 0, 0, small(bytes, 5, 16), 0, 0, 0]);
        packet.extend_from_slice(data);
        packet
    };
    drive(FEWER, make, request, |clients: &mut Vec<UnixStream>, bytes| {
        if clients.len() < 8
            && let Ok(client) = UnixStream::connect(&socket)
        {
            client.set_nonblocking(true).expect("it is a socket");
            clients.push(client);
        }
        if bytes.len() % 8 == 7 {
            clients.clear();
        } else if let Some(client) = clients.last_mut() {
            let _ = writeln!(client, "CONNECT {}", small(bytes, 0, 4));
            let _ = client.write(bytes);
        }
    });
}

#[test]
fn fs() {
    let dir = tempfile::tempdir().expect("a directory");
    let share = dir.path().join("share");
    fs::create_dir(&share).expect("it is new");
    fs::write(share.join("file"), "text").expect("there is room");
    let spec = ShareSpec::new("fuzz".try_into().expect("a tag"), share);
    let store = ShareSpec { read_only: true, cache: CachePolicy::Always, ..spec.clone() };
    // The store's server is firn's own.
    for spec in [spec, store] {
        let make = || (Box::new(Fs::new(&spec).expect("a share")) as Box<dyn VirtioDevice>, ());
        drive(FEWER, make, fuse, |(), _| {});
    }
    let beside = fs::read_dir(dir.path()).expect("it is still there").count();
    assert_eq!(beside, 1, "something was made outside the share");
}

#[test]
fn pmem() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("file"), "text").expect("there is room");
    let spec = ShareSpec::new("fuzz".try_into().expect("a tag"), dir.path().to_owned());
    let make = || {
        let pmem =
            Pmem::new(&spec, &mut Windows::new(1 << 30, 40), &Cancel::default()).expect("an image");
        (Box::new(pmem) as Box<dyn VirtioDevice>, ())
    };
    let request = |_: u16, bytes: &[u8]| {
        let kind = u32::from(small(bytes, 0, 2)).to_le_bytes();
        [&kind, rest(bytes, 1)].concat()
    };
    drive(FEWER, make, request, |(), _| {});
}

/// A request to a file system, with the names of files that are there more often than not (linux/fuse.h).
fn fuse(_queue: u16, bytes: &[u8]) -> Vec<u8> {
    const INIT: u8 = 26;
    const HIGHEST: u8 = 53;
    let opcode = match small(bytes, 0, HIGHEST + 8) {
        opcode if opcode > HIGHEST => INIT,
        opcode => opcode,
    };
    let mut body = rest(bytes, 3).to_vec();
    match small(bytes, 2, 4) {
        0 => body.extend_from_slice(b"file\0"),
        1 => body.extend_from_slice(b"../beside\0"),
        2 if opcode == INIT => body = [7_u32, 38, 0x2_0000, 0].map(u32::to_le_bytes).concat(),
        _ => {}
    }
    let length = u32::try_from(40 + body.len()).unwrap_or(u32::MAX);
    let mut request = length.to_le_bytes().to_vec();
    request.extend(u32::from(opcode).to_le_bytes());
    request.extend(1_u64.to_le_bytes());
    // The root is 1.
    request.extend(u64::from(small(bytes, 1, 4)).to_le_bytes());
    request.extend([0; 16]);
    request.extend(body);
    request
}

/// A new disk image of 1 MiB.
fn image(dir: &Path, format: DiskFormat) -> DiskSpec {
    DiskSpec {
        image: dir.join(format!("disk.{format}")),
        format: Some(format),
        size: Some(DiskMib::MIN),
        ..DiskSpec::default()
    }
}

/// A header: kind and sector (virtio 1.2, 5.2.6), and data.
fn disk_request(_queue: u16, bytes: &[u8]) -> Vec<u8> {
    let mut request = u32::from(small(bytes, 0, 16)).to_le_bytes().to_vec();
    request.extend([0; 4]);
    let sector = u64::from(small(bytes, 1, 255)) * 10;
    request.extend(sector.to_le_bytes());
    request.extend_from_slice(rest(bytes, 2));
    request
}

#[test]
fn blk() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let dir = tempfile::tempdir().expect("a directory");
        let spec = image(dir.path(), format);
        let make = || {
            let blk = Blk::new(&spec, 2).expect("an image");
            (Box::new(blk) as Box<dyn VirtioDevice>, ())
        };
        drive(FEWER, make, disk_request, |(), _| {});
    }
}

/// qcow2 images that are damaged: refused, or served as far as they go.
#[test]
fn damaged_qcow2() {
    let dir = tempfile::tempdir().expect("a directory");
    let spec = image(dir.path(), DiskFormat::Qcow2);
    drop(Blk::new(&spec, 1).expect("it is made"));
    let whole = fs::read(&spec.image).expect("it is there");
    let input = check!().with_iterations(FEWER).with_type::<(Vec<(u8, u16, u8)>, u8, Vec<Step>)>();
    input.for_each(|(damage, cut, steps)| {
        let mut bytes = whole.clone();
        for (cluster, at, value) in damage {
            // The header and the tables are the first clusters, of 64 KiB.
            let at = usize::from(cluster % 4) * 0x1_0000 + usize::from(at % 256);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = *value;
            }
        }
        if cut % 8 == 0 {
            bytes.truncate(bytes.len() * usize::from(*cut) / 256);
        }
        fs::write(&spec.image, &bytes).expect("there is room");
        let spec = DiskSpec { size: None, ..spec.clone() };
        if let Ok(blk) = Blk::new(&spec, 1) {
            let mut rig = Rig::new(Box::new(blk), disk_request);
            rig.set_up(0);
            for step in steps {
                rig.run(step);
            }
        }
    });
}
