//! A running command and its pipes.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Stdio};
use std::time::{Duration, Instant};

use firn_guest_agent::protocol::{
    ExecRequest, Exit, Failure, MAX_CHUNK, MESSAGE_COST, MIN_CHUNK, Program, ReceiveWindow,
    RequestId, SendWindow, StderrMode, Stream, ToAgent, ToHost, WINDOW,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::failure::{Context, failure};
use crate::outbox::Outbox;
use crate::spawn::Spawner;

/// Between SIGTERM and SIGKILL when a command's time is over.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// Covers NixOS and everybody else; directories that do not exist cost nothing.
pub const PATH: &str = "/run/wrappers/bin:/run/current-system/sw/bin:\
    /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const SHELLS: [&str; 3] = ["/bin/bash", "/run/current-system/sw/bin/bash", "/bin/sh"];

/// Which of a command's pipes an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pipe {
    /// Standard input.
    Stdin,
    /// An output.
    Output(Stream),
}

/// A command of the host.
pub struct Command {
    id: RequestId,
    pid: Pid,
    stdin: Option<Input>,
    outputs: Vec<Output>,
    exit: Option<Exit>,
    deadline: Option<Instant>,
    timed_out: bool,
    send: SendWindow,
    receive: ReceiveWindow,
}

/// The descriptors are watched edge-triggered; `ready` holds from an edge until a call would block.
struct Output {
    stream: Stream,
    fd: OwnedFd,
    ready: bool,
}

struct Input {
    fd: OwnedFd,
    ready: bool,
    queue: VecDeque<Vec<u8>>,
    /// Bytes of the queue's front that have been written.
    written: usize,
    eof: bool,
}

impl Command {
    /// Starts it. `watch` registers each pipe.
    pub fn start(
        id: RequestId,
        request: &ExecRequest,
        spawner: &Spawner,
        epoll: &Epoll,
        token: impl Fn(Pipe) -> u64,
    ) -> Result<Self, Failure> {
        let (mut command, name) = prepare(request)?;
        let (reader, writer) = io::pipe().context(|| "pipe".to_owned())?;
        match request.stderr {
            StderrMode::Stream => command.stderr(Stdio::piped()),
            StderrMode::Console => command.stderr(spawner.console()),
            StderrMode::Null => command.stderr(Stdio::null()),
            StderrMode::ToStdout => {
                command.stderr(writer.try_clone().context(|| "pipe".to_owned())?)
            }
        };
        command.stdout(writer);
        let mut child = spawner.spawn(&mut command).context(|| format!("run {name}"))?;
        // It holds the pipe's writing end, which would keep the stream open.
        drop(command);

        let deadline =
            request.timeout_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
        let pid = i32::try_from(child.id()).map_err(|_| failure("process id out of range"))?;
        let mut this = Self {
            id,
            pid: Pid::from_raw(pid),
            stdin: None,
            outputs: Vec::with_capacity(2),
            exit: None,
            deadline,
            timed_out: false,
            send: SendWindow::default(),
            receive: ReceiveWindow::default(),
        };
        let watched = this.watch(&mut child, reader.into(), epoll, token);
        if let Err(failure) = watched {
            this.kill();
            return Err(failure);
        }
        Ok(this)
    }

    fn watch(
        &mut self,
        child: &mut process::Child,
        stdout: OwnedFd,
        epoll: &Epoll,
        token: impl Fn(Pipe) -> u64,
    ) -> Result<(), Failure> {
        let what = || "watch a pipe".to_owned();
        let add = |fd: &OwnedFd, pipe, flags| {
            fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context(what)?;
            epoll.add(fd, EpollEvent::new(flags | EpollFlags::EPOLLET, token(pipe))).context(what)
        };
        let stderr = child.stderr.take().map(OwnedFd::from);
        let outputs = [(Stream::Stdout, Some(stdout)), (Stream::Stderr, stderr)];
        for (stream, fd) in outputs {
            if let Some(fd) = fd {
                add(&fd, Pipe::Output(stream), EpollFlags::EPOLLIN)?;
                self.outputs.push(Output { stream, fd, ready: false });
            }
        }
        if let Some(fd) = child.stdin.take().map(OwnedFd::from) {
            add(&fd, Pipe::Stdin, EpollFlags::EPOLLOUT)?;
            self.stdin =
                Some(Input { fd, ready: false, queue: VecDeque::new(), written: 0, eof: false });
        }
        Ok(())
    }

    /// Its process, and process group.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether the process has not been reaped.
    pub fn running(&self) -> bool {
        self.exit.is_none()
    }

    /// When [`Self::expire`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// A pipe can be used again.
    pub fn ready(&mut self, pipe: Pipe) {
        match pipe {
            Pipe::Stdin => self.stdin.iter_mut().for_each(|stdin| stdin.ready = true),
            Pipe::Output(stream) => {
                self.outputs
                    .iter_mut()
                    .filter(|output| output.stream == stream)
                    .for_each(|output| output.ready = true);
            }
        }
    }

    /// Moves at most one chunk from each output to `outbox`; says whether any was moved.
    pub fn pump(&mut self, outbox: &Outbox, scratch: &mut [u8]) -> bool {
        let mut moved = false;
        let mut closed = [None; 2];
        for (output, closed) in self.outputs.iter_mut().zip(&mut closed) {
            let room = usize::try_from(self.send.open().saturating_sub(MESSAGE_COST))
                .unwrap_or(usize::MAX);
            if !output.ready || room < MIN_CHUNK {
                continue;
            }
            let room = room.min(MAX_CHUNK).min(scratch.len());
            match nix::unistd::read(&output.fd, &mut scratch[..room]) {
                Ok(length @ 1..) => {
                    let message =
                        ToHost::Output { stream: output.stream, bytes: scratch[..length].to_vec() };
                    // It fits: `room` is what is open.
                    let fits = self.send.spend(message.cost());
                    debug_assert!(fits, "read beyond the window");
                    outbox.push(self.id, message);
                    moved = true;
                }
                Err(Errno::EINTR) => moved = true,
                // Of a command whose time is over only what it wrote until then is wanted.
                Err(Errno::EAGAIN) if !(self.timed_out && self.exit.is_some()) => {
                    output.ready = false
                }
                Ok(_) | Err(_) => *closed = Some(output.stream),
            }
        }
        for stream in closed.into_iter().flatten() {
            self.outputs.retain(|output| output.stream != stream);
            outbox.push(self.id, ToHost::Closed(stream));
            moved = true;
        }
        moved
    }

    /// Writes to standard input what can be written.
    pub fn feed(&mut self, outbox: &Outbox) {
        let mut used = 0_u32;
        let Some(input) = &mut self.stdin else {
            return;
        };
        let mut broken = false;
        while input.ready
            && let Some(front) = input.queue.front()
        {
            match nix::unistd::write(&input.fd, &front[input.written..]) {
                Ok(length) => input.written += length,
                Err(Errno::EAGAIN) => input.ready = false,
                Err(Errno::EINTR) => {}
                // Nobody reads it any more.
                Err(_) => {
                    broken = true;
                    break;
                }
            }
            if input.written == front.len() {
                used = used.saturating_add(data_cost(front.len()));
                input.written = 0;
                input.queue.pop_front();
            }
        }
        if broken || (input.eof && input.queue.is_empty()) {
            used = used.saturating_add(self.close_stdin());
        }
        self.release(used, outbox);
    }

    /// Closes standard input; gives the cost of what was thrown away.
    fn close_stdin(&mut self) -> u32 {
        let queue = self.stdin.take().map(|input| input.queue).unwrap_or_default();
        queue.iter().fold(0, |sum: u32, bytes| sum.saturating_add(data_cost(bytes.len())))
    }

    fn release(&mut self, used: u32, outbox: &Outbox) {
        if let Some(credit) = self.receive.release(used) {
            outbox.push(self.id, ToHost::Credit(credit));
        }
    }

    /// Takes a message of the host for this command.
    pub fn deliver(&mut self, message: ToAgent, outbox: &Outbox) -> Result<(), &'static str> {
        match message {
            ToAgent::Data(bytes) => {
                let cost = data_cost(bytes.len());
                if !self.receive.receive(cost) {
                    return Err("input beyond the window");
                }
                match &mut self.stdin {
                    Some(input) if input.eof => return Err("input after its end"),
                    Some(input) if !bytes.is_empty() => input.queue.push_back(bytes),
                    _ => self.release(cost, outbox),
                }
                self.feed(outbox);
            }
            ToAgent::Eof => {
                self.stdin.iter_mut().for_each(|input| input.eof = true);
                self.feed(outbox);
            }
            ToAgent::Credit(credit) => {
                if !self.send.grant(credit) {
                    return Err("credit beyond the window");
                }
            }
            ToAgent::Signal { signal } => {
                let signal = Signal::try_from(signal).map_err(|_| "no such signal")?;
                self.signal(signal);
            }
            _ => return Err("not a message for a command"),
        }
        Ok(())
    }

    /// Notes that the process has been reaped.
    pub fn exited(&mut self, exit: Exit, outbox: &Outbox) {
        let exit = if self.timed_out { Exit::TimedOut } else { exit };
        self.exit = Some(exit);
        self.deadline = None;
        let used = self.close_stdin();
        self.release(used, outbox);
        if self.timed_out {
            self.outputs.iter_mut().for_each(|output| output.ready = true);
        }
        outbox.push(self.id, ToHost::Exited(exit));
    }

    /// Whether it will send nothing more.
    pub fn finished(&self) -> bool {
        self.exit.is_some() && self.outputs.is_empty()
    }

    /// Does what is due at `now`: ends a command whose time is over.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        if self.timed_out {
            self.deadline = None;
            self.kill();
        } else {
            self.timed_out = true;
            self.deadline = now.checked_add(KILL_GRACE);
            self.signal(Signal::SIGTERM);
        }
    }

    /// Kills the process group, if the command has not exited.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    fn signal(&self, signal: Signal) {
        // Once the process is reaped, its number may be another's.
        if self.exit.is_none()
            && let Err(error) = killpg(self.pid, signal)
        {
            complain!("firn-agent: send {signal} to process group {}: {}", self.pid, error.desc());
        }
    }

    /// Lets it run on, with its output thrown away.
    pub fn detach(self) {
        for output in self.outputs {
            let drain = move || {
                fcntl(&output.fd, FcntlArg::F_SETFL(OFlag::empty()))?;
                io::copy(&mut File::from(output.fd), &mut io::sink())
            };
            let thread = std::thread::Builder::new().name("drain".to_owned()).stack_size(64 * 1024);
            if let Err(error) = thread.spawn(drain) {
                complain!("firn-agent: detached command loses its output pipe: {error}");
            }
        }
    }
}

fn data_cost(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(WINDOW).saturating_add(MESSAGE_COST)
}

/// The command without its outputs, and its name for messages.
fn prepare(request: &ExecRequest) -> Result<(process::Command, String), Failure> {
    let path =
        request.env.iter().rev().find(|(name, _)| name == "PATH").map_or(PATH, |(_, value)| value);
    let shell = SHELLS.iter().find(|shell| Path::new(shell).exists()).copied().unwrap_or("/bin/sh");
    let (program, name, arguments) = match &request.program {
        // By its name alone, as by who would type it: scripts see it as $0.
        Program::Shell(script) => {
            let name = shell.rsplit_once('/').map_or(shell, |(_, name)| name);
            (PathBuf::from(shell), name, vec!["-c", script.as_str()])
        }
        Program::Argv(argv) => {
            let (name, arguments) =
                argv.split_first().ok_or_else(|| failure("no program is given"))?;
            (look_up(name, path), name.as_str(), arguments.iter().map(String::as_str).collect())
        }
    };
    let mut command = process::Command::new(program);
    command.arg0(name).args(arguments).process_group(0);
    command.env_clear().env("PATH", PATH).env("SHELL", shell);
    command.env("HOME", "/root").env("USER", "root").env("LOGNAME", "root");
    for (name, value) in &request.env {
        // std would panic, or hand over something else.
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(failure(format!("{name:?} cannot be an environment variable")));
        }
        command.env(name, value);
    }
    let fallback = ["/tmp", "/"].into_iter().map(Path::new).find(|path| path.is_dir());
    let cwd = request.cwd.as_ref().map(|path| path.as_path()).or(fallback);
    if let Some(cwd) = cwd {
        if !cwd.is_dir() {
            return Err(Failure {
                message: format!("working directory {} does not exist", cwd.display()),
                errno: Some(Errno::ENOENT as i32),
            });
        }
        command.current_dir(cwd);
    }
    command.stdin(if request.stdin { Stdio::piped() } else { Stdio::null() });
    Ok((command, name.to_owned()))
}

/// The file of a program, looked up here and not by `Command`, which would have to fork a whole copy of the agent to
/// look it up in another `PATH` than the agent's.
fn look_up(name: &str, path: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let is_program = |file: &PathBuf| {
        std::fs::metadata(file)
            .is_ok_and(|info| info.is_file() && info.permissions().mode() & 0o111 != 0)
    };
    let found =
        || path.split(':').map(|directory| Path::new(directory).join(name)).find(is_program);
    if name.contains('/') { None } else { found() }.unwrap_or_else(|| PathBuf::from(name))
}
