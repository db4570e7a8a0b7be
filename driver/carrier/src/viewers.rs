//! Lets viewers on the host see the screens of machines in a carrier.
//!
//! A directory like that of a run has a socket, and whoever connects to it is connected to `firn view --pipe` in the
//! carrier.

use std::path::Path;
use std::sync::Arc;

use firn::scratch::Scratch;
use firn::viewers;
use firn_agent_client::{ExecEvent, Stream};
use firn_vmm::socket::Listener;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};

use super::{Carrier, HostCommand};

/// Most viewers at once.
const MAX_VIEWERS: usize = 16;

/// A door for viewers, open until it is dropped.
pub(super) struct Door {
    serving: AbortHandle,
    _dir: Scratch,
}

impl Door {
    /// Opens it; `firn` is the program. None if that cannot be done: nothing that a run does depends on it.
    pub(super) fn open(carrier: &Arc<Carrier>, firn: &Path) -> Option<Self> {
        let failed = |error: &dyn std::fmt::Display| {
            tracing::debug!(%error, "no viewer can see the machines in the carrier");
        };
        let dir = Scratch::new().map_err(|error| failed(&error)).ok()?;
        let socket = dir.path().join(viewers::CARRIER_SOCKET);
        let listener = Listener::bind(&socket).map_err(|error| failed(&error)).ok()?;
        let clients = listener.try_clone().and_then(UnixListener::from_std);
        let clients = clients.map_err(|error| failed(&error)).ok()?;
        let command = HostCommand::new([firn.as_os_str(), "view".as_ref(), "--pipe".as_ref()]);
        let command = command.map_err(|error| failed(&error)).ok()?;
        let command = command.env("TMPDIR", super::accel::STATE_DIR).stdin();
        let serving = tokio::spawn(serve(listener, clients, Arc::clone(carrier), command));
        Some(Self { serving: serving.abort_handle(), _dir: dir })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(
    _file: Listener,
    clients: UnixListener,
    carrier: Arc<Carrier>,
    command: HostCommand,
) {
    let mut viewers = JoinSet::new();
    loop {
        tokio::select! {
            accepted = clients.accept(), if viewers.len() < MAX_VIEWERS => {
                let Ok((stream, _)) = accepted else { return };
                let (carrier, command) = (Arc::clone(&carrier), command.clone());
                viewers.spawn(async move { connect(stream, &carrier, &command).await });
            }
            Some(_) = viewers.join_next() => {}
        }
    }
}

/// Passes bytes on in both directions until one side ends.
async fn connect(viewer: UnixStream, carrier: &Carrier, command: &HostCommand) {
    let Ok(mut exec) = carrier.exec(command).await else { return };
    let Some(mut stdin) = exec.take_stdin() else { return };
    let (mut from_viewer, mut to_viewer) = viewer.into_split();
    let up = async {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from_viewer.read(&mut bytes).await {
            if !matches!(stdin.write_all(&bytes[..read]).await, Ok(true)) {
                return;
            }
        }
    };
    let down = async {
        while let Ok(Some(event)) = exec.next().await {
            if let ExecEvent::Output { stream: Stream::Stdout, bytes } = event
                && to_viewer.write_all(&bytes).await.is_err()
            {
                return;
            }
        }
    };
    // Dropping the command kills it.
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}
