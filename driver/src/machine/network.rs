//! The user network: the guest's way to the host and beyond, and the host's to the guest.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, PoisonError};

use firn_gateway::{Forward, GUEST_V4, Gateway, GatewaySpec, Protocol, Side};
use firn_net_switch::NetPort;

use super::Machine;
use crate::config::PortForward;
use crate::error::{MachineError, Result};

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
        let Some(gateway) = self.gateway() else {
            let what = format!("{} has no user network to forward ports by", self.name());
            return Err(MachineError::Usage(what).into());
        };
        let bound = gateway.forward(forward).await;
        bound.map_err(|source| self.network_error("cannot forward a port", source))
    }

    /// Makes the user network, if the machine has one and it is not there.
    pub(super) async fn open_user_network(&self) -> Result<()> {
        if self.gateway().is_some() {
            return Ok(());
        }
        let inner = &self.inner;
        let Some(network) = inner.source.user_network(&inner.node, &self.dirs().clone())? else {
            return Ok(());
        };
        let spec = GatewaySpec {
            host_name: self.name().to_owned(),
            restrict: network.restrict,
            host_loopback: network.host_loopback,
            descriptors: inner.descriptors.network(),
            ..GatewaySpec::default()
        };
        let failed = |source| self.network_error("cannot start its user network", source);
        let gateway = Gateway::new(spec).await.map_err(failed)?;
        for PortForward(forward) in &network.forward_ports {
            let bound = match gateway.forward(*forward).await {
                Ok(bound) => bound,
                Err(error) => {
                    // So that the ports that it has got are free on return.
                    gateway.close().await;
                    return Err(failed(error));
                }
            };
            if forward.host.port() == 0 {
                let guest = forward.guest;
                self.log(format_args!("{bound} leads to {} port {guest}", forward.protocol));
            }
        }
        *self.user_network() = Some(Arc::new(gateway));
        Ok(())
    }

    /// Ends the user network. On return the host's ports are free.
    pub(super) async fn close_user_network(&self) {
        let gateway = self.user_network().take();
        if let Some(gateway) = gateway {
            gateway.close().await;
        }
    }

    /// Where its cards are plugged in, in their order.
    pub(super) fn nets(&self) -> Vec<Arc<dyn NetPort>> {
        let gateway = self.gateway().map(|gateway| gateway as Arc<dyn NetPort>);
        let vlans = self.inner.ports.iter().map(|port| Arc::clone(port) as Arc<dyn NetPort>);
        gateway.into_iter().chain(vlans).collect()
    }

    fn gateway(&self) -> Option<Arc<Gateway>> {
        self.user_network().clone()
    }

    fn user_network(&self) -> std::sync::MutexGuard<'_, Option<Arc<Gateway>>> {
        self.inner.gateway.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn network_error(
        &self,
        what: &str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> crate::error::Error {
        let machine = self.name().to_owned();
        MachineError::Network { machine, what: what.to_owned(), source: source.into() }.into()
    }
}
