//! What the agent does with hosts that come, go, and send what they must not.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a failing test may panic in its helpers too")]

mod common;

use std::io::Write;
use std::process::Command;

use common::Host;
use firn_guest_agent::protocol::{
    BytePath, ExecRequest, Exit, Greeting, GreetingKind, MAX_CHUNK, MAX_REQUESTS, RESYNC_PADDING,
    ToAgent, ToHost, VERSION, WINDOW,
};

/// The agent ends by itself when its socket is closed, so a test leaves nothing behind.
fn start() -> (tempfile::TempDir, Host) {
    let directory = tempfile::tempdir().unwrap();
    let (_, host) =
        common::start(&mut Command::new(env!("CARGO_BIN_EXE_firn-agent")), directory.path());
    (directory, host)
}

#[test]
fn announces_itself_and_welcomes() {
    let (_directory, mut host) = start();
    assert_eq!(host.greeting(), Greeting::new(GreetingKind::Announce, 0));
    let ready = host.session(42);
    assert!(!ready.init);
    assert_eq!(host.shell("echo a"), (Exit::Code(0), "a\n".to_owned()));
}

#[test]
fn stale_bytes_before_a_hello_are_skipped() {
    let (_directory, mut host) = start();
    let mut stale: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    stale.extend(&Greeting::new(GreetingKind::Hello, 1).to_bytes()[..20]);
    host.stream.write_all(&stale).unwrap();
    host.session(2);
    assert!(host.shell("true").0.success());
}

#[test]
fn a_new_hello_ends_the_old_session_and_a_repeated_one_does_not() {
    let (_directory, mut host) = start();
    host.session(1);
    let id = host.begin(ToAgent::Exec(ExecRequest::shell("echo $$; exec sleep 1000")));
    let pid = loop {
        if let (from, ToHost::Output { bytes, .. }) = host.message() {
            assert_eq!(from, id);
            break String::from_utf8(bytes).unwrap().trim().to_owned();
        }
    };
    host.hello(1);
    assert_eq!(host.shell(&format!("kill -0 {pid} && echo runs")).1, "runs\n");
    host.session(2);
    // Killed, and perhaps not yet reaped.
    let script = format!(
        "while kill -0 {pid} 2>/dev/null && ! grep -q Z /proc/{pid}/stat; do sleep 0.01; done"
    );
    assert!(host.shell(&script).0.success());
}

#[test]
fn padding_frees_an_agent_that_waits_for_the_rest_of_a_frame() {
    let (_directory, mut host) = start();
    host.session(1);
    // A frame of 200,000 bytes of which the host, before it vanished, sent ten.
    host.stream.write_all(&200_000_u32.to_le_bytes()).unwrap();
    host.stream.write_all(&[7; 10]).unwrap();
    host.stream.write_all(&vec![0; RESYNC_PADDING]).unwrap();
    host.session(2);
    assert!(host.shell("true").0.success());
}

#[test]
fn another_version_is_answered_and_not_served() {
    let (_directory, mut host) = start();
    let hello = Greeting { kind: GreetingKind::Hello, version: VERSION + 1, nonce: 5 };
    host.stream.write_all(&hello.to_bytes()).unwrap();
    while host.greeting() != Greeting::new(GreetingKind::Welcome, 5) {}
    host.send(1, ToAgent::Sync);
    host.session(6);
}

/// Waits until the agent ends the session and gives its reason.
fn refusal(host: &mut Host) -> String {
    loop {
        if let (0, ToHost::Failed(failure)) = host.message() {
            return failure.message;
        }
    }
}

/// Each kind of garbage ends the session with a reason, and a new one can begin at once.
#[test]
fn garbage_ends_the_session_with_a_reason() {
    let (_directory, mut host) = start();
    let mut nonce = 0;
    let mut refused = |garbage: &dyn Fn(&mut Host), reason: &str| {
        nonce += 1;
        host.session(nonce);
        garbage(&mut host);
        let refusal = refusal(&mut host);
        assert!(refusal.contains(reason), "{refusal:?} is not about {reason:?}");
    };
    let raw = |bytes: &'static [u8]| move |host: &mut Host| host.stream.write_all(bytes).unwrap();
    refused(&raw(&[0xff; 16]), "4294967295 bytes");
    refused(&raw(&[0, 0, 0, 0]), "0 bytes");
    refused(&raw(&[1, 0, 4, 0]), "262145 bytes");
    refused(&raw(&[2, 0, 0, 0, 1, 0x63]), "does not decode");
    refused(&|host| host.send(1, ToAgent::Eof), "request 1: not the beginning of a request");
    refused(&|host| host.send(0, ToAgent::Sync), "request 0: not a message of the session");
    let cat = || {
        let mut request = ExecRequest::shell("exec sleep 1000");
        request.stdin = true;
        ToAgent::Exec(request)
    };
    let flood = |host: &mut Host, id| {
        for _ in 0..=usize::try_from(WINDOW).unwrap() / MAX_CHUNK {
            host.send(id, ToAgent::Data(vec![0; MAX_CHUNK]));
        }
    };
    refused(
        &|host| {
            let id = host.begin(cat());
            flood(host, id);
        },
        "input beyond the window",
    );
    refused(
        &|host| {
            let id = host.begin(cat());
            host.send(id, ToAgent::Eof);
            host.send(id, ToAgent::Data(vec![1]));
            host.send(id, ToAgent::Credit(1));
        },
        "credit beyond the window",
    );
    refused(
        &|host| {
            let id = host.begin(cat());
            host.send(id, ToAgent::Signal { signal: 1000 });
        },
        "no such signal",
    );
    refused(
        &|host| {
            // A pipe nobody reads: the worker waits in open() for ever and takes nothing out of its queue.
            host.shell("rm -f /tmp/firn-agent-test-fifo; mkfifo /tmp/firn-agent-test-fifo");
            let path = BytePath::from("/tmp/firn-agent-test-fifo");
            let id = host.begin(ToAgent::WriteFile { path, mode: 0o600 });
            flood(host, id);
        },
        "data beyond the window",
    );
    // Lets that worker go.
    std::fs::OpenOptions::new().read(true).open("/tmp/firn-agent-test-fifo").unwrap();
    std::fs::remove_file("/tmp/firn-agent-test-fifo").unwrap();
}

#[test]
fn too_many_requests_are_refused_and_the_others_live() {
    let (_directory, mut host) = start();
    host.session(1);
    let first = host.begin(ToAgent::Exec(ExecRequest::shell("exec sleep 1000")));
    for _ in 1..MAX_REQUESTS {
        host.begin(ToAgent::Exec(ExecRequest::argv(["sleep", "1000"])));
    }
    let above = host.begin(ToAgent::Sync);
    loop {
        match host.message() {
            (_, ToHost::Started { .. }) => {}
            (id, ToHost::Failed(failure)) => {
                assert_eq!(id, above);
                assert!(failure.message.contains("256 requests"), "{failure}");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    host.send(first, ToAgent::Cancel);
    assert_eq!(host.message(), (first, ToHost::Done));
    assert!(host.shell("true").0.success());
}

#[test]
fn an_idle_agent_sleeps() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_firn-agent"));
    let (child, mut host) = common::start(&mut command, directory.path());
    host.session(1);
    host.begin(ToAgent::Exec(ExecRequest::shell("exec sleep 1000")));
    assert!(matches!(host.message(), (1, ToHost::Started { .. })));
    let switches = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("voluntary_ctxt_switches"))
            .unwrap()
            .to_owned();
        line.split_whitespace().last().unwrap().parse::<u64>().unwrap()
    };
    std::thread::sleep(std::time::Duration::from_millis(100));
    let before = switches();
    // The absence of events is what is tested.
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(switches(), before, "the agent wakes up for nothing");
}

#[test]
fn the_command_line_is_checked() {
    let run = |arguments: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_firn-agent")).args(arguments).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert_eq!(run(&["--version"]), (Some(0), format!("{}\n", env!("CARGO_PKG_VERSION"))));
    assert_eq!(run(&["--port"]), (Some(2), "firn-agent: --port needs a path\n".to_owned()));
    assert!(run(&["--bogus"]).1.starts_with("firn-agent: unknown argument --bogus"));
    let (status, message) = run(&["--connect", "/no/such"]);
    assert_eq!(
        (status, message.as_str()),
        (Some(1), "firn-agent: connect to /no/such: No such file or directory\n")
    );
    let (status, message) = run(&["--port", "/no/such"]);
    assert_eq!((status, message.as_str()), (Some(1), "firn-agent: /no/such does not exist\n"));
}
