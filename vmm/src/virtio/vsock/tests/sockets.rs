//! The socket's file, and the device's life.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::socket::SocketError;

fn failure(spec: &VsockSpec) -> VsockError {
    Vsock::new(spec).err().expect("no device")
}

fn spec(dir: &TempDir) -> VsockSpec {
    VsockSpec { cid: u64::from(CID).try_into().unwrap(), socket: dir.path().join("vsock") }
}

#[test]
fn the_file_is_the_users_own_and_goes_with_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let device = vsock(&dir);
    let mode = std::fs::metadata(dir.path().join("vsock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    drop(device);
    assert!(!dir.path().join("vsock").exists());
}

#[test]
fn anothers_file_stays() {
    let dir = tempfile::tempdir().unwrap();
    let device = vsock(&dir);
    let path = dir.path().join("vsock");
    std::fs::rename(&path, dir.path().join("old")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(device);
    assert!(path.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(&dir);
    drop(UnixListener::bind(&spec.socket).unwrap());
    assert!(spec.socket.exists());
    let device = Vsock::new(&spec).unwrap();
    assert!(matches!(failure(&spec), VsockError::Socket(SocketError::InUse { .. })));
    drop(device);

    std::fs::write(&spec.socket, "precious").unwrap();
    assert!(matches!(failure(&spec), VsockError::Socket(SocketError::NotASocket { .. })));
    assert_eq!(std::fs::read(&spec.socket).unwrap(), b"precious");
}

#[test]
fn what_cannot_be_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for path in ["no/such/dir", &"x".repeat(120)] {
        let socket = dir.path().join(path);
        let error = failure(&VsockSpec { socket: socket.clone(), ..spec(&dir) });
        let expected = format!("cannot listen at socket {}", socket.display());
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn the_guest_reads_its_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = [0xff; 10];
    vsock(&dir).read_config(0, &mut config);
    assert_eq!(config, [7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn it_needs_its_queues() {
    for missing in 0..QUEUES {
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::new();
        let (_, mut activation) = guest.activation(&SIZES, 0);
        activation.queues[missing] = None;
        let (_, error) = Box::new(vsock(&dir)).activate(activation).err().unwrap();
        assert!(matches!(error, DeviceError::Queue { index, .. } if index == missing));
    }
}

#[test]
fn clients_wait_for_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let device = vsock(&dir);
    let mut client = UnixStream::connect(dir.path().join("vsock")).unwrap();
    client.write_all(b"CONNECT 3\n").unwrap();
    let guest = Guest::new();
    let (mut drivers, activation) = guest.activation(&SIZES, 0);
    drivers[RECEIVE].add(&[Part::Write(100)]);
    // One buffer for header and data, as Linux has it since 6.2.
    let mut device = Box::new(device).activate(activation).ok().unwrap();
    device.host_event().unwrap();
    let used = drivers[RECEIVE].used().unwrap();
    let request = Header::from_bytes(used.data.as_slice().try_into().unwrap());
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 3));
}

#[test]
fn a_reset_closes_everything_and_the_device_works_again() {
    let mut peer = Peer::new(16);
    let (mut client, _) = peer.connected(22);
    let inactive = peer.device.take().unwrap().reset();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);

    let (drivers, activation) = peer.guest.activation(&SIZES, 0);
    peer.drivers = drivers;
    peer.device = Some(inactive.activate(activation).ok().unwrap());
    peer.device().host_event().unwrap();
    peer.drivers[EVENTS].add(&[Part::Write(4)]);
    peer.device().notify(EVENTS).unwrap();
    assert_eq!(peer.drivers[EVENTS].used(), None, "the driver is new, too");
    peer.fill(16);
    peer.connected(22);
}

#[test]
fn connections_do_not_outlive_a_restore_and_the_guest_is_told() {
    let mut peer = Peer::new(16);
    let (mut client, answer) = peer.connected(22);
    peer.device().pause();
    let (state, positions) = (peer.device().save(), peer.device().queue_positions());
    peer.device = None;
    assert_eq!(client.read(&mut [0]).unwrap(), 0);

    let mut restored = Box::new(vsock(&peer.dir));
    restored.restore(&state).unwrap();
    peer.ready = watch(&restored);
    let activation = peer.guest.reactivation(&peer.drivers, 0, &positions);
    let mut device = restored.activate(activation).ok().unwrap();
    device.host_event().unwrap();
    // Saved before the guest has heard of it: it is owed still.
    assert_eq!(device.save(), state);
    peer.device = Some(device);
    // A buffer that cannot take it, then one that can, then one that is not needed.
    peer.drivers[EVENTS].add(&[Part::Write(3)]);
    peer.drivers[EVENTS].add(&[Part::Write(4)]);
    peer.drivers[EVENTS].add(&[Part::Write(4)]);
    peer.device().notify(EVENTS).unwrap();
    assert_eq!(peer.drivers[EVENTS].used().unwrap().len, 0);
    assert_eq!(peer.drivers[EVENTS].used().unwrap().data, TRANSPORT_RESET.to_le_bytes());
    assert_eq!(peer.drivers[EVENTS].used(), None);
    assert_eq!(guest_interrupts(&peer), 1);

    peer.send(Header { op: op::RW, ..answer }, b"lost");
    assert_eq!(peer.packet().0.op, op::RST);
    drop(client);
    peer.connected(22);
}

fn guest_interrupts(peer: &Peer) -> u64 {
    peer.guest.interrupt.take_queue(EVENTS)
}

#[test]
fn a_device_that_never_ran_owes_nothing_after_a_restore() {
    let dir = tempfile::tempdir().unwrap();
    let state = vsock(&dir).save();
    let mut restored = vsock(&dir);
    restored.restore(&state).unwrap();
    assert!(!restored.owes_reset);
    let newer = SavedState { version: STATE_VERSION + 1, ..state };
    assert!(matches!(restored.restore(&newer), Err(RestoreError::Version { .. })));
}
