//! The user network: the guest and programs of the host reach each other.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use firn::Machine;
use firn_tests::{noise, with_machines};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// The size of what is transferred: odd, so that nothing comes out even.
const TRANSFER: usize = 100 << 20 | 1;

async fn output(machine: &Machine, command: &str) -> String {
    machine.succeed(&[command], None).await.unwrap().trim().to_owned()
}

/// A server of the host that answers every request by HTTP/1.0 with `data`. Returns its port.
fn serve(data: Vec<u8>) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
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
fn fetch(port: u16, path: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let body = answer.windows(4).position(|part| part == b"\r\n\r\n").expect("a header") + 4;
    answer.split_off(body)
}

#[test]
fn the_first_card_leads_to_the_host_and_back() {
    with_machines("[nodes.m]\nmemory_size = 768", async |driver| {
        let machine = &driver.machines()[0];
        let address =
            output(machine, "ip -4 -o addr show eth0; cat /sys/class/net/eth0/address").await;
        assert!(address.contains("10.0.2.15/24"), "{address}");
        assert!(address.ends_with("52:54:00:12:34:56"), "{address}");
        assert_eq!(output(machine, "cat /sys/class/net/eth1/address").await, "52:54:00:12:01:01");
        machine.succeed(&["ping -c 1 -W 5 10.0.2.2"], None).await.unwrap();

        let data = noise(TRANSFER);
        std::fs::write(machine.shared_dir().join("expected"), &data).unwrap();
        let port = serve(data.clone());
        let times = output(
            machine,
            &format!(
                "now() {{ cut -d ' ' -f 1 /proc/uptime; }}; start=$(now); \
                 wget -q -O /tmp/data http://10.0.2.2:{port}/; echo $start $(now)"
            ),
        )
        .await;
        output(machine, "cmp /tmp/data /tmp/shared/expected").await;
        eprintln!("figure: {TRANSFER} bytes from the host: {times}");

        output(machine, "httpd -p 80 -h /tmp >/dev/null 2>&1").await;
        let port = machine.forward_port(0, 80).await.unwrap();
        let began = std::time::Instant::now();
        let got = tokio::task::spawn_blocking(move || fetch(port, "/data")).await.unwrap();
        eprintln!("figure: {TRANSFER} bytes from the guest: {:?}", began.elapsed());
        assert!(got == data, "{} of {TRANSFER} bytes, or others", got.len());
    });
}
