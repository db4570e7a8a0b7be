//! How long a guest takes with a tree that nobody changes, in seconds: the systemd kit's store, 4,000 files of 200 MB,
//! from a directory in memory. It is served by firn's own server, as an image in the guest's memory, by virtiofsd in
//! firn, and by virtiofsd to QEMU, by turns; what counts is the best of the rounds, and the ratios of one run. Arguments
//! name the ones to measure; a number is that of the rounds, of which an exact carrier needs one.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use firn::kit::Kit;
use firn_tests::{micro, small_guest, systemd};
use firn_vmm::Cancel;
use firn_vmm::spec::{CachePolicy, MachineSpec, ShareSpec};
use firn_vmm::virtio::fs::ShareServer;
use firn_vmm::vm::{HostSide, Vm};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Unless another number is asked for.
const ROUNDS: usize = 2;
/// A guest that says nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(300);
const MEMORY_MIB: u64 = 512;
const TAG: &str = "store";

/// Does one thing after the other, each between two lines on the console. What is cold has been dropped from the
/// guest's caches, but not from the host's.
const SCRIPT: &str = r#"#!/bin/busybox sh
export PATH=/bin
for applet in mkdir mount insmod find ls cat tar head xargs wc reboot; do busybox ln -s busybox /bin/$applet; done
mkdir -p /dev /proc /s
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
exec >/dev/console 2>&1
while read -r module; do insmod "$module"; done </etc/firn/modules
if [ -e /etc/firn/image-drivers ]; then
  mkdir -p /sys
  mount -t sysfs sysfs /sys
  while read -r module; do insmod "$module"; done </etc/firn/image-drivers
  cat /sys/bus/virtio/devices/*/ndbus*/wait_probe
  mount -t erofs -o ro,dax=always /dev/pmem0 /s || reboot -f
else
  mount -t virtiofs -o ro store /s || reboot -f
fi
cold() { echo 3 >/proc/sys/vm/drop_caches; warm "$@"; }
warm() { echo "begin $1"; "$2" >/dev/null; echo "end $1"; }
names() { find /s; }
attributes() { ls -lR /s; }
small() { find /s -type f -size -64k | xargs cat; }
large() { find /s -type f -size +1000k | xargs cat; }
begins() { find /s -type f | xargs head -q -c 1; }
archive() { tar cf - /s 2>/dev/null; }
program() {
  /s/debian/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path /s/debian/usr/lib/x86_64-linux-gnu \
    /s/debian/usr/bin/python3 -BSsc 'import asyncio, json, ssl'
}
export PYTHONHOME=/s/debian/usr
cold "find" names
cold "stat all" attributes
warm "stat again" attributes
cold "read small" small
cold "read large" large
warm "read again" large
cold "tar" archive
cold "python3" program
warm "python3 again" program
begins >/dev/null
warm "open, read, close" begins
echo over
reboot -f
"#;

fn main() {
    let (kit, dir) = (micro(), tempfile::tempdir_in("/dev/shm").expect("a temporary directory"));
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, small_guest(&kit, SCRIPT)).expect("the initrd can be written");
    let store = dir.path().join("store");
    let source = systemd().store().expect("the kit has a store");
    let copied = Command::new("cp").args(["-a"]).args([&source, &store]).status();
    assert!(copied.expect("cp can be run").success(), "{source:?} cannot be copied");
    let arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with('-'));
    let (numbers, asked): (Vec<_>, Vec<_>) =
        arguments.partition(|argument| argument.parse::<usize>().is_ok());
    let rounds = numbers.first().and_then(|number| number.parse().ok()).unwrap_or(ROUNDS);
    // virtiofsd opens each file that a guest remembers.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("there is a limit");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).expect("it can be reached");
    let place = Place { kit, initrd, store, socket: dir.path().join("socket") };
    let all: [(&str, Measure); 4] = [
        ("firn", |place| place.firn(&place.share(true))),
        ("firn, image", |place| place.firn(&ShareSpec { image: true, ..place.share(true) })),
        ("virtiofsd in firn", |place| place.firn(&place.share(false))),
        ("virtiofsd, QEMU", Place::qemu),
    ];
    let mut rows: Vec<_> = all
        .into_iter()
        .filter(|(name, _)| asked.is_empty() || asked.iter().any(|asked| asked == name))
        .map(|(name, measure)| (name, measure, BTreeMap::<usize, (String, f64)>::new()))
        .collect();
    for _ in 0..rounds {
        for (_, measure, best) in &mut rows {
            for (at, (step, seconds)) in measure(&place).into_iter().enumerate() {
                let known = best.entry(at).or_insert((step, f64::INFINITY));
                known.1 = known.1.min(seconds);
            }
        }
    }
    let steps: Vec<_> = rows[0].2.values().map(|(step, _)| step.clone()).collect();
    println!("{:<20}{}", "", steps.iter().map(|step| format!("{step:>19}")).collect::<String>());
    for (name, _, best) in &rows {
        let times = best.values().map(|(_, seconds)| format!("{seconds:>19.4}"));
        println!("{name:<20}{}", times.collect::<String>());
    }
}

type Measure = fn(&Place) -> Vec<(String, f64)>;

/// What all monitors are given.
struct Place {
    kit: Kit,
    initrd: PathBuf,
    store: PathBuf,
    socket: PathBuf,
}

impl Place {
    fn cmdline(&self) -> String {
        format!("{} console=ttyS0 quiet", self.kit.manifest.cmdline)
    }

    /// The store's own server is for what is read-only.
    fn share(&self, read_only: bool) -> ShareSpec {
        let share = ShareSpec::new(TAG.try_into().expect("a tag"), self.store.clone());
        ShareSpec { read_only, cache: CachePolicy::Always, ..share }
    }

    fn firn(&self, share: &ShareSpec) -> Vec<(String, f64)> {
        let drivers = share.image.then(|| self.kit.image_drivers());
        let initrd: Vec<_> = std::iter::once(self.initrd.clone()).chain(drivers).collect();
        let spec: MachineSpec = serde_json::from_value(serde_json::json!({
            "name": "m", "cores": 1, "memory": MEMORY_MIB, "kernel": self.kit.vmlinux(),
            "initrd": initrd, "cmdline": self.cmdline(), "shares": [share],
        }))
        .expect("a spec");
        let (sender, lines) = channel();
        let host = HostSide {
            events: Box::new(|_| ()),
            serial: Box::new(Lines { sender, begun: Vec::new() }),
            connect: Box::new(()),
            descriptors: 10_000,
            cancel: Cancel::default(),
        };
        let mut vm = Vm::new(&spec, host).expect("the machine can be made");
        vm.start().expect("it starts");
        times(&lines)
    }

    fn qemu(&self) -> Vec<(String, f64)> {
        let _ = std::fs::remove_file(&self.socket);
        let server = ShareServer::start(&self.share(true), 10_000, self.socket.clone());
        let server = server.expect("the store can be served");
        let memory = format!("memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on");
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-M", "microvm,rtc=on,memory-backend=memory", "-enable-kvm", "-cpu", "host"])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"])
            .args(["-m", &format!("{MEMORY_MIB}M"), "-object", &memory])
            .arg("-kernel")
            .arg(self.kit.vmlinux())
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", &self.cmdline()])
            .args(["-chardev", &format!("socket,id=fs,server=on,path={}", self.socket.display())])
            .args(["-device", &format!("vhost-user-fs-device,chardev=fs,tag={TAG}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU is installed");
        let output = child.stdout.take().expect("it is piped");
        let child = Ended(child);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = sender.send((Instant::now(), line));
            }
        });
        let times = times(&lines);
        drop((child, server));
        times
    }
}

/// A process that ends with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Passes a console on by lines.
struct Lines {
    sender: Sender<(Instant, String)>,
    begun: Vec<u8>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.begun)).into_owned();
                let _ = self.sender.send((Instant::now(), line));
            } else {
                self.begun.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How long each step took.
fn times(lines: &Receiver<(Instant, String)>) -> Vec<(String, f64)> {
    let (mut times, mut began) = (Vec::new(), Instant::now());
    loop {
        let (at, line) = lines.recv_timeout(PATIENCE).expect("the guest goes on");
        let line = line.trim();
        if line.starts_with("begin ") {
            began = at;
        } else if let Some(step) = line.strip_prefix("end ") {
            times.push((step.to_owned(), (at - began).as_secs_f64()));
        } else if line == "over" {
            return times;
        } else {
            eprintln!("{line}");
        }
    }
}
