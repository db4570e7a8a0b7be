//! How fast one TCP connection of a guest goes through the user network, and through QEMU's with
//! the same kernel, guest and processor, in seconds: the best of a few rounds, which take turns, as
//! whatever else the machine does only makes them longer. What counts is the ratio of one run. With the argument `firn`
//! QEMU is left out, as an exact carrier needs it, where QEMU in QEMU hardly gets on.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use firn::kit::Kit;
use firn_gateway::{CARD_MAC, Forward, GUEST_V4, Gateway, GatewaySpec, Protocol, Side};
use firn_net_switch::NetPort;
use firn_tests::{micro, small_guest};
use firn_vmm::Cancel;
use firn_vmm::spec::{Mac, MachineSpec, NetSpec};
use firn_vmm::virtio::build::Connect;
use firn_vmm::vm::{Event, HostSide, Vm};

/// What is sent each way in a round, in bytes.
const TRANSFER: usize = 100 << 20;
const ROUNDS: usize = 4;
/// A transfer that hangs is given up.
const PATIENCE: Duration = Duration::from_secs(300);
const MEMORY_MIB: u64 = 512;

/// Takes what the host sends, gives what it fetches, and restarts when it has all. `dd` moves more at
/// a time than busybox's `wget` and `httpd`: what is measured is the network, not these.
const SCRIPT: &str = r#"#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /dev /proc
busybox mount -t devtmpfs devtmpfs /dev
busybox mount -t proc proc /proc
while read -r module; do busybox insmod "$module"; done </etc/firn/modules
busybox ip link set lo up
busybox ip link set eth0 up
busybox ip addr add 10.0.2.15/24 dev eth0
read -r arguments </proc/cmdline
for argument in $arguments; do
  case $argument in
  port=*) port=${argument#port=} ;;
  rounds=*) rounds=${argument#rounds=} ;;
  size=*) size=${argument#size=} ;;
  esac
done
take() { busybox nc 10.0.2.2 "$port" -e busybox dd of=/dev/null bs=262144 2>/dev/null; }
while [ $rounds -gt 0 ]; do
  take
  rounds=$((rounds - 1))
done
busybox nc -ll -p 80 -e busybox dd if=/dev/zero bs=262144 count="$size" 2>/dev/null &
until busybox grep -q ":0050 " /proc/net/tcp*; do busybox usleep 10000; done
take
busybox reboot -f
"#;

fn main() {
    let kit = micro();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, small_guest(&kit, SCRIPT)).expect("the initrd can be written");
    println!("{TRANSFER} bytes by TCP               to the guest  from the guest  (seconds)");
    let mut runs = vec![Run::start("firn", |port| Box::new(Firn::start(&kit, &initrd, port)))];
    if !std::env::args().any(|argument| argument == "firn") {
        let qemu = |port| Box::new(Qemu::start(&kit, &initrd, port)) as Box<dyn Monitor>;
        runs.push(Run::start("QEMU's user network", qemu));
    }
    // By turns: what else the machine does changes from one minute to the next.
    for _ in 0..ROUNDS {
        runs.iter_mut().for_each(Run::send);
    }
    let ready: Vec<_> = runs.iter().map(Run::serves).collect();
    for _ in 0..ROUNDS {
        runs.iter_mut().for_each(Run::receive);
    }
    drop(ready);
    for Run { name, to_guest, from_guest, .. } in &runs {
        println!("{name:<30} {to_guest:>12.2} {from_guest:>15.2}");
    }
    if let [firn, qemu] = &runs[..] {
        let (to, from) = (qemu.to_guest / firn.to_guest, qemu.from_guest / firn.from_guest);
        println!("{:<30} {to:>12.1} {from:>15.1}", "QEMU / firn");
    }
}

/// A monitor that runs the guest; dropping it ends it.
trait Monitor {
    /// Where the guest's port 80 is on the host.
    fn forwarded(&self) -> u16;
}

/// A guest in a monitor, and the best rounds so far, in seconds.
struct Run {
    name: &'static str,
    host: TcpListener,
    monitor: Box<dyn Monitor>,
    to_guest: f64,
    from_guest: f64,
}

impl Run {
    fn start(name: &'static str, monitor: impl FnOnce(u16) -> Box<dyn Monitor>) -> Self {
        let host = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = host.local_addr().expect("it is bound").port();
        let monitor = monitor(port);
        Self { name, host, monitor, to_guest: f64::INFINITY, from_guest: f64::INFINITY }
    }

    fn send(&mut self) {
        self.to_guest = self.to_guest.min(send(&self.host));
    }

    fn receive(&mut self) {
        self.from_guest = self.from_guest.min(receive(self.monitor.forwarded()));
    }

    /// Waits until the guest serves what it has: it connects again then.
    fn serves(&self) -> TcpStream {
        self.host.accept().expect("the guest connects").0
    }
}

/// Sends the guest something, and waits until it has it.
fn send(host: &TcpListener) -> f64 {
    let data = vec![0x5a; TRANSFER];
    let (mut stream, _) = host.accept().expect("the guest connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let began = Instant::now();
    stream.write_all(&data).expect("sent");
    stream.shutdown(std::net::Shutdown::Write).expect("ended");
    assert_eq!(stream.read(&mut [0]).expect("the guest ends too"), 0);
    began.elapsed().as_secs_f64()
}

/// Fetches something from the guest.
fn receive(port: u16) -> f64 {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it is forwarded");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let began = Instant::now();
    let (mut buffer, mut sum) = (vec![0; 1 << 18], 0);
    loop {
        match stream.read(&mut buffer).expect("the guest sends") {
            0 => break,
            count => sum += count,
        }
    }
    assert_eq!(sum, TRANSFER);
    began.elapsed().as_secs_f64()
}

fn cmdline(kit: &Kit, port: u16) -> String {
    let kernel = &kit.manifest.cmdline;
    format!("{kernel} port={port} size={} rounds={ROUNDS}", TRANSFER >> 18)
}

struct Firn {
    _vm: Vm,
    _gateway: Arc<Gateway>,
    forwarded: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl Firn {
    fn start(kit: &Kit, initrd: &Path, port: u16) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let (gateway, forwarded) = runtime.block_on(async {
            let gateway = Gateway::new(GatewaySpec::default()).await.expect("a gateway");
            let forward = Forward {
                from: Side::Host,
                protocol: Protocol::Tcp,
                host: (Ipv4Addr::LOCALHOST, 0).into(),
                guest: (GUEST_V4, 80).into(),
            };
            let forwarded = gateway.forward(forward).await.expect("a port");
            (Arc::new(gateway), forwarded)
        });
        let spec: MachineSpec = serde_json::from_value(serde_json::json!({
            "name": "m", "cores": 1, "memory": MEMORY_MIB, "kernel": kit.vmlinux(),
            "initrd": [initrd], "cmdline": cmdline(kit, port), "nets": [NetSpec { mac: Mac(CARD_MAC) }],
        }))
        .expect("a spec");
        let host = HostSide {
            events: Box::new(|event| {
                assert!(matches!(event, Event::Booting | Event::Reset), "{event:?}");
            }),
            serial: Box::new(std::io::sink()),
            connect: Box::new(Plug(Arc::clone(&gateway))),
            descriptors: 10_000,
            cancel: Cancel::default(),
        };
        let mut vm = Vm::new(&spec, host).expect("the machine can be made");
        vm.start().expect("it starts");
        Self { _vm: vm, _gateway: gateway, forwarded, _runtime: runtime }
    }
}

/// Plugs the machine's card into its user network.
struct Plug(Arc<Gateway>);

impl Connect for Plug {
    fn net(&mut self, _card: &NetSpec) -> std::io::Result<Arc<dyn NetPort>> {
        Ok(Arc::clone(&self.0) as Arc<dyn NetPort>)
    }
}

impl Monitor for Firn {
    fn forwarded(&self) -> u16 {
        self.forwarded.port()
    }
}

struct Qemu {
    child: Child,
    forwarded: u16,
}

impl Qemu {
    fn start(kit: &Kit, initrd: &Path, port: u16) -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let forwarded = free.local_addr().expect("it is bound").port();
        drop(free);
        let child = Command::new("qemu-system-x86_64")
            .args(["-M", "microvm,rtc=on", "-enable-kvm", "-cpu", "host", "-nodefaults"])
            .args(["-display", "none", "-no-reboot", "-m", &format!("{MEMORY_MIB}M")])
            .arg("-kernel")
            .arg(kit.vmlinux())
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", &cmdline(kit, port)])
            .args(["-netdev", &format!("user,id=net,hostfwd=tcp:127.0.0.1:{forwarded}-:80")])
            .args(["-device", "virtio-net-device,netdev=net", "-serial", "null"])
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU is installed");
        Self { child, forwarded }
    }
}

impl Monitor for Qemu {
    fn forwarded(&self) -> u16 {
        self.forwarded
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
