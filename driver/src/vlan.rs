//! A network of a test.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use firn_net_switch::plugs::{PlugDir, PlugError};
use firn_net_switch::{Switch, SwitchPort};
use firn_vmm::spec::Number;

/// A vlan: one virtual Ethernet segment. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Vlan {
    number: Number,
    switch: Switch,
    /// Where programs outside this process plug in; opened on first use.
    sockets: Arc<Mutex<Option<PlugDir>>>,
}

impl Vlan {
    pub(crate) fn new(number: Number) -> Self {
        Self { number, switch: Switch::new(format!("vlan{number}")), sockets: Arc::default() }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> Number {
        self.number
    }

    /// Stops the network: from now on it forwards nothing.
    pub fn stop(&self) {
        self.switch.stop();
    }

    /// The directory through which QEMU plugs in by VDE. Created in `place` on first use, and removed with the network.
    pub(crate) fn sockets(&self, place: &Path) -> Result<PathBuf, PlugError> {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sockets) = &*sockets {
            return Ok(sockets.path().to_owned());
        }
        let made = PlugDir::open(place.join(format!("vlan{}", self.number)), &self.switch)?;
        Ok(sockets.insert(made).path().to_owned())
    }

    pub(crate) fn switch(&self) -> &Switch {
        &self.switch
    }

    pub(crate) fn plug(&self, machine: &str) -> Arc<SwitchPort> {
        Arc::new(self.switch.add_port(machine))
    }
}
