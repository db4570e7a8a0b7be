//! The agent as process 1 of a PID namespace of its own.
//!
//! A user namespace lets this run without root, and keeps the agent's mounts and its power-off inside.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a failing test may panic in its helpers too")]

mod common;
#[path = "../../tests/src/skip.rs"]
mod skip;

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::Host;
use firn_guest_agent::protocol::{ExecRequest, ToAgent, ToHost};

/// `unshare`, or `None`, said aloud, where the system does not allow it.
fn unshare() -> Option<Command> {
    let mut command = Command::new("unshare");
    // The child gets SIGKILL when unshare ends, so that a failing test leaves nothing.
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    let mut trial = Command::new("unshare");
    trial.args(command.get_args()).arg("true");
    if trial.status().is_ok_and(|status| status.success()) {
        command.arg("--");
        return Some(command);
    }
    skip::skipped("this system allows no user namespaces, so the agent is not process 1");
    None
}

fn start() -> Option<(tempfile::TempDir, Child, Host)> {
    // The agent mounts its own /tmp over the system's.
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut command = unshare()?;
    command.arg(env!("CARGO_BIN_EXE_firn-agent"));
    let (child, host) = common::start(&mut command, directory.path());
    Some((directory, child, host))
}

#[test]
fn process_1_reaps_orphans_and_knows_its_own() {
    let Some((_directory, mut child, mut host)) = start() else { return };
    let ready = host.session(1);
    assert!(ready.init);
    assert_eq!(host.shell("ps -o pid= -p $PPID | tr -d ' '").1, "1\n");
    // Orphans end while commands do: every command must get its own status.
    for round in 0..50_u8 {
        let script = format!("for i in 1 2 3 4 5; do (sleep 0.0$i &) ; done; exit {round}");
        assert_eq!(host.shell(&script).0.shell_status(), i32::from(round));
    }
    let left = host.shell("sleep 0.3; ps -eo stat= | grep -c Z || true").1;
    assert_eq!(left, "0\n", "zombies are left");
    host.begin(ToAgent::PowerOff);
    assert!(matches!(host.message(), (_, ToHost::Done)));
    ended(&mut child);
}

/// Waits for the namespace's end: in one, the kernel turns power-off into SIGINT to process 1, and unshare passes on
/// how that ended.
fn ended(child: &mut Child) {
    let begin = Instant::now();
    let status = child.wait().unwrap();
    let signal = status.signal().or(status.code().map(|code| code - 128));
    assert_eq!(signal, Some(2), "{status}");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[test]
fn power_off_ends_stubborn_processes() {
    let Some((_directory, mut child, mut host)) = start() else { return };
    host.session(1);
    host.begin(ToAgent::Exec(ExecRequest::shell("trap '' TERM; while :; do sleep 0.1; done")));
    assert!(matches!(host.message(), (1, ToHost::Started { .. })));
    assert!(host.shell("setsid sleep 1000 >/dev/null 2>&1 & :").0.success());
    host.begin(ToAgent::PowerOff);
    while host.message() != (3, ToHost::Done) {}
    ended(&mut child);
}

#[test]
fn a_signal_powers_off_and_losing_the_host_does_not_panic() {
    let Some((_directory, mut child, mut host)) = start() else { return };
    host.session(1);
    // The shell may be killed before it could say how it ended.
    host.begin(ToAgent::Exec(ExecRequest::shell("kill -PWR 1; sleep 1000")));
    ended(&mut child);

    let Some((_directory, mut child, mut host)) = start() else { return };
    host.session(1);
    drop(host);
    ended(&mut child);
}
