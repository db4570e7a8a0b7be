//! Sockets between programs of host and guest.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use firn::Driver;
use firn_tests::{PATIENCE, connect_to_vsock, install_vsock_peer, with_machines};

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0]).collect()
}

/// Runs `script` with a machine that has `vsock-peer` and a vsock device with this socket.
fn with_vsock(script: impl AsyncFnOnce(&Driver, PathBuf)) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let nodes = format!("[nodes.m]\nvsock = {{ cid = 42, socket = {socket:?} }}");
    with_machines(&nodes, async |driver| {
        install_vsock_peer(&driver.machines()[0], env!("CARGO_BIN_EXE_vsock-peer")).await;
        script(driver, socket.clone()).await;
    });
    assert!(!socket.exists(), "the socket goes with the machine");
}

/// Sends `data`, closes that direction, and gives what comes back.
fn exchange(mut stream: UnixStream, data: Vec<u8>) -> JoinHandle<Vec<u8>> {
    let mut writer = stream.try_clone().unwrap();
    thread::spawn(move || {
        let sending = thread::spawn(move || {
            writer.write_all(&data).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        sending.join().unwrap();
        back
    })
}

#[test]
fn the_host_talks_to_a_program_in_the_guest() {
    with_vsock(async |driver, socket| {
        let machine = &driver.machines()[0];
        let (_, answer) = connect_to_vsock(&socket, 5000);
        assert_eq!(answer, "", "nobody listens there yet");
        let start = "mkfifo /tmp/up; vsock-peer echo 5000 >/tmp/up 2>/dev/null </dev/null & \
                     read -r line </tmp/up; echo $line";
        assert_eq!(machine.succeed(&[start], None).await.unwrap().trim(), "ready");

        let (stream, answer) = connect_to_vsock(&socket, 5000);
        assert!(answer.starts_with("OK "), "{answer:?}");
        let data = pattern(8 << 20);
        assert!(exchange(stream, data.clone()).join().unwrap() == data);

        // Many at once, each with its own data.
        let many: Vec<_> = (0..20)
            .map(|n| {
                let data = pattern(20_000 + n);
                (exchange(connect_to_vsock(&socket, 5000).0, data.clone()), data)
            })
            .collect();
        for (back, data) in many {
            assert!(back.join().unwrap() == data);
        }
    });
}

#[test]
fn a_program_in_the_guest_talks_to_the_host() {
    with_vsock(async |driver, socket| {
        let machine = &driver.machines()[0];
        // Refused at once where nobody listens, on the host and elsewhere.
        for cid in [2, 43] {
            let command = format!("timeout 30 vsock-peer connect {cid} 1234 </dev/null 2>&1");
            let told = machine.fail(&[&command], None).await.unwrap();
            assert!(told.contains("ConnectionReset"), "{told}");
        }
        let mut path = socket.into_os_string();
        path.push("_1234");
        let listener = UnixListener::bind(path).unwrap();
        let echo = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut data = Vec::new();
            stream.read_to_end(&mut data).unwrap();
            stream.write_all(&data).unwrap();
            data.len()
        });
        let command = "head -c 3000000 /dev/urandom >/tmp/a; \
                       vsock-peer connect 2 1234 </tmp/a >/tmp/b; cmp /tmp/a /tmp/b && echo same";
        assert_eq!(machine.succeed(&[command], None).await.unwrap().trim(), "same");
        assert_eq!(echo.join().unwrap(), 3_000_000);
    });
}
