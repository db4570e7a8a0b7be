//! The backdoor's protocol against a real bash.

use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use tokio::time::Instant;

use super::*;

/// A backdoor as the guest's service is one, and the host's end of its console.
struct Backdoor {
    shell: Child,
    console: UnixStream,
}

impl Backdoor {
    fn start(before: &str) -> Self {
        let (console, guest) = UnixStream::pair().expect("sockets");
        let output = OwnedFd::from(guest.try_clone().expect("a descriptor"));
        let script = format!("{before}echo 'Spawning backdoor root shell...'; exec bash --norc");
        let shell = std::process::Command::new("bash")
            .args(["-c", &script])
            .stdin(OwnedFd::from(guest))
            .stdout(output)
            .stderr(Stdio::null())
            .spawn()
            .expect("bash is there");
        Self { shell, console }
    }

    async fn connect(&self) -> ShellSession {
        ShellSession::connect(&self.console, &Clock::new()).await.expect("the shell is there")
    }
}

impl Drop for Backdoor {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

fn output(status: i32, stdout: &[u8]) -> Output {
    Output { status, stdout: stdout.to_vec() }
}

fn command(script: &str) -> Command {
    Command { script: script.to_owned(), timeout: None }
}

#[tokio::test]
async fn commands_have_their_status_and_output() {
    let backdoor = Backdoor::start("echo noise; printf 'no line end: '; ");
    let shell = backdoor.connect().await;
    let run = async |script: &str| shell.run(&command(script)).await.expect("an answer");
    assert_eq!(run("echo out; echo err >&2").await, output(0, b"out\n"));
    assert_eq!(run("echo before; false; echo after").await, output(1, b"before\n"));
    assert_eq!(run("exit 7").await.status, 7);
    assert_eq!(run("kill -9 $$").await.status, 137);
    assert_eq!(run("echo \"it's\" '$HOME'\necho two").await, output(0, b"it's $HOME\ntwo\n"));
    assert_eq!(run("printf '\\377\\0x'").await, output(0, b"\xff\0x"));
    assert_eq!(run("cat").await, output(0, b""), "its input is not the shell's");
    assert_eq!(run("nonsense $UNSET").await.status, 1, "unset variables are errors");
    let long = run("head -c 3000000 /dev/zero").await;
    assert_eq!((long.status, long.stdout.len()), (0, 3_000_000));
}

#[tokio::test]
async fn a_command_past_its_time_is_killed() {
    let backdoor = Backdoor::start("");
    let shell = backdoor.connect().await;
    let limit = Some(Duration::from_millis(200));
    let began = Instant::now();
    let slow = Command { script: "echo a; sleep 100".to_owned(), timeout: limit };
    assert_eq!(shell.run(&slow).await.expect("an answer"), output(124, b"a\n"));
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(shell.run(&command("echo b")).await.expect("an answer"), output(0, b"b\n"));
}

#[tokio::test]
async fn a_call_that_is_given_up_does_not_disturb_the_next() {
    let backdoor = Backdoor::start("");
    let shell = backdoor.connect().await;
    let slow = command("echo wrong; sleep 0.3; echo wrong");
    tokio::time::timeout(Duration::from_millis(50), shell.run(&slow))
        .await
        .expect_err("it is slow");
    assert_eq!(shell.run(&command("echo right")).await.expect("an answer"), output(0, b"right\n"));
}

#[tokio::test]
async fn a_detached_command_is_not_waited_for() {
    let backdoor = Backdoor::start("");
    let shell = backdoor.connect().await;
    let began = Instant::now();
    shell.spawn(command("sleep 50")).await.expect("it starts");
    shell.run(&command("true")).await.expect("an answer");
    assert!(began.elapsed() < Duration::from_secs(25));
}

#[tokio::test]
async fn files_travel_whole() {
    let backdoor = Backdoor::start("");
    let shell = backdoor.connect().await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("it's/a new/file");
    let bytes: Vec<u8> = (0..2_500_000_u32).map(|n| n.to_le_bytes()[(n % 3) as usize]).collect();
    shell.write_file(&path, 0o640, &mut bytes.as_slice()).await.expect("it is written");
    assert!(std::fs::read(&path).expect("it is there") == bytes);
    let mut back = Vec::new();
    shell.read_file(&path, &mut back).await.expect("it is read");
    assert!(back == bytes);
    let info = shell.stat(&path, false).await.expect("it is there");
    assert_eq!((info.kind, info.mode, info.size), (FileKind::File, 0o640, 2_500_000));

    let link = dir.path().join("it's/link");
    std::os::unix::fs::symlink("a new/file", &link).expect("it is made");
    let info = shell.stat(&link, true).await.expect("it is there");
    assert_eq!(info.kind, FileKind::File);
    let mut names: Vec<_> = shell
        .list(&dir.path().join("it's"))
        .await
        .expect("it is listed")
        .into_iter()
        .map(|entry| (entry.name.to_string(), entry.info.kind, entry.info.target))
        .collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    let target = Some(BytePath::from("a new/file"));
    assert_eq!(
        names,
        [
            ("a new".to_owned(), FileKind::Directory, None),
            ("link".to_owned(), FileKind::Symlink, target)
        ]
    );
}

#[tokio::test]
async fn a_file_that_cannot_be_written_leaves_the_shell_usable() {
    let backdoor = Backdoor::start("");
    let shell = backdoor.connect().await;
    let bytes = vec![b'x'; 300_000];
    let error = shell.write_file(Path::new("/proc/firn"), 0o644, &mut bytes.as_slice()).await;
    assert!(matches!(error, Err(SessionError::Shell(ShellError::Refused { .. }))), "{error:?}");
    // The directory can be opened for nothing, after the payload was sent.
    let pipeline = "(head -c 8 | { base64 -d >>/proc || { cat >/dev/null; false; }; })";
    let answer = shell.call(pipeline, b"aGVsbG8=", None, 0).await.expect("an answer");
    assert_ne!(answer.status, 0);
    assert_eq!(shell.run(&command("echo on")).await.expect("an answer"), output(0, b"on\n"));
    let error = shell.read_file(Path::new("/nowhere"), &mut Vec::new()).await;
    assert!(matches!(error, Err(SessionError::Shell(ShellError::Refused { .. }))), "{error:?}");
}

#[tokio::test]
async fn a_shell_that_ends_is_noticed() {
    let mut backdoor = Backdoor::start("");
    let shell = backdoor.connect().await;
    backdoor.shell.kill().expect("it runs");
    backdoor.shell.wait().expect("it ends");
    let error = shell.run(&command("true")).await.expect_err("it is gone");
    assert!(error.lost() && error.is_final(), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_mute_shell_is_not_waited_for_longer_than_the_command() {
    let (host, guest) = UnixStream::pair().expect("sockets");
    say(&guest, b"Spawning backdoor root shell...\n");
    let shell = ShellSession::connect(&host, &Clock::new()).await.expect("the banner is there");
    let slow = Command { script: "true".to_owned(), timeout: Some(Duration::from_secs(5)) };
    let error = shell.run(&slow).await.expect_err("nobody answers");
    assert!(matches!(error, SessionError::Shell(ShellError::Mute)) && error.lost(), "{error}");
}

#[tokio::test]
async fn garbage_is_refused() {
    for answer in ["firn-1\n???\n0\n", "firn-1\n\nzero\n"] {
        let (host, guest) = UnixStream::pair().expect("sockets");
        say(&guest, b"Spawning backdoor root shell...\n");
        say(&guest, answer.as_bytes());
        let shell = ShellSession::connect(&host, &Clock::new()).await.expect("the banner is there");
        let error = shell.run(&command("true")).await.expect_err("it is no answer");
        assert!(matches!(error, SessionError::Shell(ShellError::Garbage(_))), "{error}");
    }
}

#[tokio::test]
async fn a_shell_that_is_started_again_fails_the_call_that_it_ran() {
    // What it ran is killed as well, in the midst of its output or at its end.
    for rest in ["b24K\n", "b24", ""] {
        let (host, guest) = UnixStream::pair().expect("sockets");
        say(&guest, b"Spawning backdoor root shell...\n");
        let shell = ShellSession::connect(&host, &Clock::new()).await.expect("the banner is there");
        let answers = format!("firn-1\n{rest}Spawning backdoor root shell...\nfirn-2\nb24K\n0\n");
        say(&guest, answers.as_bytes());
        let error = shell.run(&command("kill")).await.expect_err("its shell was killed");
        assert!(matches!(error, SessionError::Shell(ShellError::Restarted)), "{error}");
        assert!(!error.lost());
        let answer = shell.run(&command("echo on")).await.expect("an answer");
        assert_eq!(answer, output(0, b"on\n"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_shell_that_is_left_answers_what_it_was_asked() {
    let (host, guest) = UnixStream::pair().expect("sockets");
    say(&guest, b"Spawning backdoor root shell...\n");
    let shell = ShellSession::connect(&host, &Clock::new()).await.expect("the banner is there");
    let slow = Command { script: "true".to_owned(), timeout: Some(Duration::from_secs(5)) };
    let leave = async {
        shell.leave();
        let error = shell.lost().await;
        assert!(!error.is_final() && !shell.is_lost(), "{error}");
        say(&guest, b"firn-1\nb24K\n0\n");
    };
    let (answer, ()) = tokio::join!(shell.run(&slow), leave);
    assert_eq!(answer.expect("an answer"), output(0, b"on\n"));
    // Only a call that waits in vain finds out that it is gone.
    shell.run(&slow).await.expect_err("nobody answers");
    let error = shell.lost().await;
    assert!(error.is_final() && shell.is_lost(), "{error}");
}

/// As when the guest restarts.
#[tokio::test]
async fn a_shell_that_is_left_leaves_the_console_to_the_next() {
    let backdoor = Backdoor::start("");
    for _ in 0..2 {
        let shell = backdoor.connect().await;
        let answer = shell.run(&command("echo up")).await.expect("an answer");
        assert_eq!(answer, output(0, b"up\n"));
        drop(shell);
        // The task that has written ends now.
        tokio::time::sleep(Duration::from_millis(20)).await;
        say(&backdoor.console, b"echo 'Spawning backdoor root shell...'\n");
    }
}

/// Writes what fits into a socket's buffer.
fn say(mut stream: &UnixStream, bytes: &[u8]) {
    use std::io::Write;
    stream.write_all(bytes).expect("it fits");
}

#[tokio::test]
async fn what_a_hostile_shell_answers_is_bounded() {
    let (host, guest) = UnixStream::pair().expect("sockets");
    say(&guest, b"Spawning backdoor root shell...\n");
    let shell = ShellSession::connect(&host, &Clock::new()).await.expect("the banner is there");
    let flood = std::thread::spawn(move || {
        use std::io::Write;
        let mut guest = &guest;
        let noise = vec![b'A'; 1 << 20];
        let mut all = || {
            guest.write_all(b"firn-1\n")?;
            for _ in 0..=encoded(MAX_LISTING) >> 20 {
                guest.write_all(&noise)?;
            }
            guest.write_all(b"\n0\nfirn-2\nb24K\n0\n")
        };
        all().expect("the host is there");
        guest.try_clone()
    });
    let error = shell.list(Path::new("/")).await.expect_err("it is too long");
    assert!(matches!(error, SessionError::TooMuchOutput), "{error}");
    let answer = shell.run(&command("echo on")).await.expect("an answer");
    assert_eq!(answer, output(0, b"on\n"));
    flood.join().expect("no panic").expect("a descriptor");
}
