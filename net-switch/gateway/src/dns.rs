//! Name service: questions go on to the host's resolvers.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::udp::readable;
use super::wire::Mac;
use super::{Inner, any};
use crate::lock;

/// Port of name servers.
pub(super) const PORT: u16 = 53;

/// Where the host keeps its resolvers (`man 5 resolv.conf`).
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How many resolvers are asked, as in the C library (MAXNS).
const MAX_RESOLVERS: usize = 3;
/// How long a resolver may take before the next one is asked. The C library in the guest asks
/// again after 5 s.
const PATIENCE: Duration = Duration::from_secs(4);
/// Length of a message's header (RFC 1035, 4.1.1).
const HEADER: usize = 12;
/// In the third byte: this is a response.
const RESPONSE: u8 = 0x80;
/// The longest message: what fits into a datagram.
const MAX_MESSAGE: usize = 65_507;

/// The resolvers of the host as of now; none if it has none.
pub(super) fn system_resolvers() -> Vec<SocketAddr> {
    fs::read_to_string(RESOLV_CONF).map_or_else(|_| Vec::new(), |text| resolvers(&text))
}

/// The resolvers that a `resolv.conf` names.
fn resolvers(text: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let (key, value) = line.trim_start().split_once([' ', '\t'])?;
        let value = value.trim();
        // What comes with a zone is reachable by one card only, which the socket would have to know.
        let address: IpAddr = (key == "nameserver").then(|| value.parse().ok())??;
        Some(SocketAddr::new(address, PORT))
    };
    text.lines().filter_map(address).take(MAX_RESOLVERS).collect()
}

/// The questions that are open.
pub(super) struct Questions {
    max: usize,
    /// The tasks that answer them, oldest first.
    tasks: Mutex<VecDeque<AbortHandle>>,
    /// One for each socket: a task that was ended takes a moment to close its own.
    sockets: Arc<Semaphore>,
}

impl Questions {
    pub fn new(max: usize) -> Self {
        Self { max, tasks: Mutex::default(), sockets: Arc::new(Semaphore::new(max)) }
    }

    /// Adds a question; if there are too many, the oldest is dropped; its client will ask again.
    fn add(&self, task: AbortHandle) {
        let mut tasks = lock(&self.tasks);
        tasks.retain(|task| !task.is_finished());
        if tasks.len() >= self.max
            && let Some(oldest) = tasks.pop_front()
        {
            oldest.abort();
        }
        tasks.push_back(task);
    }
}

impl Inner {
    /// The resolvers to ask, best first.
    pub(super) fn resolvers(&self) -> Vec<SocketAddr> {
        self.resolvers.clone().unwrap_or_else(system_resolvers)
    }

    /// Sees to the answer to a question.
    pub(super) fn ask(self: &Arc<Self>, from: SocketAddr, at: SocketAddr, query: &[u8], mac: Mac) {
        if query.len() < HEADER || query[2] & RESPONSE != 0 {
            return;
        }
        let (inner, query) = (Arc::clone(self), query.to_vec());
        let sockets = Arc::clone(&self.questions.sockets);
        let task = self.runtime.spawn(async move {
            // Never closed.
            let Ok(_socket) = sockets.acquire_owned().await else { return };
            let answer = async {
                for resolver in inner.resolvers() {
                    match timeout(PATIENCE, exchange(resolver, &query)).await {
                        Ok(Ok(answer)) => return answer,
                        Ok(Err(error)) => tracing::debug!(%resolver, %error, "no answer"),
                        Err(_) => tracing::debug!(%resolver, "no answer in time"),
                    }
                }
                failure(&query)
            };
            tokio::select! {
                answer = answer => inner.send_datagram(at, from, mac, &answer),
                () = inner.closed() => {}
            }
        });
        self.questions.add(task.abort_handle());
    }
}

/// Asks one resolver.
async fn exchange(resolver: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    // A port of its own for each question is what makes a forged answer unlikely.
    let socket = UdpSocket::bind(SocketAddr::new(any(resolver.ip()), 0)).await?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut answer = Vec::with_capacity(MAX_MESSAGE);
    loop {
        answer.clear();
        readable(&socket).await?;
        match socket.try_recv_buf(&mut answer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            received => received?,
        };
        if answer.len() >= HEADER && answer[..2] == query[..2] && answer[2] & RESPONSE != 0 {
            return Ok(answer);
        }
    }
}

/// The answer when there is none: "server failure" (RFC 1035, 4.1.1), with the question.
fn failure(query: &[u8]) -> Vec<u8> {
    const RECURSION_AVAILABLE: u8 = 0x80;
    const SERVER_FAILURE: u8 = 2;

    let question = question_end(query);
    let mut answer = query[..question.unwrap_or(HEADER)].to_vec();
    // Operation and "recursion desired" are repeated.
    answer[2] = RESPONSE | answer[2] & 0x79;
    answer[3] = RECURSION_AVAILABLE | SERVER_FAILURE;
    answer[4..HEADER].fill(0);
    answer[5] = u8::from(question.is_some());
    answer
}

/// Where the only question of a query ends.
fn question_end(query: &[u8]) -> Option<usize> {
    if query.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1 + length;
        match length {
            // Type and class follow.
            0 => break,
            1..=63 => {}
            _ => return None,
        }
    }
    let end = at + 4;
    (end <= query.len()).then_some(end)
}

#[cfg(test)]
mod tests;
