//! Worlds that go on from one checkpoint side by side.

use std::fs;

use firn::checkpoint::Checkpoint;
use firn::machine::Status;
use firn::{Driver, Machine};
use firn_tests::{Held, output, with_machines};

const NODES: &str =
    "[nodes.a]\ndisks = [{ size = 64 }]\n[nodes.a.user_network]\n[nodes.b]\n[nodes.c]";

#[test]
fn worlds_go_on_side_by_side() {
    with_machines(NODES, async |driver| {
        let [a, b, c] = driver.machines() else { panic!("three machines") };
        b.connect().await.unwrap();
        output(a, &write("one!")).await;
        a.succeed(&["ping -c 1 b"], None).await.unwrap();
        let boot_id = output(a, "cat /proc/sys/kernel/random/boot_id").await;

        // These guests have no driver for the generation ID: that the agent has their kernels draw fresh random numbers
        // is seen by a probe. Young kernels do so by themselves all the time, but on other threads.
        let probe = "mount -t tracefs none /sys/kernel/tracing; cd /sys/kernel/tracing; \
            echo 'p crng_reseed' >kprobe_events; echo 1 >events/kprobes/enable";
        output(a, probe).await;

        let first = driver.checkpoint("first").await.unwrap();
        often(driver, &first).await;
        let before = Held::now();
        // What the run does after it is not seen by its forks.
        output(a, &write("run!")).await;
        let names = ["red", "blue"];
        let mut forks = Vec::new();
        for name in names {
            forks.push(driver.fork(&first, name).await.unwrap());
        }
        let worlds = [(driver, "0"), (&*forks[0], "1"), (&*forks[1], "1")];
        for (world, times) in worlds {
            let by_agent = "grep -c 'file-.*crng_reseed' /sys/kernel/tracing/trace || true";
            assert_eq!(output(of(world, "a"), by_agent).await, times);
        }
        // Beside the guest memory that differs, in KiB.
        let taken = Held::now().memory - before.memory;
        assert!(taken < 8 * 1024 * 2 * names.len(), "{taken}");
        output(b, "ip link set eth1 down").await;
        for (fork, name) in forks.iter().zip(names) {
            let a = of(fork, "a");
            assert_ne!(a.state_dir(), driver.machines()[0].state_dir());
            assert_eq!(look(fork).await, seen("one!"));
            assert_eq!(output(a, "cat /proc/sys/kernel/random/boot_id").await, boot_id);
            // On its own networks it has its neighbour, and the host.
            a.succeed(&["ping -c 1 b", "ping -c 1 -6 b", "ping -c 1 10.0.2.2"], None)
                .await
                .unwrap();
            output(a, &write(&text_of(name))).await;
            assert_eq!(of(fork, "c").status(), Status::Off);
        }
        for (fork, name) in forks.iter().zip(names) {
            let text = text_of(name);
            assert_eq!(look(fork).await, seen(&text));
            assert_eq!(output(of(fork, "b"), "cat /tmp/shared/file").await, text);
            let file = of(fork, "a").shared_dir().join("file");
            assert_eq!(fs::read_to_string(file).unwrap().trim_end(), text);
        }
        let [red, blue] = &forks[..] else { panic!("two forks") };

        // Each is a world of its own: it goes back, is forked, and its machines start and end.
        of(red, "c").connect().await.unwrap();
        of(red, "c").succeed(&["ping -c 1 a"], None).await.unwrap();
        let second = red.checkpoint("second").await.unwrap();
        output(of(red, "a"), &write("two!")).await;
        of(red, "a").crash().await;
        red.roll_back(&second).await.unwrap();
        assert_eq!(look(red).await, seen("red!"));
        let pink = red.fork(&second, "pink").await.unwrap();
        assert_eq!(look(&pink).await, seen("red!"));
        pink.close().await;
        assert_eq!(look(blue).await, seen("blue"));

        // Forks live through what becomes of the run.
        driver.roll_back(&first).await.unwrap();
        assert_eq!(look(driver).await, seen("one!"));
        first.forget();
        let gone = driver.fork(&first, "late").await.err().expect("it is gone").to_string();
        assert!(gone.contains("checkpoint first is gone"), "{gone}");
        a.shutdown().await.unwrap();
        output(of(blue, "b"), "ping -c 1 a").await;
        assert_eq!(look(blue).await, seen("blue"));
        assert_eq!(c.status(), Status::Off);
        // Its disk is the same when it starts again.
        of(blue, "a").shutdown().await.unwrap();
        let refused = blue.checkpoint("off").await.err().expect("its disk was written").to_string();
        assert!(refused.contains("a is off, and what it writes to"), "{refused}");
        assert_eq!(output(of(blue, "a"), "head -c 4 /dev/vda").await, "blue");

        let dirs = forks.iter().map(|fork| fork.state_dir().unwrap()).collect::<Vec<_>>();
        red.close().await;
        blue.close().await;
        assert!(dirs.iter().all(|dir| !dir.exists()));
        drop((forks, second));
        // The run's own disk has what the run wrote.
        a.start(false).await.unwrap();
        assert_eq!(output(a, "head -c 4 /dev/vda").await, "one!");
    });
}

/// Forks that have ended leave nothing.
async fn often(driver: &Driver, first: &Checkpoint) {
    let mut settled = None;
    for round in 1..=9 {
        let fork = driver.fork(first, &format!("fork{round}")).await.unwrap();
        assert_eq!(look(&fork).await, seen("one!"));
        fork.close().await;
        if round == 4 {
            settled = Some(Held::now());
        }
    }
    settled.unwrap().check(&Held::now());
}

/// What a guest has: files, what it shares with the host and others, and its disk.
async fn look(world: &Driver) -> String {
    let look = "echo 3 >/proc/sys/vm/drop_caches; cat /tmp/file /tmp/shared/file /tmp/xchg/file; head -c 4 /dev/vda";
    output(of(world, "a"), look).await
}

fn text_of(name: &str) -> String {
    format!("{name:!<4}")
}

fn seen(text: &str) -> String {
    [text; 4].join("\n")
}

fn write(text: &str) -> String {
    format!(
        "for dir in /tmp /tmp/shared /tmp/xchg; do echo '{text}' >$dir/file; done; printf '{text}' >/dev/vda; sync"
    )
}

fn of<'a>(world: &'a Driver, name: &str) -> &'a Machine {
    world.machine(name).expect("it has one")
}
