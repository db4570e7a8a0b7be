//! What the tests that boot guests have in common.

#![forbid(unsafe_code)]

pub mod input;
pub mod skip;
pub mod start_script;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Cursor, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use firn::config::TestConfig;
use firn::error::chain;
use firn::kit::{Kit, KitName};
use firn::log::Logger;
use firn::{Driver, DriverOptions, Machine};
use peak_alloc::PeakAlloc;

/// No test here takes as long, even in a carrier on a loaded machine.
const TIMEOUT: Duration = Duration::from_secs(600);

/// How long a test waits for what has to come, even in a carrier on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The kit that guests boot by default. `make` has built it.
pub fn micro() -> Kit {
    built(KitName::Micro)
}

/// The kit that is like NixOS. `make` has built it.
pub fn systemd() -> Kit {
    built(KitName::Systemd)
}

fn built(name: KitName) -> Kit {
    let kit = firn_kits::lookup(name).expect("the kit can be read");
    kit.unwrap_or_else(|| panic!("run `firn kit build {}`", name.as_str()))
}

/// The top of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the repository")
}

/// The installed command: `make build` puts it beside its Python.
pub fn firn() -> PathBuf {
    repository().join(".venv/bin/firn")
}

/// A test's machines, from the `[nodes.…]` part of a test file.
pub fn config(nodes: &str) -> TestConfig {
    let text = format!("name = \"guest\"\ntest_script = ''\n{nodes}");
    TestConfig::from_toml(&text, Path::new("nodes.toml")).unwrap_or_else(|error| panic!("{error}"))
}

/// Runs `script` with the machines of `nodes`. Whatever it does, nothing is left of them after.
pub fn with_machines(nodes: &str, script: impl AsyncFnOnce(&Driver)) {
    with_config(&config(nodes), script);
}

/// The same for a test that exists as data.
pub fn with_config(config: &TestConfig, script: impl AsyncFnOnce(&Driver)) {
    with_log(config, Logger::new(Box::new(TestOutput), false), script);
}

/// The same with a log of its own.
pub fn with_log(config: &TestConfig, log: Logger, script: impl AsyncFnOnce(&Driver)) {
    let out = tempfile::tempdir().expect("a directory for results");
    let options = DriverOptions {
        kits: Driver::kits_needed(config).into_iter().map(built).collect(),
        out_dir: out.path().to_owned(),
        log,
        ..DriverOptions::default()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let driver = Driver::new(config, options).expect("the machines can be made");
        let outcome = tokio::time::timeout(TIMEOUT, script(&driver)).await;
        driver.close().await;
        outcome.expect("the test takes too long");
    });
}

/// The machine of a test that has one.
#[track_caller]
pub fn only(driver: &Driver) -> &Machine {
    let [machine] = driver.machines() else { panic!("one machine") };
    machine
}

/// What a command that succeeds prints, without white space around it.
pub async fn output(machine: &Machine, command: &str) -> String {
    let printed = machine.succeed(&[command], None).await;
    printed.unwrap_or_else(|error| panic!("{}", chain(&error))).trim().to_owned()
}

/// A file system that is soon full. It ends when this is dropped.
pub struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    /// Mounts one of `mib` MiB at a directory; `None` where that is not allowed.
    #[track_caller]
    pub fn mount(at: &Path, mib: u32) -> Option<Self> {
        let size = format!("size={mib}m");
        let mut mount = Command::new("mount");
        let status = mount.args(["-t", "tmpfs", "-o", &size, "none"]).arg(at).status();
        if !status.is_ok_and(|status| status.success()) {
            skip::skipped("no file system can be mounted here");
            return None;
        }
        Some(Self(at.to_owned()))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        if !thread::panicking() {
            assert!(unmounted.is_ok_and(|status| status.success()));
        }
    }
}

/// Copies `vsock-peer` into the guest. It is linked with the host's libraries, which come along: they are the ones that
/// the test itself has loaded.
pub async fn install_vsock_peer(machine: &Machine, program: &str) {
    machine.succeed(&["mkdir /tmp/peer"], None).await.expect("it is made");
    let mut run = String::new();
    for (name, library) in host_libraries() {
        let target = Path::new("/tmp/peer").join(&name);
        machine.copy_from_host(&library, &target).await.expect("it is copied");
        if name.starts_with("ld-") {
            run = format!(
                "#!/bin/sh\nexec /tmp/peer/{name} --library-path /tmp/peer /tmp/peer/program \"$@\""
            );
        }
    }
    machine
        .copy_from_host(Path::new(program), Path::new("/tmp/peer/program"))
        .await
        .expect("it is copied");
    let install =
        format!("cat >/bin/vsock-peer <<'END'\n{run}\nEND\nchmod 755 /bin/vsock-peer /tmp/peer/*");
    machine.succeed(&[&install], None).await.expect("it is installed");
}

/// Connects to `port` in the guest of a vsock; the answer, or nothing if it refuses.
pub fn connect_to_vsock(socket: &Path, port: u32) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(socket).expect("somebody listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it can be set");
    writeln!(stream, "CONNECT {port}").expect("it is sent");
    let mut answer = String::new();
    BufReader::with_capacity(1, &stream).read_line(&mut answer).expect("an answer or none");
    (stream, answer)
}

/// Bytes without a pattern, the same each time.
pub fn noise(length: usize) -> Vec<u8> {
    // xorshift64 with the shifts of Marsaglia's "Xorshift RNGs"
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Writes to what cargo shows of a test when it fails, and only then.
struct TestOutput;

impl Write for TestOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        eprint!("{}", String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts what Rust code has allocated, exactly: pages would also tell of the allocator's arenas and of what the kernel
/// gathers into huge pages when it likes.
#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// What this process has that could grow.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    files: usize,
    mappings: usize,
    /// Allocated memory in KiB.
    heap: usize,
    /// Its own pages in KiB, without what of its guests lies over checkpoints.
    pub memory: usize,
}

impl Held {
    /// What it has now.
    #[must_use]
    pub fn now() -> Self {
        let files = fs::read_dir("/proc/self/fd").expect("there is /proc").count();
        let maps = fs::read("/proc/self/smaps").expect("there is /proc");
        let maps = String::from_utf8_lossy(&maps);
        let (mut mappings, mut memory, mut guests) = (0, 0, false);
        for line in maps.lines() {
            if let Some(size) = line.strip_prefix("Private_Dirty:") {
                let size = size.trim().trim_end_matches(" kB").parse::<usize>();
                memory += if guests { 0 } else { size.expect("a number") };
            } else if line.split(' ').next().is_some_and(|word| word.contains('-')) {
                mappings += 1;
                guests = line.contains("/memfd:firn-memory");
            }
        }
        Self { files, mappings, heap: HEAP.current_usage() / 1024, memory }
    }

    /// Checks that it has no more than that later, but for what comes and goes.
    #[track_caller]
    pub fn check(&self, later: &Self) {
        let grown = later.files > self.files + 2
            || later.mappings > self.mappings + 10
            || later.heap > self.heap + 128;
        assert!(!grown, "first {self}, then {later}");
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { files, mappings, heap, memory } = self;
        write!(f, "{files} files, {mappings} mappings, {heap} KiB allocated, {memory} KiB in pages")
    }
}

/// An initrd with the busybox and the drivers of a kit that runs a script and nothing else. Drivers that the kit does
/// not load, without their dependencies, and files come along; the latter are programs. What a guest with images needs is
/// in another file of the kit.
///
/// # Panics
/// If the kit does not have them.
#[must_use]
pub fn small_guest(
    kit: &Kit,
    script: &str,
    drivers: &[&str],
    files: Vec<(PathBuf, Vec<u8>)>,
) -> Vec<u8> {
    let content = |name: &str| kit.initrd_file(name).expect("the kit has it");
    let list = content("etc/firn/modules");
    let modules = String::from_utf8(list.clone()).expect("paths");
    let mut contents = vec![
        ("bin/busybox".to_owned(), 0o100_755, content("bin/busybox")),
        ("etc/firn/modules".to_owned(), 0o100_644, list),
        ("init".to_owned(), 0o100_755, script.into()),
    ];
    let drivers = drivers.iter().map(|name| format!("lib/modules/{name}.ko"));
    for name in modules.lines().map(|name| name.trim_start_matches('/').to_owned()).chain(drivers) {
        let module = content(&name);
        contents.push((name, 0o100_644, module));
    }
    contents.extend(files.into_iter().map(|(path, content)| {
        (path.to_str().expect("a plain name").to_owned(), 0o100_755, content)
    }));
    let dirs: BTreeSet<&Path> = contents
        .iter()
        .flat_map(|(name, ..)| Path::new(name).ancestors().skip(1))
        .filter(|dir| !dir.as_os_str().is_empty())
        .collect();
    // A directory sorts before what is in it.
    let dirs: Vec<_> =
        dirs.iter().map(|dir| dir.to_str().expect("a plain name").to_owned()).collect();
    let dirs = dirs.into_iter().map(|name| (name, 0o040_755, Vec::new()));
    let entries = dirs.chain(contents).map(|(name, mode, content)| {
        (cpio::NewcBuilder::new(&name).mode(mode), Cursor::new(content))
    });
    cpio::write_cpio(entries, Vec::new()).expect("memory can be written")
}

/// What a program of the host needs to run in a guest: the libraries that this process has, and the one that loads
/// them, by their names.
///
/// # Panics
/// If they cannot be read.
#[must_use]
pub fn host_libraries() -> Vec<(String, PathBuf)> {
    let maps = fs::read_to_string("/proc/self/maps").expect("it is there");
    let mut libraries: Vec<&str> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.contains(".so"))
        .collect();
    libraries.dedup();
    let named = |path: &str| {
        let path = PathBuf::from(path);
        (path.file_name().and_then(OsStr::to_str).expect("a name").to_owned(), path)
    };
    libraries.into_iter().map(named).collect()
}
