//! What checkpoints of two machines on one network cost, against their boot: processor time of the whole process, guests
//! and the host kernel's work for them included, which an exact carrier counts in billions of instructions; and the
//! time that passes. Before each roll back memory, disks and a file of the share have changed. Last, what a run costs
//! that starts from the world that another one has kept on disk. Arguments name another kit than `systemd`, and how
//! often to go back; in the end the process has what it had after the twentieth time.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use firn::Driver;
use firn::worlds::Worlds;
use firn_tests::{Held, PATIENCE, micro, output, systemd, with_machines};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// Unless another number is asked for.
const ROUNDS: usize = 25;
/// After so many, what grows once has grown.
const SETTLED: usize = 20;

/// Changes 32 MiB of memory, 16 MiB of the disk, and 4 MiB of the share.
const TOUCH: &str = "dd if=/dev/zero of=/dev/shm/touched bs=1M count=32 2>/dev/null; \
    dd if=/dev/zero of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null; \
    dd if=/dev/zero of=/tmp/xchg/touched bs=1M count=4 2>/dev/null";

fn main() {
    let arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with('-'));
    let (numbers, kits): (Vec<_>, Vec<_>) =
        arguments.partition(|argument| argument.parse::<usize>().is_ok());
    let rounds = numbers.first().and_then(|number| number.parse().ok()).unwrap_or(ROUNDS).max(1);
    let kit = kits.first().map_or("systemd", String::as_str);
    warm(&if kit == "micro" { micro() } else { systemd() }.dir);
    let node = |name| format!("[nodes.{name}]\nkit = '{kit}'\ndisks = [{{ size = 64 }}]\n");
    let nodes = node("a") + &node("b");
    let from_disk = from_disk(&nodes);
    with_machines(&nodes, async |driver| {
        let ((), boot) = measured(boot(driver, kit == "systemd")).await;
        let checkpoint = async |name| {
            touch(driver).await;
            measured(async { driver.checkpoint(name).await.expect("there is room") }).await
        };
        let (_first, first) = checkpoint("first").await;
        let (second, again) = checkpoint("second").await;
        let (mut back, mut settled) = (Cost::default(), None);
        for round in 1..=rounds {
            touch(driver).await;
            let ((), one) =
                measured(async { driver.roll_back(&second).await.expect("it is there") }).await;
            back = Cost {
                processor: back.processor + one.processor,
                elapsed: back.elapsed + one.elapsed,
            };
            if round == SETTLED {
                settled = Some(Held::now());
            }
        }
        let after = Held::now();
        let count = u32::try_from(rounds).expect("fewer");
        back = Cost { processor: back.processor / count, elapsed: back.elapsed / count };
        println!(
            "{:<28}{:>11}{:>13}{:>9}",
            format!("2 machines, kit {kit}"),
            "processor",
            "of the boot",
            "elapsed"
        );
        let roll_back = format!("roll back, mean of {rounds}");
        for (name, cost) in [
            ("boot", &boot),
            ("first checkpoint", &first),
            ("second checkpoint", &again),
            (&roll_back, &back),
            ("start from disk", &from_disk),
        ] {
            let [processor, elapsed, whole] =
                [cost.processor, cost.elapsed, boot.processor].map(|time| time.as_secs_f64());
            println!(
                "{name:<28}{processor:>11.3}{:>12.1}%{elapsed:>9.3}",
                processor / whole * 100.0
            );
        }
        if let Some(settled) = settled {
            println!("after {SETTLED}: {settled}; after {rounds}: {after}");
            settled.check(&after);
        }
    });
}

/// Has the host read what guests boot from, as after any other boot.
fn warm(kit: &Path) {
    let mut read = Command::new("find");
    read.arg("-L").arg(kit).args(["-type", "f", "-exec", "cat", "{}", "+"]);
    let status = read.stdout(Stdio::null()).status();
    assert!(status.expect("find can be run").success());
}

/// What the second run of a test costs until its machines are up: the first keeps their boot.
fn from_disk(nodes: &str) -> Cost {
    let dir = tempfile::tempdir().expect("there is room");
    let worlds = Worlds::at(dir.path().join("worlds"), 8192);
    let mut cost = Cost::default();
    for _ in 0..2 {
        with_machines(nodes, async |driver| {
            let ready = driver.boot_once(&worlds, "bench", false);
            ((), cost) = measured(async { ready.await.expect("they boot") }).await;
        });
    }
    cost
}

/// Until both machines are up.
async fn boot(driver: &Driver, systemd: bool) {
    driver.start_all().await.expect("they start");
    for machine in driver.machines() {
        if systemd {
            machine
                .wait_for_unit("multi-user.target", None, PATIENCE * 4)
                .await
                .expect("it is reached");
        } else {
            machine.connect().await.expect("it boots");
        }
    }
}

async fn touch(driver: &Driver) {
    for machine in driver.machines() {
        output(machine, TOUCH).await;
    }
}

#[derive(Default)]
struct Cost {
    processor: Duration,
    elapsed: Duration,
}

async fn measured<T>(work: impl Future<Output = T>) -> (T, Cost) {
    let (began, before) = (Instant::now(), processor());
    let value = work.await;
    (value, Cost { processor: processor().saturating_sub(before), elapsed: began.elapsed() })
}

/// What this process has taken of the processors so far.
fn processor() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("it is known");
    let time = usage.user_time() + usage.system_time();
    Duration::from_micros(time.num_microseconds().unsigned_abs())
}
