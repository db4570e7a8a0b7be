//! The guest's way to the host and beyond, and the host's to the guest.

use std::net::{Ipv4Addr, SocketAddr};

use firn_gateway::{Forward, GUEST_V4, Protocol, Side};

use super::Machine;
use crate::error::Result;

impl Machine {
    /// Forwards TCP connections to a port of the host's loopback to a port of the guest, from now until the machine
    /// ends. Returns the host's port, which the system chooses if `host_port` is 0.
    ///
    /// # Errors
    /// As [`Machine::forward`].
    pub async fn forward_port(&self, host_port: u16, guest_port: u16) -> Result<u16> {
        let forward = Forward {
            from: Side::Host,
            protocol: Protocol::Tcp,
            host: (Ipv4Addr::LOCALHOST, host_port).into(),
            guest: (GUEST_V4, guest_port).into(),
        };
        Ok(self.forward(forward).await?.port())
    }

    /// Forwards a port, from now until the machine ends. Returns the address that leads to the other side, with the
    /// port that the system chose if it was to.
    ///
    /// # Errors
    /// If the machine does not run, has no user network, or the port is in use.
    pub async fn forward(&self, forward: Forward) -> Result<SocketAddr> {
        self.run()?;
        self.inner.backend.forward(forward).await
    }

    /// Pulls the cable of the first vlan.
    pub fn block(&self) {
        self.inner.backend.set_link(0, false);
    }

    /// Plugs the cable of the first vlan in again.
    pub fn unblock(&self) {
        self.inner.backend.set_link(0, true);
    }
}
