//! One session with a host: its requests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use firn_guest_agent::protocol::{
    Exit, Failure, Frame, MAX_REQUESTS, ProtocolError, Ready, RequestId, Stream, ToAgent, ToHost,
};
use nix::sys::epoll::Epoll;
use nix::unistd::Pid;

use crate::exec::{Command, Pipe};
use crate::failure::failure;
use crate::files::{self, Transfer};
use crate::outbox::Outbox;
use crate::spawn::Spawner;

/// Tokens below are the agent's own.
pub const FIRST_TOKEN: u64 = 16;

/// The shortest interval of heartbeats.
const MIN_HEARTBEAT: Duration = Duration::from_millis(10);

/// What a request asks of the agent itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    Off,
    Reboot,
}

enum Work {
    Command(Box<Command>),
    Transfer(Transfer),
}

/// A session, from its hello to the next or to the host's leaving.
pub struct Session {
    /// The hello's nonce.
    pub nonce: u64,
    /// What is to be sent.
    pub outbox: Arc<Outbox>,
    spawner: Arc<Spawner>,
    requests: BTreeMap<RequestId, Work>,
    highest: RequestId,
    /// Where the next round of [`Self::pump`] starts, so that no request is always last when there is little room.
    turn: RequestId,
    heartbeat: Option<(Duration, Instant)>,
    greeted: bool,
}

impl Session {
    /// A session without requests.
    pub fn new(nonce: u64, outbox: Arc<Outbox>, spawner: Arc<Spawner>) -> Self {
        Self {
            nonce,
            outbox,
            spawner,
            requests: BTreeMap::new(),
            highest: 0,
            turn: 0,
            heartbeat: None,
            greeted: false,
        }
    }

    /// Tells the host that the agent can be used, once.
    pub fn greet(&mut self, ready: impl FnOnce() -> Ready) {
        if !self.greeted {
            self.greeted = true;
            self.outbox.push(0, ToHost::Ready(ready()));
        }
    }

    /// Handles a frame. `may_power` is asked before a power request is granted.
    pub fn handle(
        &mut self,
        frame: Frame<ToAgent>,
        epoll: &Epoll,
        may_power: bool,
    ) -> Result<Option<Power>, ProtocolError> {
        let Frame { id, message } = frame;
        let misplaced = |what| ProtocolError::Misplaced { id, what };
        if id == 0 {
            let ToAgent::Heartbeat { interval_ms } = message else {
                return Err(misplaced("not a message of the session"));
            };
            let interval = Duration::from_millis(interval_ms.into()).max(MIN_HEARTBEAT);
            self.heartbeat = (interval_ms > 0).then(|| (interval, Instant::now() + interval));
            return Ok(None);
        }
        if id > self.highest {
            self.highest = id;
            return Ok(self.begin(id, message, epoll, may_power).map_err(misplaced)?.inspect(
                |_| {
                    self.outbox.push(id, ToHost::Done);
                },
            ));
        }
        // A request without an entry has ended before the host could know.
        let result = match (self.requests.get_mut(&id), message) {
            (None, _) => Ok(()),
            (Some(Work::Command(command)), ToAgent::Cancel) => {
                command.kill();
                self.end(id);
                Ok(())
            }
            (Some(Work::Command(_)), ToAgent::Detach) => {
                if let Some(Work::Command(command)) = self.end(id) {
                    command.detach();
                }
                Ok(())
            }
            (Some(Work::Command(command)), message) => command.deliver(message, &self.outbox),
            (Some(Work::Transfer(transfer)), message) => match message {
                ToAgent::Data(_) | ToAgent::Eof | ToAgent::Credit(_) | ToAgent::Cancel => {
                    transfer.deliver(message)
                }
                _ => Err("not a message for a file request"),
            },
        };
        result.map_err(misplaced).map(|()| None)
    }

    fn begin(
        &mut self,
        id: RequestId,
        message: ToAgent,
        epoll: &Epoll,
        may_power: bool,
    ) -> Result<Option<Power>, &'static str> {
        let full = self.requests.len() >= MAX_REQUESTS;
        let result = match message {
            ToAgent::PowerOff if may_power => return Ok(Some(Power::Off)),
            ToAgent::Reboot if may_power => return Ok(Some(Power::Reboot)),
            ToAgent::PowerOff | ToAgent::Reboot => {
                Err(failure("this agent does not serve a machine's port"))
            }
            _ if full => Err(failure(format!("{MAX_REQUESTS} requests are in flight already"))),
            ToAgent::Exec(request) => {
                let token = |pipe| token(id, pipe);
                Command::start(id, &request, &self.spawner, epoll, token).map(|command| {
                    self.outbox
                        .push(id, ToHost::Started { pid: command.pid().as_raw().unsigned_abs() });
                    Work::Command(Box::new(command))
                })
            }
            ToAgent::WriteFile { .. }
            | ToAgent::ReadFile { .. }
            | ToAgent::Stat { .. }
            | ToAgent::List { .. }
            | ToAgent::MakeDirectory { .. }
            | ToAgent::Symlink { .. }
            | ToAgent::Sync
            | ToAgent::Wait(_)
            | ToAgent::Reseed(_) => {
                files::start(id, message, Arc::clone(&self.outbox)).map(Work::Transfer)
            }
            _ => return Err("not the beginning of a request"),
        };
        match result {
            Ok(work) => {
                self.requests.insert(id, work);
            }
            Err(failure) => self.outbox.push(id, ToHost::Failed(failure)),
        }
        Ok(None)
    }

    fn end(&mut self, id: RequestId) -> Option<Work> {
        self.outbox.push(id, ToHost::Done);
        self.requests.remove(&id)
    }

    /// Forgets file requests whose workers have said their last word.
    pub fn forget(&mut self, finished: &[RequestId]) {
        for id in finished {
            self.requests.remove(id);
        }
    }

    /// A pipe with a token of this session can be used again.
    pub fn ready(&mut self, token: u64) {
        if let Some((id, pipe)) = from_token(token)
            && let Some(Work::Command(command)) = self.requests.get_mut(&id)
        {
            command.ready(pipe);
            command.feed(&self.outbox);
        }
    }

    /// Gives each command a turn to send a chunk, as long as `room` says there is room; says whether any did.
    pub fn pump(&mut self, scratch: &mut [u8], room: impl Fn(&Outbox) -> bool) -> bool {
        let mut moved = false;
        let turn = self.turn;
        let (before, after): (Vec<_>, Vec<_>) =
            self.requests.iter_mut().partition(|(id, _)| **id < turn);
        for (id, work) in after.into_iter().chain(before) {
            if !room(&self.outbox) {
                self.turn = *id;
                break;
            }
            if let Work::Command(command) = work {
                moved |= command.pump(&self.outbox, scratch);
            }
        }
        self.end_finished();
        moved
    }

    fn end_finished(&mut self) {
        let outbox = &self.outbox;
        self.requests.retain(|id, work| {
            let finished = matches!(work, Work::Command(command) if command.finished());
            if finished {
                outbox.push(*id, ToHost::Done);
            }
            !finished
        });
    }

    /// A process has been reaped; nothing if it is none of the session's.
    pub fn exited(&mut self, pid: Pid, exit: Exit) {
        for work in self.requests.values_mut() {
            if let Work::Command(command) = work
                && command.pid() == pid
            {
                command.exited(exit, &self.outbox);
                break;
            }
        }
        self.end_finished();
    }

    /// The processes that have not been reaped.
    pub fn running(&self) -> Vec<Pid> {
        let running = |work: &Work| match work {
            Work::Command(command) => command.running().then_some(command.pid()),
            Work::Transfer(_) => None,
        };
        self.requests.values().filter_map(running).collect()
    }

    /// When [`Self::expire`] is due next.
    pub fn deadline(&self) -> Option<Instant> {
        let commands = self.requests.values().filter_map(|work| match work {
            Work::Command(command) => command.deadline(),
            Work::Transfer(_) => None,
        });
        commands.chain(self.heartbeat.map(|(_, due)| due)).min()
    }

    /// Does what is due at `now`.
    pub fn expire(&mut self, now: Instant, uptime_ms: impl Fn() -> u64) {
        for work in self.requests.values_mut() {
            if let Work::Command(command) = work {
                command.expire(now);
            }
        }
        if let Some((interval, due)) = &mut self.heartbeat
            && *due <= now
        {
            *due = now + *interval;
            self.outbox.push(0, ToHost::Heartbeat { uptime_ms: uptime_ms() });
        }
    }

    /// Tells the host why the agent ends the session.
    pub fn refuse(&self, why: &ProtocolError) {
        let failure = Failure { message: why.to_string(), errno: None };
        self.outbox.push(0, ToHost::Failed(failure));
    }
}

impl Drop for Session {
    /// Ends what no one waits for any more.
    fn drop(&mut self) {
        self.outbox.close();
        for work in self.requests.values() {
            if let Work::Command(command) = work {
                command.kill();
            }
        }
    }
}

fn token(id: RequestId, pipe: Pipe) -> u64 {
    let pipe = match pipe {
        Pipe::Stdin => 0,
        Pipe::Output(Stream::Stdout) => 1,
        Pipe::Output(Stream::Stderr) => 2,
    };
    FIRST_TOKEN + u64::from(id) * 4 + pipe
}

fn from_token(token: u64) -> Option<(RequestId, Pipe)> {
    let token = token.checked_sub(FIRST_TOKEN)?;
    let pipe = match token % 4 {
        0 => Pipe::Stdin,
        1 => Pipe::Output(Stream::Stdout),
        _ => Pipe::Output(Stream::Stderr),
    };
    Some((u32::try_from(token / 4).ok()?, pipe))
}
