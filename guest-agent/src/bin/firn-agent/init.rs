//! Setting the system up as process 1.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use firn_guest_agent::protocol::Failure;
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::set_cad_enabled;
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout};

use crate::failure::{Context, failure};

/// Modules to load, one a line and in order: the path of an uncompressed `.ko`, then its parameters.
const MODULES: &str = "/etc/firn/modules";

/// Runs before the agent reports that it is ready.
pub const BOOT_SCRIPT: &str = "/etc/firn/boot";

/// The device number of `/dev/null`: major 1, minor 3.
const NULL_DEVICE: (u64, u64) = (1, 3);

/// What came of setting up.
#[derive(Debug, Default)]
pub struct Setup {
    /// What did not work, a line each.
    pub warnings: Vec<String>,
}

struct Mount {
    path: &'static str,
    kind: &'static str,
    flags: MsFlags,
    options: Option<&'static str>,
}

fn mounts() -> [Mount; 7] {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let inert = quiet | MsFlags::MS_NOEXEC;
    let devices = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    let mount = |path, kind, flags, options| Mount { path, kind, flags, options };
    [
        mount("/proc", "proc", inert, None),
        mount("/sys", "sysfs", inert, None),
        mount("/dev", "devtmpfs", MsFlags::MS_NOSUID, Some("mode=755")),
        mount("/dev/pts", "devpts", devices, Some("gid=5,mode=620,ptmxmode=666")),
        mount("/dev/shm", "tmpfs", quiet, Some("mode=1777")),
        mount("/run", "tmpfs", quiet, Some("mode=755")),
        mount("/tmp", "tmpfs", quiet, Some("mode=1777")),
    ]
}

/// Mounts what is missing, makes standard descriptors, loads the modules. A failure here does not end the agent: the
/// host gets a warning, and can investigate.
pub fn set_up() -> Setup {
    let mut warnings = Vec::new();
    for mount in mounts() {
        mount_if_absent(&mount).unwrap_or_else(|failure| warnings.push(failure.message));
    }
    attach_console().unwrap_or_else(|failure| warnings.push(failure.message));
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                warnings.push(format!("{link}: {error}"))
            }
            _ => {}
        }
    }
    // Ctrl-alt-delete sends SIGINT to this process instead of rebooting at once.
    if crate::power::owns_machine() {
        let result = set_cad_enabled(false).context(|| "handle ctrl-alt-delete".to_owned());
        result.unwrap_or_else(|failure| warnings.push(failure.message));
    }
    load_modules(&mut warnings);
    for warning in &warnings {
        complain!("firn-agent: {warning}");
    }
    Setup { warnings }
}

fn mount_if_absent(this: &Mount) -> Result<(), Failure> {
    let what = || format!("mount {}", this.path);
    let path = Path::new(this.path);
    let parent = path.parent().unwrap_or(path);
    match fs::metadata(path) {
        Ok(info) if info.dev() != fs::metadata(parent).context(what)?.dev() => return Ok(()),
        Ok(_) => {}
        Err(_) => fs::create_dir(path).context(what)?,
    }
    mount(Some(this.kind), path, Some(this.kind), this.flags, this.options).context(what)
}

/// The kernel opens the console for process 1, unless the initramfs has no `/dev/console`; then Rust's runtime has
/// opened `/dev/null` instead.
fn attach_console() -> Result<(), Failure> {
    let device = fs::metadata("/proc/self/fd/2").map(|info| info.rdev());
    if !device.is_ok_and(|device| {
        (nix::sys::stat::major(device), nix::sys::stat::minor(device)) == NULL_DEVICE
    }) {
        return Ok(());
    }
    let what = || "open /dev/console".to_owned();
    let console = OpenOptions::new().read(true).write(true).open("/dev/console").context(what)?;
    dup2_stdin(&console)
        .and_then(|()| dup2_stdout(&console))
        .and_then(|()| dup2_stderr(&console))
        .context(what)
}

fn load_modules(warnings: &mut Vec<String>) {
    let list = match fs::read_to_string(MODULES) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            warnings.push(format!("{MODULES}: {error}"));
            return;
        }
    };
    for line in
        list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let (path, parameters) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        load_module(path, parameters.trim())
            .unwrap_or_else(|failure| warnings.push(failure.message));
    }
}

fn load_module(path: &str, parameters: &str) -> Result<(), Failure> {
    let what = || format!("load {path}");
    let file = File::open(path).context(what)?;
    let parameters =
        CString::new(parameters).map_err(|_| failure(format!("{}: NUL in parameters", what())))?;
    match finit_module(&file, &parameters, ModuleInitFlags::empty()) {
        // Loaded already, or built in.
        Err(Errno::EEXIST) => Ok(()),
        // The file is open, so it is not the file that is missing.
        Err(Errno::ENOENT) => Err(failure(format!(
            "{}: a module that it needs is not loaded yet (the kernel log names the symbol)",
            what()
        ))),
        result => result.context(what),
    }
}

/// Starts the boot script, if there is one that may be executed.
pub fn start_boot_script() -> Result<Option<Pid>, Failure> {
    let mut command = Command::new(BOOT_SCRIPT);
    command.stdin(Stdio::null()).current_dir("/").env_clear();
    command.env("PATH", crate::exec::PATH).env("HOME", "/root").env("USER", "root");
    match command.spawn() {
        Ok(child) => Ok(i32::try_from(child.id()).ok().map(Pid::from_raw)),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound && !Path::new(BOOT_SCRIPT).exists() =>
        {
            Ok(None)
        }
        Err(error) => Err(error).context(|| format!("run {BOOT_SCRIPT}")),
    }
}
