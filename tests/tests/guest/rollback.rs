//! A whole run that goes back: machines, networks, disks and shared directories.

use std::fs;
use std::time::Duration;

use firn::checkpoint::Checkpoint;
use firn::config::MachineFile;
use firn::error::MachineError;
use firn::machine::Status;
use firn::{Driver, Error, Machine};
use firn_tests::{Held, PATIENCE, micro, only, output, with_machines};

/// How often a run goes back in a row.
const OFTEN: usize = 1000;

const NODES: &str = "[nodes.a]\ndisks = [{ size = 64 }]\n[nodes.b]\n[nodes.c]";

/// What a guest has: files, how far a process has counted, its disk, and what it shares with the host and others.
const LOOK: &str =
    "cat /tmp/file /tmp/count /tmp/shared/file /tmp/xchg/file; head -c 4 /dev/vda; ls /tmp/shared";
const SEEN: &str = "one\n1\none\none\none!file";

#[test]
fn everything_goes_back_together() {
    with_machines(NODES, async |driver| {
        let [a, b, c] = driver.machines() else { panic!("three machines") };
        refused_while_booting(driver, a).await;
        b.connect().await.unwrap();
        // `c` has never been started.
        let begin = "for dir in /tmp /tmp/shared /tmp/xchg; do echo one >$dir/file; done; printf 'one!' >/dev/vda; sync; \
            mkfifo /tmp/tick; echo 0 >/tmp/count; \
            (n=0; while :; do read -r _ </tmp/tick || continue; n=$((n + 1)); echo $n >/tmp/count; done) >/dev/null 2>&1 &";
        output(a, begin).await;
        tick(a, 1).await;
        a.succeed(&["ping -c 1 b"], None).await.unwrap();
        // A connection from guest to guest that lives through it all.
        output(b, "(nc -l -p 7 -e cat >/dev/null 2>&1) & sleep 0.1").await;
        output(a, "mkfifo /tmp/to; (nc b 7 </tmp/to >/tmp/from) >/dev/null 2>&1 & exec 3>/tmp/to; echo hello >&3; \
            (sleep 100000 >&3) >/dev/null 2>&1 & until grep -q hello /tmp/from; do :; done").await;
        refused_in_a_command(driver, a, b).await;

        let first = driver.checkpoint("first").await.unwrap();
        assert_eq!(a.status(), Status::Running);
        spoil(driver).await;
        driver.roll_back(&first).await.unwrap();
        check(driver).await;
        assert_eq!(c.status(), Status::Off);

        // A stack.
        output(a, "echo two >/tmp/file").await;
        let second = driver.checkpoint("second").await.unwrap();
        output(a, "echo three >/tmp/file").await;
        driver.roll_back(&second).await.unwrap();
        assert_eq!(output(a, "cat /tmp/file").await, "two");
        driver.roll_back(&first).await.unwrap();
        check(driver).await;
        let gone = driver.roll_back(&second).await.unwrap_err().to_string();
        assert!(gone.contains("checkpoint second is gone"), "{gone}");
        assert!(!second.is_there() && first.is_there());

        whatever_became_of_it(driver, &first).await;
        calls_end(driver, a, &first).await;
        in_the_middle_of_writes(driver).await;
        made_later(driver, &first).await;
        often(driver, &first).await;

        // Given up, it takes nothing, and what ends then has ended.
        first.forget();
        a.shutdown().await.unwrap();
        let image = fs::read(a.state_dir().join("disk0.img")).unwrap();
        assert_eq!(&image[..4], b"end!");
    });
}

async fn refused(driver: &Driver, why: &str) {
    match driver.checkpoint("refused").await.map(|_| ()) {
        Err(Error::Machine(MachineError::Usage(what))) => assert!(what.contains(why), "{what}"),
        other => panic!("{other:?}"),
    }
}

async fn refused_while_booting(driver: &Driver, a: &Machine) {
    a.start(true).await.unwrap();
    refused(driver, "a does not take commands yet").await;
    a.connect().await.unwrap();
    a.reboot().await.unwrap();
    refused(driver, "a does not take commands yet").await;
    a.connect().await.unwrap();
    // What it writes when it starts again could not be taken back.
    a.shutdown().await.unwrap();
    refused(driver, "a is off, and what it writes to").await;
    a.connect().await.unwrap();
}

/// Commands of the agent may run at a checkpoint; going back ends them.
async fn refused_in_a_command(driver: &Driver, a: &Machine, b: &Machine) {
    // Paused machines stay so.
    b.pause().await.unwrap();
    let checkpoint = driver.checkpoint("paused").await.unwrap();
    assert_eq!((a.status(), b.status()), (Status::Running, Status::Paused));
    b.resume().await.unwrap();
    driver.roll_back(&checkpoint).await.unwrap();
    assert_eq!((a.status(), b.status()), (Status::Running, Status::Paused));
    b.resume().await.unwrap();
    output(b, "true").await;
}

async fn tick(machine: &Machine, count: u32) {
    let tick = "echo >/tmp/tick; until [ \"$(cat /tmp/count)\" = N ]; do :; done";
    output(machine, &tick.replace('N', &count.to_string())).await;
}

async fn spoil(driver: &Driver) {
    let [a, b, c] = driver.machines() else { panic!("three machines") };
    tick(a, 2).await;
    let spoil = "rm /tmp/file; echo two >/tmp/shared/file; echo two >/tmp/xchg/file; touch /tmp/shared/new; \
        printf 'two!' >/dev/vda; sync; ip link set eth1 down";
    output(a, spoil).await;
    fs::write(a.shared_dir().join("of the host"), "").unwrap();
    output(b, "killall cat; ip link set eth1 down").await;
    b.block();
    c.connect().await.unwrap();
}

async fn check(driver: &Driver) {
    let [a, b, _] = driver.machines() else { panic!("three machines") };
    assert_eq!(output(a, &format!("echo 3 >/proc/sys/vm/drop_caches; {LOOK}")).await, SEEN);
    a.succeed(&["ping -c 1 b", "ping -c 1 -6 b"], None).await.unwrap();
    output(b, "ping -c 1 a; echo there >/tmp/shared/there; cat /tmp/shared/file").await;
    assert_eq!(output(a, "cat /tmp/shared/there; rm /tmp/shared/there").await, "there");
    output(a, "echo again >/tmp/to; until grep -q again /tmp/from; do :; done").await;
    tick(a, 2).await;
}

/// Crashed, powered off and started again, rebooted, panicked, paused.
async fn whatever_became_of_it(driver: &Driver, first: &Checkpoint) {
    let [a, b, _] = driver.machines() else { panic!("three machines") };
    a.crash().await;
    b.shutdown().await.unwrap();
    driver.roll_back(first).await.unwrap();
    check(driver).await;

    // It starts with what is on its disk now.
    output(a, "printf 'two!' >/dev/vda; sync").await;
    a.shutdown().await.unwrap();
    a.start(true).await.unwrap();
    assert_eq!(output(a, "test ! -e /tmp/file; head -c 4 /dev/vda").await, "two!");
    a.reboot().await.unwrap();
    a.connect().await.unwrap();
    b.pause().await.unwrap();
    driver.roll_back(first).await.unwrap();
    check(driver).await;

    let panic = "echo 1 >/proc/sys/kernel/sysrq; (sleep 0.1; echo c >/proc/sysrq-trigger) >/dev/null 2>&1 &";
    output(b, panic).await;
    b.wait_for_end().await;
    // It can be gone back to, too.
    let panicked = driver.checkpoint("panicked").await.unwrap();
    b.crash().await;
    b.connect().await.unwrap();
    driver.roll_back(&panicked).await.unwrap();
    assert_eq!(b.status(), Status::Ended);
    let error = b.succeed(&["true"], None).await.unwrap_err().to_string();
    assert!(error.contains("b panicked: "), "{error}");
    driver.roll_back(first).await.unwrap();
    check(driver).await;
    let text = b.get_console_log();
    assert!(!text.contains("sysrq: Trigger a crash"), "it has not happened");
}

/// Calls that wait end at once, and say why.
async fn calls_end(driver: &Driver, a: &Machine, first: &Checkpoint) {
    let command = a.succeed(&["sleep 100000"], None);
    let file = a.wait_for_file("/never", PATIENCE * 10);
    let back = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        driver.roll_back(first).await.unwrap();
    };
    let (command, file, ()) = tokio::join!(command, file, back);
    for error in [command.unwrap_err(), file.unwrap_err()] {
        let error = error.to_string();
        assert!(error.contains("a went back to checkpoint first"), "{error}");
    }
    check(driver).await;
}

/// Copies what is new each time to the disk, to the share and over the network, and compares what comes back.
const WRITES: &str = r#"
head -c 40000 /dev/urandom >/tmp/noise
disk() {
    dd if=$1 of=/dev/vda bs=40000 seek=8 conv=fsync
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/vda of=$2 bs=40000 skip=8 count=1
}
share() {
    cp $1 /tmp/xchg/written
    echo 3 >/proc/sys/vm/drop_caches
    cp /tmp/xchg/written $2
}
network() {
    cat $1 >&3 &
    dd of=$2 bs=40000 count=1 iflag=fullblock <&4
}
writes() {
    n=0
    until [ -e /tmp/enough ]; do
        n=$((n + 1))
        { printf %08d $n; tail -c +9 /tmp/noise; } >/tmp/$1.data
        $1 /tmp/$1.data /tmp/$1.back
        cmp /tmp/$1.data /tmp/$1.back || echo "$1 $n" >>/tmp/bad
        echo $n >/tmp/$1.new
        mv /tmp/$1.new /tmp/$1.count
    done
    touch /tmp/$1.over
}
: >/tmp/bad
mkfifo /tmp/there /tmp/back
nc b 8 </tmp/there >/tmp/back 2>/tmp/nc.log &
exec 3>/tmp/there 4</tmp/back
for way in disk share network; do
    echo 0 >/tmp/$way.count
    # A function's redirection would leave the shell a copy of its output.
    (exec >/tmp/$way.log 2>&1; writes $way) &
done
"#;

/// Each way has come to the end of a round.
const GO_ON: &str = "for way in disk share network; do \
    n=$(($(cat /tmp/$way.count) + 1)); until [ $(cat /tmp/$way.count) -ge $n ]; do usleep 10000; done; done";

/// What is being written arrives whole, and what was written before is as it was.
async fn in_the_middle_of_writes(driver: &Driver) {
    let [a, b, _] = driver.machines() else { panic!("three machines") };
    let listen =
        "nc -l -p 8 -e cat >/dev/null 2>&1 & until grep -q ':0008 ' /proc/net/tcp*; do :; done";
    output(b, listen).await;
    output(a, WRITES).await;
    let keep =
        "cp /tmp/noise /tmp/xchg/noise; dd if=/tmp/noise of=/dev/vda bs=40000 seek=4 conv=fsync";
    output(a, keep).await;
    output(a, GO_ON).await;
    let middle = driver.checkpoint("middle").await.unwrap();
    for _ in 0..2 {
        output(a, GO_ON).await;
        let spoil = "echo other >/tmp/xchg/noise; \
            dd if=/dev/zero of=/dev/vda bs=40000 seek=4 count=1 conv=fsync";
        output(a, spoil).await;
        driver.roll_back(&middle).await.unwrap();
        let look = "echo 3 >/proc/sys/vm/drop_caches; cmp /tmp/noise /tmp/xchg/noise; \
            dd if=/dev/vda bs=40000 skip=4 count=1 2>/dev/null | cmp /tmp/noise -";
        output(a, look).await;
    }
    output(a, GO_ON).await;
    let end = "touch /tmp/enough; for way in disk share network; do \
        until [ -e /tmp/$way.over ]; do usleep 10000; done; done; cat /tmp/bad";
    assert_eq!(output(a, end).await, "");
}

/// A machine that did not exist at the checkpoint is off after it, and can start again.
async fn made_later(driver: &Driver, first: &Checkpoint) {
    let kit = micro();
    let file = serde_json::json!({
        "firn": 1, "name": "later", "memory": 256, "kernel": kit.vmlinux(), "initrd": [kit.initrd()],
        "cmdline": kit.manifest.cmdline,
    });
    let path = driver.machines()[0].out_dir().join("run-later-vm");
    fs::write(&path, format!("#!/usr/bin/firn run\n{file}\n")).unwrap();
    let later = driver.create_machine(MachineFile::read(&path).unwrap(), false).unwrap();
    later.start(false).await.unwrap();
    driver.roll_back(first).await.unwrap();
    assert!(!later.booted());
    check(driver).await;
}

async fn often(driver: &Driver, first: &Checkpoint) {
    let before = Held::now();
    for _ in 0..20 {
        driver.roll_back(first).await.unwrap();
    }
    check(driver).await;
    before.check(&Held::now());
    output(&driver.machines()[0], "printf 'end!' >/dev/vda; sync").await;
}

#[test]
fn many_times_in_a_row_nothing_grows() {
    with_machines("[nodes.m]\ndisks = [{ size = 16 }]", async |driver| {
        let m = only(driver);
        let begin = "for file in /tmp/file /tmp/xchg/file; do echo one >$file; done; printf one! >/dev/vda; sync";
        output(m, begin).await;
        let first = driver.checkpoint("first").await.unwrap();
        let mut settled = None;
        for round in 1..=OFTEN {
            if round % (OFTEN / 10) == 0 {
                let spoil = "for file in /tmp/file /tmp/xchg/file; do echo two >$file; done; printf two! >/dev/vda; \
                    sync; head -c 4000000 /dev/urandom >/tmp/noise";
                output(m, spoil).await;
            }
            driver.roll_back(&first).await.unwrap();
            if round % (OFTEN / 10) == 0 {
                let look = "cat /tmp/file /tmp/xchg/file; head -c 4 /dev/vda; test ! -e /tmp/noise";
                assert_eq!(output(m, look).await, "one\none\none!");
            }
            if round == 20 {
                settled = Some(Held::now());
            }
        }
        settled.unwrap().check(&Held::now());
    });
}
