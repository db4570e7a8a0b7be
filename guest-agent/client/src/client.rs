//! The connection: handshake, the two tasks that read and write, and what they share with requests.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use firn_guest_agent::protocol::{
    Condition, Decoder, Frame, Greeting, GreetingKind, Item, ProtocolError, RESYNC_GUARD,
    RESYNC_PADDING, Ready, ReceiveWindow, RequestId, SEED_LEN, ToAgent, ToHost, VERSION, WINDOW,
    WINDOW_MESSAGES, encode,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};

use super::request::Request;
use super::{ANSWER_WITHIN, AgentError, Clock, HEARTBEAT, Lost, SILENCE};

/// Bytes read at a time.
const BUFFER: usize = 64 * 1024;

/// Bytes after which the writer stops gathering frames for one write.
const BATCH: usize = 64 * 1024;

/// Most bytes before the agent's greeting. What an earlier session left behind is what the port's socket and the
/// agent's queue hold, a megabyte or two.
const MAX_STALE: usize = 16 << 20;

/// How long an agent that may be in the middle of a frame has to answer a hello, before it is brought out of the frame.
const RESYNC_AFTER: Duration = Duration::from_secs(2);

/// How many times silence is waited for within [`SILENCE`].
const SILENCE_PIECES: u32 = 4;

/// Messages a request may have waiting beside those that its window counts: `Started`, two `Closed`, `Exited`,
/// `Info`, and the last.
const UNCOUNTED_MESSAGES: usize = 8;

/// A connected, ready agent. Clones are cheap and share the connection, which ends with the last of them and of their
/// requests.
#[derive(Debug, Clone)]
pub struct AgentClient {
    pub(super) shared: Arc<Shared>,
    ready: Arc<Ready>,
    clock: Clock,
    tasks: Arc<Tasks>,
}

/// Ends the tasks when nobody can use them any more.
#[derive(Debug)]
struct Tasks([JoinHandle<()>; 2]);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

/// What requests and tasks share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Everything but contents. It is short, and must not wait behind contents.
    control: mpsc::UnboundedSender<Vec<u8>>,
    /// `Data` and `Eof`, bounded by each request's window.
    contents: mpsc::UnboundedSender<Vec<u8>>,
    lost: watch::Sender<Option<Lost>>,
    heartbeat: watch::Sender<Option<Duration>>,
}

#[derive(Debug)]
struct State {
    next: RequestId,
    requests: HashMap<RequestId, Entry>,
}

#[derive(Debug)]
struct Entry {
    events: mpsc::Sender<ToHost>,
    receive: ReceiveWindow,
    /// The bytes that may be sent; closed when the agent has ended the request.
    send: Arc<Semaphore>,
}

impl AgentClient {
    /// Waits for the agent at the other end of `stream` to be ready. For a guest that has just been started, or whose
    /// agent has seen an earlier host leave.
    ///
    /// There is no timeout: the caller knows what to wait for beside this, such as the machine's end. Dropping the
    /// future gives up.
    ///
    /// # Errors
    /// [`AgentError::Version`], or [`AgentError::Lost`] when the stream ends first.
    pub async fn connect(stream: UnixStream) -> Result<Self, AgentError> {
        Self::establish(stream, &Clock::new(), false).await
    }

    /// The same for an agent that may still be in a session whose host vanished, even in the middle of a frame.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn reconnect(stream: UnixStream) -> Result<Self, AgentError> {
        Self::establish(stream, &Clock::new(), true).await
    }

    /// [`Self::connect`], or with `again` [`Self::reconnect`], to the agent of a machine that may be paused or freeze:
    /// how long it takes to answer is measured on `clock`, and one that says nothing for [`SILENCE`] is lost
    /// ([`Lost::Silent`]).
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_on(
        stream: UnixStream,
        clock: &Clock,
        again: bool,
    ) -> Result<Self, AgentError> {
        let client = Self::establish(stream, clock, again).await?;
        client.notice_silence();
        Ok(client)
    }

    async fn establish(stream: UnixStream, clock: &Clock, again: bool) -> Result<Self, AgentError> {
        // The stream's own halves would shut it down when they are dropped, for its clones too.
        let (mut reader, mut writer) = tokio::io::split(stream);
        let mut decoder = Decoder::new();
        shake_hands(&mut reader, &mut writer, &mut decoder, clock, again).await?;
        let ready = wait_until_ready(&mut reader, &mut decoder).await?;

        let (control, control_queue) = mpsc::unbounded_channel();
        let (contents, contents_queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            state: Mutex::new(State { next: 1, requests: HashMap::new() }),
            control,
            contents,
            lost: watch::Sender::new(None),
            heartbeat: watch::Sender::new(None),
        });
        let reading = tokio::spawn(read(Arc::clone(&shared), reader, decoder));
        let writing =
            tokio::spawn(write(Arc::clone(&shared), writer, control_queue, contents_queue));
        let tasks = Arc::new(Tasks([reading, writing]));
        Ok(Self { shared, ready: Arc::new(ready), clock: clock.clone(), tasks })
    }

    /// What the agent said of itself and the guest when it was ready.
    #[must_use]
    pub fn ready(&self) -> &Ready {
        &self.ready
    }

    /// Waits until the agent is lost, and says why.
    pub async fn lost(&self) -> Lost {
        let mut lost = self.shared.lost.subscribe();
        match lost.wait_for(Option::is_some).await.map(|lost| lost.clone()) {
            Ok(Some(lost)) => lost,
            // The sender lives in `self`.
            Ok(None) | Err(_) => Lost::Closed,
        }
    }

    /// Ends the connection for all clones and requests, as if the agent had closed it. The stream's other clones can
    /// be used for another one.
    pub fn close(&self) {
        self.abandon();
        self.shared.lose(Lost::Closed);
    }

    /// Ends the connection, but leaves those who wait for an answer waiting: for a caller who tells them better.
    pub fn abandon(&self) {
        self.tasks.0.iter().for_each(JoinHandle::abort);
    }

    /// Why the agent is lost, if it is.
    #[must_use]
    pub fn lost_reason(&self) -> Option<Lost> {
        self.shared.lost.borrow().clone()
    }

    /// Has the agent tell each `interval` (at least 10 ms; zero: no more) that it is alive. The receiver holds the
    /// guest's uptime at the last time.
    #[must_use]
    pub fn heartbeat(&self, interval: Duration) -> watch::Receiver<Option<Duration>> {
        let interval_ms = u32::try_from(interval.as_millis()).unwrap_or(u32::MAX);
        self.shared.send(0, ToAgent::Heartbeat { interval_ms }).ok();
        self.shared.heartbeat.subscribe()
    }

    /// Has the agent say now and then that it lives, and gives it up when it does not.
    fn notice_silence(&self) {
        let mut alive = self.heartbeat(HEARTBEAT);
        let clock = self.clock.clone();
        let shared = Arc::downgrade(&self.shared);
        let tasks = self.tasks.0.each_ref().map(JoinHandle::abort_handle);
        tokio::spawn(async move {
            alive.mark_unchanged();
            let mut silent = 0;
            // In pieces, of which a clock that jumps ends only one: a host that was stopped for a minute has no silent
            // guest.
            while silent < SILENCE_PIECES {
                match clock.timeout(SILENCE / SILENCE_PIECES, alive.changed()).await {
                    Some(Ok(())) => silent = 0,
                    // Nobody has the client any more.
                    Some(Err(_)) => return,
                    None => silent += 1,
                }
            }
            tasks.iter().for_each(AbortHandle::abort);
            if let Some(shared) = shared.upgrade() {
                shared.lose(Lost::Silent);
            }
        });
    }

    /// Waits for an answer for as long as one may take.
    pub(super) async fn soon<T>(
        &self,
        answer: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, AgentError> {
        let answer = self.clock.timeout(ANSWER_WITHIN, answer).await;
        answer.unwrap_or(Err(AgentError::Late(ANSWER_WITHIN)))
    }

    /// Waits until something holds in the guest. Dropping this gives the wait up.
    ///
    /// # Errors
    /// [`AgentError::Refused`] if the guest cannot look.
    pub async fn wait(&self, condition: Condition) -> Result<(), AgentError> {
        Request::begin(self, ToAgent::Wait(condition))?.finish().await
    }

    /// Writes all dirty data of the guest back to its disks.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn sync(&self) -> Result<(), AgentError> {
        Request::begin(self, ToAgent::Sync)?.finish().await
    }

    /// Has the guest's kernel draw its random numbers afresh, because it is a copy of another guest's.
    ///
    /// # Errors
    /// [`AgentError::Refused`] if the kernel does, or the host has no random numbers.
    pub async fn reseed(&self) -> Result<(), AgentError> {
        let mut seed = [0; SEED_LEN];
        getrandom::fill(&mut seed).map_err(|error| AgentError::local(error.into()))?;
        Request::begin(self, ToAgent::Reseed(seed))?.finish().await
    }

    /// Has the guest power off cleanly; returns when the agent has begun to.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn power_off(&self) -> Result<(), AgentError> {
        Request::begin(self, ToAgent::PowerOff)?.finish().await
    }

    /// Has the guest reboot cleanly; returns when the agent has begun to.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn reboot(&self) -> Result<(), AgentError> {
        Request::begin(self, ToAgent::Reboot)?.finish().await
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock with the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the agent is lost; only to be asked after something has failed because it is.
    pub(super) fn lost(&self) -> Lost {
        self.lost.borrow().clone().unwrap_or(Lost::Closed)
    }

    /// Queues a message.
    pub(super) fn send(&self, id: RequestId, message: ToAgent) -> Result<(), AgentError> {
        let queue = match message {
            ToAgent::Data(_) | ToAgent::Eof => &self.contents,
            _ => &self.control,
        };
        let mut bytes = Vec::new();
        encode(&Frame { id, message }, &mut bytes).map_err(AgentError::Unsendable)?;
        queue.send(bytes).map_err(|_| AgentError::Lost(self.lost()))
    }

    /// Registers a request and queues its first message.
    pub(super) fn begin(
        &self,
        message: ToAgent,
    ) -> Result<(RequestId, mpsc::Receiver<ToHost>, Arc<Semaphore>), AgentError> {
        let (events, receiver) = mpsc::channel(WINDOW_MESSAGES + UNCOUNTED_MESSAGES);
        let send = Arc::new(Semaphore::new(usize::try_from(WINDOW).unwrap_or(usize::MAX)));
        // Numbers must reach the agent in order, so queuing is done with the state locked; it does not wait.
        let mut state = self.state();
        if let Some(lost) = self.lost.borrow().clone() {
            return Err(lost.into());
        }
        let id = state.next;
        self.send(id, message)?;
        state.next =
            id.checked_add(1).ok_or(Lost::Ended("all request numbers are used".to_owned()))?;
        state.requests.insert(
            id,
            Entry { events, receive: ReceiveWindow::default(), send: Arc::clone(&send) },
        );
        Ok((id, receiver, send))
    }

    /// Notes that a counted message has been taken by the request's owner.
    pub(super) fn release(&self, id: RequestId, cost: u32) {
        let credit =
            self.state().requests.get_mut(&id).and_then(|entry| entry.receive.release(cost));
        if let Some(credit) = credit {
            // Were it not sent, the agent would be lost, which the request's owner learns anyway.
            self.send(id, ToAgent::Credit(credit)).ok();
        }
    }

    /// Forgets a request that its owner gives up. What still comes for it is ignored.
    pub(super) fn forget(&self, id: RequestId) {
        self.state().requests.remove(&id);
    }

    fn lose(&self, why: Lost) {
        self.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            lost.get_or_insert(why);
            first
        });
        // After the reason is there: this wakes everybody who waits.
        for (_, entry) in self.state().requests.drain() {
            entry.send.close();
        }
    }

    fn receive(&self, frame: Frame<ToHost>) -> Result<(), Lost> {
        let Frame { id, message } = frame;
        if id == 0 {
            return self.receive_for_session(message);
        }
        let misplaced = |what| Lost::Garbage(ProtocolError::Misplaced { id, what });
        let mut state = self.state();
        let next = state.next;
        let Some(entry) = state.requests.get_mut(&id) else {
            return if id < next {
                Ok(())
            } else {
                Err(misplaced("answer to a request that was never made"))
            };
        };
        if let ToHost::Credit(credit) = message {
            let credit = usize::try_from(credit).unwrap_or(usize::MAX);
            let window = usize::try_from(WINDOW).unwrap_or(usize::MAX);
            if entry.send.available_permits().saturating_add(credit) > window {
                return Err(misplaced("credit beyond the window"));
            }
            entry.send.add_permits(credit);
            return Ok(());
        }
        if !entry.receive.receive(message.cost()) {
            return Err(misplaced("more than its window admits"));
        }
        let last = matches!(message, ToHost::Done | ToHost::Failed(_));
        if let Err(mpsc::error::TrySendError::Full(_)) = entry.events.try_send(message) {
            return Err(misplaced("more messages than a request can have"));
        }
        if last && let Some(entry) = state.requests.remove(&id) {
            entry.send.close();
        }
        Ok(())
    }

    fn receive_for_session(&self, message: ToHost) -> Result<(), Lost> {
        match message {
            ToHost::Heartbeat { uptime_ms } => {
                self.heartbeat.send_replace(Some(Duration::from_millis(uptime_ms)));
                Ok(())
            }
            ToHost::Failed(failure) => Err(Lost::Ended(failure.message)),
            _ => {
                Err(ProtocolError::Misplaced { id: 0, what: "not a message of the session" }.into())
            }
        }
    }
}

/// A number that no earlier session has used. It need not be secret: each `RandomState` is seeded differently.
fn fresh_nonce() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// Begins a session. With `again`, the agent may be in the middle of a frame. It nearly never is, so it gets the padding
/// only if it does not answer.
async fn shake_hands(
    reader: &mut ReadHalf<UnixStream>,
    writer: &mut WriteHalf<UnixStream>,
    decoder: &mut Decoder,
    clock: &Clock,
    again: bool,
) -> Result<(), AgentError> {
    let mut late = std::pin::pin!(clock.sleep(RESYNC_AFTER));
    let mut resync = again;
    let mut hello = Greeting::new(GreetingKind::Hello, fresh_nonce());
    let mut outgoing = vec![0; if again { RESYNC_GUARD } else { 0 }];
    outgoing.extend(hello.to_bytes());
    let (mut sent, mut received) = (0, 0);
    let mut buffer = vec![0; BUFFER];
    loop {
        // The guest may not read yet, so writing must not keep from reading.
        let length = tokio::select! {
            result = writer.write(&outgoing[sent..]), if sent < outgoing.len() => {
                sent += result.map_err(io_error)?;
                continue;
            }
            result = reader.read(&mut buffer) => result.map_err(io_error)?,
            () = &mut late, if resync => {
                resync = false;
                // Another one: should the first be answered after all, the padding ends that session.
                hello = Greeting::new(GreetingKind::Hello, fresh_nonce());
                outgoing.resize(outgoing.len() + RESYNC_PADDING, 0);
                outgoing.extend(hello.to_bytes());
                continue;
            }
        };
        if length == 0 {
            return Err(Lost::Closed.into());
        }
        received += length;
        if received > MAX_STALE {
            return Err(Lost::from(ProtocolError::NoGreeting { length: received }).into());
        }
        decoder.push(&buffer[..length]);
        while let Some(greeting) = decoder.find_greeting() {
            let welcome = greeting.kind == GreetingKind::Welcome && greeting.nonce == hello.nonce;
            if welcome && greeting.version == VERSION {
                return Ok(());
            }
            if welcome {
                return Err(AgentError::Version { agent: greeting.version, host: VERSION });
            }
            if greeting.kind == GreetingKind::Announce {
                // A hello sent before the agent opened its port may have been dropped on the way.
                outgoing.extend(hello.to_bytes());
            }
        }
    }
}

fn io_error(error: std::io::Error) -> Lost {
    Lost::Io(Arc::new(error))
}

async fn wait_until_ready(
    reader: &mut ReadHalf<UnixStream>,
    decoder: &mut Decoder,
) -> Result<Ready, AgentError> {
    let mut buffer = vec![0; BUFFER];
    loop {
        if let Some(item) = decoder.next_item::<ToHost>().map_err(Lost::from)? {
            return match item {
                Item::Frame(Frame { id: 0, message: ToHost::Ready(ready) }) => Ok(ready),
                Item::Frame(Frame { id: 0, message: ToHost::Failed(failure) }) => {
                    Err(Lost::Ended(failure.message).into())
                }
                Item::Frame(Frame { id, .. }) => Err(Lost::from(ProtocolError::Misplaced {
                    id,
                    what: "message before the agent is ready",
                })
                .into()),
                Item::Greeting(_) => Err(Lost::Ended("it was started again".to_owned()).into()),
            };
        }
        match reader.read(&mut buffer).await.map_err(io_error)? {
            0 => return Err(Lost::Closed.into()),
            length => decoder.push(&buffer[..length]),
        }
    }
}

async fn read(shared: Arc<Shared>, mut reader: ReadHalf<UnixStream>, mut decoder: Decoder) {
    let mut buffer = vec![0; BUFFER];
    let why = loop {
        match receive_all(&shared, &mut decoder) {
            Ok(()) => {}
            Err(why) => break why,
        }
        match reader.read(&mut buffer).await {
            Ok(0) => break Lost::Closed,
            Ok(length) => decoder.push(&buffer[..length]),
            Err(error) => break io_error(error),
        }
    };
    shared.lose(why);
}

fn receive_all(shared: &Shared, decoder: &mut Decoder) -> Result<(), Lost> {
    while let Some(item) = decoder.next_item::<ToHost>()? {
        match item {
            Item::Frame(frame) => shared.receive(frame)?,
            Item::Greeting(_) => return Err(Lost::Ended("it was started again".to_owned())),
        }
    }
    Ok(())
}

async fn write(
    shared: Arc<Shared>,
    mut writer: WriteHalf<UnixStream>,
    mut control: mpsc::UnboundedReceiver<Vec<u8>>,
    mut contents: mpsc::UnboundedReceiver<Vec<u8>>,
) {
    let mut lost = shared.lost.subscribe();
    loop {
        let mut batch = tokio::select! {
            biased;
            _ = lost.wait_for(Option::is_some) => return,
            Some(frame) = control.recv() => frame,
            Some(frame) = contents.recv() => frame,
            else => return,
        };
        while batch.len() < BATCH
            && let Ok(mut frame) = control.try_recv().or_else(|_| contents.try_recv())
        {
            batch.append(&mut frame);
        }
        let result = tokio::select! {
            result = writer.write_all(&batch) => result,
            _ = lost.wait_for(Option::is_some) => return,
        };
        if let Err(error) = result {
            // If the guest has gone, the reader learns it too, and says it better.
            let gone = error.kind() == std::io::ErrorKind::BrokenPipe;
            shared.lose(if gone { Lost::Closed } else { io_error(error) });
            return;
        }
    }
}
