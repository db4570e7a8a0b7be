//! Lets viewers on the host see the screens of machines in a carrier.
//!
//! A directory like a run's has a socket; connections to it are passed to `firn view --pipe` in the carrier.

use std::path::Path;
use std::sync::Arc;

use firn::scratch::Scratch;
use firn::viewers;
use firn_agent_client::{ExecEvent, Stream};
use firn_vmm::socket::Listener;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::AbortHandle;

use super::forward::feed;
use super::{Carrier, HostCommand};

/// The most viewers at once.
const MAX_VIEWERS: usize = 16;

/// The viewers' socket, open until it is dropped.
pub(super) struct ViewerSocket {
    serving: AbortHandle,
    _dir: Scratch,
}

impl ViewerSocket {
    /// Opens it; `firn` is the program. None if that fails: a run does not depend on it.
    pub(super) fn open(carrier: &Arc<Carrier>, firn: &Path) -> Option<Self> {
        let failed = |error: &dyn std::fmt::Display| {
            tracing::debug!(%error, "viewers cannot see the machines in the carrier");
        };
        let dir = Scratch::new().map_err(|error| failed(&error)).ok()?;
        let socket = dir.path().join(viewers::CARRIER_SOCKET);
        let listener = Listener::bind(&socket).map_err(|error| failed(&error)).ok()?;
        let command = HostCommand::new([firn.as_os_str(), "view".as_ref(), "--pipe".as_ref()]);
        let command = command.map_err(|error| failed(&error)).ok()?;
        let command = command.env("TMPDIR", super::accel::STATE_DIR).stdin();
        let carrier = Arc::clone(carrier);
        let attend = move |stream| connect(stream, Arc::clone(&carrier), command.clone());
        let serving = tokio::spawn(viewers::serve(listener, MAX_VIEWERS, attend));
        Some(Self { serving: serving.abort_handle(), _dir: dir })
    }
}

impl Drop for ViewerSocket {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Copies bytes in both directions until one side ends.
async fn connect(viewer: UnixStream, carrier: Arc<Carrier>, command: HostCommand) {
    let Ok(mut exec) = carrier.exec(&command).await else { return };
    let Some(stdin) = exec.take_stdin() else { return };
    let (from_viewer, mut to_viewer) = viewer.into_split();
    let up = feed(from_viewer, stdin);
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
