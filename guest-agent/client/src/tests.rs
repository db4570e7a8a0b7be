//! The client against the real agent, run as an ordinary process, and against one that misbehaves.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use firn_guest_agent::protocol::{
    Decoder, Frame, GREETING_LEN, Greeting, GreetingKind, Item, MAX_CHUNK, RESYNC_GUARD, ToAgent,
    ToHost, WINDOW, encode,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};

use super::*;

/// Far above what anything here takes; a test that waits so long has hung.
const LONG: Duration = Duration::from_secs(60);

/// The agent's program, built on first use: cargo builds no other package's binaries for a test.
fn agent_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let program = test.ancestors().nth(2).unwrap().join("firn-agent");
        if let Some(cargo) = std::env::var_os("CARGO") {
            let target = program.ancestors().nth(2).unwrap();
            let mut build = std::process::Command::new(cargo);
            build.args(["build", "--quiet", "-p", "firn-guest-agent", "--bin", "firn-agent"]);
            if !cfg!(debug_assertions) {
                build.arg("--release");
            }
            build.arg("--target-dir");
            build.arg(target).current_dir(env!("CARGO_MANIFEST_DIR"));
            assert!(build.status().unwrap().success(), "the agent does not build");
        }
        assert!(program.exists(), "{} is missing", program.display());
        program
    })
}

/// A running agent and its client.
struct Guest {
    client: AgentClient,
    process: Child,
    directory: tempfile::TempDir,
}

impl Guest {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent");
        let listener = UnixListener::bind(&path).unwrap();
        let mut command = Command::new(agent_program());
        command.arg("--connect").arg(&path).stdin(Stdio::null()).kill_on_drop(true);
        let process = command.spawn().unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let client = within(AgentClient::connect(stream)).await.unwrap();
        Self { client, process, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn shell(&self, script: &str) -> Collected {
        within(self.client.exec_collect(ExecRequest::shell(script))).await.unwrap()
    }
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(LONG, future).await.expect("it hangs")
}

#[tokio::test]
async fn ready_says_who_is_there() {
    let guest = Guest::start().await;
    let ready = guest.client.ready();
    assert_eq!((ready.init, ready.boot), (false, None));
    assert_eq!(
        ready.hostname,
        guest.shell("uname -n").await.stdout.trim_ascii_end().escape_ascii().to_string()
    );
    assert!(ready.uptime_ms > 0);
}

#[tokio::test]
async fn status_streams_and_environment() {
    let guest = Guest::start().await;
    let mut request = ExecRequest::shell("echo out; echo err >&2; echo $A $HOME; pwd; exit 7");
    request.env.push(("A".to_owned(), "b c".to_owned()));
    request.cwd = Some(BytePath::from("/usr"));
    let done = within(guest.client.exec_collect(request)).await.unwrap();
    assert_eq!(done.exit, Exit::Code(7));
    assert_eq!(done.stdout, b"out\nb c /root\n/usr\n");
    assert_eq!(done.stderr, b"err\n");

    let done = within(guest.client.exec_collect(ExecRequest::argv(["echo", "a b", "$HOME"])))
        .await
        .unwrap();
    assert_eq!(done.stdout, b"a b $HOME\n");
    assert_eq!(guest.shell("kill -9 $$").await.exit, Exit::Signal(9));
    // A real-time signal, which has no name, must end the request all the same.
    assert_eq!(guest.shell("kill -40 $$").await.exit, Exit::Signal(0));

    let mut request = ExecRequest::shell("echo 1; echo 2 >&2; echo 3");
    request.stderr = StderrMode::ToStdout;
    let done = within(guest.client.exec_collect(request)).await.unwrap();
    assert_eq!((done.stdout.as_slice(), done.stderr.as_slice()), (&b"1\n2\n3\n"[..], &b""[..]));
}

#[tokio::test]
async fn what_cannot_run_is_refused() {
    let guest = Guest::start().await;
    let run =
        async |request| within(guest.client.exec_collect(request)).await.unwrap_err().to_string();
    let error = run(ExecRequest::argv(["no-such-program"])).await;
    assert_eq!(error, "in the guest: run no-such-program: No such file or directory");
    assert!(run(ExecRequest::argv::<String>([])).await.contains("no program"));
    let mut request = ExecRequest::argv(["true"]);
    request.cwd = Some(BytePath::from("/no/such"));
    assert!(run(request.clone()).await.contains("/no/such does not exist"));
    request.cwd = None;
    request.env.push(("A=B".to_owned(), String::new()));
    assert!(run(request).await.contains("environment"));
    let error = run(ExecRequest::argv(["echo", "nul\0byte"])).await;
    assert!(error.contains("run echo"), "{error}");
    let error = run(ExecRequest::shell("x".repeat(300_000))).await;
    assert!(error.contains("too long to send"), "{error}");
    assert!(guest.shell("true").await.exit.success());
}

#[tokio::test]
async fn commands_inherit_neither_signals_nor_descriptors() {
    let guest = Guest::start().await;
    // Whoever started the test may have ignored signals or left descriptors open; the agent must
    // not add any.
    let list = ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"];
    let expected = std::process::Command::new(list[0]).args(&list[1..]).output().unwrap().stdout;
    let done = within(guest.client.exec_collect(ExecRequest::argv(list))).await.unwrap();
    assert_eq!(done.stdout.escape_ascii().to_string(), expected.escape_ascii().to_string());
    let list = ["ls", "/proc/self/fd"];
    let expected = std::process::Command::new(list[0]).arg(list[1]).output().unwrap().stdout;
    let done = within(guest.client.exec_collect(ExecRequest::argv(list))).await.unwrap();
    assert_eq!(done.stdout.escape_ascii().to_string(), expected.escape_ascii().to_string());
}

#[tokio::test]
async fn commands_run_at_the_same_time() {
    let guest = Guest::start().await;
    let fifo = guest.path("fifo").display().to_string();
    assert!(guest.shell(&format!("mkfifo {fifo}")).await.exit.success());
    // Each waits for the other, so they end only if both run.
    let (first, second) = (format!("cat {fifo}"), format!("echo met > {fifo}"));
    let (first, second) = tokio::join!(guest.shell(&first), guest.shell(&second));
    assert_eq!((first.stdout.as_slice(), second.exit), (&b"met\n"[..], Exit::Code(0)));

    let many = (0..100).map(|n| {
        let client = guest.client.clone();
        tokio::spawn(async move {
            client.exec_collect(ExecRequest::shell(format!("echo {n}; exit {n}"))).await
        })
    });
    for (n, task) in many.enumerate() {
        let done = within(task).await.unwrap().unwrap();
        assert_eq!(done.stdout, format!("{n}\n").into_bytes());
        assert_eq!(done.exit.shell_status(), i32::try_from(n).unwrap());
    }
}

#[tokio::test]
async fn fifty_mebibytes_pass_while_others_are_served() {
    let guest = Guest::start().await;
    let client = guest.client.clone();
    let chatty = tokio::spawn(async move {
        let mut exec = client.exec(ExecRequest::shell("head -c 52428800 /dev/zero")).await.unwrap();
        let (mut total, mut others) = (0, 0);
        while let Some(event) = exec.next().await.unwrap() {
            if let ExecEvent::Output { bytes, .. } = event {
                assert!(bytes.len() <= MAX_CHUNK && bytes.iter().all(|byte| *byte == 0));
                total += bytes.len();
                if others < 5 {
                    // The chatty one is far from its end.
                    assert!(total < 50 << 20);
                    let done = client.exec_collect(ExecRequest::shell("echo hi")).await.unwrap();
                    assert_eq!(done.stdout, b"hi\n");
                    others += 1;
                }
            }
        }
        total
    });
    assert_eq!(within(chatty).await.unwrap(), 50 << 20);
}

#[tokio::test]
async fn unread_output_holds_up_its_command_only() {
    let guest = Guest::start().await;
    let progress = guest.path("progress").display().to_string();
    let script = format!("head -c 52428800 /dev/zero; touch {progress}");
    let mut unread = within(guest.client.exec(ExecRequest::shell(script))).await.unwrap();
    for _ in 0..20 {
        assert!(guest.shell("true").await.exit.success());
    }
    assert!(!Path::new(&progress).exists(), "50 MiB went somewhere");
    // What waits here is within the window, and the agent holds little more than a pipe and its own buffers.
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", guest.process.id().unwrap())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 16 * 1024, "the agent used {peak} KiB");
    let mut total = 0;
    while let Some(event) = within(unread.next()).await.unwrap() {
        if let ExecEvent::Output { bytes, .. } = event {
            total += bytes.len();
        }
    }
    assert_eq!(total, 50 << 20);
    assert!(Path::new(&progress).exists());
}

#[tokio::test]
async fn input_is_streamed() {
    let guest = Guest::start().await;
    let input: Vec<u8> = (0..5_000_000_u32).map(|n| n.to_le_bytes()[(n % 3) as usize]).collect();
    let done =
        within(guest.client.exec_with_input(ExecRequest::argv(["cat"]), &input)).await.unwrap();
    assert!(done.stdout == input);

    let mut request = ExecRequest::shell("read line; echo got $line; read line; echo got $line");
    request.stdin = true;
    let mut exec = within(guest.client.exec(request)).await.unwrap();
    let mut stdin = exec.take_stdin().unwrap();
    stdin.write_all(b"one\n").await.unwrap();
    let first = within(exec.next()).await.unwrap().unwrap();
    assert_eq!(first, ExecEvent::Output { stream: Stream::Stdout, bytes: b"got one\n".to_vec() });
    stdin.write_all(b"two\n").await.unwrap();
    assert_eq!(within(exec.collect()).await.unwrap().stdout, b"got two\n");

    // A command that does not read its input neither holds up the sender for ever nor the agent.
    let done =
        within(guest.client.exec_with_input(ExecRequest::shell("exec <&-; echo done"), &input))
            .await
            .unwrap();
    assert_eq!(done.stdout, b"done\n");
    let mut unread = ExecRequest::shell("sleep 1000");
    unread.stdin = true;
    let mut exec = within(guest.client.exec(unread)).await.unwrap();
    let mut stdin = exec.take_stdin().unwrap();
    assert!(
        tokio::time::timeout(Duration::from_millis(300), stdin.write_all(&input)).await.is_err()
    );
    assert!(guest.shell("true").await.exit.success());
}

#[tokio::test]
async fn time_out_ends_the_whole_group() {
    let guest = Guest::start().await;
    let begin = Instant::now();
    let mut request = ExecRequest::shell("echo before; sleep 1000 & sleep 1000");
    request.timeout_ms = Some(200);
    let done = within(guest.client.exec_collect(request)).await.unwrap();
    assert_eq!((done.exit, done.stdout.as_slice()), (Exit::TimedOut, &b"before\n"[..]));
    assert!(
        begin.elapsed() >= Duration::from_millis(200) && begin.elapsed() < Duration::from_secs(2)
    );

    // SIGTERM is not enough, and a process outside of the group keeps the output open.
    let begin = Instant::now();
    let mut request =
        ExecRequest::shell("trap '' TERM; setsid sleep 5 & echo $$; while :; do sleep 0.1; done");
    request.timeout_ms = Some(100);
    let done = within(guest.client.exec_collect(request)).await.unwrap();
    assert_eq!(done.exit, Exit::TimedOut);
    assert!(begin.elapsed() >= Duration::from_secs(2) && begin.elapsed() < Duration::from_secs(4));
    assert!(!Path::new("/proc").join(String::from_utf8(done.stdout).unwrap().trim()).exists());
}

#[tokio::test]
async fn signal_reaches_the_whole_group() {
    let guest = Guest::start().await;
    let script = "sleep 1000 & echo $!; wait";
    let mut exec = within(guest.client.exec(ExecRequest::shell(script))).await.unwrap();
    let Some(ExecEvent::Output { bytes, .. }) = within(exec.next()).await.unwrap() else {
        panic!("no output")
    };
    let child = String::from_utf8(bytes).unwrap().trim().to_owned();
    assert!(alive(&child));
    exec.signal(15).unwrap();
    // It is over only when the child has let go of the output.
    assert_eq!(within(exec.collect()).await.unwrap().exit, Exit::Signal(15));
    gone(&child).await;
}

fn alive(pid: &str) -> bool {
    // A zombie that its new parent has not reaped yet is as good as gone.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

async fn gone(pid: &str) {
    // Linux tells only parents when a process ends.
    within(async {
        while alive(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn exit_and_closing_are_two_events() {
    let guest = Guest::start().await;
    let script = "{ read x < $FIFO; echo late; } & exit 3";
    let fifo = guest.path("fifo").display().to_string();
    assert!(guest.shell(&format!("mkfifo {fifo}")).await.exit.success());
    let mut request = ExecRequest::shell(script);
    request.stderr = StderrMode::Null;
    request.env.push(("FIFO".to_owned(), fifo.clone()));
    let mut exec = within(guest.client.exec(request)).await.unwrap();
    assert_eq!(within(exec.next()).await.unwrap(), Some(ExecEvent::Exited(Exit::Code(3))));
    assert!(guest.shell(&format!("echo go > {fifo}")).await.exit.success());
    let late = ExecEvent::Output { stream: Stream::Stdout, bytes: b"late\n".to_vec() };
    assert_eq!(within(exec.next()).await.unwrap(), Some(late));
    assert_eq!(within(exec.next()).await.unwrap(), Some(ExecEvent::Closed(Stream::Stdout)));
    assert_eq!(within(exec.next()).await.unwrap(), None);
    assert_eq!(within(exec.next()).await.unwrap(), None);
}

#[tokio::test]
async fn dropping_kills_and_detaching_does_not() {
    let guest = Guest::start().await;
    let exec = within(guest.client.exec(ExecRequest::shell("sleep 1000"))).await.unwrap();
    let pid = exec.pid().to_string();
    assert!(alive(&pid));
    drop(exec);
    gone(&pid).await;

    let marker = guest.path("marker").display().to_string();
    let script = format!("head -c 3000000 /dev/zero; sleep 0.2; echo more; touch {marker}");
    within(guest.client.exec(ExecRequest::shell(script))).await.unwrap().detach().unwrap();
    within(async {
        while !Path::new(&marker).exists() {
            assert!(guest.client.lost_reason().is_none());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn files_go_both_ways_with_their_modes() {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    let guest = Guest::start().await;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy =
        (proptest::collection::vec(any::<u8>(), 0..300_000), 0_u32..0o10000, "[a-zé \n']{1,20}");
    for round in 0..30 {
        let (bytes, mode, name) = strategy.new_tree(&mut runner).unwrap().current();
        let path = guest.path(&format!("{round}/sub/{name}"));
        within(guest.client.write_file(&path, mode, &mut bytes.as_slice())).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
        let mut back = Vec::new();
        let info = within(guest.client.read_file(&path, &mut back)).await.unwrap();
        assert!(back == bytes);
        assert_eq!((info.kind, info.mode, info.size), (FileKind::File, mode, bytes.len() as u64));
        // Again, shorter: the rest must go.
        within(guest.client.write_file(&path, 0o600, &mut &bytes[..bytes.len() / 2]))
            .await
            .unwrap();
        assert_eq!(
            within(guest.client.stat(&path, true)).await.unwrap().size,
            (bytes.len() / 2) as u64
        );
    }
}

#[tokio::test]
async fn two_hundred_mebibytes_both_ways() {
    let guest = Guest::start().await;
    let path = guest.path("large");
    let block: Vec<u8> =
        (0..1_000_003_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let bytes = block.repeat(210);
    let begin = Instant::now();
    within(guest.client.write_file(&path, 0o644, &mut bytes.as_slice())).await.unwrap();
    let written = begin.elapsed();
    let mut back = Vec::with_capacity(bytes.len());
    within(guest.client.read_file(&path, &mut back)).await.unwrap();
    assert!(back == bytes);
    eprintln!("210 MB: written in {written:?}, read in {:?}", begin.elapsed() - written);
}

#[tokio::test]
async fn directories_links_and_their_errors() {
    let guest = Guest::start().await;
    let client = &guest.client;
    let directory = guest.path("a/b");
    within(client.make_directory(&directory, 0o1750)).await.unwrap();
    within(client.make_directory(&directory, 0o1750)).await.unwrap();
    within(client.symlink(&directory.join("link"), Path::new("../nowhere"))).await.unwrap();
    within(client.symlink(&directory.join("link"), Path::new("../else"))).await.unwrap();
    for n in 0..3000 {
        std::fs::write(directory.join(format!("file with a long name {n}")), "").unwrap();
    }
    let entries = within(client.list(&directory)).await.unwrap();
    assert_eq!(entries.len(), 3001);
    let link = entries.iter().find(|entry| entry.info.kind == FileKind::Symlink).unwrap();
    assert_eq!(
        (&link.name, &link.info.target),
        (&BytePath::from("link"), &Some(BytePath::from("../else")))
    );
    let info = within(client.stat(&directory, false)).await.unwrap();
    assert_eq!((info.kind, info.mode), (FileKind::Directory, 0o1750));

    let refused = |error: AgentError| match error {
        AgentError::Refused(failure) => failure,
        error => panic!("{error}"),
    };
    let failure = refused(within(client.stat(&directory.join("link"), true)).await.unwrap_err());
    assert_eq!(failure.errno, Some(2));
    let failure = refused(within(client.read_file(&directory, &mut Vec::new())).await.unwrap_err());
    assert!(failure.message.contains("Is a directory"), "{failure}");
    // The failure comes while far more than the window is still to be sent.
    let large = vec![0; 10 << 20];
    let failure = refused(
        within(client.write_file(&directory, 0o644, &mut large.as_slice())).await.unwrap_err(),
    );
    assert!(failure.message.contains("Is a directory"), "{failure}");
    let failure = refused(
        within(client.write_file(Path::new("/dev/full"), 0o644, &mut large.as_slice()))
            .await
            .unwrap_err(),
    );
    assert_eq!(failure.errno, Some(28));
    within(client.sync()).await.unwrap();
    // This agent serves a socket and must not end the machine it runs on.
    assert!(
        refused(within(client.power_off()).await.unwrap_err()).message.contains("does not serve")
    );
}

#[tokio::test]
async fn a_blocked_file_request_blocks_nothing_else() {
    let guest = Guest::start().await;
    let fifo = guest.path("fifo");
    assert!(guest.shell(&format!("mkfifo {}", fifo.display())).await.exit.success());
    let client = guest.client.clone();
    let path = fifo.clone();
    let reader = tokio::spawn(async move {
        let mut bytes = Vec::new();
        client.read_file(&path, &mut bytes).await.map(|_| bytes)
    });
    assert!(
        guest.shell(&format!("sleep 0.1; echo through > {}", fifo.display())).await.exit.success()
    );
    assert_eq!(within(reader).await.unwrap().unwrap(), b"through\n");
}

#[tokio::test]
async fn heartbeats_come_when_asked_for() {
    let guest = Guest::start().await;
    let mut heartbeat = guest.client.heartbeat(Duration::from_millis(20));
    let mut last = Duration::ZERO;
    for _ in 0..3 {
        within(heartbeat.changed()).await.unwrap();
        let now = heartbeat.borrow_and_update().unwrap();
        assert!(now > last);
        last = now;
    }
}

#[tokio::test]
async fn loss_of_the_agent_ends_every_call_at_once() {
    let mut guest = Guest::start().await;
    let mut exec = within(guest.client.exec(ExecRequest::shell("sleep 1000"))).await.unwrap();
    let pid = exec.pid().to_string();
    let client = guest.client.clone();
    let other =
        tokio::spawn(async move { client.exec_collect(ExecRequest::shell("sleep 1000")).await });
    assert!(guest.shell("true").await.exit.success());
    guest.process.start_kill().unwrap();
    let begin = Instant::now();
    assert!(matches!(within(guest.client.lost()).await, Lost::Closed));
    let error = within(exec.next()).await.unwrap_err();
    assert_eq!(error.to_string(), "the agent is lost: the guest closed the agent's port");
    assert!(matches!(within(other).await.unwrap(), Err(AgentError::Lost(Lost::Closed))));
    assert!(matches!(within(guest.client.sync()).await, Err(AgentError::Lost(Lost::Closed))));
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    std::process::Command::new("kill").args(["-9", &pid]).status().unwrap();
}

#[tokio::test]
async fn the_hosts_leaving_ends_commands_and_agent() {
    let mut guest = Guest::start().await;
    let exec = within(guest.client.exec(ExecRequest::shell("sleep 1000"))).await.unwrap();
    let pid = exec.pid().to_string();
    drop(exec);
    let (client, directory) = (guest.client, guest.directory);
    drop(client);
    assert!(within(guest.process.wait()).await.unwrap().success());
    gone(&pid).await;
    drop(directory);
}

/// The agent's side, played by hand.
struct Puppet {
    stream: UnixStream,
    decoder: Decoder,
}

impl Puppet {
    /// Shakes hands and is ready.
    async fn connect() -> (AgentClient, Self) {
        let (host, stream) = UnixStream::pair().unwrap();
        let puppet = async {
            let mut this = Self { stream, decoder: Decoder::new() };
            this.welcome(VERSION_HERE).await;
            this.send(0, ToHost::Ready(ready())).await;
            this
        };
        let (client, puppet) = tokio::join!(AgentClient::connect(host), puppet);
        (client.unwrap(), puppet)
    }

    async fn welcome(&mut self, version: u16) {
        let hello = loop {
            if let Some(hello) = self.decoder.find_greeting() {
                break hello;
            }
            self.fill().await;
        };
        let welcome = Greeting { kind: GreetingKind::Welcome, version, nonce: hello.nonce };
        self.write(&welcome.to_bytes()).await;
    }

    async fn fill(&mut self) {
        let mut buffer = [0; 4096];
        let length = self.stream.read(&mut buffer).await.unwrap();
        assert!(length > 0, "the host left");
        self.decoder.push(&buffer[..length]);
    }

    async fn write(&mut self, bytes: &[u8]) {
        // The host may leave at the first bad byte.
        self.stream.write_all(bytes).await.ok();
    }

    async fn send(&mut self, id: u32, message: ToHost) {
        let mut bytes = Vec::new();
        encode(&Frame { id, message }, &mut bytes).unwrap();
        self.write(&bytes).await;
    }

    async fn request(&mut self) -> Frame<ToAgent> {
        loop {
            match self.decoder.next_item().unwrap() {
                Some(Item::Frame(frame)) => return frame,
                Some(Item::Greeting(_)) => {}
                None => self.fill().await,
            }
        }
    }
}

const VERSION_HERE: u16 = firn_guest_agent::protocol::VERSION;

fn ready() -> Ready {
    Ready {
        agent_version: String::new(),
        init: true,
        early: false,
        hostname: "puppet".to_owned(),
        kernel: String::new(),
        uptime_ms: 1,
        boot: None,
        warnings: Vec::new(),
    }
}

/// What the client says of an agent that answers its first command as `act` does.
async fn misbehave(act: impl AsyncFnOnce(&mut Puppet, u32)) -> String {
    let (client, mut puppet) = Puppet::connect().await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.exec_collect(ExecRequest::shell("true")).await }
    });
    let frame = within(puppet.request()).await;
    within(act(&mut puppet, frame.id)).await;
    let error = within(call).await.unwrap().unwrap_err();
    // The stream is still open: it is the garbage that ended the session, and for every other call too.
    let lost = within(client.lost()).await;
    assert_eq!(error.to_string(), format!("the agent is lost: {lost}"));
    lost.to_string()
}

#[tokio::test]
async fn garbage_ends_the_session_and_is_named() {
    let lost = misbehave(async |puppet, _| puppet.write(&[0xff; 64]).await).await;
    assert_eq!(lost, "the agent sent garbage: frame of 4294967295 bytes, allowed are 1 to 262144");
    let lost = misbehave(async |puppet, _| puppet.write(&[3, 0, 0, 0, 1, 99, 0]).await).await;
    assert!(lost.starts_with("the agent sent garbage: frame of 3 bytes does not decode"), "{lost}");
    let lost = misbehave(async |puppet, _| puppet.send(77, ToHost::Done).await).await;
    assert_eq!(lost, "the agent sent garbage: request 77: answer to a request that was never made");
    let lost = misbehave(async |puppet, _| puppet.send(0, ToHost::Done).await).await;
    assert_eq!(lost, "the agent sent garbage: request 0: not a message of the session");
    let lost = misbehave(async |puppet, id| puppet.send(id, ToHost::Credit(u32::MAX)).await).await;
    assert_eq!(lost, "the agent sent garbage: request 1: credit beyond the window");
    let announce = Greeting::new(GreetingKind::Announce, 0).to_bytes();
    let lost = misbehave(async |puppet, _| puppet.write(&announce).await).await;
    assert_eq!(lost, "the agent ended the session: it was started again");
    let failure = Failure { message: "what was that?".to_owned(), errno: None };
    let lost = misbehave(async |puppet, _| puppet.send(0, ToHost::Failed(failure)).await).await;
    assert_eq!(lost, "the agent ended the session: what was that?");
}

#[tokio::test]
async fn floods_end_the_session_within_bounds() {
    for bytes in [MAX_CHUNK, 0] {
        // Nobody reads these events, so the window is never opened again.
        let (client, mut puppet) = Puppet::connect().await;
        let call = tokio::spawn({
            let client = client.clone();
            async move { client.exec(ExecRequest::shell("true")).await }
        });
        let id = within(puppet.request()).await.id;
        puppet.send(id, ToHost::Started { pid: 1 }).await;
        let mut exec = within(call).await.unwrap().unwrap();
        let message = ToHost::Output { stream: Stream::Stdout, bytes: vec![0; bytes] };
        let admitted = WINDOW / message.cost();
        for _ in 0..=admitted {
            puppet.send(id, message.clone()).await;
        }
        let lost = within(client.lost()).await.to_string();
        assert_eq!(lost, "the agent sent garbage: request 1: more than its window admits");
        let mut events = 0;
        while let Ok(event) = within(exec.next()).await {
            assert!(event.is_some());
            events += 1;
        }
        assert_eq!(events, admitted);
    }
    let lost = misbehave(async |puppet, id| {
        puppet.send(id, ToHost::Started { pid: 1 }).await;
        for _ in 0..100_000 {
            puppet.send(id, ToHost::Closed(Stream::Stdout)).await;
        }
        puppet.write(&[0; 8]).await;
    })
    .await;
    assert!(lost.starts_with("the agent sent garbage"), "{lost}");
}

#[tokio::test]
async fn other_versions_are_named() {
    let (host, stream) = UnixStream::pair().unwrap();
    let mut puppet = Puppet { stream, decoder: Decoder::new() };
    let (result, ()) = tokio::join!(within(AgentClient::connect(host)), puppet.welcome(9));
    let error = result.unwrap_err().to_string();
    assert_eq!(
        error,
        format!("the agent speaks protocol version 9, this firn speaks {VERSION_HERE}")
    );
}

#[tokio::test]
async fn stale_bytes_and_a_late_agent_do_not_matter() {
    let (host, stream) = UnixStream::pair().unwrap();
    let puppet = async {
        let mut this = Puppet { stream, decoder: Decoder::new() };
        // The first hello is lost; an earlier session's bytes come first.
        this.fill().await;
        this.decoder.clear();
        let mut stale = Vec::new();
        encode(&Frame { id: 3, message: ToHost::Data(vec![7; 5000]) }, &mut stale).unwrap();
        stale.truncate(4000);
        stale.extend(Greeting::new(GreetingKind::Welcome, 1).to_bytes());
        this.write(&stale).await;
        this.write(&Greeting::new(GreetingKind::Announce, 0).to_bytes()).await;
        this.welcome(VERSION_HERE).await;
        this.send(0, ToHost::Ready(ready())).await;
        this
    };
    let (client, _puppet) =
        within(async { tokio::join!(AgentClient::connect(host), puppet) }).await;
    assert_eq!(client.unwrap().ready().hostname, "puppet");
}

#[tokio::test]
async fn an_agent_between_two_frames_gets_no_padding() {
    let (host, mut stream) = UnixStream::pair().unwrap();
    let host = tokio::spawn(AgentClient::reconnect(host));
    let mut first = [0; RESYNC_GUARD + GREETING_LEN];
    within(stream.read_exact(&mut first)).await.unwrap();
    let (guard, hello) = first.split_first_chunk::<RESYNC_GUARD>().unwrap();
    assert_eq!(guard, &[0; RESYNC_GUARD]);
    let hello: &[u8; GREETING_LEN] = hello.try_into().unwrap();
    assert_eq!(Greeting::from_bytes(hello).map(|hello| hello.kind), Some(GreetingKind::Hello));
    let mut puppet = Puppet { stream, decoder: Decoder::new() };
    puppet.decoder.push(hello);
    within(puppet.welcome(VERSION_HERE)).await;
    puppet.send(0, ToHost::Ready(ready())).await;
    within(host).await.unwrap().unwrap();
}

/// A machine that went back has an agent with a session that nobody knows any more.
#[tokio::test]
async fn an_agent_is_met_again_between_two_frames_and_in_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = Command::new(agent_program());
    command.arg("--connect").arg(&path).stdin(Stdio::null()).kill_on_drop(true);
    let _process = command.spawn().unwrap();
    let port = listener.accept().await.unwrap().0.into_std().unwrap();
    let end = || UnixStream::from_std(port.try_clone().unwrap()).unwrap();
    let works = async |client: &AgentClient| {
        let done = client.exec_collect(ExecRequest::shell("echo here")).await.unwrap();
        assert_eq!(done.stdout, b"here\n");
    };
    let leave = |client: AgentClient| {
        client.abandon();
        drop(client);
    };

    let client = within(AgentClient::connect(end())).await.unwrap();
    works(&client).await;
    leave(client);
    // Nothing, a cut length, and the beginnings of a short frame and of one as long as can be.
    let short = [200, 0, 0, 0, 1, 0, 1];
    let long = [0, 0, 4, 0, 1, 0, 1];
    for begun in [&[][..], &short[..2], &short, &long] {
        end().write_all(begun).await.unwrap();
        let client = within(AgentClient::reconnect(end())).await.unwrap();
        works(&client).await;
        leave(client);
    }
}

#[tokio::test]
async fn an_agent_that_does_not_greet_is_given_up() {
    // Announcements are greetings, but not the one that is waited for, and the answers are never read.
    for bytes in
        [vec![0xff; 1 << 16], Greeting::new(GreetingKind::Announce, 0).to_bytes().repeat(2000)]
    {
        let (host, mut stream) = UnixStream::pair().unwrap();
        let flood = tokio::spawn(async move { while stream.write_all(&bytes).await.is_ok() {} });
        let error = within(AgentClient::connect(host)).await.unwrap_err();
        assert!(
            error.to_string().starts_with("the agent is lost: the agent sent garbage: 16"),
            "{error}"
        );
        within(flood).await.unwrap();
    }
}

#[tokio::test]
async fn a_guest_that_ends_before_it_is_ready_is_noticed() {
    let (host, stream) = UnixStream::pair().unwrap();
    drop(stream);
    let error = within(AgentClient::connect(host)).await.unwrap_err();
    assert!(matches!(error, AgentError::Lost(_)), "{error}");
}

/// Sends `message` as often as the client's window admits, until the client gives the request up.
async fn flood(puppet: &mut Puppet, id: u32, message: &ToHost) {
    let mut room = WINDOW;
    loop {
        if room >= message.cost() {
            room -= message.cost();
            puppet.send(id, message.clone()).await;
            continue;
        }
        match puppet.request().await.message {
            ToAgent::Credit(credit) => room += credit,
            ToAgent::Cancel => return,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn what_a_hostile_guest_answers_is_bounded() {
    let (client, mut puppet) = Puppet::connect().await;
    let output = ToHost::Output { stream: Stream::Stderr, bytes: vec![0; MAX_CHUNK] };
    let request = ExecRequest::shell("true");
    let (error, ()) = within(async {
        tokio::join!(client.exec_collect(request), async {
            let id = puppet.request().await.id;
            puppet.send(id, ToHost::Started { pid: 1 }).await;
            flood(&mut puppet, id, &output).await;
        })
    })
    .await;
    let error = error.unwrap_err().to_string();
    assert_eq!(error, "the guest answers with more than 16777216 bytes of output");

    let info = FileInfo { kind: FileKind::File, mode: 0, size: 0, target: None };
    let entry = Entry { name: BytePath::from("x"), info };
    let entries = ToHost::Entries(vec![entry; 500]);
    let (error, ()) = within(async {
        tokio::join!(client.list(Path::new("/")), async {
            let id = puppet.request().await.id;
            flood(&mut puppet, id, &entries).await;
        })
    })
    .await;
    let error = error.unwrap_err().to_string();
    assert_eq!(error, "the guest answers with more than 33554432 bytes of a directory");
    // Nothing of that has ended the session.
    assert!(client.lost_reason().is_none());
}

#[tokio::test(start_paused = true)]
async fn answers_that_do_not_come_are_given_up() {
    let (client, mut puppet) = Puppet::connect().await;
    let late = |error: AgentError| assert!(matches!(error, AgentError::Late(_)), "{error}");
    let path = Path::new("/");
    late(client.exec(ExecRequest::shell("true")).await.unwrap_err());
    late(client.list(path).await.unwrap_err());
    late(client.stat(path, true).await.unwrap_err());
    late(client.make_directory(path, 0).await.unwrap_err());
    late(client.symlink(path, path).await.unwrap_err());
    late(client.read_file(path, &mut Vec::new()).await.unwrap_err());
    late(client.write_file(path, 0, &mut &[0; 2 << 20][..]).await.unwrap_err());
    puppet.fill().await;
}
