//! Ports that lead to the other side.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};

use super::{Forward, ForwardError, Inner, Protocol, Side};
use crate::lock;

/// How long a listener rests when the process has no descriptors left for a connection.
const EXHAUSTED: Duration = Duration::from_millis(100);

impl Inner {
    /// Forwards a port, as [`super::Gateway::forward`].
    pub(super) async fn forward(
        self: &Arc<Self>,
        forward: Forward,
    ) -> Result<SocketAddr, ForwardError> {
        match forward.from {
            Side::Host => self.forward_from_host(forward).await,
            Side::Guest => self.forward_from_guest(forward),
        }
    }

    async fn forward_from_host(
        self: &Arc<Self>,
        Forward { protocol, host, guest, .. }: Forward,
    ) -> Result<SocketAddr, ForwardError> {
        let senseless = |problem| ForwardError::Senseless { protocol, address: host, problem };
        if guest.port() == 0 {
            return Err(senseless("it leads to port 0 of the guest"));
        }
        if !is_station(guest.ip()) {
            return Err(senseless("it leads to no address of the guest"));
        }
        let failed = |source: io::Error| match source.kind() {
            ErrorKind::AddrInUse => ForwardError::InUse { protocol, address: host },
            _ => ForwardError::Listen { protocol, address: host, source },
        };
        match protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind(host).await.map_err(failed)?;
                let bound = listener.local_addr().map_err(failed)?;
                self.listen(Arc::clone(self).forward_connections(listener, guest));
                Ok(bound)
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(host).await.map_err(failed)?;
                let bound = socket.local_addr().map_err(failed)?;
                self.listen(Arc::clone(self).forward_datagrams(Arc::new(socket), guest));
                Ok(bound)
            }
        }
    }

    fn listen(&self, listener: impl Future<Output = ()> + Send + 'static) {
        lock(&self.listeners).push(self.runtime.spawn(listener));
    }

    fn forward_from_guest(
        &self,
        Forward { protocol, host, guest, .. }: Forward,
    ) -> Result<SocketAddr, ForwardError> {
        let senseless = |problem| ForwardError::Senseless { protocol, address: guest, problem };
        if host.port() == 0 || guest.port() == 0 {
            return Err(senseless("a port from the guest needs two numbers"));
        }
        if !is_station(guest.ip()) {
            return Err(senseless("the guest cannot reach the gateway by this address"));
        }
        let mut forwards = lock(&self.guest_forwards);
        if forwards.contains_key(&(protocol, guest)) {
            return Err(ForwardError::InUse { protocol, address: guest });
        }
        forwards.insert((protocol, guest), host);
        Ok(guest)
    }

    /// Passes on to the guest who connects, until the gateway closes.
    async fn forward_connections(self: Arc<Self>, listener: TcpListener, guest: SocketAddr) {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => self.connect_guest(stream, peer, guest),
                    Err(error) => {
                        tracing::warn!(%guest, %error, "cannot take a connection");
                        // The error stays until somebody else closes a file: no event tells of that.
                        tokio::time::sleep(EXHAUSTED).await;
                    }
                },
                () = self.closed() => return,
            }
        }
    }
}

/// Whether a station beyond the guest's card can have this address.
fn is_station(address: IpAddr) -> bool {
    let broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    !(address.is_unspecified() || address.is_multicast() || address.is_loopback() || broadcast)
}
