//! Runs a process and measures it, or takes what it has measured.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use firn_vmm::device::boot_timer::now_ns;
use memchr::memmem;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, killpg};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::boot::{MEMORY, SYSTEM, TOTAL, USER};
use super::guest::HERE;
use super::monitor::Boot;
use super::{BenchError, Sample, Stage, Stages};

/// How much of a failed run's output is shown.
const TAIL: usize = 4 << 10;

/// Before what [`print_sample`] prints.
const SAMPLE: &str = "firn-bench: sample ";

/// Prints the figures that this process has measured, for [`super::measure`] in the one that has started it.
///
/// # Errors
/// If they cannot be printed.
pub fn print_sample(sample: &Sample) -> io::Result<()> {
    writeln!(io::stdout(), "{SAMPLE}{}", serde_json::to_string(sample)?)
}

/// Boots once, within a time limit.
pub(super) fn time(name: &str, boot: &Boot, limit: Duration) -> Result<Sample, BenchError> {
    let before = used();
    let began = now_ns();
    let mut stages = Stages::new();
    watch(name, &boot.command, limit, |_, line| {
        if is_here(line) {
            stages.entry(Stage::Init).or_insert_with(now_ns);
        }
    })?;
    let after = used();
    stages.insert(Stage::End, now_ns());
    if let Some(file) = &boot.marks {
        let text = fs::read(file).map_err(BenchError::file("read", file))?;
        let marks: Stages = serde_json::from_slice(&text)
            .map_err(|error| BenchError::file("read", file)(error.into()))?;
        stages.extend(marks);
    }
    let (user, system) = (after.0 - before.0, after.1 - before.1);
    let work = [(USER, user), (SYSTEM, system), (TOTAL, user + system)];
    let stages = stages.into_iter().map(|(stage, at)| (stage.as_str(), at.saturating_sub(began)));
    Ok(stages.chain(work).map(|(name, value)| (name.to_owned(), value)).collect())
}

/// The [memory](MEMORY) of a process while its guest runs, without the guest's, in KiB.
pub(super) fn memory(
    name: &str,
    boot: &Boot,
    limit: Duration,
) -> Result<Option<[u64; MEMORY.len()]>, BenchError> {
    let Some(command) = &boot.lingering else { return Ok(None) };
    let guest_kib = boot.memory_mib << 10;
    let mut found = None;
    watch(name, command, limit, |child, line| {
        if found.is_none() && is_here(line) {
            let maps = fs::read_to_string(format!("/proc/{child}/smaps")).ok();
            found = Some(maps.map(|maps| memory_kib(&maps, guest_kib)));
        }
    })?;
    Ok(found.flatten())
}

/// What a process has measured.
pub(super) fn sample(
    name: &str,
    command: &[OsString],
    limit: Duration,
) -> Result<Sample, BenchError> {
    let mut sample = None;
    watch(name, command, limit, |_, line| {
        if let Some(json) = line.strip_prefix(SAMPLE.as_bytes()) {
            sample = serde_json::from_slice(json).ok();
        }
    })?;
    let none = || BenchError::Failed {
        name: name.to_owned(),
        how: "it has measured nothing".to_owned(),
        output: String::new(),
    };
    sample.ok_or_else(none)
}

fn is_here(line: &[u8]) -> bool {
    memmem::find(line, HERE.as_bytes()).is_some()
}

/// Runs a command to its end, with a look at each line that it prints.
fn watch(
    name: &str,
    command: &[OsString],
    limit: Duration,
    mut look: impl FnMut(u32, &[u8]),
) -> Result<(), BenchError> {
    let failed = |source| BenchError::Process {
        name: name.to_owned(),
        program: command.first().map_or(String::new(), |word| word.display().to_string()),
        source,
    };
    let (program, arguments) =
        command.split_first().ok_or(io::ErrorKind::InvalidInput.into()).map_err(failed)?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Its children hold its streams open too, and are killed with it.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let errors = tail_of_stderr(&mut child);
    let mut stdout = child.stdout.take().map(BufReader::new);
    let id = child.id();
    let watchdog = Watchdog::new(&child, limit);
    let mut said = Vec::new();
    let mut line = Vec::new();
    while let Some(stdout) = &mut stdout {
        line.clear();
        if stdout.read_until(b'\n', &mut line).map_err(failed)? == 0 {
            break;
        }
        look(id, &line);
        said.extend_from_slice(&line);
        said.drain(..said.len().saturating_sub(TAIL));
    }
    // It may keep running without its streams. Its PID must not be reused until the watchdog has ended.
    waitid(Id::Pid(pid(&child)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
        .map_err(|error| failed(error.into()))?;
    let barked = watchdog.end();
    let status = child.wait().map_err(failed)?;
    said.extend(errors.join().unwrap_or_default());
    if status.success() && !barked {
        return Ok(());
    }
    let how = if barked {
        format!("it hangs: killed after {} seconds", limit.as_secs())
    } else {
        status.to_string()
    };
    let output = String::from_utf8_lossy(&said).trim().to_owned();
    Err(BenchError::Failed { name: name.to_owned(), how, output })
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// Kills a process that takes too long.
struct Watchdog {
    stop: mpsc::Sender<()>,
    thread: thread::JoinHandle<bool>,
}

impl Watchdog {
    /// Watches a child that leads its process group and is not reaped before [`Self::end`].
    fn new(child: &Child, limit: Duration) -> Self {
        let (stop, stopped) = mpsc::channel();
        let group = pid(child);
        let thread = thread::spawn(move || {
            let barks = stopped.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
            if barks {
                // A child that has ended no longer needs it.
                let _ = killpg(group, Signal::SIGKILL);
            }
            barks
        });
        Self { stop, thread }
    }

    /// Whether it had to kill the child.
    fn end(self) -> bool {
        drop(self.stop);
        self.thread.join().unwrap_or(false)
    }
}

/// Drains a process's error output, so that it never blocks on it.
fn tail_of_stderr(child: &mut Child) -> thread::JoinHandle<Vec<u8>> {
    let stderr = child.stderr.take();
    thread::spawn(move || {
        let mut said = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.read_to_end(&mut said);
        }
        said.drain(..said.len().saturating_sub(TAIL));
        said
    })
}

/// Returns the processor time of all children that have ended, in nanoseconds: user and system.
fn used() -> (u64, u64) {
    let nanoseconds =
        |time: TimeVal| u64::try_from(time.num_microseconds()).unwrap_or(0).saturating_mul(1000);
    getrusage(UsageWho::RUSAGE_CHILDREN)
        .map_or((0, 0), |usage| (nanoseconds(usage.user_time()), nanoseconds(usage.system_time())))
}

/// The [memory](MEMORY) in a list of mappings (`man 5 proc_pid_smaps`), without mappings as large as the guest's memory
/// or half of it, which may be split in two.
fn memory_kib(maps: &str, guest_kib: u64) -> [u64; MEMORY.len()] {
    let (mut guest, mut resident, mut private, mut written) = (false, 0, 0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let key = words.next().unwrap_or_default();
        let value: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match key {
            "Size:" => guest = value >= guest_kib / 2,
            _ if guest => {}
            "Rss:" => resident += value,
            "Private_Clean:" | "Private_Dirty:" => private += value,
            // Not what is dirty: that is each page of a file in a tmpfs, where programs and kernels have been copied.
            "Anonymous:" => written += value,
            _ => {}
        }
    }
    [resident, private, written]
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{LIMIT, Run, Subject, measure};

    fn boot(script: &str) -> Boot {
        let command: Vec<OsString> = ["sh", "-c", script].map(Into::into).into();
        Boot { lingering: Some(command.clone()), command, marks: None, memory_mib: 64 }
    }

    fn subject(run: Run) -> Subject {
        Subject { name: "a shell".to_owned(), machines: 1, reference: false, run }
    }

    #[test]
    fn a_process_is_watched_from_its_start_to_its_end() {
        let work = "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done";
        let sample = time("a shell", &boot(&format!("{work}; echo 'x {HERE}'; {work}")), LIMIT);
        let sample = sample.expect("it ends well");
        let of = |name: &str| sample.iter().find(|(of, _)| of == name).expect("it is there").1;
        assert!(0 < of("init") && of("init") < of("end"), "{sample:?}");
        assert!((1..10_000_000_000).contains(&of("user")), "{sample:?}");
        assert_eq!(of("total"), of("user") + of("sys"));
        let memory = memory("a shell", &boot(&format!("echo '{HERE}'; sleep 0.2")), LIMIT)
            .expect("it ends well");
        let [all, private, written] = memory.unwrap();
        assert!((100..50_000).contains(&all), "{memory:?}");
        assert!(all >= private && private >= written && written > 0, "{memory:?}");
    }

    #[test]
    fn what_a_failed_boot_said_is_shown() {
        let error = time("a shell", &boot("echo no kernel; echo no memory >&2; exit 3"), LIMIT)
            .expect_err("it fails");
        assert_eq!(error.to_string(), "a shell: exit status: 3:\nno kernel\nno memory");
    }

    #[test]
    fn one_that_hangs_loses_itself_only() {
        let hangs = boot("echo slowly; exec >&- 2>&-; sleep 1000 & wait");
        let printing = |text: &str| {
            Run::Sample(["sh", "-c", &format!("echo '{text}'")].map(Into::into).into())
        };
        let began = Instant::now();
        let measured = measure(
            &[
                subject(Run::Boot(Boot { lingering: None, ..hangs })),
                subject(Run::Boot(boot("exit 3"))),
                subject(Run::Boot(boot("true"))),
                subject(printing("nothing")),
                subject(printing("firn-bench: sample [[\"find\",7]]")),
            ],
            2,
            Duration::from_secs(2),
            |_| (),
        );
        assert!(began.elapsed() < Duration::from_secs(60));
        let found: Vec<_> =
            measured.iter().map(|of| (of.samples.len(), of.failure.as_deref())).collect();
        assert_eq!(
            found,
            [
                (0, Some("a shell: it hangs: killed after 2 seconds:\nslowly")),
                (0, Some("a shell: exit status: 3")),
                (2, None),
                (0, Some("a shell: it has measured nothing")),
                (2, None),
            ]
        );
        assert_eq!(measured[4].samples[1], [("find".to_owned(), 7)]);
    }

    #[test]
    fn the_guests_memory_is_not_the_monitors() {
        let maps = "00-01 rw-p\nSize:    524288 kB\nRss:   300000 kB\nPrivate_Dirty: 300000 kB\n\
                    02-03 r-xp\nSize:  4000 kB\nRss:  2000 kB\nPrivate_Clean:  1000 kB\nPrivate_Dirty: 500 kB\n\
                    04-05 rw-p\nSize:  262144 kB\nRss:  100 kB\nAnonymous: 100 kB\n\
                    06-07 rw-p\nSize:  132 kB\nRss: 24 kB\nPrivate_Dirty: 20 kB\nAnonymous: 20 kB\n";
        assert_eq!(memory_kib(maps, 524_288), [2024, 1520, 20]);
    }
}
