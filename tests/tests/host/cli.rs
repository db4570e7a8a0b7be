//! What the command line says when something is wrong. Needs no guest and no working KVM.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use firn_tests::firn;
use firn_tests::skip::skipped;
use tempfile::TempDir;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(command: &mut Command) -> Output {
    command.env("NO_COLOR", "1").stdin(Stdio::null()).output().unwrap()
}

/// Runs `firn` with these arguments: its exit status, stdout and stderr.
fn call(args: &[&str]) -> (Option<i32>, String, String) {
    let output = run(Command::new(firn()).args(args));
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Writes a test file.
fn write_test(toml: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("test.toml"), toml).unwrap();
    dir
}

/// A test that needs no kit.
fn kitless() -> TempDir {
    let nodes = "[nodes.m]\nkernel = 'k'\ninitrd = ['k']\ncmdline = ''";
    let dir = write_test(&format!("test_script = ''\n{nodes}\n"));
    fs::write(dir.path().join("k"), "no kernel").unwrap();
    dir
}

/// What `firn test` says of a file that makes no sense; it must exit with 2 and name the line.
#[track_caller]
fn refused(toml: &str, line: usize) -> String {
    let dir = write_test(toml);
    let file = dir.path().join("test.toml");
    let (status, stdout, stderr) = call(&["test", file.to_str().unwrap()]);
    assert_eq!((status, stdout.as_str()), (Some(2), ""), "{stderr}");
    let place = format!("{}:{line}:", file.display());
    assert!(stderr.contains(&place), "{place} is not named:\n{stderr}");
    stderr
}

#[track_caller]
fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
}

#[test]
fn test_files_that_make_no_sense() {
    const HEAD: &str = "name = 'x'\ntest_script = ''\n";
    // The lines after the head, the line that is at fault, and what must be said.
    let cases: &[(&str, usize, &[&str])] = &[
        ("[nodes.m]\nmemroy = 512", 4, &["unknown field `memroy`", "`memory`", "`cores`"]),
        ("global_timeuot = 3\n[nodes.m]", 3, &["`global_timeuot`", "`global_timeout`"]),
        ("[nodes.m]\nmemory = '512'", 4, &["invalid type: string", "memory = '512'"]),
        ("[nodes.m]\nvlans = 1", 4, &["invalid type: integer", "vlans = 1"]),
        ("[nodes.m]\n[nodes.n]\n[nodes.m]", 5, &["duplicate key", "[nodes.m]"]),
        ("[nodes.a-b]\n[nodes.a_b]", 4, &["`a-b`", "`a_b`"]),
        ("[nodes.m]\nmemory = 0", 4, &["`nodes.m.memory`: 0", "allowed: ", "MiB"]),
        ("[nodes.m]\ncores = 33", 4, &["`nodes.m.cores`: 33", "allowed: 1 to 32"]),
        ("[nodes.m]\nvlans = [1, 300]", 4, &["`nodes.m.vlans[1]`: 300", "allowed: 1 to "]),
        (
            "[nodes.m]\nkernel = 'gone'",
            4,
            &["`nodes.m.kernel`", "/gone", "No such file", "allowed: "],
        ),
        ("[nodes.m]\ninitrd = ['/']", 4, &["`nodes.m.initrd[0]`", "is a directory", "allowed: "]),
        (
            "[[nodes.m.shares]]\ntag = 's'\nsource = 'gone'\ntarget = '/mnt'",
            5,
            &["`nodes.m.shares[0].source`", "/gone", "No such file"],
        ),
        (
            "[[nodes.m.shares]]\ntag = 's'\nsource = '.'\ntarget = 'mnt'",
            6,
            &["`nodes.m.shares[0].target`", "allowed: an absolute path"],
        ),
        ("global_timeout = -1\n[nodes.m]", 3, &["`global_timeout`: -1", "allowed: "]),
        ("[nodes.m", 3, &["[nodes.m"]),
    ];
    for (lines, line, parts) in cases {
        assert_has(&refused(&format!("{HEAD}{lines}\n"), *line), parts);
    }
    assert_has(&refused("test_script = ''\n", 1), &["needs a machine", "[nodes.machine]"]);
    assert_has(&refused("[nodes.m]\n", 1), &["missing key `test_script`"]);
}

#[test]
fn a_test_file_that_is_not_there() {
    let (status, _, stderr) = call(&["test", "/nowhere/test.toml"]);
    assert_eq!(status, Some(2));
    assert_has(&stderr, &["/nowhere/test.toml", "No such file"]);
}

#[test]
fn an_output_directory_that_cannot_be_written() {
    let dir = kitless();
    let file = dir.path().join("test.toml");
    let (status, _, stderr) = call(&["test", file.to_str().unwrap(), "-o", "/proc/firn"]);
    assert_eq!(status, Some(1));
    assert_has(&stderr, &["output directory /proc/firn"]);
}

#[test]
fn usage() {
    let (status, stdout, _) = call(&["--help"]);
    assert_eq!(status, Some(0));
    assert_has(&stdout, &["firn test", "firn doctor", "firn kit build micro", "Exit status"]);
    for command in ["test", "run", "check", "doctor", "kit", "carrier"] {
        let (status, stdout, _) = call(&[command, "--help"]);
        assert_eq!(status, Some(0), "firn {command} --help");
        assert_has(&stdout, &["Usage: firn ", command]);
    }
    let version = call(&["--version"]);
    assert_eq!(version, (Some(0), format!("firn {}\n", env!("CARGO_PKG_VERSION")), String::new()));
    for (args, said) in [
        (&[][..], "Usage: firn"),
        (&["tset"], "tset"),
        (&["test"], "FILE"),
        (&["test", "x.toml", "--accel", "magic"], "auto, kvm, carrier"),
        (&["test", "x.toml", "--global-timeout", "0"], "--global-timeout"),
        (
            &["kit", "build", "nonsense"],
            "there is no kit `nonsense`; kits are: micro, systemd, desktop, carrier",
        ),
        (&["carrier", "exec"], "CMD"),
    ] {
        let (status, _, stderr) = call(args);
        assert_eq!(status, Some(2), "firn {args:?}: {stderr}");
        assert_has(&stderr, &[said]);
    }
}

/// `firn doctor` in this environment: its exit status, and its lines by their first word.
fn doctor(command: &mut Command) -> (Option<i32>, impl Fn(&str) -> String + use<>) {
    let output = run(command);
    let stdout = text(&output.stdout);
    assert_eq!(stdout.lines().count(), 6, "{stdout}{}", text(&output.stderr));
    let line = move |what: &str| {
        let line = stdout.lines().find(|line| line.split_whitespace().next() == Some(what));
        line.unwrap_or_else(|| panic!("no {what} in:\n{stdout}")).to_owned()
    };
    (output.status.code(), line)
}

#[test]
fn doctor_of_a_host_where_tests_can_run() {
    let (status, line) = doctor(Command::new(firn()).arg("doctor"));
    assert_eq!(status, Some(0), "{}", line("tests"));
    assert_has(&line("tests"), &["tests can run"]);
    assert_has(&line("kit"), &[" ok ", "micro, Linux ", "systemd, Linux "]);
    assert_has(&line("python"), &[" ok ", "3."]);
    assert_has(&line("kvm"), &["/dev/kvm"]);
    assert_has(&line("ocr"), &[" ok ", "/tesseract"]);
}

#[test]
fn doctor_without_a_kit() {
    let cache = tempfile::tempdir().unwrap();
    let (status, line) =
        doctor(Command::new(firn()).arg("doctor").env("XDG_CACHE_HOME", cache.path()));
    assert_eq!(status, Some(1));
    assert_has(&line("kit"), &["MISSING", "run `firn kit build micro`"]);
    assert_has(&line("tests"), &["tests cannot run yet"]);
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0, "doctor only looks");
}

#[test]
fn doctor_without_the_python_package() {
    let dir = tempfile::tempdir().unwrap();
    let python = dir.path().join("python3");
    let script = "#!/bin/sh\necho 3.12.0\necho \"! No module named 'firn'\"\n";
    fs::write(&python, script).unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    let (status, line) = doctor(Command::new(firn()).arg("doctor").env("FIRN_PYTHON", &python));
    assert_eq!(status, Some(1));
    assert_has(&line("python"), &["MISSING", "no package firn", "FIRN_PYTHON"]);
}

/// Starts `command`, waits until it says `line`, and sends it a signal: how it ended, within seconds.
fn ended_by(mut command: Command, line: &str, signal: &str) -> ExitStatus {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|said| said.unwrap().contains(line)), "it did not say {line:?}");
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-s", signal, &id]).status().unwrap().success());
    for _ in 0..100 {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    child.kill().unwrap();
    panic!("{signal} did not end it");
}

#[test]
fn signals_end_what_waits_for_a_kit() {
    let cache = tempfile::tempdir().unwrap();
    fs::create_dir(cache.path().join("firn")).unwrap();
    let lock = fs::File::create(cache.path().join("firn/lock")).unwrap();
    lock.lock().unwrap();
    let waits = "another firn is building a kit";
    let firn = |args: &[&str]| {
        let mut command = Command::new(firn());
        command.args(args).env("XDG_CACHE_HOME", cache.path());
        command
    };
    for (name, number) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        let status = ended_by(firn(&["kit", "build", "micro"]), waits, name);
        assert_eq!(status.signal(), Some(number));
        let status = ended_by(firn(&["carrier", "exec", "--", "true"]), waits, name);
        assert_eq!(status.code(), Some(128 + number));
    }
}

#[test]
fn a_cache_that_is_not_ours_is_not_used() {
    let cache = tempfile::tempdir().unwrap();
    let root = cache.path().join("firn");
    fs::create_dir(&root).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
    let build = || {
        let output = run(Command::new(firn())
            .args(["kit", "build", "micro"])
            .env("XDG_CACHE_HOME", cache.path()));
        assert_eq!(output.status.code(), Some(1));
        text(&output.stderr)
    };
    let help = "set XDG_CACHE_HOME to another directory of yours";
    assert_has(&build(), &["firn can be written to by other users", help]);
    match chown(&root, Some(65534), None) {
        Ok(()) => assert_has(&build(), &["firn belongs to another user (65534)", help]),
        Err(error) => eprintln!("SKIPPED: only root gives directories away: {error}"),
    }
}

/// `firn` in a mount namespace in which `setup` has been run, in the directory `dir`.
fn confined(dir: &Path, setup: &str, path: &Path) -> Command {
    // Tools are found by our PATH, firn is run with its own.
    let script = format!(
        "set -e; cd \"$1\"; {setup}; shift; setpriv=$(command -v setpriv); export PATH=\"$1\"; shift; \
         exec \"$setpriv\" --bounding-set=-all --inh-caps=-all \"$@\""
    );
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"]);
    command.arg(dir).arg(path).arg(firn());
    command
}

/// Another /dev, with nothing but null in it.
const NO_KVM: &str = "mkdir dev; mount -t tmpfs none dev; : >dev/null; \
                      mount --bind /dev/null dev/null; mount --rbind dev /dev";
/// A /dev/kvm that is not for this user.
const LOCKED_KVM: &str = ": >locked; chmod 000 locked; mount --bind locked /dev/kvm";

#[test]
fn without_kvm() {
    let mut setups = vec![(NO_KVM, "/dev/kvm does not exist")];
    if Path::new("/dev/kvm").exists() {
        setups.push((LOCKED_KVM, "/dev/kvm may not be opened by this user"));
    } else {
        skipped("there is no /dev/kvm that could be locked");
    }
    for (setup, said) in setups {
        let bare = tempfile::tempdir().unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let (status, line) = doctor(confined(scratch.path(), setup, bare.path()).arg("doctor"));
        assert_eq!(status, Some(1), "there is no QEMU either");
        assert_has(&line("kvm"), &["MISSING", said]);
        assert_has(
            &line("carrier"),
            &["MISSING", "qemu-system-x86_64 is not in PATH", "qemu-system-x86"],
        );

        let dir = kitless();
        let file = dir.path().join("test.toml");
        for (accel, also) in [("kvm", "--accel carrier"), ("auto", "qemu-system-x86")] {
            let scratch = tempfile::tempdir().unwrap();
            let path = with_tool(bare.path(), "setpriv");
            let mut firn = confined(scratch.path(), setup, &path);
            firn.args(["test", "--accel", accel, "-o"]).arg(dir.path()).arg(&file);
            let output = run(&mut firn);
            let stderr = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{stderr}");
            assert_has(&stderr, &[said, also]);
            assert!(!stderr.contains("panicked"), "{stderr}");
        }
    }
}

/// A directory for `PATH` with one program of the host.
fn with_tool(dir: &Path, tool: &str) -> std::path::PathBuf {
    let path = dir.join("bin");
    if !path.exists() {
        fs::create_dir(&path).unwrap();
        symlink(format!("/usr/bin/{tool}"), path.join(tool)).unwrap();
    }
    path
}
