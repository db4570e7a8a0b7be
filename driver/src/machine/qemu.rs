//! What scripts ask of QEMU's monitor, as far as firn has the same thing.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::Machine;
use crate::config;
use crate::error::{End, MachineError, Result};
use crate::retry::timed_out;

/// Most events that wait to be asked for.
const MAX_EVENTS: usize = 1000;

const HELP: &str = "\
cont -- resume emulation
help -- show this help
hostfwd_add [tcp|udp]:[HOST]:PORT-[GUEST]:PORT -- forward a port of the host to the guest
info name|status -- show the machine's name, or whether it runs
quit -- end the machine at once
set_link name on|off -- plug or pull a network card's cable; virtio-net-pci.1 is the first vlan's
stop -- stop emulation
system_powerdown -- have the guest power off
";

/// What QEMU's machine protocol would have told, of what happened to a machine.
pub(super) struct Events {
    queue: Mutex<VecDeque<Value>>,
    grown: watch::Sender<()>,
}

impl Events {
    pub(super) fn new() -> Self {
        Self { queue: Mutex::default(), grown: watch::Sender::new(()) }
    }

    fn tell(&self, event: &str, data: &Value) {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() == MAX_EVENTS {
            queue.pop_front();
        }
        queue.push_back(json!({"event": event, "data": data, "timestamp": timestamp}));
        drop(queue);
        self.grown.send_replace(());
    }

    /// Tells of a guest's end, or of its restart.
    pub(super) fn ended(&self, end: &End) {
        let by = |guest: bool, reason: &str| json!({"guest": guest, "reason": reason});
        match end {
            End::PoweredOff | End::Halted => self.tell("SHUTDOWN", &by(true, "guest-shutdown")),
            End::Reset => self.tell("RESET", &by(true, "guest-reset")),
            End::Panicked(_) => self.tell("GUEST_PANICKED", &json!({"action": "shutdown"})),
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
    /// Does what a command of QEMU's human monitor would, and answers what that would print. `help` names the
    /// commands there are.
    ///
    /// # Errors
    /// [`MachineError::Usage`] for another command; else as [`Machine::execute`].
    pub async fn send_monitor_command(&self, command: &str) -> Result<String> {
        let words: Vec<&str> = command.split_whitespace().collect();
        match words.as_slice() {
            ["help" | "?"] => return Ok(HELP.to_owned()),
            ["info", "name"] => return Ok(format!("{}\n", self.name())),
            ["info", "status"] => return Ok(format!("VM status: {}\n", self.status())),
            ["quit" | "q"] => self.crash().await,
            ["stop" | "s"] => self.pause().await?,
            ["cont" | "c"] => self.resume().await?,
            ["system_powerdown"] => self.power_down().await?,
            ["set_link", card, "on"] => self.set_card(card, true)?,
            ["set_link", card, "off"] => self.set_card(card, false)?,
            // Its first word may name a network; there is only one that can.
            ["hostfwd_add", .., rule] => {
                let forward = config::qemu_options::forward(rule).ok_or_else(|| {
                    usage("hostfwd_add needs `[tcp|udp]:[HOST]:PORT-[GUEST]:PORT`")
                })?;
                self.forward(forward).await?;
            }
            _ => return Err(self.no_command(command)),
        }
        Ok(String::new())
    }

    /// Does what a command of QEMU's machine protocol would, and answers what that would.
    ///
    /// # Errors
    /// As [`Self::send_monitor_command`].
    pub async fn send_qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        match command {
            "query-status" => {
                let status = self.status();
                return Ok(json!({"running": status == "running", "status": status}));
            }
            "query-name" => return Ok(json!({"name": self.name()})),
            "quit" | "stop" | "cont" | "system_powerdown" => {
                self.send_monitor_command(command).await?;
            }
            "set_link" => match (arguments["name"].as_str(), arguments["up"].as_bool()) {
                (Some(name), Some(up)) => self.set_card(name, up)?,
                _ => return Err(usage("set_link needs `name`, a text, and `up`, true or false")),
            },
            _ => return Err(self.no_command(command)),
        }
        Ok(json!({}))
    }

    /// Waits until `filter` takes an event that QEMU's machine protocol would have told: `SHUTDOWN`, `RESET`, `STOP`,
    /// `RESUME`, `POWERDOWN`, `GUEST_PANICKED`. Each event is seen once.
    ///
    /// # Errors
    /// [`crate::Error::Assertion`] after `timeout`, and what `filter` answers.
    pub async fn wait_for_qmp_event(
        &self,
        mut filter: impl FnMut(&Value) -> Result<bool>,
        timeout: Duration,
    ) -> Result<Value> {
        let events = &self.inner.events;
        let mut grown = events.grown.subscribe();
        let wait = async {
            loop {
                grown.mark_unchanged();
                while let Some(event) = events.next() {
                    if filter(&event)? {
                        return Ok(event);
                    }
                }
                // The sender lives in self.
                let _ = grown.changed().await;
            }
        };
        tokio::time::timeout(timeout, wait).await.unwrap_or_else(|_| Err(timed_out(timeout)))
    }

    fn status(&self) -> &'static str {
        match self.run() {
            Err(_) => "shutdown",
            Ok(run) if run.monitor.is_paused() => "paused",
            Ok(_) => "running",
        }
    }

    async fn pause(&self) -> Result<()> {
        self.run()?.monitor.pause().await;
        self.inner.events.tell("STOP", &json!({}));
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        self.run()?.monitor.resume().await;
        self.inner.events.tell("RESUME", &json!({}));
        Ok(())
    }

    /// Has the guest power off, without waiting for it.
    async fn power_down(&self) -> Result<()> {
        let session = self.session().await?;
        self.inner.events.tell("POWERDOWN", &json!({}));
        self.ask_for_power_off(&session).await
    }

    /// Upstream's names for network cards: virtio-net-pci.N is the one of the Nth vlan.
    fn set_card(&self, name: &str, up: bool) -> Result<()> {
        let number = name.strip_prefix("virtio-net-pci.").and_then(|n| n.parse::<usize>().ok());
        let port = number.and_then(|n| self.inner.ports.get(n.checked_sub(1)?));
        let Some(port) = port else {
            let count = self.inner.ports.len();
            return Err(usage(&format!(
                "{} has no network card `{name}`: it has virtio-net-pci.1 to .{count}",
                self.name()
            )));
        };
        port.set_link(up);
        Ok(())
    }

    fn no_command(&self, command: &str) -> crate::Error {
        usage(&format!(
            "{}: firn has no QEMU monitor, and does not know what `{command}` would do; \
             send_monitor_command(\"help\") says what it knows",
            self.name()
        ))
    }
}

fn usage(message: &str) -> crate::Error {
    MachineError::Usage(message.to_owned()).into()
}
