//! A network of a test.

use std::sync::Arc;

use firn_net_switch::{Switch, SwitchPort};

/// A vlan: one virtual Ethernet segment. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Vlan {
    number: u8,
    switch: Switch,
}

impl Vlan {
    pub(crate) fn new(number: u8) -> Self {
        Self { number, switch: Switch::new(format!("vlan{number}")) }
    }

    /// Its number, 1 to [`crate::config::MAX_NUMBER`].
    #[must_use]
    pub fn number(&self) -> u8 {
        self.number
    }

    /// From now on nothing gets from one machine to another here.
    pub fn stop(&self) {
        self.switch.stop();
    }

    pub(crate) fn plug(&self, machine: &str) -> Arc<SwitchPort> {
        Arc::new(self.switch.add_port(machine))
    }
}
