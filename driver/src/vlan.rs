//! A network of a test.

use std::sync::Arc;

use firn_net_switch::{Switch, SwitchPort};
use firn_vmm::spec::Number;

/// A vlan: one virtual Ethernet segment. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Vlan {
    number: Number,
    switch: Switch,
}

impl Vlan {
    pub(crate) fn new(number: Number) -> Self {
        Self { number, switch: Switch::new(format!("vlan{number}")) }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> Number {
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
