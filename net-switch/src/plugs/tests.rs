//! Plugs as programs outside make them, QEMU among them.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver as Inbox, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use tempfile::TempDir;

use super::*;
use crate::backlog::OwnedFrame;
use crate::port::{Delivery, Frame, Header, MIN_FRAME, NetPort, Receiver};
use crate::switch::SwitchPort;

/// How long anything may take on a busy host.
const LIMIT: Duration = Duration::from_secs(30);

/// A card in this process.
struct Card {
    port: SwitchPort,
    frames: Inbox<Vec<u8>>,
}

struct Taker(Mutex<Sender<Vec<u8>>>);

impl Receiver for Taker {
    fn receive(&self, frame: &Frame<'_>) -> Delivery {
        // Nobody may look at them any more.
        let _ = lock(&self.0).send(frame.to_vec());
        Delivery::Taken
    }

    fn link_changed(&self, _up: bool) {}
}

impl Card {
    fn new(switch: &Switch) -> Self {
        let port = switch.add_port("card");
        let (sender, frames) = channel();
        port.attach(Arc::new(Taker(Mutex::new(sender))));
        Self { port, frames }
    }

    fn send(&self, data: &[u8]) -> Delivery {
        let frame = OwnedFrame { header: Header::default(), data: data.to_vec() };
        let mut frame = frame;
        frame.lend(|frame| self.port.send(frame))
    }

    #[track_caller]
    fn receive(&self) -> Vec<u8> {
        self.frames.recv_timeout(LIMIT).expect("a frame comes")
    }

    /// Sends a frame until something comes back: whoever answers may not be plugged in yet.
    #[track_caller]
    fn send_until_heard(&self, frame: &[u8], by: &Self) -> Vec<u8> {
        for _ in 0..600 {
            self.send(frame);
            match by.frames.recv_timeout(Duration::from_millis(50)) {
                Ok(got) => return got,
                Err(RecvTimeoutError::Timeout) => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("nothing comes through");
    }
}

/// A broadcast of card `from` with `len` bytes of payload.
fn frame(from: u8, len: usize) -> Vec<u8> {
    let mut frame = [[0xff; 6], [0x52, 0x54, 0, 0x12, 1, from]].concat();
    frame.extend([0x88, 0xb5]);
    frame.resize(14 + len, from);
    frame
}

fn vlan() -> (TempDir, Switch, PlugDir) {
    let dir = tempfile::tempdir().unwrap();
    let switch = Switch::new("vlan1");
    let plugs = PlugDir::open(dir.path().join("v"), &switch).unwrap();
    (dir, switch, plugs)
}

/// A VDE plug, made as libvdeplug does it.
struct Plug {
    control: UnixStream,
    data: UnixDatagram,
}

impl Plug {
    fn new(dir: &Path, number: u32) -> Self {
        let mut control = UnixStream::connect(dir.join(CONTROL)).unwrap();
        let path = dir.join(format!(".{number:05}-00000"));
        let data = UnixDatagram::bind(&path).unwrap();
        control.write_all(&vde::tests::request(0, &path, "a test")).unwrap();
        let mut answer = [0; 110];
        control.read_exact(&mut answer).unwrap();
        let end = answer.iter().skip(2).position(|&byte| byte == 0).unwrap() + 2;
        data.connect(std::str::from_utf8(&answer[2..end]).unwrap()).unwrap();
        data.set_read_timeout(Some(LIMIT)).unwrap();
        Self { control, data }
    }

    fn receive(&self) -> Vec<u8> {
        let mut buffer = vec![0; 70_000];
        let len = self.data.recv(&mut buffer).unwrap();
        buffer.truncate(len);
        buffer
    }
}

/// Waits until the directory holds only the sockets of the switch itself.
#[track_caller]
fn wait_until_empty(dir: &Path) {
    let mut names = Vec::new();
    for _ in 0..3000 {
        names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        if names.len() == 3 {
            return;
        }
        // Nothing tells when a name is gone.
        thread::sleep(Duration::from_millis(10));
    }
    panic!("left behind: {names:?}");
}

#[test]
fn a_vde_plug_exchanges_frames_and_leaves_nothing() {
    let (_dir, switch, plugs) = vlan();
    let card = Card::new(&switch);
    let (one, two) = (Plug::new(plugs.path(), 1), Plug::new(plugs.path(), 2));
    for len in [0, 46, MTU, MTU + 8] {
        assert_eq!(card.send(&frame(9, len)), Delivery::Taken);
        assert_eq!(one.receive(), frame(9, len));
        assert_eq!(two.receive(), frame(9, len));
        one.data.send(&frame(1, len)).unwrap();
        assert_eq!(card.receive(), frame(1, len));
        assert_eq!(two.receive(), frame(1, len), "from one plug to the other");
    }
    card.send(&frame(9, MTU + 9));
    card.send(&frame(9, 1));
    assert_eq!(one.receive(), frame(9, 1), "what is too long is dropped");
    let stats = plugs.plugs();
    assert_eq!(stats.len(), 2);
    assert!(stats.iter().all(|plug| plug.name == "a test" && plug.dropped == 1), "{stats:?}");
    // The one says goodbye, the other is killed: its own name stays.
    one.data.send(&[]).unwrap();
    drop(one);
    drop(two);
    wait_until_empty(plugs.path());
    assert!(plugs.plugs().is_empty());
    card.send(&frame(9, 1));
    let path = plugs.path().to_owned();
    let _third = Plug::new(&path, 3);
    drop(plugs);
    assert!(!path.exists());
}

#[test]
fn what_cards_leave_to_others_is_done_for_plugs() {
    let (_dir, switch, plugs) = vlan();
    let card = Card::new(&switch);
    let plug = Plug::new(plugs.path(), 1);
    let payload: Vec<u8> = (0..=255).cycle().take(60_000).collect();
    let mut data = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(1, 2, 1000, 500)
        .write(&mut data, &payload)
        .unwrap();
    // Nobody has computed it.
    data[50..52].copy_from_slice(&[0xab, 0xcd]);
    let header = Header {
        flags: Header::NEEDS_CSUM,
        gso_type: Header::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1460,
        csum_start: 34,
        csum_offset: 16,
    };
    let mut frame = OwnedFrame { header, data };
    assert_eq!(frame.lend(|frame| card.port.send(frame)), Delivery::Taken);
    let mut got: Vec<u8> = Vec::new();
    while got.len() < payload.len() {
        let bytes = plug.receive();
        assert!(bytes.len() <= MIN_FRAME + MTU);
        let sliced = SlicedPacket::from_ethernet(&bytes).unwrap();
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) =
            (sliced.net, sliced.transport)
        else {
            panic!("no TCP");
        };
        let (source, destination) = (ip.header().source(), ip.header().destination());
        assert_eq!(tcp.checksum(), tcp.calc_checksum_ipv4(source, destination).unwrap());
        got.extend(tcp.payload());
    }
    assert!(got == payload);
}

#[test]
fn a_stream_is_cut_into_frames() {
    let (_dir, switch, plugs) = vlan();
    let card = Card::new(&switch);
    let mut stream = UnixStream::connect(plugs.path().join(STREAM)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let framed =
        |frame: &[u8]| [&u32::try_from(frame.len()).unwrap().to_be_bytes(), frame].concat();
    let both = [framed(&frame(1, 100)), framed(&frame(1, MTU))].concat();
    let (first, second) = both.split_at(50);
    stream.write_all(first).unwrap();
    stream.write_all(second).unwrap();
    assert_eq!((card.receive(), card.receive()), (frame(1, 100), frame(1, MTU)));
    card.send(&frame(9, 7));
    let mut got = vec![0; 4 + 14 + 7];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, framed(&frame(9, 7)));
    // What is no such stream ends.
    stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
}

#[test]
fn datagrams_are_answered_where_they_come_from() {
    let (dir, switch, plugs) = vlan();
    let card = Card::new(&switch);
    let own = UnixDatagram::bind(dir.path().join("own")).unwrap();
    own.set_read_timeout(Some(LIMIT)).unwrap();
    own.send_to(&frame(1, 60), plugs.path().join(DATAGRAMS)).unwrap();
    assert_eq!(card.receive(), frame(1, 60));
    card.send(&frame(9, 60));
    let mut buffer = [0; 2000];
    let len = own.recv(&mut buffer).unwrap();
    assert_eq!(buffer[..len], frame(9, 60));
}

#[test]
fn who_sends_garbage_floods_or_never_reads_costs_nobody_else() {
    let (_dir, switch, plugs) = vlan();
    let card = Card::new(&switch);
    let other = Card::new(&switch);
    for garbage in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 256]] {
        let mut control = UnixStream::connect(plugs.path().join(CONTROL)).unwrap();
        control.write_all(garbage).unwrap();
        control.shutdown(std::net::Shutdown::Write).unwrap();
        control.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(control.read(&mut [0]).unwrap_or(0), 0, "it is closed");
    }
    let mute = Plug::new(plugs.path(), 1);
    let _mute_stream = UnixStream::connect(plugs.path().join(STREAM)).unwrap();
    for _ in 0..5000 {
        card.send(&frame(9, MTU));
        assert_eq!(other.receive(), frame(9, MTU));
    }
    let stats = plugs.plugs();
    let dropped = stats.iter().find(|plug| plug.name == "a test").unwrap().dropped;
    assert!(dropped >= 5000 - 1000, "{dropped}");
    // A flood of its own is served in turns.
    mute.data.set_nonblocking(true).unwrap();
    for _ in 0..5000 {
        let _ = mute.data.send(&frame(1, 10));
    }
    let late = Plug::new(plugs.path(), 2);
    late.data.send(&frame(2, 10)).unwrap();
    while card.receive() != frame(2, 10) {}
    assert!(mute.control.peer_addr().is_ok());
}

#[test]
fn a_directory_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let switch = Switch::new("vlan1");
    let long = dir.path().join("x".repeat(100));
    let error = PlugDir::open(&long, &switch).unwrap_err().to_string();
    assert!(error.contains("at most 92") && error.contains("xxx"), "{error}");
    assert!(!long.exists());
    let there = dir.path().join("there");
    fs::create_dir(&there).unwrap();
    let error = PlugDir::open(&there, &switch).unwrap_err().to_string();
    assert!(error.starts_with("cannot make directory"), "{error}");
    assert!(there.exists(), "it is not ours");
}

/// QEMU without a machine, whose hub joins two networks.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_plugs_in_by_each_of_its_ways() {
    for way in ["stream", "dgram"] {
        let ((dir, left, left_plugs), (_dir, right, right_plugs)) = (vlan(), vlan());
        let (a, b) = (Card::new(&left), Card::new(&right));
        let second = match way {
            "stream" => format!(
                "stream,id=b,server=off,addr.type=unix,addr.path={}",
                right_plugs.path().join(STREAM).display()
            ),
            _ => format!(
                "dgram,id=b,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                dir.path().join("own").display(),
                right_plugs.path().join(DATAGRAMS).display()
            ),
        };
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "none", "-nodefaults", "-display", "none", "-netdev"])
            .arg(format!("vde,id=a,sock={}", left_plugs.path().display()))
            .args(["-netdev", "hubport,id=p,hubid=1,netdev=a", "-netdev", &second])
            .args(["-netdev", "hubport,id=q,hubid=1,netdev=b"])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86 is installed (.ci/setup)");
        let qemu = Qemu(qemu);
        assert_eq!(a.send_until_heard(&frame(1, 100), &b), frame(1, 100), "vde to {way}");
        assert_eq!(b.send_until_heard(&frame(2, MTU), &a), frame(2, MTU), "{way} to vde");
        assert!(left_plugs.plugs()[0].name.starts_with("QEMU user="));
        // Killed, it leaves its own socket, which the switch removes.
        drop(qemu);
        wait_until_empty(left_plugs.path());
    }
}
