//! The user network: the guest and programs of the host reach each other.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use firn::Machine;
use firn_tests::{PATIENCE, noise, output, with_machines};
use nix::sys::socket::Backlog;
use nix::unistd::geteuid;
use sha2::{Digest, Sha256};

/// The size of what is transferred: odd, so that nothing comes out even.
const TRANSFER: usize = 100 << 20 | 1;
/// Connections at once.
const MANY: usize = 1000;
/// What they may leave in this process, in KiB: small pieces that the allocator keeps for the next ones.
const KEPT: u64 = 8 << 10;

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

/// Fetches a file from a server on a port of the host, with curl.
async fn fetch(port: u16, path: &str) -> Vec<u8> {
    let mut curl = tokio::process::Command::new("curl");
    // Without what the user's files and variables say.
    curl.args(["--disable", "--noproxy", "*", "--silent", "--show-error", "--fail"]);
    curl.args(["--max-time", &PATIENCE.as_secs().to_string()]);
    curl.arg(format!("http://127.0.0.1:{port}{path}"));
    let output = curl.output().await.expect("curl is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
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
        // As QEMU's monitor has it; the port was free a moment ago.
        let free = listener().1;
        let add = format!("hostfwd_add net0 tcp::{free}-:80");
        machine.send_monitor_command(&add).await.unwrap();
        assert!(fetch(free, "/data").await == data);
        machine.send_monitor_command("hostfwd_add tcp::80").await.unwrap_err();
        let error = machine.forward_port(port, 80).await.unwrap_err();
        assert!(firn::error::chain(&error).contains(&port.to_string()), "{error}");
        machine.shutdown().await.unwrap();
        // Free again.
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    });
}

#[test]
fn a_machine_whose_port_is_taken_does_not_start_and_keeps_none() {
    let (_taken, port) = listener();
    let (free, other) = listener();
    drop(free);
    let forward = |port| {
        format!("[[nodes.m.user_network.forward_ports]]\nhost.port = {port}\nguest.port = 80\n")
    };
    with_machines(&format!("[nodes.m]\n{}{}", forward(other), forward(port)), async |driver| {
        let error = driver.machines()[0].start(false).await.unwrap_err();
        let text = firn::error::chain(&error);
        assert!(text.contains(&format!("TCP port {port} of 127.0.0.1")), "{text}");
        TcpListener::bind((Ipv4Addr::LOCALHOST, other)).expect("what it had got is free again");
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

async fn datagrams_go_both_ways(machine: &Machine) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let server = thread::spawn(move || {
        let mut buffer = [0; 100];
        let (length, peer) = socket.recv_from(&mut buffer).unwrap();
        socket.send_to(b"pong\n", peer).unwrap();
        buffer[..length].to_vec()
    });
    let ask = format!("exec 3<>/dev/udp/10.0.2.2/{port}; echo ping >&3; head -c 5 <&3");
    assert_eq!(output(machine, &ask).await, "pong");
    assert_eq!(server.join().unwrap(), b"ping\n");
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

/// Runs a test of this file that is marked as ignored in a network namespace where there is nothing but loopback.
fn in_a_namespace(test: &str) {
    let mut unshare = Command::new("unshare");
    // Users need a user namespace as well; root might be in a chroot, where there can be none.
    unshare.arg("--net").args((!geteuid().is_root()).then_some("--map-root-user"));
    unshare.args(["sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]);
    unshare.arg(std::env::current_exe().unwrap());
    unshare.args(["--ignored", "--exact", "--nocapture", test]);
    let output = unshare.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    text.lines().filter(|line| line.starts_with("figure: ")).for_each(|line| eprintln!("{line}"));
}

/// How many connections hang, and how long a new one may take meanwhile: far less than they do.
const HANGING: usize = 600;
const SOON: Duration = Duration::from_secs(20);

#[test]
fn connections_that_hang_keep_no_other_from_working() {
    // With its queue full the host's kernel drops what asks for a connection.
    let (silent, dead) = listener();
    nix::sys::socket::listen(&silent, Backlog::new(0).unwrap()).unwrap();
    let _first = std::net::TcpStream::connect(silent.local_addr().unwrap()).unwrap();
    with_machines("[nodes.m]\nmemory = 512", async |driver| {
        let machine = &driver.machines()[0];
        let port = serve(b"word\n".to_vec());
        let hang = format!(
            "for i in $(seq {HANGING}); do nc 10.0.2.2 {dead} </dev/null >/dev/null 2>&1 & done"
        );
        output(machine, &hang).await;
        // All have sent what asks for a connection.
        output(machine, "until [ $(grep -c ' 02 ' /proc/net/tcp) -ge 600 ]; do sleep 1; done")
            .await;
        let began = Instant::now();
        let said = output(machine, &format!("wget -q -O - http://10.0.2.2:{port}/")).await;
        assert_eq!(said, "word");
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        let hanging = output(machine, "grep -c ' 02 ' /proc/net/tcp").await;
        assert!(hanging.parse::<usize>().unwrap() > HANGING / 2, "{hanging} still hang");
    });
}

#[test]
fn the_hosts_loopback_and_link_can_be_kept_from_a_guest() {
    let port = serve(b"word\n".to_vec());
    let nodes = "[nodes.open]\n[nodes.shut]\nuser_network.host_loopback = false";
    with_machines(nodes, async |driver| {
        let [open, shut] = driver.machines() else { panic!("two machines") };
        let fetch = format!("wget -q -O - http://10.0.2.2:{port}/ 2>&1");
        assert_eq!(output(open, &fetch).await, "word");
        shut.fail(&[&fetch], None).await.unwrap();
        // At once, and by the gateway's word: it is no network that drops what it cannot pass on.
        for machine in [open, shut] {
            let began = Instant::now();
            let metadata = "nc 169.254.169.254 80 </dev/null 2>&1";
            let said = machine.fail(&[metadata], None).await.unwrap();
            assert!(said.contains("No route to host"), "{said}");
            assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        }
    });
}

#[test]
fn it_works_on_a_host_without_a_network() {
    in_a_namespace("usernet::a_system_and_a_restricted_one");
}

#[test]
#[ignore = "it_works_on_a_host_without_a_network runs it where there is no network"]
fn a_system_and_a_restricted_one() {
    let (chosen, before) = listener();
    // Hardly anybody takes it in between, least of all in a namespace of its own.
    drop(chosen);
    let nodes = format!(
        "[nodes.open]\nkit = 'systemd'\n[[nodes.open.user_network.forward_ports]]\nhost.port = {before}\nguest.port = 80\n\
         [nodes.shut]\nuser_network.restrict = true"
    );
    with_machines(&nodes, async |driver| {
        driver.start_all().await.unwrap();
        let [open, shut] = driver.machines() else { panic!("two machines") };
        has_its_lease_when_online(open).await;
        let data = noise(TRANSFER);
        let port = serve(data.clone());
        fetches_from_the_host(open, port, &data).await;
        for port in [before, open.forward_port(0, 80).await.unwrap()] {
            let got = fetch(port, "/data").await;
            assert!(got == data, "{} of {TRANSFER} bytes, or others", got.len());
        }
        datagrams_go_both_ways(open).await;
        no_names_without_a_network(open).await;
        many_connections(open).await;

        shut.fail(&[&format!("wget -q -O - http://10.0.2.2:{port}/")], None).await.unwrap();
        // Nobody asks for it, so nobody says that it cannot be found out.
        let said = shut.fail(&["nslookup name.example 10.0.2.3 2>&1"], None).await.unwrap();
        assert!(!said.contains("SERVFAIL"), "{said}");
        output(shut, "echo inside > /tmp/word; httpd -p 80 -h /tmp >/dev/null 2>&1").await;
        let port = shut.forward_port(0, 80).await.unwrap();
        assert_eq!(fetch(port, "/word").await, b"inside\n");
    });
}

async fn has_its_lease_when_online(machine: &Machine) {
    let at_once = "systemctl start network-online.target && ip -4 -o addr show eth0 && ip route";
    let state = output(machine, at_once).await;
    assert!(state.contains("10.0.2.15/24"), "{state}");
    assert!(state.contains("default via 10.0.2.2 dev eth0 proto dhcp"), "{state}");
}

async fn fetches_from_the_host(machine: &Machine, port: u16, data: &[u8]) {
    output(machine, "mkdir /tmp/web").await;
    let fetch = format!("curl -sS -o /tmp/web/data http://10.0.2.2:{port}/");
    output(machine, &fetch).await;
    let sum = output(machine, "sha256sum </tmp/web/data").await;
    assert_eq!(sum.split(' ').next(), Some(hex(&Sha256::digest(data)).as_str()));
    output(machine, "systemd-run -q python3 -m http.server 80 -d /tmp/web").await;
    machine.wait_for_open_port(80, "localhost", PATIENCE).await.unwrap();
}

/// There is nobody to ask, and that is said at once.
async fn no_names_without_a_network(machine: &Machine) {
    let began = Instant::now();
    machine.fail(&["getent hosts name.example"], None).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

/// Opens them all, then says a number on each and reads it back.
const OPEN_MANY: &str = r#"
ulimit -n 4096
fds=()
for i in $(seq MANY); do
  exec {fd}<>/dev/tcp/10.0.2.2/PORT
  fds+=("$fd")
  echo "$i" >&"$fd"
done
sum=0
for fd in "${fds[@]}"; do
  read -r number <&"$fd"
  sum=$((sum + number))
  exec {fd}>&-
done
echo "$sum"
"#;

async fn many_connections(machine: &Machine) {
    let before = own_memory();
    let (host, port) = listener();
    let server = serve_many(host);
    let script = OPEN_MANY.replace("MANY", &MANY.to_string()).replace("PORT", &port.to_string());
    let sum = output(machine, &script).await;
    assert_eq!(sum, (MANY * (MANY + 1) / 2).to_string());
    let during = tokio::task::spawn_blocking(|| server.join().unwrap()).await.unwrap();
    // The gateway hears of the last ends a moment later.
    let began = Instant::now();
    while own_memory() > before + KEPT {
        let now = own_memory();
        assert!(began.elapsed() < PATIENCE, "{before} KiB before, {now} KiB after");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let after = own_memory();
    eprintln!(
        "figure: {MANY} connections: {before} KiB before, {during} KiB during, {after} KiB after"
    );
}

/// Takes all connections before it answers any. Returns what the process has in memory then.
fn serve_many(host: TcpListener) -> JoinHandle<u64> {
    thread::spawn(move || {
        let streams: Vec<_> = (0..MANY).map(|_| host.accept().unwrap().0).collect();
        let memory = own_memory();
        for mut stream in streams {
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            stream.write_all(line.as_bytes()).unwrap();
        }
        memory
    })
}

/// What this process has in memory without that of guests, in KiB.
fn own_memory() -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let value = |line: &str| -> u64 { line.split_whitespace().nth(1).unwrap().parse().unwrap() };
    let (mut guest, mut sum) = (false, 0);
    for line in maps.lines() {
        if line.starts_with("Size:") {
            // No other mapping is nearly as large.
            guest = value(line) >= 512 << 10;
        } else if line.starts_with("Rss:") && !guest {
            sum += value(line);
        }
    }
    sum
}
