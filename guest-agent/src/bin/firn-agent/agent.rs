//! The main loop: everything that can happen, and what follows.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use firn_guest_agent::protocol::{
    Decoder, Exit, Failure, Greeting, GreetingKind, Item, ProtocolError, Ready, ToAgent, VERSION,
};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::kill;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::Options;
use crate::boot_timer;
use crate::failure::Context;
use crate::init::Setup;
use crate::outbox::{HIGH, Outbox};
use crate::port::{self, Opening, Place};
use crate::session::{FIRST_TOKEN, Power, Session};
use crate::signals::{Signals, drain};
use crate::spawn::Spawner;

const PORT: u64 = 0;
const CHILD: u64 = 1;
const WAKE: u64 = 2;
const DEVICES: u64 = 3;
const POWER_OFF: u64 = 4;
const REBOOT: u64 = 5;

/// Bytes read from the port, or from a command's pipe, at a time.
const BUFFER: usize = 64 * 1024;

/// With this many bytes waiting to be sent, no more requests are read.
const CONGESTED: usize = 1024 * 1024;

/// How long the answer to a power request may take to be sent before the system goes down anyway.
const POWER_REPLY_TIMEOUT: Duration = Duration::from_millis(500);

/// Why the main loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The socket was closed.
    Disconnected,
    /// Power the system off.
    PowerOff,
    /// Reboot the system.
    Reboot,
}

/// The stream to the host. It is watched edge-triggered, because a port without a host is always "readable" and a
/// level-triggered wait for its host would spin; the flags hold from an edge until a call would block.
struct Link {
    fd: OwnedFd,
    readable: bool,
    writable: bool,
}

/// The agent.
pub struct Agent {
    place: Place,
    init: bool,
    early: bool,
    spawner: Arc<Spawner>,
    boot_pid: Option<Pid>,
    boot: Option<Exit>,
    warnings: Vec<String>,
    epoll: Epoll,
    signals: Signals,
    wake: Arc<EventFd>,
    devices: Option<OwnedFd>,
    link: Option<Link>,
    decoder: Decoder,
    session: Option<Session>,
    outgoing: Vec<u8>,
    sent: usize,
    scratch: Vec<u8>,
    ending: Option<(Outcome, Instant)>,
}

impl Agent {
    /// An agent with these options; with `setup` it is process 1.
    pub fn new(options: Options, setup: Option<Setup>) -> Result<Self, Failure> {
        let Options { place, console, early } = options;
        let init = setup.is_some();
        let setup = setup.unwrap_or_default();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context(|| "epoll".to_owned())?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let wake = Arc::new(wake.context(|| "eventfd".to_owned())?);
        let signals = Signals::install(init)?;
        let mut this = Self {
            place,
            init,
            early,
            spawner: Arc::new(Spawner::new(console)),
            boot_pid: None,
            boot: None,
            warnings: setup.warnings,
            epoll,
            signals,
            wake,
            devices: None,
            link: None,
            decoder: Decoder::new(),
            session: None,
            outgoing: Vec::new(),
            sent: 0,
            scratch: vec![0; BUFFER],
            ending: None,
        };
        this.register()?;
        // After the handler of SIGCHLD: its end must not be missed.
        if init {
            match crate::init::start_boot_script() {
                Ok(pid) => this.boot_pid = pid,
                Err(failure) => this.warn(failure.message),
            }
        }
        Ok(this)
    }

    fn register(&self) -> Result<(), Failure> {
        let what = || "watch for events".to_owned();
        let event = |token| EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token);
        self.epoll.add(&*self.wake, event(WAKE)).context(what)?;
        self.epoll.add(&self.signals.child, event(CHILD)).context(what)?;
        let power = [(&self.signals.power_off, POWER_OFF), (&self.signals.reboot, REBOOT)];
        for (stream, token) in power {
            if let Some(stream) = stream {
                self.epoll.add(stream, event(token)).context(what)?;
            }
        }
        Ok(())
    }

    fn warn(&mut self, warning: String) {
        complain!("firn-agent: {warning}");
        self.warnings.push(warning);
    }

    /// Serves until the system or the stream ends.
    pub fn run(&mut self) -> Result<Outcome, Failure> {
        self.open()?;
        loop {
            self.flush();
            if let Some((outcome, until)) = self.ending
                && (self.unsent() == 0 || self.link.is_none() || Instant::now() >= until)
            {
                return Ok(outcome);
            }
            let busy = self.receive() | self.pump();
            if self.link.is_none() && self.devices.is_none() && self.ending.is_none() {
                if !self.place.is_machine() {
                    return Ok(Outcome::Disconnected);
                }
                self.open()?;
                continue;
            }
            self.wait(busy)?;
        }
    }

    fn open(&mut self) -> Result<(), Failure> {
        if self.try_open()? {
            return Ok(());
        }
        if self.devices.is_none() {
            let devices = port::device_events()?;
            let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, DEVICES);
            self.epoll.add(&devices, event).context(|| "watch for devices".to_owned())?;
            self.devices = Some(devices);
            // It may have come just before the socket listened.
            if !self.try_open()? {
                complain!("firn-agent: waiting for the port {:?}", self.place);
            }
        }
        Ok(())
    }

    fn try_open(&mut self) -> Result<bool, Failure> {
        let fd = match self.place.open()? {
            Opening::Open(fd) => fd,
            Opening::Absent => return Ok(false),
        };
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        self.epoll
            .add(&fd, EpollEvent::new(flags, PORT))
            .context(|| "watch the port".to_owned())?;
        self.devices = None;
        self.link = Some(Link { fd, readable: true, writable: true });
        self.announce();
        Ok(true)
    }

    fn announce(&mut self) {
        self.outgoing.clear();
        self.sent = 0;
        self.outgoing.extend(Greeting::new(GreetingKind::Announce, 0).to_bytes());
    }

    fn unsent(&self) -> usize {
        self.outgoing.len() - self.sent
            + self.session.as_ref().map_or(0, |session| session.outbox.len())
    }

    /// Writes what the port takes.
    fn flush(&mut self) {
        loop {
            if self.sent == self.outgoing.len() {
                self.outgoing.clear();
                self.sent = 0;
                if let Some(session) = &mut self.session {
                    let finished = session.outbox.take(&mut self.outgoing);
                    session.forget(&finished);
                }
            }
            let Some(link) = self.link.as_mut().filter(|link| link.writable) else {
                return;
            };
            if self.outgoing.is_empty() {
                return;
            }
            match nix::unistd::write(&link.fd, &self.outgoing[self.sent..]) {
                Ok(length) => self.sent += length,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => link.writable = false,
                Err(error) => self.lose(error),
            }
        }
    }

    /// Lets commands add output; says whether any did.
    fn pump(&mut self) -> bool {
        let waiting = self.outgoing.len() - self.sent;
        let room = |outbox: &Outbox| outbox.len() + waiting < HIGH;
        self.session.as_mut().is_some_and(|session| session.pump(&mut self.scratch, room))
    }

    /// Reads and handles one piece from the port; says whether there may be more.
    fn receive(&mut self) -> bool {
        if self.unsent() >= CONGESTED || self.ending.is_some() {
            return false;
        }
        let Some(link) = self.link.as_mut().filter(|link| link.readable) else {
            return false;
        };
        match nix::unistd::read(&link.fd, &mut self.scratch) {
            Ok(0) => self.left(),
            Ok(length) => {
                self.decoder.push(&self.scratch[..length]);
                self.decode();
                return true;
            }
            Err(Errno::EINTR) => return true,
            Err(Errno::EAGAIN) => link.readable = false,
            Err(error) => self.lose(error),
        }
        false
    }

    /// The host has closed its end: a socket is done with, a port may be connected again.
    fn left(&mut self) {
        self.session = None;
        self.decoder.clear();
        if self.place.is_machine() {
            self.announce();
            if let Some(link) = &mut self.link {
                link.readable = false;
            }
        } else {
            self.link = None;
        }
    }

    /// The stream itself is gone.
    fn lose(&mut self, error: Errno) {
        if self.place.is_machine() {
            complain!("firn-agent: the port is gone: {}", error.desc());
        }
        self.session = None;
        self.decoder.clear();
        self.link = None;
        self.outgoing.clear();
        self.sent = 0;
    }

    fn decode(&mut self) {
        loop {
            let result = match &self.session {
                None => match self.decoder.find_greeting() {
                    Some(greeting) => self.greeted(greeting),
                    None => return,
                },
                Some(_) => match self.decoder.next_item::<ToAgent>() {
                    Ok(Some(item)) => self.handle(item),
                    Ok(None) => return,
                    Err(error) => Err(error),
                },
            };
            if let Err(error) = result {
                // Zeros are a new host's padding: it knows that the session is over.
                if !matches!(error, ProtocolError::Length { length: 0 }) {
                    complain!("firn-agent: session ended: {error}");
                }
                if let Some(session) = self.session.take() {
                    session.refuse(&error);
                    // What is half sent must be finished, or the host could not read the refusal.
                    let mut rest = Vec::new();
                    session.outbox.take(&mut rest);
                    self.outgoing.append(&mut rest);
                }
            }
        }
    }

    fn handle(&mut self, item: Item<ToAgent>) -> Result<(), ProtocolError> {
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        let frame = match item {
            Item::Greeting(greeting) => return self.greeted(greeting),
            Item::Frame(frame) => frame,
        };
        let may_power = self.init || self.place.is_machine();
        let power = session.handle(frame, &self.epoll, may_power)?;
        if let Some(power) = power {
            self.end(power);
        }
        Ok(())
    }

    fn greeted(&mut self, hello: Greeting) -> Result<(), ProtocolError> {
        let repeated = self.session.as_ref().is_some_and(|session| session.nonce == hello.nonce);
        if hello.kind != GreetingKind::Hello || repeated {
            return Ok(());
        }
        self.outgoing.clear();
        self.sent = 0;
        self.outgoing.extend(Greeting::new(GreetingKind::Welcome, hello.nonce).to_bytes());
        self.session = None;
        if hello.version == VERSION {
            let outbox = Outbox::new(Arc::clone(&self.wake));
            self.session = Some(Session::new(hello.nonce, outbox, Arc::clone(&self.spawner)));
            self.greet();
        } else {
            complain!("firn-agent: the host speaks version {}, this is {VERSION}", hello.version);
        }
        Ok(())
    }

    /// Says that the agent can be used, if it can.
    fn greet(&mut self) {
        if self.boot_pid.is_some() {
            return;
        }
        let (init, early, boot) = (self.init, self.early, self.boot);
        let warnings = &self.warnings;
        if let Some(session) = &mut self.session {
            // A socket may be on a host, whose ports are none of our business.
            if matches!(self.place, Place::Port(_)) {
                boot_timer::mark_ready();
            }
            session.greet(|| describe(init, early, boot, warnings.clone()));
        }
    }

    fn wait(&mut self, busy: bool) -> Result<(), Failure> {
        let timeout = if busy { EpollTimeout::ZERO } else { self.timeout() };
        let mut events = [EpollEvent::empty(); 32];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error).context(|| "wait for events".to_owned()),
        };
        for event in &events[..count] {
            self.happened(*event)?;
        }
        if let Some(session) = &mut self.session
            && let Some(deadline) = session.deadline()
        {
            let now = Instant::now();
            if deadline <= now {
                session.expire(now, uptime_ms);
            }
        }
        Ok(())
    }

    fn timeout(&self) -> EpollTimeout {
        let session = self.session.as_ref().and_then(Session::deadline);
        let Some(deadline) = session.into_iter().chain(self.ending.map(|(_, until)| until)).min()
        else {
            return EpollTimeout::NONE;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, or the last millisecond would be spent spinning.
        let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX - 1).saturating_add(1);
        EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
    }

    fn happened(&mut self, event: EpollEvent) -> Result<(), Failure> {
        match event.data() {
            PORT => self.port_changed(event.events()),
            CHILD => {
                drain(&self.signals.child);
                self.reap();
            }
            WAKE => drain(&*self.wake),
            DEVICES => {
                if let Some(devices) = &self.devices {
                    drain(devices);
                    self.try_open()?;
                }
            }
            POWER_OFF => self.end(Power::Off),
            REBOOT => self.end(Power::Reboot),
            token @ FIRST_TOKEN.. => {
                self.session.iter_mut().for_each(|session| session.ready(token))
            }
            _ => {}
        }
        Ok(())
    }

    fn port_changed(&mut self, flags: EpollFlags) {
        let Some(link) = &mut self.link else {
            return;
        };
        // What the host sent before it left is still to be read.
        link.readable |=
            flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLRDHUP);
        link.writable |= flags.contains(EpollFlags::EPOLLOUT);
    }

    fn end(&mut self, power: Power) {
        let outcome = match power {
            Power::Reboot => Outcome::Reboot,
            Power::Off => Outcome::PowerOff,
        };
        if self.init {
            self.ending.get_or_insert((outcome, Instant::now() + POWER_REPLY_TIMEOUT));
        } else if let Err(failure) = crate::power::ask_init(outcome) {
            complain!("firn-agent: {}", failure.message);
        }
    }

    /// Takes the status of every child that has ended: commands, and as process 1 also orphans.
    fn reap(&mut self) {
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => {
                    (pid, Exit::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)))
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::Signal(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Err(Errno::EINTR) | Ok(_) => continue,
                // The child was killed by a real-time signal, which nix does not know: it is reaped, but unnamed.
                Err(Errno::EINVAL) => {
                    self.find_vanished();
                    continue;
                }
                Err(error) => {
                    complain!("firn-agent: wait for children: {}", error.desc());
                    return;
                }
            };
            self.exited(pid, exit);
        }
    }

    fn exited(&mut self, pid: Pid, exit: Exit) {
        if self.boot_pid == Some(pid) {
            self.booted(exit);
        } else if let Some(session) = &mut self.session {
            session.exited(pid, exit);
        }
    }

    /// Finds out which child has been reaped without its number.
    fn find_vanished(&mut self) {
        let commands = self.session.as_ref().map(Session::running).unwrap_or_default();
        for pid in commands.into_iter().chain(self.boot_pid) {
            if kill(pid, None) == Err(Errno::ESRCH) {
                self.exited(pid, Exit::Signal(0));
            }
        }
    }

    fn booted(&mut self, exit: Exit) {
        self.boot_pid = None;
        self.boot = Some(exit);
        if !exit.success() {
            self.warn(format!("{}: {exit}", crate::init::BOOT_SCRIPT));
        }
        self.greet();
    }
}

fn describe(init: bool, early: bool, boot: Option<Exit>, warnings: Vec<String>) -> Ready {
    let (hostname, kernel) = nix::sys::utsname::uname().map_or_else(
        |_| Default::default(),
        |uname| {
            (
                uname.nodename().to_string_lossy().into_owned(),
                uname.release().to_string_lossy().into_owned(),
            )
        },
    );
    let agent_version = env!("CARGO_PKG_VERSION").to_owned();
    Ready { agent_version, init, early, hostname, kernel, uptime_ms: uptime_ms(), boot, warnings }
}

fn uptime_ms() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
