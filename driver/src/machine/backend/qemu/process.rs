//! QEMU's process, with all that its start script starts beside it.
//!
//! They are in a group of their own, led by a watcher: a shell that reads a pipe whose other end only this process has.
//! When the pipe closes, because the machine is ended or this process was killed, it kills them all. Some helpers leave
//! the group; they are known by a variable of their environment.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use memchr::memmem;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdin, Command};
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::log::{Logger, printable};

/// The variable by which a machine's processes are known.
const MARK: &str = "FIRN_MACHINE";
/// Kills the processes with the variable that is the first argument, and those of its own group, itself included.
const WATCH: &str = r#"trap '' HUP INT QUIT TERM
read -r _
for _ in 1 2; do
  for file in $(grep -lsF "$0" /proc/[0-9]*/environ); do
    pid=${file#/proc/}
    kill -9 "${pid%/environ}" 2>/dev/null
  done
done
kill -9 0"#;

/// How long QEMU may take to end once it has been told to: it writes its disks back.
const QUIT_WITHIN: Duration = Duration::from_secs(20);
/// How long after SIGTERM.
const TERM_WITHIN: Duration = Duration::from_secs(5);
/// How long helpers have to end after QEMU, as they are meant to.
const HELPERS_WITHIN: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);
/// What is printed just before an end may be read just after it.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long typing may take if nobody reads.
const TYPE_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of complaints that are kept.
const TAIL: usize = 8 << 10;
/// Most lines of them in the log, and the longest.
const MAX_LOGGED: usize = 200;
const MAX_LINE: u64 = 4 << 10;

/// A process that runs, or has ended. Dropping it kills whatever is left.
pub(super) struct Process {
    group: Mutex<Option<Group>>,
    stdin: tokio::sync::Mutex<ChildStdin>,
    ended: watch::Receiver<Option<ExitStatus>>,
    stderr: Arc<Mutex<VecDeque<u8>>>,
}

/// The group that it is in. Dropping it kills whatever is there.
struct Group {
    watcher: Child,
    id: Pid,
    /// The variable that all of its processes have, `NAME=VALUE`.
    mark: String,
}

impl Group {
    fn new() -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{MARK}={}-{count}-{now}", std::process::id());
        let watcher = std::process::Command::new("/bin/sh")
            .args(["-c", WATCH, &mark])
            .env_remove(MARK)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let id = Pid::from_raw(i32::try_from(watcher.id()).map_err(io::Error::other)?);
        Ok(Self { watcher, id, mark })
    }

    /// Whether any of its processes is left beside the watcher.
    fn is_busy(&self) -> bool {
        let has_mark = |entry: fs::DirEntry| {
            // Those of other users cannot be read, and are not ours.
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            memmem::find(&environment, self.mark.as_bytes()).is_some()
        };
        fs::read_dir("/proc").is_ok_and(|mut all| all.any(|entry| entry.is_ok_and(has_mark)))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        drop(self.watcher.stdin.take());
        // It kills itself last.
        let _ = self.watcher.wait();
    }
}

impl Process {
    /// Runs a command. What it prints goes to `printed`, its complaints to the log.
    pub(super) fn spawn(
        mut command: Command,
        log: &Logger,
        printed: impl FnMut(&[u8]) + Send + 'static,
    ) -> io::Result<Self> {
        let group = Group::new()?;
        let (name, value) = group.mark.split_once('=').unwrap_or_default();
        command.env(name, value).process_group(group.id.as_raw());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let kept = Arc::default();
        tokio::spawn(pass_on(stdout, printed));
        let (heard, all_heard) = oneshot::channel::<()>();
        tokio::spawn({
            let (log, kept) = (log.clone(), Arc::clone(&kept));
            async move {
                read_stderr(stderr, &log, &kept).await;
                drop(heard);
            }
        });
        let (sender, ended) = watch::channel(None);
        tokio::spawn(async move {
            let status = child.wait().await;
            // A helper may hold the pipe for longer.
            let _ = timeout(LAST_WORDS, all_heard).await;
            // Whoever waits sees the channel closed if that fails.
            sender.send_replace(status.ok());
        });
        Ok(Self { group: Mutex::new(Some(group)), stdin: stdin.into(), ended, stderr: kept })
    }

    /// Waits for its end; says how it ended, and what it complained of last.
    pub(super) async fn ended(&self) -> (Option<ExitStatus>, String) {
        let mut ended = self.ended.clone();
        let status = ended.wait_for(Option::is_some).await.map_or(None, |status| *status);
        let mut kept = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(kept.make_contiguous());
        (status, text.lines().map(printable).collect::<Vec<_>>().join("\n"))
    }

    /// Types into its standard input.
    pub(super) async fn type_in(&self, bytes: &[u8]) -> io::Result<()> {
        let write = async {
            let mut stdin = self.stdin.lock().await;
            stdin.write_all(bytes).await?;
            stdin.flush().await
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "nobody reads there");
        timeout(TYPE_WITHIN, write).await.map_err(late)?
    }

    /// Waits until it has ended, which it has been told to, and brings that about if it does not. On return nothing is
    /// left of it, nor of what it has started.
    pub(super) async fn end(&self) {
        let taken = self.group.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(group) = taken else { return };
        if timeout(QUIT_WITHIN, self.ended()).await.is_err() {
            // The watcher does not heed it.
            let _ = killpg(group.id, Signal::SIGTERM);
            let _ = timeout(TERM_WITHIN, self.ended()).await;
        }
        let clear = move || {
            let began = Instant::now();
            while group.is_busy() && began.elapsed() < HELPERS_WITHIN {
                std::thread::sleep(PAUSE);
            }
            drop(group);
        };
        // Only the end of the runtime keeps it from that, and then the group is dropped all the same.
        let _ = spawn_blocking(clear).await;
    }

    /// Ends it at once, whatever it does.
    pub(super) async fn kill(&self) {
        let taken = self.group.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(group) = taken {
            let _ = spawn_blocking(move || drop(group)).await;
        }
    }
}

async fn pass_on(mut pipe: impl AsyncRead + Unpin, mut printed: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        printed(&buffer[..length]);
    }
}

/// Reads complaints to their end: keeps the last of them, and shows the first in the log.
async fn read_stderr(pipe: impl AsyncRead + Unpin, log: &Logger, kept: &Mutex<VecDeque<u8>>) {
    let mut lines = BufReader::new(pipe);
    let mut line = Vec::new();
    for count in 0.. {
        line.clear();
        match (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line).await {
            Ok(1..) => {}
            _ => return,
        }
        // It says so of each share.
        if memmem::find(&line, b": info: QEMU waiting for connection on: ").is_some() {
            continue;
        }
        if count < MAX_LOGGED {
            log.info(format_args!(
                "QEMU: {}",
                printable(String::from_utf8_lossy(&line).trim_end())
            ));
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(&line);
        let surplus = kept.len().saturating_sub(TAIL);
        kept.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn its_streams_and_its_end() {
        let (sender, printed) = mpsc::channel();
        let send = move |bytes: &[u8]| sender.send(bytes.to_vec()).expect("heard");
        let script = "read -r line; echo \"got $line\"; echo no such thing >&2; exit 3";
        let process = Process::spawn(shell(script), &Logger::nowhere(), send).expect("it runs");
        process.type_in(b"this\n").await.expect("it reads");
        let (status, complaints) = timeout(SOON, process.ended()).await.expect("it ends");
        assert_eq!(status.and_then(|status| status.code()), Some(3));
        assert_eq!(complaints, "no such thing");
        assert_eq!(printed.recv_timeout(SOON).expect("printed"), b"got this\n");
        process.end().await;
        process.end().await;
    }

    /// The processes that have written their numbers into `dir`, once there are `count`.
    async fn started(dir: &Path, count: usize) -> Vec<String> {
        loop {
            let files: Vec<_> = fs::read_dir(dir).expect("there").flatten().collect();
            let read = |entry: &fs::DirEntry| fs::read_to_string(entry.path()).ok();
            let pids: Vec<String> = files.iter().filter_map(read).collect();
            if pids.iter().filter(|pid| pid.ends_with('\n')).count() == count {
                return pids;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    #[tokio::test]
    async fn nothing_is_left_of_it_and_its_helpers() {
        // One helper, one that leaves the group, and itself, none of which heeds a word.
        let script = "trap '' TERM; cd \"$0\"; help='trap \"\" TERM; echo $$ > $0; sleep 1000; true'; \
                      sh -c \"$help\" one & setsid sh -c \"$help\" two & echo $$ > own; sleep 1000; true";
        for way in ["kill", "drop", "lost"] {
            let dir = tempfile::tempdir().expect("a directory");
            let mut command = shell(script);
            command.arg(dir.path());
            let process = Process::spawn(command, &Logger::nowhere(), |_| {}).expect("it runs");
            let pids = timeout(SOON, started(dir.path(), 3)).await.expect("they start");
            match way {
                "kill" => process.kill().await,
                "drop" => drop(process),
                // As it is when this process is killed: nothing but the pipe's end is heard.
                _ => {
                    let mut group = process.group.lock().expect("whole").take().expect("there");
                    drop(group.watcher.stdin.take());
                    std::mem::forget(group);
                }
            }
            let is_there = |pid: &String| {
                let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
                stat.is_ok_and(|stat| !stat.contains(") Z "))
            };
            let gone = async {
                while pids.iter().any(is_there) {
                    tokio::time::sleep(PAUSE).await;
                }
            };
            timeout(SOON, gone).await.unwrap_or_else(|_| panic!("{way}: {pids:?}"));
        }
    }
}
