//! The ways into a running guest: its agent, and its backdoor's shell on hvc0.
//!
//! The agent is preferred whenever it is there. A guest may have either, both or, until it is up, none. An agent that is
//! there before its system is up is not used until then: what the first command meets must be what it meets over the
//! backdoor, which is ordered behind basic.target.

use std::convert::Infallible;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::power::END_AFTER_LOSS;
use super::session::{AgentSession, Session, SessionError, ShellSession};
use super::{DEFAULT_TIMEOUT, Machine, State};
use crate::error::{Error, MachineError, Result, chain};

/// How long a system may take to come up once its agent is there.
const SYSTEM_UP_WITHIN: Duration = DEFAULT_TIMEOUT;

/// Most sessions with the agent of one boot: it may be restarted, but a broken one must not keep the host busy.
const MAX_SESSIONS: u32 = 16;

/// The ways into a guest.
#[derive(Clone)]
pub(super) struct Access {
    agent: Agent,
    shell: Shell,
    /// The host's end of hvc0.
    hvc0: Arc<UnixStream>,
    /// Tells who reads hvc0 that another shell will come.
    left: Arc<Notify>,
    /// Whether the log says which way commands go.
    told: bool,
}

/// The way by the agent.
#[derive(Clone)]
enum Agent {
    /// The guest has not come up yet, or its agent is being started again.
    Awaited,
    /// It is there before its system is up; or the system does not come up, for this reason.
    Early(AgentSession, Option<Arc<str>>),
    There(AgentSession),
    /// It is that of a boot which is over for the script, and the next one's is awaited.
    Left(AgentSession),
    /// There will be none any more as long as the guest runs.
    Lost(Arc<SessionError>),
}

/// The way by the backdoor.
#[derive(Clone)]
enum Shell {
    /// It has not said yet that it is there; most guests have none.
    Awaited,
    There(ShellSession),
    /// It does not answer any more.
    Lost(Arc<SessionError>),
}

impl Access {
    pub(super) fn new(hvc0: Arc<UnixStream>, left: Arc<Notify>) -> Self {
        Self { agent: Agent::Awaited, shell: Shell::Awaited, hvc0, left, told: false }
    }

    /// Ends all sessions, because the guest is gone.
    pub(super) fn close(&self) {
        if let Agent::Early(session, _) | Agent::There(session) | Agent::Left(session) = &self.agent
        {
            session.client().close();
        }
        if let Shell::There(shell) = &self.shell {
            shell.close();
        }
    }

    /// The best way there is now.
    pub(super) fn session(&self) -> Option<Session> {
        match (&self.agent, &self.shell) {
            // Where the backdoor has come, the system is up. The agent may be lost already, and whoever attends to it
            // not know yet.
            (Agent::There(session), _) | (Agent::Early(session, _), Shell::There(_))
                if session.client().lost_reason().is_none() =>
            {
                Some(Session::Agent(session.clone()))
            }
            (_, Shell::There(shell)) => Some(Session::Shell(shell.clone())),
            (_, Shell::Awaited | Shell::Lost(_)) => None,
        }
    }

    /// Whoever attends to the agent brings the next session when this one ends.
    fn leave_agent(&mut self) {
        if let Agent::There(session) = &self.agent {
            self.agent = Agent::Left(session.clone());
        }
    }

    /// Another shell will come on hvc0.
    fn leave_shell(&mut self) {
        if matches!(self.shell, Shell::There(_)) {
            self.shell = Shell::Awaited;
            self.left.notify_one();
        }
    }

    /// A way into a guest whose system does not come up.
    fn session_while_down(&self) -> Option<Session> {
        match &self.agent {
            Agent::Early(session, Some(_)) => Some(Session::Agent(session.clone())),
            _ => None,
        }
    }

    /// Why its system does not come up, if so.
    fn down(&self) -> Option<Arc<str>> {
        match &self.agent {
            Agent::Early(_, why) => why.clone(),
            _ => None,
        }
    }

    /// Why there is no way any more, if so.
    fn lost(&self) -> Option<Arc<SessionError>> {
        match (&self.agent, &self.shell) {
            (Agent::Early(..) | Agent::There(_), _) | (_, Shell::There(_)) => None,
            (Agent::Lost(why), _) | (Agent::Awaited | Agent::Left(_), Shell::Lost(why)) => {
                Some(Arc::clone(why))
            }
            (Agent::Awaited | Agent::Left(_), Shell::Awaited) => None,
        }
    }
}

impl Machine {
    /// The host's end of hvc0, on which the backdoor's root shell is: for whoever wants to talk to it alone.
    ///
    /// # Errors
    /// If the machine does not run.
    pub fn shell(&self) -> Result<UnixStream> {
        let hvc0 = self.run()?.access.hvc0;
        hvc0.try_clone().map_err(|e| MachineError::file("open", "hvc0")(e).into())
    }

    /// Starts it if need be and waits for a way into the guest, and for its system to be up.
    pub(super) async fn session(&self) -> Result<Session> {
        self.session_if(false).await
    }

    /// The same, or with a way into a guest whose system does not come up.
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
            // One that has ended by itself is not started again without a word.
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

    /// Has the next call wait for another way into the guest than the last one took: that of its next boot. If that is
    /// there already, there is nothing to wait for.
    pub fn disconnect(&self) {
        let used = self.inner.used.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(used) = used else { return };
        self.set_access(|access| {
            if access.session().is_some_and(|now| now.is(&used)) {
                access.leave_agent();
                access.leave_shell();
            }
        });
    }

    async fn await_session(&self, even_down: bool) -> Result<Session> {
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

    /// Connects to the agent, and again when it went away: as a service it may be restarted.
    pub(super) async fn attend_agent(
        &self,
        stream: Option<&UnixStream>,
        again: bool,
    ) -> Infallible {
        let Some(stream) = stream else { return std::future::pending().await };
        for count in 1.. {
            let error =
                match AgentSession::connect(stream, again || count > 1, &self.inner.clock).await {
                    Ok(session) => self.attend_session(session).await,
                    Err(error) => error,
                };
            self.inner.log.warning(format_args!("no agent: {}", chain(&error)));
            if error.is_final() || count == MAX_SESSIONS {
                self.set_access(|access| access.agent = Agent::Lost(Arc::new(error)));
                break;
            }
        }
        // Only another start of the guest can help.
        std::future::pending().await
    }

    async fn attend_session(&self, session: AgentSession) -> SessionError {
        for warning in session.warnings() {
            self.inner.log.warning(warning);
        }
        let usable = async {
            self.attend_system(&session).await;
            self.set_access(|access| access.agent = Agent::There(session.clone()));
            std::future::pending().await
        };
        let error = tokio::select! {
            biased;
            error = session.lost() => error,
            never = usable => match never {},
        };
        self.set_access(|access| access.agent = Agent::Awaited);
        error
    }

    /// Waits until the system of a guest is up, if its agent may be there before it is.
    async fn attend_system(&self, session: &AgentSession) {
        if !session.early() {
            return;
        }
        let down = |why: &str| {
            self.set_access(|access| {
                access.agent = Agent::Early(session.clone(), Some(why.into()));
            });
        };
        self.set_access(|access| access.agent = Agent::Early(session.clone(), None));
        let mut up = std::pin::pin!(session.system_up());
        let up = tokio::select! {
            biased;
            up = &mut up => up,
            Ok(()) = session.system_down() => {
                down("its system did not come up and is in emergency or rescue mode");
                up.await
            }
            () = self.inner.clock.sleep(SYSTEM_UP_WITHIN) => {
                let limit = SYSTEM_UP_WITHIN.as_secs();
                down(&format!("its system has not reached basic.target within {limit} seconds"));
                up.await
            }
        };
        if let Err(error) = up {
            self.inner
                .log
                .warning(format_args!("nothing tells whether the system is up: {}", chain(&error)));
        }
    }

    /// Reads hvc0 until the backdoor's shell is there; from then on calls do, until that shell is left for another.
    pub(super) async fn attend_backdoor(&self, hvc0: &UnixStream, left: &Notify) -> Infallible {
        loop {
            match ShellSession::connect(hvc0, &self.inner.clock).await {
                Ok(shell) => self.set_access(|access| access.shell = Shell::There(shell)),
                // Without an answer there is no backdoor, which most guests can do without.
                Err(error) => {
                    tracing::debug!(machine = self.name(), "no backdoor: {}", chain(&error));
                    return std::future::pending().await;
                }
            }
            left.notified().await;
        }
    }

    /// Waits until a session that is about to end has ended, and all others with it.
    pub(super) async fn left(&self, session: &Session) {
        if let Session::Agent(session) = session {
            session.lost().await;
        }
        // Nothing tells of the end of a shell on a console; the next one says that it is there.
        self.set_access(Access::leave_shell);
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

    /// Makes an error of a session one of the machine.
    pub(super) async fn session_error(&self, what: String, error: SessionError) -> Error {
        let machine = self.name().to_owned();
        if !error.lost() {
            return MachineError::Agent { machine, what, source: error.into() }.into();
        }
        let error = Arc::new(error);
        if matches!(*error, SessionError::Shell(_)) {
            self.set_access(|access| access.shell = Shell::Lost(Arc::clone(&error)));
        }
        self.access_lost(error.into()).await
    }

    /// There is no way into the guest any more. If the guest is about to end, that is the better reason: it is waited
    /// for a moment.
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
        let mut told = None;
        self.inner.state.send_if_modified(|state| {
            let Some(run) = state.run_mut() else { return false };
            change(&mut run.access);
            if let (false, Some(session)) = (run.access.told, run.access.session()) {
                run.access.told = true;
                told = Some(session);
            }
            true
        });
        if let Some(session) = told {
            self.log(format_args!("commands go through {}", session.description()));
        }
    }
}
