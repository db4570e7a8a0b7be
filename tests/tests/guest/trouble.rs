//! Guests that end while somebody waits for them, guests that cannot start, and agents that lie.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use firn::error::{End, MachineError, Tail, chain};
use firn::{Driver, Error, ExecOptions, Machine};
use firn_tests::{micro, with_machines};
use nix::sys::socket::{Backlog, listen};
use tempfile::TempDir;

/// How soon a call fails whose guest has ended. The commands here would run for much longer.
const AT_ONCE: Duration = Duration::from_secs(15);

/// The end that a call failed with, and the console lines it quotes.
#[track_caller]
fn end_of<T: std::fmt::Debug>(answer: Result<T, Error>) -> (End, Tail) {
    match answer {
        Err(Error::Machine(MachineError::Ended { end, tail, .. })) => ((*end).clone(), tail),
        other => panic!("the guest has ended, and the call says {other:?}"),
    }
}

async fn execute(machine: &Machine, command: &str) -> Result<(i32, String), Error> {
    machine.execute(command, ExecOptions::default()).await
}

/// Boots a guest and has it end itself by `command`, while that and another call wait.
fn ends_by(extra_cmdline: &str, command: &str) -> (End, Tail) {
    let cmdline = format!("{} {extra_cmdline}", micro().manifest.cmdline);
    let mut result = None;
    with_machines(&format!("[nodes.m]\ncmdline = {cmdline:?}"), async |driver| {
        let machine = &driver.machines()[0];
        machine.connect().await.unwrap();
        let began = Instant::now();
        let command = format!("echo last words >/dev/console; {command}; sleep 100");
        let text = machine.wait_for_console("what is never printed", |_| Ok(None), None);
        let (answer, text) = tokio::join!(execute(machine, &command), text);
        assert!(began.elapsed() < AT_ONCE, "it took {:?}", began.elapsed());
        let (end, tail) = end_of(answer);
        assert_eq!(end_of(text).0, end);
        assert!(tail.0.iter().any(|line| line.contains("last words")), "{tail}");
        assert!(!machine.booted());
        // So does whoever comes later, until somebody has taken note.
        assert_eq!(end_of(execute(machine, "true").await).0, end);
        machine.crash().await;
        result = Some((end, tail));
    });
    result.expect("the script has run")
}

/// What another machine's kernel said, as a test may show it.
const ANOTHERS_PANIC: &str = "Kernel panic - not syncing: another machine's";

#[test]
fn a_panic_ends_the_waiting_calls() {
    let print = format!("echo \"<1>{ANOTHERS_PANIC}\" >/dev");
    let bound = "[ -e /sys/bus/platform/drivers/pvpanic-mmio/QEMU0001:00 ]";
    for (cmdline, before) in [
        // With a driver for pvpanic even the kernel may print what it likes.
        ("", format!("{bound} && {print}/kmsg; {print}/console")),
        ("module_blacklist=pvpanic_mmio", format!("{bound} || {print}/console")),
    ] {
        let (end, tail) = ends_by(cmdline, &format!("{before}; echo c >/proc/sysrq-trigger"));
        let End::Panicked(message) = &end else { panic!("{end}: {tail}") };
        assert!(message.contains("sysrq triggered crash"), "{message}");
        let panics = tail.0.iter().filter(|line| line.contains("Kernel panic - not syncing"));
        assert_eq!(panics.count(), if cmdline.is_empty() { 3 } else { 2 }, "{tail}");
    }
}

#[test]
fn a_triple_fault_ends_the_waiting_calls() {
    // This way of rebooting loads an empty interrupt table and raises an interrupt.
    let (end, _) = ends_by("reboot=t", "echo b >/proc/sysrq-trigger");
    let End::VcpuDied { vcpu: 0, reason } = &end else { panic!("{end}") };
    assert!(reason.contains("triple fault"), "{reason}");
}

#[test]
fn a_power_off_ends_the_waiting_calls() {
    assert_eq!(ends_by("", "poweroff -f").0, End::PoweredOff);
}

#[test]
fn a_reset_ends_the_waiting_calls() {
    assert_eq!(ends_by("", "reboot -f").0, End::Reset);
}

#[test]
fn a_panic_before_the_agent_is_there_ends_the_wait_for_it() {
    let cmdline = format!("{} rdinit=/nothing", micro().manifest.cmdline);
    with_machines(&format!("[nodes.m]\ncmdline = {cmdline:?}"), async |driver| {
        let (end, tail) = end_of(driver.machines()[0].connect().await);
        let End::Panicked(message) = &end else { panic!("{end}: {tail}") };
        assert!(message.contains("VFS") || message.contains("init"), "{message}");
    });
}

#[test]
fn a_machine_that_ended_starts_again() {
    with_machines("[nodes.m]", async |driver| {
        let machine = &driver.machines()[0];
        end_of(execute(machine, "poweroff -f; sleep 100").await);
        machine.wait_for_shutdown().await.unwrap();
        assert_eq!(execute(machine, "echo again").await.unwrap(), (0, "again\n".to_owned()));
    });
}

/// What the start of a machine with these boot files says.
fn start_error(kernel: &Path, initrd: &Path) -> String {
    // The test file has been read when they are found to be bad.
    let (good_kernel, good_initrd) = (micro().vmlinux(), micro().initrd());
    let mut config = firn_tests::config(&format!(
        "[nodes.m]\nkernel = {good_kernel:?}\ninitrd = [{good_initrd:?}]"
    ));
    config.nodes[0].kernel = Some(kernel.to_owned());
    config.nodes[0].initrd = Some(vec![initrd.to_owned()]);
    let mut said = String::new();
    firn_tests::with_config(&config, async |driver| {
        let machine = &driver.machines()[0];
        let error = machine.start(false).await.expect_err("it cannot start");
        assert!(matches!(error, Error::Machine(MachineError::Start { .. })), "{error:?}");
        assert!(!machine.booted());
        said = chain(&error);
    });
    said
}

/// The first bytes of a file, in a file of their own.
fn head(dir: &TempDir, file: &Path, length: impl FnOnce(usize) -> usize) -> std::path::PathBuf {
    let bytes = fs::read(file).unwrap();
    let path = dir.path().join("head");
    fs::write(&path, &bytes[..length(bytes.len())]).unwrap();
    path
}

#[test]
fn kernels_and_initrds_that_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let kit = micro();
    let (kernel, initrd) = (kit.kernel(), kit.initrd());
    let gone = dir.path().join("gone");

    let said = start_error(&gone, &initrd);
    assert!(said.contains("cannot read kernel") && said.contains("/gone"), "{said}");
    assert!(said.contains("No such file"), "{said}");
    let said = start_error(&head(&dir, &kernel, |length| length / 2), &initrd);
    assert!(said.contains("kernel") && said.contains("/head is truncated"), "{said}");
    let said = start_error(&head(&dir, &kit.vmlinux(), |length| length / 2), &initrd);
    assert!(said.contains("cannot load kernel") && said.contains("/head"), "{said}");
    let said = start_error(&head(&dir, &kernel, |_| 100), &initrd);
    assert!(said.contains("is no kernel"), "{said}");
    let said = start_error(&initrd, &initrd);
    assert!(said.contains("is no kernel") && said.contains("/initrd"), "{said}");

    let said = start_error(&kernel, &gone);
    assert!(said.contains("cannot read initrd") && said.contains("/gone"), "{said}");
    let said = start_error(&kernel, &head(&dir, &initrd, |_| 0));
    assert!(said.contains("initrd") && said.contains("is empty"), "{said}");
    let said = start_error(&kernel, &head(&dir, &initrd, |length| length / 2));
    assert!(said.contains("initrd") && said.contains("/head is truncated"), "{said}");
}

/// An initrd like the kit's, but with this script as process 1. `$port` is the agent's port.
fn initrd_with(dir: &TempDir, script: &str) -> std::path::PathBuf {
    const SET_UP: &str = "#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
while read -r module; do insmod $module; done </etc/firn/modules
until port=$(grep -l org.firn.agent /sys/class/virtio-ports/*/name); do :; done
port=/dev/$(basename ${port%/name})
";
    let mut bytes = fs::read(micro().initrd()).unwrap();
    let script = format!("{SET_UP}{script}\nwhile :; do sleep 100; done\n");
    let init = cpio::newc::Builder::new("init")
        .mode(0o755)
        .set_mode_file_type(cpio::newc::ModeFileType::Regular);
    cpio::write_cpio([(init, std::io::Cursor::new(script))].into_iter(), &mut bytes).unwrap();
    let path = dir.path().join("initrd");
    fs::write(&path, bytes).unwrap();
    path
}

/// What a call says that waits for such an agent.
fn lost_agent(script: &str, wait: impl AsyncFnOnce(&Driver) -> Error) -> String {
    let dir = tempfile::tempdir().unwrap();
    let initrd = initrd_with(&dir, script);
    let mut said = String::new();
    with_machines(&format!("[nodes.m]\ninitrd = [{initrd:?}]"), async |driver| {
        let error = wait(driver).await;
        assert!(matches!(error, Error::Machine(MachineError::AgentLost { .. })), "{error:?}");
        // Nobody has to wait again, and the machine can still be ended.
        let again = driver.machines()[0].connect().await;
        assert!(matches!(again, Err(Error::Machine(MachineError::AgentLost { .. }))), "{again:?}");
        assert!(driver.machines()[0].booted());
        said = chain(&error);
    });
    said
}

async fn connect_error(driver: &Driver) -> Error {
    driver.machines()[0].connect().await.expect_err("this is no agent")
}

#[test]
fn an_agent_that_never_greets_but_sends_garbage() {
    let said = lost_agent("cat /dev/zero >$port", connect_error);
    assert!(said.contains("m lost its agent") && said.contains("garbage"), "{said}");
}

/// Answers the hello as an agent does, with its kind (byte 14) changed to `welcome`.
const WELCOME: &str = "exec 3<>$port; head -c 25 <&3 >/hello
{ head -c 14 /hello; printf '\\003'; tail -c 10 /hello; } >&3
";

#[test]
fn an_agent_that_greets_and_then_sends_garbage() {
    let script = format!("{WELCOME}printf '\\377\\377\\377\\377garbage' >&3; cat /dev/zero >&3");
    let said = lost_agent(&script, connect_error);
    assert!(said.contains("m lost its agent") && said.contains("garbage"), "{said}");
}

#[test]
fn an_agent_of_another_version() {
    let welcome = WELCOME.replace("head -c 14 /hello", "head -c 12 /hello; printf '\\111\\0'");
    let said = lost_agent(&welcome, connect_error);
    assert!(said.contains("protocol version 73"), "{said}");
}

#[test]
fn a_guest_takes_no_descriptors_of_others() {
    // The limit is the process's, and other tests need more.
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 3000; exec \"$0\" \"$@\""]);
    limited.arg(std::env::current_exe().unwrap());
    limited.args(["--ignored", "--exact", "--nocapture", "trouble::a_greedy_guest"]);
    let output = limited.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "a_guest_takes_no_descriptors_of_others runs it where there are few"]
fn a_greedy_guest() {
    with_machines("[nodes.a]\nmemory = 512\n[nodes.b]", async |driver| {
        driver.start_all().await.unwrap();
        let [a, b] = driver.machines() else { panic!("two machines") };
        // The host's kernel takes them all: of what waits in vain for that, the gateway tires.
        let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listen(&silent, Backlog::new(512).unwrap()).unwrap();
        let port = silent.local_addr().unwrap().port();
        let connect = format!(
            "mkfifo /run/never; exec 3<>/run/never; for i in $(seq 300); do \
             nc 10.0.2.2 {port} <&3 >/dev/null 2>&1 & done"
        );
        a.succeed(&[&connect], None).await.unwrap();
        // Each takes two: the guest keeps its inode, and has it open.
        for dir in ["/tmp/xchg", "/tmp/shared"] {
            let hold = format!(
                "cd {dir} && touch $(seq 250) && {{ tail -f $(seq 250) >/dev/null 2>/run/said & }}; \
                 for i in $(seq 100); do grep 'open files' /run/said && break; sleep 1; done | head -n 1"
            );
            let said = a.succeed(&[&hold], None).await.unwrap();
            assert!(said.contains("Too many open files in system"), "{said}");
        }
        // Much is open, but far from all: the driver goes on, and so does everybody else.
        let open = fs::read_dir("/proc/self/fd").unwrap().count();
        assert!((500..2500).contains(&open), "{open} files are open");
        let _held: Vec<_> = (0..200).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let command = "cd /tmp/xchg && touch $(seq 50) && echo hello >/tmp/shared/word";
        b.succeed(&[command], None).await.unwrap();
        let answering = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = answering.local_addr().unwrap().port();
        let connect = format!("nc 10.0.2.2 {port} </dev/null >/dev/null 2>&1 &");
        b.succeed(&[&connect], None).await.unwrap();
        drop(tokio::task::spawn_blocking(move || answering.accept().unwrap()).await.unwrap());
        a.succeed(&["true"], None).await.unwrap();
    });
}
