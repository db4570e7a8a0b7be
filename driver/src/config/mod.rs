//! The description of a test: its script, machines and limits, as plain data.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn_vmm::spec::Number;

mod document;
mod driver_file;
mod expand;
mod machine_file;
mod network;
mod node;
pub(crate) mod qemu_options;
mod report;
mod screen;
mod start_command;
mod test_file;

pub use expand::Variables;
pub use machine_file::MachineFile;
pub use network::{PortForward, UserNetwork};
pub use node::{BackendKind, NodeConfig};
pub use report::ConfigError;
pub use screen::{Needs, ScreenChoice};

#[cfg(test)]
mod tests;

/// The default [`TestConfig::vsock_offset`]: CIDs below 3 are not for guests (`man 7 vsock`).
const VSOCK_OFFSET: u32 = 2;
/// The tag of the directory that all machines and the host share, at `/tmp/shared` in each guest.
pub const SHARED_TAG: &str = "shared";
/// The tag of the machine's own exchange directory, at `/tmp/xchg` in the guest.
pub const EXCHANGE_TAG: &str = "xchg";

/// A test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestConfig {
    /// The test's name.
    pub name: String,
    /// The Python script that drives the machines.
    pub script: Script,
    /// The time limit of the whole test.
    pub global_timeout: Option<Duration>,
    /// The machines, sorted by name; [`NodeConfig::number`] counts from 1 in this order.
    pub nodes: Vec<NodeConfig>,
    /// Machines described by machine files.
    pub files: Vec<MachineFile>,
    /// Vlans that exist even if no machine is on them.
    pub more_vlans: Vec<Number>,
    /// Gives every machine a vsock for ssh; its CID is this plus the machine's number.
    pub vsock_offset: Option<u32>,
    /// The script begins after the boot of all machines, which is kept on disk for later runs.
    pub from_boot: bool,
}

/// A test's script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// The Python source.
    pub text: String,
    /// The file it was read from.
    pub file: PathBuf,
    /// The line of `file` on which `text` begins, from 1.
    pub line: usize,
}

impl TestConfig {
    /// All vlans that machines are on, sorted, without duplicates.
    #[must_use]
    pub fn vlans(&self) -> Vec<Number> {
        let nodes = self.nodes.iter().flat_map(|node| &node.vlans);
        let files = self.files.iter().flat_map(MachineFile::vlans);
        let all: std::collections::BTreeSet<Number> =
            nodes.chain(files).chain(&self.more_vlans).copied().collect();
        all.into_iter().collect()
    }

    /// The names of the machines' variables in the script.
    #[must_use]
    pub fn variables(&self) -> Vec<String> {
        let nodes = self.nodes.iter().map(NodeConfig::variable);
        nodes.chain(self.files.iter().map(|file| variable_name(file.name()))).collect()
    }

    /// Gives the machine of the script's `variable`, or all machines, the parts that the script needs, unless their
    /// descriptions set them.
    pub fn supply(&mut self, variable: Option<&str>, needs: Needs) {
        let wanted = |other: &str| variable.is_none_or(|wanted| wanted == other);
        for node in self.nodes.iter_mut().filter(|node| wanted(&node.variable())) {
            node.supply(needs);
        }
        for file in self.files.iter_mut().filter(|file| wanted(&variable_name(file.name()))) {
            file.supply(needs);
        }
    }

    /// The existing directories of the host that guests may write to, without those of devices and of the system.
    #[must_use]
    pub fn writable(&self) -> Vec<PathBuf> {
        let files = self.files.iter().filter_map(MachineFile::here);
        let nodes = self.nodes.iter().cloned().chain(files);
        let usual = |dir: &PathBuf| {
            let system = ["/dev", "/proc", "/sys", "/run"].iter().any(|own| dir.starts_with(own));
            !system && dir != Path::new("/") && dir.is_dir()
        };
        nodes.flat_map(|node| node.writable()).filter(usual).collect()
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

fn variable_name(name: &str) -> String {
    name.char_indices()
        .map(|(at, c)| {
            let fits = if at == 0 {
                c.is_ascii_alphabetic() || c == '_'
            } else {
                c.is_ascii_alphanumeric() || c == '_'
            };
            if fits { c } else { '_' }
        })
        .collect()
}
