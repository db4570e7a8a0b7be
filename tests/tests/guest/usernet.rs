//! The user network: the guest and programs of the host reach each other.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use firn::Machine;
use firn_tests::{noise, with_machines};
use sha2::{Digest, Sha256};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

async fn output(machine: &Machine, command: &str) -> String {
    machine.succeed(&[command], None).await.unwrap().trim().to_owned()
}

/// A port of the host's loopback.
fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A server of the host that answers every request by HTTP/1.0 with `data`. Returns its port.
fn serve(data: Vec<u8>) -> u16 {
    let (listener, port) = listener();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).unwrap();
            write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", data.len()).unwrap();
            stream.write_all(&data).unwrap();
        }
    });
    port
}

/// Fetches a file from a server on a port of the host.
async fn fetch(port: u16, path: &'static str) -> Vec<u8> {
    let fetch = move || {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let body = answer.windows(4).position(|part| part == b"\r\n\r\n").expect("a header") + 4;
        answer.split_off(body)
    };
    tokio::task::spawn_blocking(fetch).await.unwrap()
}

#[test]
fn the_first_card_leads_to_the_host_and_back() {
    with_machines("[nodes.m]\n[nodes.off]\nuser_network = false", async |driver| {
        driver.start_all().await.unwrap();
        let [machine, off] = driver.machines() else { panic!("two machines") };
        let address =
            output(machine, "ip -4 -o addr show eth0; cat /sys/class/net/eth0/address").await;
        assert!(address.contains("10.0.2.15/24"), "{address}");
        assert!(address.ends_with("52:54:00:12:34:56"), "{address}");
        let cards = "cd /sys/class/net; for card in eth*; do echo $card $(cat $card/address); done";
        assert_eq!(output(off, cards).await, "eth1 52:54:00:12:01:02");
        output(machine, "ping -c 1 -W 5 10.0.2.2 && ping -c 1 -W 5 off").await;
        errors_arrive(machine).await;
        off.forward_port(0, 80).await.unwrap_err();
        a_pause_does_no_harm(machine).await;

        // Only the first test network's cable is pulled.
        machine.block();
        let data = noise(1 << 20 | 1);
        let port = serve(data.clone());
        output(machine, &format!("wget -q -O /tmp/data http://10.0.2.2:{port}/")).await;
        output(machine, "cp /tmp/data /tmp/shared/data; httpd -p 80 -h /tmp >/dev/null 2>&1").await;
        assert!(fs::read(machine.shared_dir().join("data")).unwrap() == data);
        let port = machine.forward_port(0, 80).await.unwrap();
        assert!(fetch(port, "/data").await == data);
        let error = machine.forward_port(port, 80).await.unwrap_err();
        assert!(firn::error::chain(&error).contains(&port.to_string()), "{error}");
        machine.shutdown().await.unwrap();
        // Free again.
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    });
}

async fn errors_arrive(machine: &Machine) {
    let began = Instant::now();
    let (closed, port) = listener();
    drop(closed);
    machine.fail(&[&format!("nc 10.0.2.2 {port} </dev/null")], None).await.unwrap();
    machine.fail(&["nc 10.0.2.77 80 </dev/null"], None).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

/// A pause longer than what TCP waits before it sends again.
const PAUSE: Duration = Duration::from_millis(1500);

async fn a_pause_does_no_harm(machine: &Machine) {
    let (host, port) = listener();
    let (data, half) = (noise(4 << 20), 2 << 20);
    let expected = Sha256::digest(&data);
    let (tell, begun) = tokio::sync::oneshot::channel();
    let server = thread::spawn(move || {
        let (mut stream, _) = host.accept().unwrap();
        stream.write_all(&data[..half]).unwrap();
        tell.send(()).unwrap();
        // Blocks when all buffers are full, until the guest goes on.
        stream.write_all(&data[half..]).unwrap();
    });
    let fetch = format!("nc 10.0.2.2 {port} </dev/null | sha256sum");
    let (sum, ()) = tokio::join!(output(machine, &fetch), async {
        begun.await.unwrap();
        machine.send_monitor_command("stop").await.unwrap();
        tokio::time::sleep(PAUSE).await;
        machine.send_monitor_command("cont").await.unwrap();
    });
    assert_eq!(sum.split(' ').next(), Some(hex(&expected).as_str()));
    server.join().unwrap();
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_guest_that_restarts_leaves_nothing_behind() {
    with_machines("[nodes.m]", async |driver| {
        let machine = &driver.machines()[0];
        machine.start(true).await.unwrap();
        let (host, port) = listener();
        let hold = format!("(sleep 1000 | nc 10.0.2.2 {port}) >/dev/null 2>&1 &");
        let held = thread::spawn(move || {
            let (mut stream, _) = host.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let end = stream.read(&mut [0]).map_err(|error| error.kind());
            (end, host)
        });
        output(machine, &hold).await;
        let forwarded = machine.forward_port(0, 80).await.unwrap();
        machine
            .execute("reboot -f", firn::ExecOptions { check_return: false, ..Default::default() })
            .await
            .ok();
        let (end, host) = tokio::task::spawn_blocking(|| held.join().unwrap()).await.unwrap();
        assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
        // What is forwarded stays so.
        output(machine, "echo again > /tmp/word; httpd -p 80 -h /tmp >/dev/null 2>&1").await;
        assert_eq!(fetch(forwarded, "/word").await, b"again\n");
        let server = thread::spawn(move || host.accept().unwrap().0.write_all(b"hello\n").unwrap());
        assert_eq!(output(machine, &format!("nc 10.0.2.2 {port} </dev/null")).await, "hello");
        server.join().unwrap();
    });
}
