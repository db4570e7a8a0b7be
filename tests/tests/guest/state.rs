//! Machines that are saved in the middle of their work and go on in another process.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use firn::kit::{GuestConfig, Interface, Mount, MountKind, machine_overlay};
use firn_agent_client::{AgentClient, ExecRequest};
use firn_net_switch::{NetPort, Switch};
use firn_tests::micro;
use firn_vmm::Cancel;
use firn_vmm::spec::{
    CachePolicy, ConsolePortSpec, Cores, DiskSpec, Mac, MachineSpec, NetSpec, ShareSpec,
};
use firn_vmm::virtio::build::Connect;
use firn_vmm::vm::{HostSide, Vm};

/// Where the second process finds the first one's files.
const STATE: &str = "FIRN_TEST_STATE";
const NAMES: [&str; 2] = ["a", "b"];
/// Places that each kind of work writes to in turn.
const PLACES: u32 = 8;

/// Writes the same noise to disk, share and network, until `/tmp/enough` is there.
const WORK: &str = r#"
head -c 1000000 /dev/urandom >/tmp/data
rounds() { n=0; until [ -e /tmp/enough ]; do $1 $((n % 8)) || echo $1 >>/tmp/bad; n=$((n + 1))
  >/tmp/$1.begun; done; echo $n >/tmp/$1.done; }
disk() { dd if=/tmp/data of=/dev/vda bs=64k seek=$(($1 * 16)) conv=fsync 2>/dev/null; }
share() { cp /tmp/data /mnt/s/f$1; }
net() { cat /tmp/data; }
rounds disk & rounds share & rounds net | nc 192.168.1.2 5000 &
"#;

/// Has a directory and a file open that are only read afterwards.
const HOLD: &str = "(cd /mnt/fixed/dir; exec 5<$(hostname); until [ -e /tmp/go ]; do sleep 0.1; done; \
    cat <&5; cat both; >/tmp/held.done) >/tmp/held 2>&1 & \
    until [ -e /proc/$!/fd/5 ]; do :; done";

struct Machine {
    vm: Vm,
    agent: UnixStream,
}

pub(super) fn spec(dir: &Path, index: usize) -> MachineSpec {
    let kit = micro();
    let name = NAMES[index];
    let mac = [0x52, 0x54, 0, 0x12, 1, u8::try_from(index + 1).unwrap()];
    let overlay = machine_overlay(&GuestConfig {
        hostname: name.to_owned(),
        hosts: Vec::new(),
        interfaces: vec![Interface {
            name: "eth1".to_owned(),
            mac,
            addresses: vec![(format!("192.168.1.{}", index + 1).parse().unwrap(), 24)],
            gateway: None,
        }],
        dns: Vec::new(),
        mounts: [("s", "rw"), ("fixed", "ro")]
            .map(|(tag, options)| Mount {
                tag: tag.to_owned(),
                mount_point: format!("/mnt/{tag}"),
                kind: MountKind::Virtiofs,
                options: options.to_owned(),
            })
            .into(),
    });
    let overlay_path = dir.join(format!("{name}.cpio"));
    fs::write(&overlay_path, overlay.unwrap()).unwrap();
    let share = dir.join(format!("{name}-share"));
    fs::create_dir_all(&share).unwrap();
    // Both machines have the same one that nobody changes.
    let fixed = dir.join("fixed");
    if !fixed.exists() {
        fs::create_dir_all(fixed.join("dir")).unwrap();
        for file in ["a", "b", "both"] {
            fs::write(fixed.join("dir").join(file), file).unwrap();
        }
    }
    let disk = |image: PathBuf| DiskSpec {
        image,
        size: Some(64_u64.try_into().unwrap()),
        ..DiskSpec::default()
    };
    MachineSpec {
        name: name.to_owned(),
        cores: 2_u64.try_into().unwrap(),
        memory: 192_u64.try_into().unwrap(),
        kernel: kit.vmlinux(),
        initrd: vec![kit.initrd(), overlay_path],
        cmdline: kit.manifest.cmdline,
        console_ports: vec![ConsolePortSpec { name: Some("org.firn.agent".to_owned()) }],
        nets: vec![NetSpec { mac: Mac(mac) }],
        shares: vec![
            ShareSpec::new("s".try_into().unwrap(), share),
            ShareSpec {
                read_only: true,
                cache: CachePolicy::Always,
                ..ShareSpec::new("fixed".try_into().unwrap(), fixed)
            },
        ],
        disks: vec![disk(dir.join(format!("{name}.qcow2")))],
        rng: true,
        balloon: true,
        vsock: None,
        oem_strings: vec![],
        screen: None,
        keyboard: false,
        tablet: false,
    }
}

/// What a machine is connected to.
struct Ends {
    agent: Option<UnixStream>,
    port: Option<Arc<dyn NetPort>>,
}

impl Connect for Ends {
    fn console_port(&mut self, _port: &ConsolePortSpec) -> io::Result<UnixStream> {
        self.agent.take().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn net(&mut self, _card: &NetSpec) -> io::Result<Arc<dyn NetPort>> {
        self.port.take().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

pub(super) fn host_side(switch: &Switch, name: &str) -> (HostSide, UnixStream) {
    let (agent, guest) = UnixStream::pair().unwrap();
    let host = HostSide {
        events: Box::new(|event| eprintln!("{event:?}")),
        serial: Box::new(io::stderr()),
        connect: Box::new(Ends { agent: Some(guest), port: Some(Arc::new(switch.add_port(name))) }),
        descriptors: 10_000,
        cancel: Cancel::default(),
    };
    (host, agent)
}

pub(super) fn tokio_stream(stream: &UnixStream) -> tokio::net::UnixStream {
    let stream = stream.try_clone().unwrap();
    stream.set_nonblocking(true).unwrap();
    tokio::net::UnixStream::from_std(stream).unwrap()
}

pub(super) async fn output(agent: &AgentClient, script: &str) -> String {
    let done = agent.exec_collect(ExecRequest::shell(script)).await.unwrap();
    let text = String::from_utf8_lossy(&done.stdout).trim().to_owned();
    assert!(done.exit.success(), "{script}: {:?} {text}", done.exit);
    text
}

/// When the guest's clock began to count, in the host's seconds: not before the one, not after the
/// other.
async fn booted(agent: &AgentClient) -> (f64, f64) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let before = now();
    let uptime = output(agent, "read -r uptime rest </proc/uptime; echo $uptime").await;
    let uptime: f64 = uptime.parse().unwrap();
    // It has two digits.
    (before - uptime - 0.01, now() - uptime + 0.01)
}

pub(super) fn run(script: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(280), script).await.expect("it takes too long");
    });
}

#[test]
fn saved_machines_go_on_in_another_process() {
    if let Some(dir) = std::env::var_os(STATE) {
        return run(go_on(Path::new(&dir)));
    }
    let dir = tempfile::tempdir().unwrap();
    run(work_and_save(dir.path()));
    // Time passes.
    std::thread::sleep(Duration::from_secs(2));
    let test = "state::saved_machines_go_on_in_another_process";
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(STATE, dir.path())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

async fn work_and_save(dir: &Path) {
    let switch = Switch::new("vlan 1");
    let mut machines = Vec::new();
    for (index, name) in NAMES.iter().enumerate() {
        let (host, agent) = host_side(&switch, name);
        let mut vm = Vm::new(&spec(dir, index), host).unwrap();
        vm.start().unwrap();
        machines.push(Machine { vm, agent });
    }
    let mut agents = Vec::new();
    for machine in &machines {
        agents.push(AgentClient::connect(tokio_stream(&machine.agent)).await.unwrap());
    }
    // nc ends with its input, so it gets one without end.
    let listen = "mkfifo /tmp/in; (exec 3<>/tmp/in; nc -l -p 5000 <&3 | md5sum >/tmp/sum; >/tmp/received) >/dev/null 2>&1 & \
        until netstat -ltn | grep -q :5000; do :; done";
    output(&agents[1], listen).await;
    output(
        &agents[0],
        &format!("cat >/tmp/work <<'END'\n{WORK}\nEND\nsetsid sh /tmp/work >/dev/null 2>&1 &"),
    )
    .await;
    // Now each has done its first round and is at a later one.
    let begun =
        "cd /tmp; until [ -e disk.begun -a -e share.begun -a -e net.begun ]; do sleep 0.01; done";
    output(&agents[0], begun).await;

    let mut boots = Vec::new();
    for agent in &agents {
        output(agent, HOLD).await;
        boots.push(booted(agent).await);
    }
    fs::write(dir.join("booted"), serde_json::to_vec(&boots).unwrap()).unwrap();
    for machine in &mut machines {
        machine.vm.pause();
    }
    for (name, machine) in NAMES.iter().zip(&machines) {
        let memory = File::create_new(dir.join(format!("{name}.memory"))).unwrap();
        let state = machine.vm.save(&memory).unwrap();
        let state = serde_json::to_vec(&state).unwrap();
        fs::write(dir.join(format!("{name}.state")), state).unwrap();
    }
}

async fn go_on(dir: &Path) {
    let switch = Switch::new("vlan 1");
    let mut machines = Vec::new();
    for (index, name) in NAMES.iter().enumerate() {
        let (host, agent) = host_side(&switch, name);
        let memory = File::open(dir.join(format!("{name}.memory"))).unwrap();
        let state = fs::read(dir.join(format!("{name}.state"))).unwrap();
        let state = serde_json::from_slice(&state).unwrap();
        let vm = Vm::restore(&spec(dir, index), host, &state, &memory).unwrap();
        machines.push(Machine { vm, agent });
    }
    for machine in &mut machines {
        machine.vm.start().unwrap();
    }
    let mut agents = Vec::new();
    for machine in &machines {
        agents.push(AgentClient::reconnect(tokio_stream(&machine.agent)).await.unwrap());
    }
    // The clock runs as if the guest had never stopped.
    let earlier = fs::read(dir.join("booted")).unwrap();
    let earlier: Vec<(f64, f64)> = serde_json::from_slice(&earlier).unwrap();
    for (agent, (least, most)) in agents.iter().zip(earlier) {
        let now = booted(agent).await;
        assert!(now.0 <= most && least <= now.1, "{least} to {most}, then {now:?}");
    }
    let wait = "cd /tmp; >enough; until [ -e disk.done -a -e share.done -a -e net.done ]; do \
        sleep 0.1; done; cat /tmp/bad 2>/dev/null; cat disk.done share.done net.done";
    let rounds = output(&agents[0], wait).await;
    let rounds: Vec<u32> = rounds.lines().map(|line| line.parse().expect(&rounds)).collect();
    let [disk, share, net] = rounds[..] else { panic!("{rounds:?}") };
    let check = format!(
        "echo 3 >/proc/sys/vm/drop_caches; for n in $(seq {}); do \
         cmp /mnt/s/f$((n - 1)) /tmp/data && echo same; done; for n in $(seq {}); do \
         dd if=/dev/vda bs=64k skip=$(((n - 1) * 16)) count=16 2>/dev/null | head -c 1000000 | \
         cmp - /tmp/data && echo same; done",
        share.min(PLACES),
        disk.min(PLACES)
    );
    let same = output(&agents[0], &check).await;
    let expected = usize::try_from(share.min(PLACES) + disk.min(PLACES)).unwrap();
    assert_eq!(same.lines().filter(|line| *line == "same").count(), expected, "{same}");
    let sent = format!("(for n in $(seq {net}); do cat /tmp/data; done) | md5sum");
    let sent = output(&agents[0], &sent).await;
    let got = "until [ -e /tmp/received ]; do sleep 0.1; done; cat /tmp/sum";
    assert_eq!(output(&agents[1], got).await, sent);
    for (agent, name) in agents.iter().zip(NAMES) {
        let held = "echo 3 >/proc/sys/vm/drop_caches; >/tmp/go; until [ -e /tmp/held.done ]; do sleep 0.1; done; \
            cat /tmp/held /mnt/fixed/dir/a";
        assert_eq!(output(agent, held).await, format!("{name}botha"));
        let said = "dmesg | grep -iE 'lockup|stall|I/O error|unstable|nobody cared' || true";
        assert_eq!(output(agent, said).await, "");
    }
    // The host has it, too.
    let data = fs::read(dir.join("a-share/f0")).unwrap();
    assert_eq!(data.len(), 1_000_000);
    let places = 1..share.min(PLACES);
    assert!(
        places.into_iter().all(|n| fs::read(dir.join(format!("a-share/f{n}"))).unwrap() == data)
    );
}

#[test]
fn a_state_of_another_machine_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let switch = Switch::new("vlan 1");
    let mut one = spec(dir.path(), 0);
    let mut vm = Vm::new(&one, host_side(&switch, "a").0).unwrap();
    let memory = File::create_new(dir.path().join("memory")).unwrap();
    let error = vm.save(&memory).err().expect("it is not paused");
    assert!(error.to_string().contains("only a paused machine"), "{error}");
    vm.start().unwrap();
    vm.pause();
    let state = vm.save(&memory).unwrap();
    drop(vm);
    let memory = File::open(dir.path().join("memory")).unwrap();
    let refused = |change: fn(&mut MachineSpec)| {
        let mut other = one.clone();
        change(&mut other);
        let host = host_side(&switch, "a").0;
        Vm::restore(&other, host, &state, &memory).err().expect("it does not fit").to_string()
    };
    assert!(refused(|spec| spec.cores = Cores::MIN).contains("other vCPUs or devices"));
    assert!(refused(|spec| spec.rng = false).contains("other vCPUs or devices"));
    assert!(refused(|spec| spec.memory = 128_u64.try_into().unwrap()).contains("guest memory"));
    one.kernel = "/nothing".into();
    let vm = Vm::restore(&one, host_side(&switch, "a").0, &state, &memory);
    assert!(vm.is_ok(), "the kernel is in memory, its file is not needed");
}
