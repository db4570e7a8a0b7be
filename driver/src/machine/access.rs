//! The ways into a running guest: its agent, and its backdoor's shell on hvc0.
//!
//! The agent is preferred if there is one. A guest may have either, both or, until it is up, none. An agent that starts
//! before its system is up is not used until then: the first command must find what it finds over the backdoor, which
//! is ordered after basic.target.

use std::convert::Infallible;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::power::{END_AFTER_LOSS, Guest};
use super::session::{AgentSession, Environment, Session, SessionError, ShellSession};
use super::{DEFAULT_TIMEOUT, Machine, State};
use crate::error::{Error, MachineError, Result, chain};

/// How long a system may take to come up after its agent.
const SYSTEM_UP_WITHIN: Duration = DEFAULT_TIMEOUT;

/// Most agent sessions per boot: the agent may be restarted, but a broken one must not keep the host busy.
const MAX_SESSIONS: u32 = 16;

/// The ways into a guest.
#[derive(Clone)]
pub(super) struct Access {
    agent: Way,
    shell: Way,
    /// The host's end of hvc0.
    hvc0: Arc<UnixStream>,
    /// Whether the way that commands take has been logged.
    logged: bool,
}

/// Which way.
#[derive(Clone, Copy)]
pub(super) enum By {
    Agent,
    Shell,
}

/// The state of a way.
#[derive(Clone)]
enum Way {
    /// The guest is not up yet, or the service that answers is restarting. Most guests have no backdoor.
    Awaited,
    /// It answers but its system is not up yet, or fails to come up for this reason.
    Early(Session, Option<Arc<str>>),
    There(Session),
    /// It belongs to a boot that is over for the script; the next boot's is awaited.
    Left(Session),
    /// There will be none for the rest of this run.
    Lost(Arc<SessionError>),
}

impl Way {
    fn session(&self) -> Option<&Session> {
        match self {
            Self::Early(session, _) | Self::There(session) | Self::Left(session) => Some(session),
            Self::Awaited | Self::Lost(_) => None,
        }
    }

    /// From now on the next boot's is awaited. The task that attends to this way sets it.
    fn leave(&mut self) {
        if let Self::There(session) = self {
            session.leave();
            *self = Self::Left(session.clone());
        }
    }
}

impl Access {
    /// `logged`: the way that commands take is known already.
    pub(super) fn new(hvc0: Arc<UnixStream>, logged: bool) -> Self {
        Self { agent: Way::Awaited, shell: Way::Awaited, hvc0, logged }
    }

    fn way(&mut self, by: By) -> &mut Way {
        match by {
            By::Agent => &mut self.agent,
            By::Shell => &mut self.shell,
        }
    }

    /// Ends all sessions, because the guest is gone.
    pub(super) fn close(&self) {
        [&self.agent, &self.shell].into_iter().filter_map(Way::session).for_each(Session::close);
    }

    /// Ends all sessions without a word to those who wait for answers: they learn better how the guest ended.
    pub(super) fn abandon(&self) {
        [&self.agent, &self.shell].into_iter().filter_map(Way::session).for_each(Session::abandon);
    }

    /// The backdoor's shell, if it is there.
    pub(super) fn shell(&self) -> Option<&ShellSession> {
        match &self.shell {
            Way::There(Session::Shell(shell)) => Some(shell),
            _ => None,
        }
    }

    /// Root's login environment, if the agent has said it.
    pub(super) fn environment(&self) -> Option<Environment> {
        match &self.agent {
            Way::There(Session::Agent(agent)) => agent.environment(),
            _ => None,
        }
    }

    /// The best way at the moment. It may be lost already without its task having noticed.
    pub(super) fn session(&self) -> Option<Session> {
        let best = match (&self.agent, &self.shell) {
            // If the backdoor has started, the system is up.
            (Way::There(agent), _) | (Way::Early(agent, _), Way::There(_)) if !agent.is_lost() => {
                agent
            }
            (_, Way::There(shell)) if !shell.is_lost() => shell,
            _ => return None,
        };
        Some(best.clone())
    }

    /// A way into a guest whose system does not come up.
    fn session_while_down(&self) -> Option<Session> {
        match &self.agent {
            Way::Early(session, Some(_)) => Some(session.clone()),
            _ => None,
        }
    }

    /// Why its system fails to come up, if it does.
    fn down(&self) -> Option<Arc<str>> {
        match &self.agent {
            Way::Early(_, why) => why.clone(),
            _ => None,
        }
    }

    /// Why there is no way left, if there is none.
    fn lost(&self) -> Option<Arc<SessionError>> {
        use Way::{Awaited, Early, Left, Lost, There};
        match (&self.agent, &self.shell) {
            (Early(..) | There(_), _) | (_, Early(..) | There(_)) => None,
            (Lost(why), _) | (Awaited | Left(_), Lost(why)) => Some(Arc::clone(why)),
            (Awaited | Left(_), Awaited | Left(_)) => None,
        }
    }
}

impl Machine {
    /// The host's end of hvc0, where the backdoor's root shell is, for exclusive use.
    ///
    /// # Errors
    /// If the machine is not running.
    pub fn shell(&self) -> Result<UnixStream> {
        let hvc0 = self.run()?.access.hvc0;
        hvc0.try_clone().map_err(|e| MachineError::file("open", "hvc0")(e).into())
    }

    /// Starts the machine if it is off, and waits for a way into the guest and for its system to be up.
    pub(super) async fn session(&self) -> Result<Session> {
        self.session_if(false).await
    }

    /// The same, but also accepts a guest whose system fails to come up.
    pub(super) async fn session_even_down(&self) -> Result<Session> {
        self.session_if(true).await
    }

    async fn session_if(&self, even_down: bool) -> Result<Session> {
        let start = match &*self.inner.state.borrow() {
            state @ (State::Running(run) | State::Paused(run)) => {
                if matches!(state, State::Paused(_)) {
                    self.inner.log.warning("it is paused: this waits until it is resumed");
                }
                if let Some(session) = run.access.session() {
                    return Ok(self.use_session(session));
                }
                false
            }
            State::Ended(end) => return Err(self.ended_error(end)),
            // A machine that ended by itself is not silently restarted.
            State::Stopping => false,
            State::Off | State::Starting => true,
        };
        let _step = self.nested("waiting for the VM to finish booting");
        if start {
            self.start(false).await?;
        }
        let began = Instant::now();
        let session = self.unless_ended(self.await_session(even_down)).await?;
        self.log("connected to guest root shell");
        self.log(format_args!("(connecting took {:.2} seconds)", began.elapsed().as_secs_f64()));
        Ok(self.use_session(session))
    }

    /// Remembers the way by which a call goes.
    fn use_session(&self, session: Session) -> Session {
        *self.inner.used.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
        session
    }

    /// Makes the next call wait for the next boot's way into the guest, unless it is there already.
    pub fn disconnect(&self) {
        let used = self.inner.used.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(used) = used else { return };
        self.set_access(|access| {
            if access.session().is_some_and(|now| now.is(&used)) {
                access.agent.leave();
                access.shell.leave();
            }
        });
    }

    pub(super) async fn await_session(&self, even_down: bool) -> Result<Session> {
        let mut state = self.inner.state.subscribe();
        loop {
            let access = state.borrow_and_update().run().map(|run| run.access.clone());
            if let Some(access) = access {
                if let Some(session) = access.session() {
                    return Ok(session);
                }
                if even_down && let Some(session) = access.session_while_down() {
                    return Ok(session);
                }
                if let Some(why) = access.down() {
                    let machine = self.name().to_owned();
                    return Err(MachineError::NotUp { machine, why, tail: self.tail() }.into());
                }
                if let Some(why) = access.lost() {
                    return Err(self.access_lost(why.into()).await);
                }
            }
            // The sender lives in self.
            let _ = state.changed().await;
        }
    }

    /// Connects by one of the ways, and reconnects when its session is lost: both services may be restarted.
    pub(super) async fn attend_way(
        &self,
        by: By,
        stream: Option<&UnixStream>,
        guest: &Guest,
    ) -> Infallible {
        let Some(stream) = stream else { return std::future::pending().await };
        for count in 1.. {
            let guest = if count > 1 { &Guest::Again } else { guest };
            let error = match self.connect_by(by, stream, guest).await {
                Ok(session) => self.attend_session(by, session).await,
                Err(error) => error,
            };
            let name = self.name();
            match by {
                By::Agent => self.inner.log.warning(format_args!("no agent: {}", chain(&error))),
                // Most guests do not need it.
                By::Shell => tracing::debug!(machine = name, "no backdoor: {}", chain(&error)),
            }
            if error.is_final() || count == MAX_SESSIONS {
                self.set_access(|access| *access.way(by) = Way::Lost(Arc::new(error)));
                break;
            }
        }
        // Only a restart of the guest can help.
        std::future::pending().await
    }

    async fn connect_by(
        &self,
        by: By,
        stream: &UnixStream,
        guest: &Guest,
    ) -> std::result::Result<Session, SessionError> {
        let clock = &self.inner.clock;
        Ok(match (by, guest) {
            (By::Agent, _) => {
                let again = *guest != Guest::Fresh;
                let environment = match guest {
                    Guest::Back { environment, .. } => environment.clone(),
                    Guest::Fresh | Guest::Again => None,
                };
                Session::Agent(AgentSession::connect(stream, again, environment, clock).await?)
            }
            (By::Shell, Guest::Back { shell: true, .. }) => {
                Session::Shell(ShellSession::resume(stream, clock)?)
            }
            (By::Shell, _) => Session::Shell(ShellSession::connect(stream, clock).await?),
        })
    }

    async fn attend_session(&self, by: By, session: Session) -> SessionError {
        let usable = async {
            if let Session::Agent(agent) = &session {
                self.attend_system(agent).await;
            }
            self.set_access(|access| *access.way(by) = Way::There(session.clone()));
            std::future::pending().await
        };
        let error = tokio::select! {
            biased;
            error = session.lost() => error,
            never = usable => match never {},
        };
        self.set_access(|access| *access.way(by) = Way::Awaited);
        error
    }

    /// Waits until the system of a guest is up, if its agent may be there before it is.
    async fn attend_system(&self, session: &AgentSession) {
        for warning in session.warnings() {
            self.inner.log.warning(warning);
        }
        if !session.early() {
            return;
        }
        let early = |why: Option<&str>| {
            let session = Session::Agent(session.clone());
            self.set_access(|access| access.agent = Way::Early(session, why.map(Into::into)));
        };
        early(None);
        let mut up = std::pin::pin!(session.system_up());
        let up = tokio::select! {
            biased;
            up = &mut up => up,
            Ok(()) = session.system_down() => {
                early(Some("its system did not come up and is in emergency or rescue mode"));
                up.await
            }
            () = self.inner.clock.sleep(SYSTEM_UP_WITHIN) => {
                let limit = SYSTEM_UP_WITHIN.as_secs();
                early(Some(&format!("its system has not reached basic.target within {limit} seconds")));
                up.await
            }
        };
        if let Err(error) = up {
            self.inner
                .log
                .warning(format_args!("nothing tells whether the system is up: {}", chain(&error)));
        }
    }

    /// Waits until a session that is about to end has ended, and all others with it.
    pub(super) async fn left(&self, session: &Session) {
        if matches!(session, Session::Agent(_)) {
            session.lost().await;
        }
        // No event announces the end of a shell on a console; the next shell announces itself.
        self.set_access(|access| access.shell.leave());
    }

    /// Waits for a session's answer, or for the guest's end. `failed` says what could not be done.
    pub(super) async fn answered<T>(
        &self,
        answer: impl Future<Output = std::result::Result<T, SessionError>>,
        failed: impl FnOnce() -> String,
    ) -> Result<T> {
        match self.unless_ended(async { Ok(answer.await) }).await? {
            Ok(value) => Ok(value),
            Err(error) => Err(self.session_error(failed(), error).await),
        }
    }

    /// Converts an error of a session to one of the machine.
    pub(super) async fn session_error(&self, what: String, error: SessionError) -> Error {
        let machine = self.name().to_owned();
        if !error.lost() {
            return MachineError::Agent { machine, what, source: error.into() }.into();
        }
        self.access_lost(error.into()).await
    }

    /// There is no way into the guest left. If the guest is about to end, that is the better reason, so wait a moment
    /// for it.
    async fn access_lost(&self, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
        let mut state = self.inner.state.subscribe();
        match self.inner.clock.timeout(END_AFTER_LOSS, self.ended(&mut state)).await {
            Some(ended) => ended,
            None => {
                let machine = self.name().to_owned();
                MachineError::AgentLost { machine, source, tail: self.tail() }.into()
            }
        }
    }

    fn set_access(&self, change: impl FnOnce(&mut Access)) {
        let mut first = None;
        self.inner.state.send_if_modified(|state| {
            let Some(run) = state.run_mut() else { return false };
            change(&mut run.access);
            if let (false, Some(session)) = (run.access.logged, run.access.session()) {
                run.access.logged = true;
                first = Some(session);
            }
            true
        });
        if let Some(session) = first {
            self.log(format_args!("commands go through {}", session.description()));
        }
    }
}
