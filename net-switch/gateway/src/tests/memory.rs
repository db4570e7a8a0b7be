//! What is left of many connections.

use std::process::Command;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::Socket;

use super::*;

const COUNT: usize = 1000;
/// What the host sends on each.
const SENT: usize = 512 << 10;
/// What a first round may leave, in KiB: small pieces that the allocator keeps for the next one.
const KEPT: u64 = 8 << 10;
/// What further rounds may leave: nothing, but counting is not exact.
const NOISE: u64 = 1 << 10;

/// Further rounds of which one has to leave nothing.
const MOST_ROUNDS: usize = 5;

/// Memory is counted for a whole process, so this runs in one of its own.
#[test]
fn connections_that_have_ended_give_all_memory_back() {
    let mut test = Command::new(std::env::current_exe().unwrap());
    test.args(["--ignored", "--exact", "--nocapture"]);
    let output = test.arg("tests::memory::many_full_connections").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "connections_that_have_ended_give_all_memory_back runs it in a process of its own"]
fn many_full_connections() {
    let mut guest = Guest::new(GatewaySpec::default());
    let (host, address) = listener();
    // What guest and test need is there before.
    let sockets: Vec<_> = (0..COUNT).map(|_| guest.tcp(2048)).collect();
    let warm = guest.connect(address).unwrap();
    drop(host.accept().unwrap());
    guest.receive(warm);
    guest.close(warm);
    settles(&mut guest);

    let before = resident();
    let (during, after) = round(&mut guest, &sockets, &host, address);
    println!("{COUNT} connections: {before} KiB before, {during} during, {after} after");
    assert!(during > before + (64 << 10));
    assert!(after < before + KEPT);
    // It may take a few rounds until what the allocator keeps is enough; what is lost would be lost
    // in each of them.
    let mut last = after;
    let settled = (0..MOST_ROUNDS).any(|_| {
        let (_, again) = round(&mut guest, &sockets, &host, address);
        println!("as many again: {again} KiB after");
        std::mem::replace(&mut last, again) + NOISE > again
    });
    assert!(settled);
}

/// Opens all connections, fills their buffers and ends them. Returns what the process has in memory when they are full,
/// and in the end.
fn round(
    guest: &mut Guest,
    sockets: &[SocketHandle],
    host: &TcpListener,
    address: SocketAddr,
) -> (u64, u64) {
    let mut connect = |socket: &_| {
        guest.connect_by(*socket, address);
        host.accept().unwrap().0
    };
    let mut streams: Vec<_> = sockets.iter().map(&mut connect).collect();
    assert_eq!(guest.gateway().stats().connections, COUNT);
    // The guest does not read, so this stays in buffers, the system's or the gateway's.
    let data = vec![1; SENT];
    for stream in &mut streams {
        stream.set_nonblocking(true).unwrap();
        let _ = stream.write(&data).unwrap();
    }
    guest.until(|_| Some(()));
    // No event tells when the gateway has taken all that it has room for.
    let mut during = 0;
    while resident() > during {
        during = resident();
        thread::sleep(Duration::from_millis(100));
    }
    drop((streams, data));
    for socket in sockets {
        guest.socket::<Socket>(*socket).abort();
    }
    settles(guest);
    (during, resident())
}

#[track_caller]
fn settles(guest: &mut Guest) {
    let gateway = Arc::clone(&guest.cable.gateway);
    guest.until(|_| (gateway.stats() == GatewayStats::default()).then_some(()));
}

/// What this process has in memory, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
