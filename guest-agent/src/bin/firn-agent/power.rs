//! The end of the system.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use firn_guest_agent::protocol::Failure;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, sync};

use crate::agent::Outcome;
use crate::failure::Context;
use crate::signals;

/// How long processes may take to end after SIGTERM, and again after SIGKILL.
const GRACE: Duration = Duration::from_millis(500);

/// The inode number of the initial PID namespace (`PROC_PID_INIT_INO` in include/linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;

/// File systems that keep nothing.
const VOLATILE: [&str; 9] =
    ["rootfs", "tmpfs", "ramfs", "devtmpfs", "devpts", "proc", "sysfs", "cgroup2", "mqueue"];

/// As a service: asks the real process 1, by the commands that every init brings.
pub fn ask_init(outcome: Outcome) -> Result<(), Failure> {
    let command = if outcome == Outcome::Reboot { "reboot" } else { "poweroff" };
    // The main loop reaps it.
    Command::new(command).spawn().map(drop).context(|| format!("run {command}"))
}

/// Whether this process 1 is the machine's, and not a container's.
pub fn owns_machine() -> bool {
    fs::metadata("/proc/self/ns/pid")
        .is_ok_and(|namespace| namespace.ino() == INITIAL_PID_NAMESPACE)
}

/// As process 1: ends all processes, then the system. It returns only if the kernel refuses.
pub fn end(mode: RebootMode) -> ExitCode {
    end_processes();
    sync();
    // In a container the file systems are the host's business.
    if fs::metadata("/proc/self/ns/pid")
        .is_ok_and(|namespace| namespace.ino() == INITIAL_PID_NAMESPACE)
    {
        unmount();
    }
    let Err(error) = reboot(mode);
    complain!("firn-agent: the kernel refuses to end: {}", error.desc());
    ExitCode::FAILURE
}

fn end_processes() {
    let children = signals::listen(&[signal_hook::consts::SIGCHLD]).ok();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        // -1: every process but this one. ESRCH: there is none.
        if kill(Pid::from_raw(-1), signal).is_err() {
            return;
        }
        // A stopped process takes SIGTERM only when it goes on.
        kill(Pid::from_raw(-1), Signal::SIGCONT).ok();
        let until = Instant::now() + GRACE;
        while !all_reaped() {
            let left = until.saturating_duration_since(Instant::now());
            let Some(children) = children.as_ref().filter(|_| !left.is_zero()) else {
                break;
            };
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            poll(&mut [PollFd::new(children.as_fd(), PollFlags::POLLIN)], left).ok();
            signals::drain(children);
        }
    }
}

/// Reaps what has ended; true when no child is left. Orphans become children, so that means no process is left.
fn all_reaped() -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(status) if status.pid().is_none() => return false,
            Ok(_) | Err(Errno::EINTR | Errno::EINVAL) => {}
            Err(_) => return true,
        }
    }
}

/// Unmounts what keeps data, the last mounted first, and makes read-only what is in use.
fn unmount() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let mut fields = line.split(' ').skip(1);
        let (Some(path), Some(kind)) = (fields.next(), fields.next()) else {
            continue;
        };
        if VOLATILE.contains(&kind) {
            continue;
        }
        // The kernel writes blanks in paths as octal escapes.
        let path = path.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\");
        if umount2(path.as_str(), MntFlags::empty()).is_err() {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            let none: Option<&str> = None;
            if let Err(error) = mount(none, path.as_str(), none, flags, none) {
                complain!("firn-agent: {path} stays writable: {}", error.desc());
            }
        }
    }
    sync();
}
