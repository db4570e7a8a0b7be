//! systemd over D-Bus: the guest's bus, through the agent.
//!
//! `systemd-stdio-bridge`, which is part of systemd, connects its standard input and output to the bus; the agent
//! carries both.

use std::borrow::Cow;
use std::os::unix::net::UnixStream;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use zbus::connection::{AuthMechanism, Builder};
use zbus::message::Type;
use zbus::proxy::CacheProperties;
use zbus::{Connection, MatchRule, MessageStream, OwnedObjectPath};

use super::exec::quote;
use super::session::AgentSession;
use firn_agent_client::{AgentError, Exec, ExecEvent, ExecRequest, StderrMode, Stream};

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const ROOT: &str = "/org/freedesktop/systemd1";

/// How the names of units end (systemd.unit(5)).
const UNIT_TYPES: [&str; 11] = [
    "service",
    "socket",
    "device",
    "mount",
    "automount",
    "swap",
    "target",
    "path",
    "timer",
    "slice",
    "scope",
];

/// Bytes moved at a time.
const BUFFER: usize = 16 << 10;

/// Why systemd cannot be reached over the bus.
#[derive(Debug, thiserror::Error)]
pub(super) enum BusError {
    #[error("the guest's bus cannot be reached")]
    Agent(#[from] AgentError),
    #[error("the guest's bus cannot be reached")]
    Socket(#[from] std::io::Error),
    #[error("the guest's bus failed: {0}")]
    Bus(zbus::Error),
    #[error("the guest's bus is gone")]
    Gone,
}

impl From<zbus::Error> for BusError {
    fn from(error: zbus::Error) -> Self {
        Self::Bus(error)
    }
}

type Result<T> = std::result::Result<T, BusError>;

/// A connection to the guest's system bus or to a user's bus. Dropping it closes it.
pub(super) struct Bus {
    connection: Connection,
    bridge: tokio::task::JoinHandle<()>,
}

/// The events of a unit.
pub(super) struct Changes {
    path: OwnedObjectPath,
    seen: watch::Receiver<u64>,
}

impl Bus {
    /// Connects to the bus that systemd is on: the system's, or that of `user`.
    pub(super) async fn connect(agent: &AgentSession, user: Option<&str>) -> Result<Self> {
        let mut request = match user {
            None => ExecRequest::argv(["systemd-stdio-bridge"]),
            Some(user) => {
                let command =
                    "exec systemd-stdio-bridge --bus-path=unix:path=/run/user/$(id -u)/bus";
                ExecRequest::shell(format!(
                    "exec su -l {} --shell /bin/sh -c {}",
                    quote(user),
                    quote(command)
                ))
            }
        };
        request.stdin = true;
        request.stderr = StderrMode::Null;
        let exec = agent.client().exec(request).await?;
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let bridge = tokio::spawn(bridge(exec, tokio::net::UnixStream::from_std(theirs)?));
        // The bridge has authenticated itself to the bus, and trusts its own peer.
        let build = Builder::unix_stream(ours).auth_mechanism(AuthMechanism::Anonymous).build();
        let connection = match build.await {
            Ok(connection) => connection,
            Err(error) => {
                bridge.abort();
                return Err(error.into());
            }
        };
        Ok(Self { connection, bridge })
    }

    /// Starts watching a unit, which need not be loaded or even exist. As with `systemctl`, a name without a type means
    /// a service.
    pub(super) async fn watch_unit(&self, unit: &str) -> Result<Changes> {
        let manager = self.manager().await?;
        // Without a subscriber systemd sends no signals.
        manager.call::<_, _, ()>("Subscribe", &()).await?;
        let path: OwnedObjectPath = manager.call("LoadUnit", &(with_type(unit),)).await?;
        let signals = || MatchRule::builder().msg_type(Type::Signal).sender(SYSTEMD);
        let rules = [
            signals()
                .interface("org.freedesktop.DBus.Properties")
                .member("PropertiesChanged")
                .path(path.clone())
                .build()?,
            signals().interface(MANAGER).member("JobRemoved").build()?,
        ];
        let (sender, seen) = watch::channel(0);
        for rule in rules {
            let stream = MessageStream::for_match_rule(rule, &self.connection, None).await?;
            tokio::spawn(count(stream, sender.clone()));
        }
        Ok(Changes { path, seen })
    }

    /// The state of a watched unit: `active`, `reloading`, `inactive`, `failed`, `activating` or `deactivating`.
    pub(super) async fn active_state(&self, unit: &Changes) -> Result<String> {
        let proxy = self.proxy(unit.path.as_str(), UNIT).await?;
        Ok(proxy.get_property("ActiveState").await?)
    }

    /// How many jobs systemd has queued.
    pub(super) async fn pending_jobs(&self) -> Result<u32> {
        Ok(self.manager().await?.get_property("NJobs").await?)
    }

    async fn manager(&self) -> Result<zbus::Proxy<'static>> {
        self.proxy(ROOT, MANAGER).await
    }

    async fn proxy(&self, path: &str, interface: &'static str) -> Result<zbus::Proxy<'static>> {
        Ok(zbus::proxy::Builder::new(&self.connection)
            .destination(SYSTEMD)
            .path(path.to_owned())
            .interface(interface)
            .cache_properties(CacheProperties::No)
            .build()
            .await?)
    }
}

fn with_type(unit: &str) -> Cow<'_, str> {
    match unit.rsplit_once('.') {
        Some((_, kind)) if UNIT_TYPES.contains(&kind) => unit.into(),
        _ => format!("{unit}.service").into(),
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.bridge.abort();
    }
}

impl Changes {
    /// Earlier events are known already.
    pub(super) fn mark_seen(&mut self) {
        self.seen.mark_unchanged();
    }

    /// Waits until something happens.
    pub(super) async fn next(&mut self) -> Result<()> {
        self.seen.changed().await.map_err(|_| BusError::Gone)
    }
}

/// Takes messages at once and counts them: the connection's queue must not fill up while an answer is awaited.
async fn count(mut stream: MessageStream, counter: watch::Sender<u64>) {
    use futures_util::StreamExt;
    while let Some(Ok(_)) = stream.next().await {
        counter.send_modify(|count| *count += 1);
    }
}

/// Moves bytes between a command and a socket until one of them ends.
async fn bridge(mut exec: Exec, socket: tokio::net::UnixStream) {
    let Some(mut stdin) = exec.take_stdin() else { return };
    let (mut reader, mut writer) = socket.into_split();
    let up = async {
        let mut buffer = vec![0; BUFFER];
        while let Ok(length @ 1..) = reader.read(&mut buffer).await {
            if !matches!(stdin.write_all(&buffer[..length]).await, Ok(true)) {
                break;
            }
        }
    };
    let down = async {
        while let Ok(Some(event)) = exec.next().await {
            if let ExecEvent::Output { stream: Stream::Stdout, bytes } = event
                && writer.write_all(&bytes).await.is_err()
            {
                break;
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}
