//! `firn carrier exec` as people use it. Each test boots a carrier, or several.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long an ended firn may leave anything behind.
const GRACE: Duration = Duration::from_secs(2);

/// The program under test: it lies beside the directory that this test is in.
fn firn() -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let firn = this.parent().unwrap().parent().unwrap().join("firn");
    assert!(firn.is_file(), "build {} first: cargo build -p firn-cli", firn.display());
    firn
}

/// A command in a carrier, in the working directory `dir`.
fn carrier(dir: &Path, command: &[&str]) -> Command {
    let mut firn = Command::new(firn());
    firn.args(["carrier", "exec", "--memory", "1024", "--"]).args(command);
    firn.current_dir(dir).stdin(Stdio::null());
    firn
}

fn run(dir: &Path, command: &[&str]) -> Output {
    carrier(dir, command).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Starts a command that prints a line when it runs and then stays; waits for that line.
fn start_and_stay(dir: &Path) -> (Child, u32) {
    let mut command = carrier(dir, &["sh", "-c", "echo up; exec sleep 1000"]);
    let mut firn = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(firn.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    let qemu = qemu_of(firn.id()).expect("firn runs, but no QEMU");
    (firn, qemu)
}

/// The process name and the parent of a process that has not ended.
fn alive(pid: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "PID (NAME) STATE PARENT ...", and the name may hold anything.
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    // A zombie holds nothing; its parent may be slow to bury it.
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (state != "Z").then(|| (name.to_owned(), parent))
}

fn qemu_of(parent: u32) -> Option<u32> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.into_iter().find(|&pid| {
        alive(pid).is_some_and(|(name, its)| its == parent && name.starts_with("qemu"))
    })
}

fn send(signal: &str, pid: u32) {
    assert!(Command::new("kill").arg(signal).arg(pid.to_string()).status().unwrap().success());
}

fn assert_gone(pid: u32, since: Instant) {
    while alive(pid).is_some() {
        assert!(since.elapsed() < GRACE, "process {pid} outlives firn");
        // Nobody tells a stranger of a process's end.
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn runs_a_command_of_the_host_beside_a_working_kvm() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("in"), "from the host").unwrap();
    let script = "cat in; echo complaint >&2; echo from inside >out; exec 3<>/dev/kvm || exit 8
        touch /usr/firn-was-here 2>/dev/null && exit 9
        cp in /tmp/firn-inside && [ \"$MARK\" = 'a b' ] && exit 42";
    let output = carrier(dir.path(), &["sh", "-c", script]).env("MARK", "a b").output().unwrap();
    assert_eq!(text(&output.stdout), "from the host");
    let stderr = text(&output.stderr);
    assert!(stderr.ends_with("complaint\n"), "{stderr}");
    assert_eq!(output.status.code(), Some(42), "{stderr}");
    assert_eq!(fs::read_to_string(dir.path().join("out")).unwrap(), "from inside\n");
    assert!(!Path::new("/tmp/firn-inside").exists(), "/tmp reached the host");
}

#[test]
fn streams_both_ways_while_the_command_runs() {
    let dir = tempfile::tempdir().unwrap();
    let script = "echo ready; read -r line; echo \"got $line\"; cat";
    let mut command = carrier(dir.path(), &["sh", "-c", script]);
    let mut firn = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = firn.stdin.take().unwrap();
    let mut stdout = BufReader::new(firn.stdout.take().unwrap());
    let mut line = String::new();
    // It answers before its input ends, and after.
    stdout.read_line(&mut line).unwrap();
    stdin.write_all(b"word\n").unwrap();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\ngot word\n");
    let much = "0123456789abcdef".repeat(1 << 17);
    let (sent, received) = std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut rest = String::new();
            stdout.read_to_string(&mut rest).map(|_| rest)
        });
        let sent = stdin.write_all(much.as_bytes());
        drop(stdin);
        (sent, reader.join().unwrap().unwrap())
    });
    sent.unwrap();
    assert!(received == much, "{} bytes of {} came back", received.len(), much.len());
    assert!(firn.wait().unwrap().success());
}

#[test]
fn a_signal_is_told_as_a_shell_tells_it() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run(dir.path(), &["sh", "-c", "kill -KILL $$"]).status.code(), Some(137));
    let missing = run(dir.path(), &["no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    assert!(text(&missing.stderr).contains("no-such-program"), "{}", text(&missing.stderr));
}

#[test]
fn ctrl_c_and_sigterm_end_everything_in_time() {
    let dir = tempfile::tempdir().unwrap();
    for (signal, status) in [("-INT", 130), ("-TERM", 143)] {
        let (mut firn, qemu) = start_and_stay(dir.path());
        let sent = Instant::now();
        send(signal, firn.id());
        assert_eq!(firn.wait().unwrap().code(), Some(status));
        assert!(sent.elapsed() < GRACE, "it took {:?}", sent.elapsed());
        assert_gone(qemu, sent);
    }
}

#[test]
fn a_stubborn_command_ends_too() {
    let dir = tempfile::tempdir().unwrap();
    let script = "trap '' INT TERM; echo up; while :; do sleep 1; done";
    let mut command = carrier(dir.path(), &["sh", "-c", script]);
    let mut firn = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(firn.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let sent = Instant::now();
    send("-TERM", firn.id());
    assert_eq!(firn.wait().unwrap().code(), Some(143));
    assert!(sent.elapsed() < GRACE, "it took {:?}", sent.elapsed());
}

#[test]
fn sigterm_during_boot_ends_it_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let mut firn = carrier(dir.path(), &["true"]).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let qemu = loop {
        if let Some(qemu) = qemu_of(firn.id()) {
            break qemu;
        }
        assert!(Instant::now() < deadline, "QEMU did not start");
        std::thread::sleep(Duration::from_millis(5));
    };
    let sent = Instant::now();
    send("-TERM", firn.id());
    assert_eq!(firn.wait().unwrap().code(), Some(143));
    assert_gone(qemu, sent);
}

#[test]
fn a_killed_firn_leaves_no_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let (mut firn, qemu) = start_and_stay(dir.path());
    let sent = Instant::now();
    send("-KILL", firn.id());
    firn.wait().unwrap();
    assert_gone(qemu, sent);
}

#[test]
fn a_killed_qemu_is_reported_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = carrier(dir.path(), &["sh", "-c", "echo up; exec sleep 1000"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut firn = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(firn.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let sent = Instant::now();
    send("-KILL", qemu_of(firn.id()).unwrap());
    let output = firn.wait_with_output().unwrap();
    assert!(sent.elapsed() < GRACE, "it took {:?}", sent.elapsed());
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("signal: 9"), "{}", text(&output.stderr));
}

#[test]
fn a_carrier_with_a_wrong_clock_is_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let tools = dir.path().join("bin");
    fs::create_dir(&tools).unwrap();
    // The first carrier's kernel is told half of the frequency.
    let qemu = tools.join("qemu-system-x86_64");
    let script = "#!/bin/bash\n\
                  if ! [ -e started ]; then\n\
                    touch started\n\
                    all=\"$*\"; khz=${all#*tsc_early_khz=}; khz=${khz%% *}\n\
                    set -- \"${@/tsc_early_khz=*/tsc_early_khz=$((khz / 2))}\"\n\
                  fi\n\
                  PATH=${PATH#*:} exec qemu-system-x86_64 \"$@\"\n";
    fs::write(&qemu, script).unwrap();
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let output = carrier(dir.path(), &["cat", "/proc/cmdline"]).env("PATH", path).output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let told = stderr.split_once("its clock runs at ").unwrap_or_else(|| panic!("{stderr}")).1;
    let (speed, rest) = told.split_once(" times the host's").unwrap();
    assert!((1.8..2.2).contains(&speed.parse::<f64>().unwrap()), "{stderr}");
    assert!(rest.contains("starting it again"), "{stderr}");
    assert_eq!(stderr.matches("starting it again").count(), 1, "{stderr}");
}

#[test]
fn a_carrier_hides_what_its_guests_cannot_use() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(dir.path(), &["grep", "-m1", "^flags", "/proc/cpuinfo"]);
    let flags = text(&output.stdout);
    assert!(flags.contains(" svm "), "{flags}{}", text(&output.stderr));
    let hidden = ["xsave", "avx", "avx2", "f16c", "fma", "mpx", "pku", "vaes"];
    let there: Vec<_> = flags.split_whitespace().filter(|flag| hidden.contains(flag)).collect();
    assert!(there.is_empty(), "{there:?}");
}

#[test]
fn a_busy_carriers_kvm_is_not_called_an_interpreter() {
    let dir = tempfile::tempdir().unwrap();
    let busy: Vec<_> = (0..2)
        .map(|_| Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap())
        .collect();
    let firn = firn();
    let script = format!(
        "(while :; do :; done) & \
         for n in 1 2 3; do FIRN_PYTHON=/none {} doctor | grep '^kvm'; done; kill $!",
        firn.display()
    );
    let output = run(dir.path(), &["bash", "-c", &script]);
    for mut process in busy {
        process.kill().unwrap();
        process.wait().unwrap();
    }
    let said = text(&output.stdout);
    let good = said.lines().filter(|line| line.contains(" ok ")).count();
    assert_eq!(good, 3, "{said}{}", text(&output.stderr));
}

#[test]
fn a_missing_qemu_is_named_with_its_package() {
    let dir = tempfile::tempdir().unwrap();
    let tools = dir.path().join("bin");
    fs::create_dir(&tools).unwrap();
    std::os::unix::fs::symlink("/usr/bin/setpriv", tools.join("setpriv")).unwrap();
    let output = carrier(dir.path(), &["true"]).env("PATH", &tools).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("install Debian's package qemu-system-x86"), "{stderr}");
}
