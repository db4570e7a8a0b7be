//! `firn test` as people run it, when something goes wrong: what it says, and what it leaves behind.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant, SystemTime};

use firn_tests::{PATIENCE, SmallFileSystem, firn, micro};
use tempfile::TempDir;

/// How long an ended firn may leave anything behind.
const GRACE: Duration = Duration::from_secs(2);

/// A `firn test` that runs, in a process group and a `TMPDIR` of its own.
struct Run {
    firn: Child,
    /// What it prints, stdout and stderr together, a line each.
    lines: Receiver<String>,
    said: String,
    places: Places,
}

/// The directories of a run.
struct Places {
    test: TempDir,
    out: TempDir,
    tmp: TempDir,
    /// Where booted worlds are kept.
    worlds: PathBuf,
}

impl Places {
    fn new(nodes: &str, script: &str) -> Self {
        let dir = || tempfile::tempdir().unwrap();
        let test = dir();
        let this = Self { worlds: test.path().join("worlds"), test, out: dir(), tmp: dir() };
        let toml = format!("test_script = '''\n{script}\n'''\n{nodes}\n");
        fs::write(this.test.path().join("test.toml"), toml).unwrap();
        this
    }

    fn start(self, args: &[&str]) -> Run {
        let mut command = Command::new(firn());
        command.args(["test", "--accel", "kvm", "-o"]).arg(self.out.path()).args(args);
        command.arg(self.test.path().join("test.toml"));
        command.env("TMPDIR", self.tmp.path()).env("NO_COLOR", "1").process_group(0);
        command.env("FIRN_WORLDS", &self.worlds);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut firn = command.spawn().unwrap();
        let (sender, lines) = mpsc::channel();
        forward(firn.stdout.take().unwrap(), sender.clone());
        forward(firn.stderr.take().unwrap(), sender);
        Run { firn, lines, said: String::new(), places: self }
    }

    /// What is left in its `TMPDIR`.
    fn left(&self) -> Vec<String> {
        let mut found = Vec::new();
        walk(self.tmp.path(), &mut |path| found.push(path.display().to_string()));
        found
    }
}

/// Passes on what a pipe brings until all its writers are gone.
fn forward(pipe: impl Read + Send + 'static, lines: mpsc::Sender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines() {
            if line.map(|line| lines.send(line)).is_err() {
                return;
            }
        }
    });
}

fn walk(dir: &Path, found: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        found(&entry.path());
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), found);
        }
    }
}

impl Run {
    /// Waits until it prints something.
    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.said.push_str(&line);
                    self.said.push('\n');
                    if line.contains(text) {
                        return;
                    }
                }
                Err(error) => {
                    let _ = self.firn.kill();
                    panic!("no {text:?} ({error}) in:\n{}", self.said);
                }
            }
        }
    }

    /// Sends a signal to the process group, as a terminal does, or a CI system.
    fn signal(&self, name: &str) {
        let group = format!("-{}", self.firn.id());
        assert!(Command::new("kill").args([name, "--", &group]).status().unwrap().success());
    }

    /// Waits for its end. Then no process of it may be left, and none that holds its output open.
    fn finish(mut self) -> (ExitStatus, String, Places) {
        let status = self.firn.wait().unwrap();
        let deadline = Instant::now() + GRACE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.said.extend([line.as_str(), "\n"]),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("somebody still holds its output"),
            }
        }
        assert_eq!(processes_of(self.places.tmp.path()), [""; 0], "outlive firn");
        (status, self.said, self.places)
    }
}

/// The command lines of the processes with this `TMPDIR`.
fn processes_of(tmp: &Path) -> Vec<String> {
    let mark = format!("TMPDIR={}", tmp.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        // Those that have ended meanwhile cannot be read.
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environ.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push(String::from_utf8_lossy(&command).replace('\0', " "));
        }
    }
    found
}

/// Runs a test to its end; nothing may be left of it.
fn run(nodes: &str, script: &str, args: &[&str]) -> (ExitStatus, String) {
    let (status, said, places) = Places::new(nodes, script).start(args).finish();
    assert_eq!(places.left(), [""; 0]);
    (status, said)
}

#[test]
fn a_script_that_raises_is_shown_with_its_own_frames() {
    let script = "def check():\n    m.succeed(\"exit 3\")\n\ncheck()";
    let (status, said) = run("[nodes.m]", script, &[]);
    assert_eq!(status.code(), Some(1), "{said}");
    for part in [
        "Traceback (most recent call last):",
        "test.toml\", line 5, in <module>",
        "check()",
        "test.toml\", line 3, in check",
        "m.succeed(\"exit 3\")",
        "RequestedAssertionFailed: command `exit 3` failed (exit code 3)",
    ] {
        assert!(said.contains(part), "{part:?} is missing in:\n{said}");
    }
    let frames = said.lines().filter(|line| line.contains("File \"")).count();
    assert_eq!(frames, 2, "{said}");
}

#[test]
fn a_guest_that_panics_ends_the_script_with_its_last_lines() {
    let script = "m.succeed(\"echo c >/proc/sysrq-trigger; sleep 100\")";
    let (status, said) = run("[nodes.m]", script, &[]);
    assert_eq!(status.code(), Some(1), "{said}");
    let (_, traceback) = said.split_once("Traceback").unwrap_or_else(|| panic!("{said}"));
    for part in [&script[..20], "m panicked: ", "last lines of its console:", "Kernel panic"] {
        assert!(traceback.contains(part), "{part:?} is missing in:\n{said}");
    }
}

#[test]
fn the_global_timeout_ends_everything() {
    let began = Instant::now();
    let (status, said) = run("[nodes.m]", "m.succeed(\"sleep 1000\")", &["--global-timeout", "12"]);
    assert_eq!(status.signal(), Some(15), "{status}: {said}");
    assert!(said.contains("Timeout of 12 seconds reached, exiting"), "{said}");
    assert!(began.elapsed() < PATIENCE, "it took {:?}", began.elapsed());
}

/// A script that says when its command runs.
const LONG_COMMAND: &str = "m.succeed(\"echo run''ning >/dev/console; sleep 1000\")";

/// Sends a signal when the log says `event`; nothing may be left. Answers how long the end took.
fn end_by(signal: &str, code: i32, event: &str) -> Duration {
    let mut run = Places::new("[nodes.m]", LONG_COMMAND).start(&[]);
    // The first start of a program in the carrier takes a while: not in the measured time.
    run.signal("-0");
    run.wait_for(event);
    let sent = Instant::now();
    run.signal(signal);
    let (status, said, places) = run.finish();
    let took = sent.elapsed();
    assert_eq!(status.code(), Some(code), "{signal} at {event:?}: {said}");
    assert_eq!(places.left(), [""; 0]);
    assert_eq!(fs::read_dir(places.out.path()).unwrap().count(), 0);
    took
}

#[test]
fn signals_end_everything_in_time() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        for event in ["waiting for the VM to finish booting", "running"] {
            // On a loaded machine emulation may stand still for a second; not three times.
            let mut tries = (0..3).map(|_| end_by(signal, code, event));
            assert!(tries.any(|took| took < GRACE), "{signal} at {event:?} takes too long");
        }
    }
}

#[test]
fn a_killed_run_leaves_only_files_and_the_next_run_removes_them() {
    let script = format!("start_all()\nn.connect()\n{LONG_COMMAND}");
    let mut run = Places::new("[nodes.m]\n[nodes.n]", &script).start(&[]);
    run.wait_for("running");
    run.signal("-KILL");
    let (status, _, places) = run.finish();
    assert_eq!(status.signal(), Some(9));

    walk(places.tmp.path(), &mut |path| {
        let socket = path.symlink_metadata().unwrap().file_type().is_socket();
        assert!(!socket, "{} is left", path.display());
    });
    // Directories that are just being made are not touched, so this one has to look its age.
    let state = fs::read_dir(places.tmp.path()).unwrap().next().expect("it was killed").unwrap();
    let lock = fs::File::options().write(true).open(state.path().join("lock")).unwrap();
    lock.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
    drop(lock);
    fs::write(places.test.path().join("test.toml"), "test_script = ''\n[nodes.m]\n").unwrap();
    let (status, said, places) = places.start(&[]).finish();
    assert!(status.success(), "{said}");
    assert_eq!(places.left(), [""; 0]);
}

#[test]
fn a_run_killed_while_it_keeps_its_boot_leaves_nothing_that_is_used_or_stays() {
    let script = "print('boot', m.succeed('dmesg | sed -n 1,50p | md5sum'))";
    let places = Places::new("[nodes.m]", script);
    let worlds = places.worlds.clone();
    let names = || {
        let names = fs::read_dir(&worlds).into_iter().flatten().flatten();
        names.map(|entry| entry.path().display().to_string()).collect::<Vec<_>>()
    };
    let writes = || {
        let is_new = |name: &&String| name.ends_with(".new");
        names().iter().find(is_new).is_some_and(|dir| {
            fs::metadata(Path::new(dir).join("m.memory")).is_ok_and(|file| file.len() > 0)
        })
    };
    let start = |places: Places| {
        let mut run = places.start(&["--from-boot"]);
        // By then, what an earlier run has left is gone.
        run.wait_for("checkpoint after the boot");
        let deadline = Instant::now() + PATIENCE;
        while !writes() {
            assert!(Instant::now() < deadline, "nothing is kept");
            std::thread::yield_now();
        }
        run
    };
    let run = start(places);
    run.signal("-KILL");
    let (status, said, places) = run.finish();
    assert_eq!(status.signal(), Some(9), "{said}");
    let half = |name: &String| name.ends_with(".new") || name.ends_with(".lock");
    assert!(names().len() == 2 && names().iter().all(half), "{:?}", names());

    let id = |said: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix("boot ")).map(str::to_owned);
        line.unwrap_or_else(|| panic!("{said}"))
    };
    // Another process boots while this one is in the midst of it, and leaves it alone.
    let run = start(places);
    run.signal("-STOP");
    let other = Places { worlds: worlds.clone(), ..Places::new("[nodes.m]", script) };
    let (status, said, _other) = other.start(&["--from-boot"]).finish();
    let fresh = "boots afresh: no world of this test has been kept";
    assert!(status.success() && said.contains(fresh), "{said}");
    assert!(said.contains("another run keeps this world"), "{said}");
    let other = id(&said);
    run.signal("-CONT");
    let (status, said, places) = run.finish();
    assert!(status.success(), "{said}");
    assert!(said.contains(fresh) && said.contains("kept the booted world in "), "{said}");
    let first = id(&said);
    assert_ne!(first, other);
    assert!(names().len() == 1 && !half(&names()[0]), "{:?}", names());

    // The file may say it too, and the script may change.
    let text = format!(
        "from_boot = true\ntest_script = \"\"\"\nstart_all()\nm.connect()\n{script}\n\"\"\"\n[nodes.m]\n"
    );
    fs::write(places.test.path().join("test.toml"), text).unwrap();
    let (status, said, places) = places.start(&[]).finish();
    assert!(status.success() && said.contains("started from the world kept in "), "{said}");
    assert_eq!(id(&said), first);

    // As if another processor had written it.
    let entry = PathBuf::from(&names()[0]);
    of_another_processor(&entry);
    fs::rename(&entry, worlds.join("0".repeat(64))).unwrap();
    let (status, said, _places) = places.start(&[]).finish();
    let why = "boots afresh: the host's processor or KVM has changed\n";
    assert!(status.success() && said.contains(why), "{said}");
    assert!(id(&said) != first && entry.exists() && names().len() == 2, "{:?}", names());

    let cache = |args: &[&str]| {
        let ran = Command::new(firn()).arg("cache").args(args).env("FIRN_WORLDS", &worlds).output();
        let ran = ran.unwrap();
        assert!(ran.status.success(), "{ran:?}");
        String::from_utf8(ran.stdout).unwrap()
    };
    let list = cache(&[]);
    assert!(list.starts_with("TEST  SIZE") && list.contains("\ntest  "), "{list}");
    assert!(list.contains(" m\n2 worlds, "), "{list}");
    assert!(cache(&["clear", "test"]).starts_with("removed 2 worlds, "));
    assert_eq!(names(), [""; 0]);
}

/// Changes what a world says of the host on which it was kept.
fn of_another_processor(world: &Path) {
    let path = world.join("manifest.json");
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let host = manifest.pointer_mut("/key/the host's processor or KVM").unwrap();
    *host = "0".repeat(64).into();
    fs::write(&path, manifest.to_string()).unwrap();
}

/// What the derivations of a NixOS test run that starts from a booted world.
#[test]
fn a_world_in_a_directory_is_only_read_and_used_where_it_fits() {
    let script = "print('boot', m.succeed('dmesg | sed -n 1,50p | md5sum'))\nm.send_key('a')";
    let places = Places::new("[nodes.m]", script);
    let [dir, tmp] = [places.test.path(), places.tmp.path()];
    let kit = micro();
    let machine = serde_json::json!({
        "firn": 1, "name": "m", "memory": 256, "kernel": kit.kernel(), "initrd": [kit.initrd()],
        "cmdline": kit.manifest.cmdline, "vlans": [1],
        "disks": [{ "image": "${NIX_DISK_IMAGE:-m.img}", "size": 8 }],
        "shares": [{ "tag": "xchg", "source": "${TMPDIR}/xchg" }],
    });
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let start = write("run-m-vm", format!("#!{} run\n{machine}\n", firn().display()));
    let config = |name: &str, script: &Path| {
        let vms = serde_json::json!({ "m": { "name": "m", "start_script": start } });
        let config = serde_json::json!({ "vms": vms, "vlans": [1], "test_script": script });
        write(name, config.to_string())
    };
    let none = config("none.json", &write("no-script", String::new()));
    let test = config("test.json", &write("test-script", script.to_owned()));
    let driver = |config: &Path, args: &[&Path], world: Option<&Path>| {
        let mut command = Command::new(firn().with_file_name("nixos-test-driver"));
        command.args(["--accel", "kvm", "-o"]).arg(places.out.path());
        command.arg("--config").arg(config).args(args).env("TMPDIR", tmp);
        command.env("NO_COLOR", "1").stdin(Stdio::null());
        let ran = command.envs(world.map(|world| ("FIRN_WORLD", world))).output().unwrap();
        let said = [ran.stdout, ran.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(ran.status.success(), "{said:?}");
        assert_eq!(places.left(), [""; 0]);
        said.concat()
    };
    let boot = |said: &str| said.lines().find(|line| line.starts_with("boot ")).map(str::to_owned);

    let world = dir.join("world");
    let said = driver(&none, &["--keep-world".as_ref(), &world], None);
    let place = format!("kept the booted world in {}", world.display());
    assert!(said.contains(&place) && boot(&said).is_none(), "{said}");
    let files = || {
        let mut files = Vec::new();
        walk(&world, &mut |path| {
            let meta = fs::metadata(path).unwrap();
            files.push((path.to_owned(), meta.len(), meta.modified().unwrap()));
        });
        files.sort();
        files
    };
    let before = files();
    let from = format!("started from the world kept in {}", world.display());
    let said = driver(&test, &[], Some(&world));
    assert!(said.contains(&from), "{said}");
    let first = boot(&said).unwrap();
    assert_eq!(boot(&driver(&test, &["--world".as_ref(), &world], None)).unwrap(), first);
    assert_eq!(files(), before);

    of_another_processor(&world);
    let said = driver(&test, &[], Some(&world));
    assert!(said.contains("boots afresh: the host's processor or KVM has changed\n"), "{said}");
    assert!(boot(&said).unwrap() != first && !said.contains("kept the booted world"), "{said}");
}

/// A limit to the size of files, also of those in memory: as if memory were full, which only containers can make it, and
/// those kill whoever asks for more.
const FILES_OF_AT_MOST: &str = r"
import contextlib, resource, signal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

@contextlib.contextmanager
def files_of_at_most(mib):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (mib << 20, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
";

/// The host's `TMPDIR` fills up, and then memory.
const NO_ROOM: &str = r#"
import os, pathlib, tempfile

def files():
    tmp = pathlib.Path(tempfile.gettempdir())
    return sorted(map(str, tmp.rglob("*"))), len(os.listdir("/proc/self/fd"))

def goes_on(text):
    m.succeed("test $(cat /tmp/count) = 1", f"printf {text} >/dev/vda; sync", f"echo {text} >/tmp/xchg/said")
    t.assertEqual((m.state_dir / "disk0.img").read_bytes()[:4], text.encode())

m.succeed("echo 1 >/tmp/count", "head -c 1000000 /dev/urandom >/tmp/xchg/data; sync")
before = files()
with tempfile.TemporaryFile(buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError as error:
        print("full:", error)
    with t.assertRaisesRegex(Exception, r"cannot copy \S+: its copy in \S+: No space left on device"):
        driver.checkpoint("no space")
t.assertEqual(files(), before)
goes_on("one!")

before = files()
with files_of_at_most(2), t.assertRaisesRegex(Exception, "cannot keep guest memory: File too large"):
    driver.checkpoint("no memory")
t.assertEqual(files(), before)
goes_on("two!")

first = driver.checkpoint("first")
m.succeed("echo 2 >/tmp/count; head -c 8000000 /dev/urandom >/tmp/noise")
before = files()
with files_of_at_most(2), t.assertRaisesRegex(Exception, "cannot keep guest memory: File too large"):
    driver.checkpoint("no more memory")
t.assertEqual(files(), before)
m.succeed("test $(cat /tmp/count) = 2")
first.rollback()
m.succeed("test $(cat /tmp/count) = 1 -a ! -e /tmp/noise", "test $(head -c 4 /dev/vda) = 'two!'")
"#;

#[test]
fn a_checkpoint_for_which_there_is_no_room_leaves_the_run_as_it_was() {
    let places =
        Places::new("[nodes.m]\ndisks = [{ size = 1 }]", &format!("{FILES_OF_AT_MOST}{NO_ROOM}"));
    let Some(small) = SmallFileSystem::mount(places.tmp.path(), 32) else { return };
    let (status, said, places) = places.start(&[]).finish();
    assert!(status.success(), "{said}");
    assert_eq!(places.left(), [""; 0]);
    drop(small);
}

/// There is room for the memory of the first machine, and not for the second one's.
const ROOM_FOR_ONE: &str = r#"
start_all()
m.connect()
n.connect()
refused = "n: cannot make a checkpoint: cannot keep guest memory: File too large"
with files_of_at_most(384), t.assertRaisesRegex(Exception, refused):
    driver.checkpoint("half")
m.succeed("printf mine >/dev/vda; sync")
# Nothing lies over the disk of the first, which nobody would ever take away.
t.assertEqual((m.state_dir / "disk0.img").read_bytes()[:4], b"mine")
with driver.checkpoint("whole"):
    m.succeed("printf lost >/dev/vda; sync")
m.succeed("test $(head -c 4 /dev/vda) = mine")
"#;

#[test]
fn a_checkpoint_of_half_the_machines_is_given_up() {
    let nodes = "[nodes.m]\nmemory = 256\ndisks = [{ size = 1 }]\n[nodes.n]\nmemory = 512";
    let (status, said, _places) =
        Places::new(nodes, &format!("{FILES_OF_AT_MOST}{ROOM_FOR_ONE}")).start(&[]).finish();
    assert!(status.success(), "{said}");
}
