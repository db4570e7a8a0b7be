//! A machine that goes back in time.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use firn_agent_client::AgentClient;
use firn_net_switch::Switch;
use firn_tests::Held;
use firn_vmm::vm::{Checkpoint, Event, Vm};

use super::state::{host_side, output, run, spec, tokio_stream};

/// A machine, the driver's end of its agent's port, and what happens to it.
struct Subject {
    vm: Vm,
    port: UnixStream,
    events: Receiver<Event>,
}

impl Subject {
    fn keep(&mut self) -> Checkpoint {
        self.vm.pause();
        let checkpoint = self.vm.checkpoint().unwrap();
        self.vm.resume();
        checkpoint
    }

    /// Goes back, and leaves the agent that was met before.
    async fn go_back(&mut self, agent: AgentClient, to: &Checkpoint) -> AgentClient {
        drop(agent);
        self.vm.roll_back(to).unwrap();
        self.vm.start().unwrap();
        AgentClient::reconnect(tokio_stream(&self.port)).await.unwrap()
    }

    fn wait_for(&self, wanted: &Event) {
        while self.events.recv().unwrap() != *wanted {}
    }
}

/// What a guest has: a file, a process's memory, what is on its disk and its shares, and how long it has been up.
const LOOK: &str = "cat /tmp/file /tmp/count; kill -0 $(cat /tmp/pid) && echo alive; echo 3 >/proc/sys/vm/drop_caches; \
    head -c 4 /dev/vda; ls /mnt/s; cat /mnt/fixed/dir/both";

#[test]
fn a_machine_goes_back_whatever_became_of_it() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(dir.path(), 0);
        let image = dir.path().join("a.raw");
        spec.disks[0].image.clone_from(&image);
        let (mut host, port) = host_side(&Switch::new("vlan 1"), "a");
        let (sender, events) = channel();
        host.events = Box::new(move |event| drop(sender.send(event)));
        let vm = Vm::new(&spec, host).unwrap();
        let mut machine = Subject { vm, port, events };
        machine.vm.start().unwrap();
        machine.wait_for(&Event::Booting);
        let mut agent = AgentClient::connect(tokio_stream(&machine.port)).await.unwrap();
        // The process counts the lines of its pipe, so each look at it is a step of its memory.
        let begin = "printf one1 >/dev/vda; echo first >/tmp/file; mkfifo /tmp/tick; echo 0 >/tmp/count; \
            (n=0; while :; do read -r _ </tmp/tick || continue; n=$((n + 1)); echo $n >/tmp/count; done) >/dev/null 2>&1 & \
            echo $! >/tmp/pid; sync; echo >/mnt/s/kept";
        output(&agent, begin).await;
        let tick = "echo >/tmp/tick; until [ $(cat /tmp/count) = $N ]; do :; done";
        let tick = |n: u32| tick.replace("$N", &n.to_string());
        output(&agent, &tick(1)).await;
        let uptime = "read -r uptime rest </proc/uptime; echo $uptime";
        let up: f64 = output(&agent, uptime).await.parse().unwrap();
        let first = machine.keep();
        let began = std::time::Instant::now();

        // Everything is spoilt, with work under way.
        let spoil = "echo spoilt >/tmp/file; printf two2 >/dev/vda; sync; head -c 20000000 /dev/urandom >/tmp/noise; \
            (while :; do dd if=/tmp/noise of=/dev/vda bs=1M seek=1 conv=fsync; done) >/dev/null 2>&1 &";
        output(&agent, spoil).await;
        output(&agent, &tick(2)).await;
        agent = machine.go_back(agent, &first).await;
        assert_eq!(output(&agent, LOOK).await, "first\n1\nalive\none1kept\nboth");
        let passed = began.elapsed().as_secs_f64();
        let now: f64 = output(&agent, uptime).await.parse().unwrap();
        assert!(now < up + passed, "no time has passed for it: {up}, then {now} after {passed}");
        // The network card, the disk and the entropy source work on.
        output(&agent, "ip link set eth1 down; ip link set eth1 up; head -c 16 /dev/hwrng | wc -c")
            .await;
        output(&agent, &tick(2)).await;

        // A stack of checkpoints.
        output(&agent, "echo second >/tmp/file; printf two2 >/dev/vda; sync").await;
        let second = machine.keep();
        for _ in 0..3 {
            output(&agent, "rm /tmp/file; printf bad! >/dev/vda").await;
            agent = machine.go_back(agent, &second).await;
            assert_eq!(output(&agent, LOOK).await, "second\n2\nalive\ntwo2kept\nboth");
        }
        agent = machine.go_back(agent, &first).await;
        assert_eq!(output(&agent, LOOK).await, "first\n1\nalive\none1kept\nboth");
        let gone = machine.vm.roll_back(&second).expect_err("it is gone").to_string();
        assert!(gone.contains("went back to an earlier checkpoint"), "{gone}");
        assert_eq!(output(&agent, "cat /tmp/file").await, "first", "it goes on");

        // A guest that powers off, and one that restarts with other memory.
        output(&agent, "(sleep 0.1; poweroff -f) >/dev/null 2>&1 &").await;
        machine.wait_for(&Event::PowerOff);
        agent = machine.go_back(agent, &first).await;
        assert_eq!(output(&agent, "cat /tmp/file").await, "first");
        output(&agent, "(sleep 0.1; reboot -f) >/dev/null 2>&1 &").await;
        machine.wait_for(&Event::Reset);
        machine.vm.reset().unwrap();
        machine.vm.start().unwrap();
        machine.wait_for(&Event::Booting);
        drop(agent);
        agent = AgentClient::connect(tokio_stream(&machine.port)).await.unwrap();
        output(&agent, "test ! -e /tmp/file").await;
        agent = machine.go_back(agent, &first).await;
        assert_eq!(output(&agent, LOOK).await, "first\n1\nalive\none1kept\nboth");

        // Often, without growth.
        let before = Held::now();
        for _ in 0..100 {
            machine.vm.roll_back(&first).unwrap();
            machine.vm.start().unwrap();
            machine.vm.pause();
        }
        agent = machine.go_back(agent, &first).await;
        assert_eq!(output(&agent, LOOK).await, "first\n1\nalive\none1kept\nboth");
        before.check(&Held::now());
        let said = output(
            &agent,
            "dmesg | grep -iE 'lockup|stall|I/O error|unstable|nobody cared' || true",
        )
        .await;
        assert_eq!(said, "");

        // What it writes after that is in its image in the end.
        output(&agent, "printf end! >/dev/vda; sync").await;
        machine.vm.stop();
        let mut start = [0; 4];
        fs::File::open(image).unwrap().read_exact_at(&mut start, 0).unwrap();
        assert_eq!(&start, b"end!");
    });
}
