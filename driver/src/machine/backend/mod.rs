//! What a [`Machine`](super::Machine) needs from below, whatever runs it: a kind of machine is a file here.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use firn_gateway::Forward;
use firn_net_switch::SwitchPort;
use firn_vmm::device::boot_timer::Mark;
use firn_vmm::screen::Screen;
use firn_vmm::virtio::input::InputHandle;
use firn_vmm::vm::KeptVm;
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::sync::mpsc;

use super::Dirs;
use super::console::Console;
use super::setup::Source;
use crate::config::{BackendKind, NodeConfig};
use crate::descriptors::Part;
use crate::error::{End, Result};
use crate::log::Logger;
use crate::vlan::Vlan;

mod firn;
mod qemu;

pub(super) use firn::Kept;

/// What a machine gives to whatever runs it.
pub(super) struct Parts {
    pub(super) node: Arc<NodeConfig>,
    pub(super) source: Arc<Source>,
    pub(super) log: Logger,
    /// How many files its guest may make this process open.
    pub(super) descriptors: Arc<Part>,
    /// Where its cards on vlans are plugged in, in the order of the node's vlans, if it runs in firn's own monitor.
    pub(super) ports: Vec<Arc<SwitchPort>>,
    /// All networks of the test.
    pub(super) vlans: Vec<Vlan>,
}

/// Chooses what runs a machine, by what it was made from.
pub(super) fn backend_for(parts: Parts) -> Box<dyn Backend> {
    match parts.node.backend() {
        BackendKind::Firn => Box::new(firn::Firn::new(parts)),
        BackendKind::Qemu => Box::new(qemu::Qemu::new(parts)),
    }
}

/// What runs a machine, from before its first start to after its last end. Which calls make sense when is the machine's
/// to know: it starts what is off, and asks things of what runs.
pub(super) trait Backend: Send + Sync {
    /// Puts everything together and starts the guest, whose serial console is `console`. Unless it may reboot, its reset
    /// is its end.
    fn start(
        &self,
        dirs: Dirs,
        console: Arc<Console>,
        may_reboot: bool,
    ) -> BoxFuture<'_, Result<Started>>;

    /// Has a start that is under way fail soon.
    fn cancel_start(&self);

    /// Starts a guest again that has reset itself: the same machine, with its disks and the host's ends of its ports.
    /// One that is paused stays so.
    fn restart(&self) -> BoxFuture<'_, Result<()>>;

    /// Ends it, in whatever state it is. On return nothing of it is left.
    fn stop(&self) -> BoxFuture<'_, ()>;

    /// Stops all processors and devices; nothing if they stand still.
    fn pause(&self) -> BoxFuture<'_, Result<()>>;

    /// Lets them go on; nothing if they do.
    fn resume(&self) -> BoxFuture<'_, Result<()>>;

    /// Presses the power button.
    fn press_power_button(&self) -> BoxFuture<'_, Result<()>>;

    /// Types into the serial console.
    fn type_in(&self, bytes: Vec<u8>) -> BoxFuture<'_, Result<()>>;

    /// How many cards on vlans it has. They are there before the start and after the end.
    fn links(&self) -> usize;

    /// Plugs or pulls a card's cable; nothing if there is no such card.
    fn set_link(&self, card: usize, up: bool);

    /// Forwards a port until the machine ends; the address that leads to the other side.
    fn forward(&self, forward: Forward) -> BoxFuture<'_, Result<SocketAddr>>;

    /// How many bytes of memory the guest has without what its balloon has taken; None if it has no balloon.
    fn memory(&self) -> BoxFuture<'_, Result<Option<u64>>>;

    /// Has the balloon leave the guest so many bytes; false if there is none.
    fn set_memory(&self, bytes: u64) -> BoxFuture<'_, Result<bool>>;

    /// The host's hand on its keyboard; None if it has none.
    fn keyboard(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Input>>>>;

    /// The host's hand on its tablet; None if it has none.
    fn tablet(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Input>>>>;

    /// Its screen, which can be looked at for longer than the machine runs; None if it has none.
    fn screen(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Screen>>>>;

    /// When its last boot, if that has ended, reached which stage.
    fn boot_marks(&self) -> Vec<Mark>;

    /// Checkpoints, if it can make them.
    fn checkpoints(&self) -> Option<&dyn Checkpoints> {
        None
    }

    /// QEMU's own monitors, if it has them; else what scripts ask of those is firn's to answer.
    fn monitor(&self) -> Option<&dyn QemuMonitors> {
        None
    }
}

/// A machine that can go back.
pub(super) trait Checkpoints: Send + Sync {
    /// Keeps what a paused guest is. While that exists, the machine's end only switches it off.
    fn keep(&self) -> BoxFuture<'_, Result<Kept>>;

    /// Gives up what was kept of a guest that has been paused since then.
    fn give_up<'a>(&'a self, kept: &'a Kept) -> BoxFuture<'a, Result<()>>;

    /// Makes the guest, whatever became of it, what it was then. It stands still until [`Backend::resume`].
    fn go_back<'a>(&'a self, dirs: &'a Dirs, to: &'a Kept) -> BoxFuture<'a, Result<Started>>;

    /// Makes a machine that is off, and of the same description, what another one was then: a fork of it. `from` has to
    /// outlive it. It stands still until [`Backend::resume`].
    fn fork<'a>(
        &'a self,
        dirs: Dirs,
        console: Arc<Console>,
        from: &'a Kept,
    ) -> BoxFuture<'a, Result<Started>>;

    /// Writes what was kept of this machine to files, which `create` makes by their names.
    fn write<'a>(&'a self, kept: &'a Kept, create: Create) -> BoxFuture<'a, Result<()>>;

    /// Makes a machine that is off what another run's was. It stands still until [`Backend::resume`].
    fn go_on(
        &self,
        dirs: Dirs,
        console: Arc<Console>,
        from: KeptVm,
        links: &[bool],
    ) -> BoxFuture<'_, Result<Started>>;

    /// Whether there are checkpoints of it.
    fn held(&self) -> bool;

    /// Ends a machine for good that was only switched off: it cannot go back any more.
    fn discard(&self) -> BoxFuture<'_, ()>;
}

/// Makes files by their names.
pub(crate) type Create = Arc<dyn Fn(&str) -> io::Result<File> + Send + Sync>;

/// The host's hand on a keyboard or a pointer.
pub(super) trait Input: Send + Sync {
    /// Presses or releases the key that Linux numbers `code`.
    fn key(&self, code: u16, down: bool);

    /// The same of a pointer's button.
    fn button(&self, code: u16, down: bool);

    /// Moves a pointer: 0 is left and top, [`firn_vmm::virtio::input::MAX_POSITION`] right and bottom.
    fn move_to(&self, x: u16, y: u16);

    /// Turns a pointer's wheel, away from the user if `steps` are positive.
    fn wheel(&self, steps: i16);
}

impl Input for InputHandle {
    fn key(&self, code: u16, down: bool) {
        Self::key(self, code, down);
    }

    fn button(&self, code: u16, down: bool) {
        Self::button(self, code, down);
    }

    fn move_to(&self, x: u16, y: u16) {
        Self::move_to(self, x, y);
    }

    fn wheel(&self, steps: i16) {
        Self::wheel(self, steps);
    }
}

/// QEMU's monitors.
pub(super) trait QemuMonitors: Send + Sync {
    /// What the one for people prints for a command.
    fn human<'a>(&'a self, command: &'a str) -> BoxFuture<'a, Result<String>>;

    /// What the one for programs replies to a command: an object with `return`, or with `error`.
    fn qmp<'a>(&'a self, command: &'a str, arguments: &'a Value) -> BoxFuture<'a, Result<Value>>;
}

/// What a start gives to the machine.
pub(super) struct Started {
    /// What happens, until the end.
    pub(super) events: mpsc::UnboundedReceiver<Event>,
    /// The host's end of the backdoor's console.
    pub(super) shell: UnixStream,
    /// The host's end of the agent's port, where there is one.
    pub(super) agent: Option<UnixStream>,
}

/// What happens to a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest has been started; whatever was told before is an earlier boot's.
    Booting,
    /// Its kernel has panicked, for this reason. Its end may follow, and so may the reason if it is not known yet.
    Panicked(Option<String>),
    /// It has ended.
    Ended(End),
    /// Something that people may want to know.
    Warning(String),
    /// An event of QEMU's machine protocol.
    Told(Value),
}
