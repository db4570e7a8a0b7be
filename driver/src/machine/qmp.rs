//! QEMU's monitors for scripts, as far as firn has equivalents.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::backend::QemuMonitors;
use super::{Machine, Status};
use crate::error::{End, MachineError, Result};

mod human;
mod input;
mod protocol;

/// Most events that are queued.
const MAX_EVENTS: usize = 1000;

/// Commands of QEMU's human monitor without an equivalent in firn, and why: shown by `help` and in errors.
const REFUSED: &[(&[&str], &str)] = &[
    (
        &["device_add", "device_del", "drive_add", "drive_del", "netdev_add", "netdev_del"],
        "a machine has the devices that its description says, from its start to its end",
    ),
    (
        &["object_add", "object_del", "chardev-add", "chardev-change", "chardev-remove", "cpu"],
        "a machine has the parts that its description says, from its start to its end",
    ),
    (
        &["change", "eject", "block_resize", "block_set_io_throttle", "commit", "nbd_server_start"],
        "a disk stays as its machine was started with it",
    ),
    (
        &["mouse_button", "mouse_move", "mouse_set"],
        "a machine's pointer is a tablet, which the machine protocol's input-send-event moves",
    ),
    (
        &["expire_password", "set_password", "change-vnc-password"],
        "nobody needs a password to look at a screen: the run's own user alone can",
    ),
    (
        &["savevm", "loadvm", "delvm", "snapshot_blkdev", "migrate", "migrate_incoming"],
        "firn has no snapshots yet",
    ),
    (
        &["dump-guest-memory", "memsave", "pmemsave", "print", "x", "xp", "i", "o", "gdbserver"],
        "firn does not look into a guest's memory, nor at its ports",
    ),
    (
        &["nmi", "mce", "system_reset", "system_wakeup", "watchdog_action", "boot_set"],
        "reboot(), shutdown() and crash() are what is there",
    ),
    (&["hostfwd_remove"], "a forwarded port stays until the machine ends"),
    (&["wavcapture", "stopcapture"], "firn's machines have no sound"),
    (
        &["log", "logfile", "trace-event", "qom-get", "qom-list", "qom-set", "ringbuf_read"],
        "they are about QEMU itself",
    ),
];

/// The QMP events of a machine: QEMU's, or those that QEMU would have sent.
pub(super) struct Events {
    /// Whether there is no QEMU that sends them.
    made: bool,
    queue: Mutex<VecDeque<Value>>,
    grown: watch::Sender<()>,
}

impl Events {
    pub(super) fn new(made: bool) -> Self {
        Self { made, queue: Mutex::default(), grown: watch::Sender::new(()) }
    }

    /// Adds an event that QEMU would have sent.
    pub(super) fn tell(&self, event: &str, data: &Value) {
        if !self.made {
            return;
        }
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
        self.pass_on(json!({"event": event, "data": data, "timestamp": timestamp}));
    }

    /// Adds an event that QEMU has sent.
    pub(super) fn pass_on(&self, event: Value) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() == MAX_EVENTS {
            queue.pop_front();
        }
        queue.push_back(event);
        drop(queue);
        self.grown.send_replace(());
    }

    /// Adds the event of a guest's end or restart.
    pub(super) fn ended(&self, end: &End) {
        let by = |guest: bool, reason: &str| json!({"guest": guest, "reason": reason});
        match end {
            End::PoweredOff | End::Halted => self.tell("SHUTDOWN", &by(true, "guest-shutdown")),
            End::Reset => self.tell("RESET", &by(true, "guest-reset")),
            End::Panicked(_) => self.tell("GUEST_PANICKED", &json!({"action": "shutdown"})),
            // No end that a guest or a script knows of: the machine is what it was, running or off.
            End::WentBack(_) => {}
            End::Stopped => self.tell("SHUTDOWN", &by(false, "host-signal")),
            End::VcpuDied { .. } | End::Failed(_) => {
                self.tell("SHUTDOWN", &by(false, "host-error"))
            }
        }
    }

    fn next(&self) -> Option<Value> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

impl Machine {
    /// The output of QEMU's human monitor for a command, for a machine under QEMU.
    async fn ask_monitor(&self, monitor: &dyn QemuMonitors, command: &str) -> Result<String> {
        // Commands with an effect on the machine's state.
        match command.trim() {
            "quit" | "q" => self.crash().await,
            "stop" | "s" => self.pause().await?,
            "cont" | "c" => self.resume().await?,
            command => {
                self.run()?;
                return self.unless_ended(monitor.human(command)).await;
            }
        }
        Ok(String::new())
    }

    /// The same for QMP.
    async fn ask_qmp(
        &self,
        monitor: &dyn QemuMonitors,
        command: &str,
        arguments: &Value,
    ) -> Result<Value> {
        if let "quit" | "stop" | "cont" = command {
            self.ask_monitor(monitor, command).await?;
            return Ok(json!({"return": {}}));
        }
        self.run()?;
        self.unless_ended(monitor.qmp(command, arguments)).await
    }

    /// The next QMP event: `SHUTDOWN`, `RESET`, `STOP`, `RESUME`, `POWERDOWN`, `GUEST_PANICKED`. Each is returned once.
    /// None if there is none within `limit`, in host time: the caller may be the one to resume a paused machine.
    pub async fn next_qmp_event(&self, limit: Duration) -> Option<Value> {
        let events = &self.inner.events;
        let mut grown = events.grown.subscribe();
        let next = async {
            loop {
                grown.mark_unchanged();
                if let Some(event) = events.next() {
                    return event;
                }
                // The sender lives in self.
                let _ = grown.changed().await;
            }
        };
        tokio::time::timeout(limit, next).await.ok()
    }

    /// As QEMU reports it.
    fn qemu_status(&self) -> &'static str {
        match self.status() {
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Off | Status::Starting | Status::Stopping | Status::Ended => "shutdown",
        }
    }

    /// Makes the guest power off, without waiting for it.
    async fn power_down(&self) -> Result<()> {
        let session = self.session().await?;
        self.inner.events.tell("POWERDOWN", &json!({}));
        self.ask_for_power_off(&session).await
    }

    /// Upstream's names for network cards: virtio-net-pci.N is the one of the Nth vlan.
    fn set_card(&self, name: &str, up: bool) -> Result<()> {
        let number = name.strip_prefix("virtio-net-pci.").and_then(|n| n.parse::<usize>().ok());
        let count = self.inner.backend.links();
        let card = number.and_then(|n| n.checked_sub(1)).filter(|card| *card < count);
        let Some(card) = card else {
            return Err(usage(&format!(
                "{} has no network card `{name}`: it has virtio-net-pci.1 to .{count}",
                self.name()
            )));
        };
        self.inner.backend.set_link(card, up);
        Ok(())
    }

    /// The guest's memory in bytes, without what its balloon has taken.
    async fn memory(&self) -> Result<u64> {
        self.run()?;
        self.inner.backend.memory().await?.ok_or_else(|| self.no_balloon())
    }

    /// Asks the guest, through its balloon, to make do with this much memory.
    async fn set_memory(&self, bytes: u64) -> Result<()> {
        self.run()?;
        match self.inner.backend.set_memory(bytes).await? {
            true => Ok(()),
            false => Err(self.no_balloon()),
        }
    }

    fn no_balloon(&self) -> crate::Error {
        usage(&format!("{} has no balloon: its description says so", self.name()))
    }

    /// The error for an unknown command.
    fn no_command(&self, command: &str) -> crate::Error {
        let name = command.split_whitespace().next().unwrap_or_default();
        usage(&match refusal(name) {
            Some(why) => format!("{}: {name}: {why}", self.name()),
            None => format!(
                "{}: firn has no QEMU monitor, and does not know what `{command}` would do; \
                 send_monitor_command(\"help\") says what it knows",
                self.name()
            ),
        })
    }
}

/// Why firn has no equivalent for a command of QEMU's.
fn refusal(name: &str) -> Option<&'static str> {
    REFUSED.iter().find(|(names, _)| names.contains(&name)).map(|(_, why)| *why)
}

fn usage(message: &str) -> crate::Error {
    MachineError::Usage(message.to_owned()).into()
}
