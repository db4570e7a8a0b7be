//! The machine protocol.

use serde_json::{Value, json};

use super::{Machine, refusal};
use crate::Error;
use crate::error::{MachineError, Result};

/// What there is.
const COMMANDS: &[&str] = &[
    "balloon",
    "cont",
    "human-monitor-command",
    "input-send-event",
    "qmp_capabilities",
    "query-balloon",
    "query-block",
    "query-commands",
    "query-cpus-fast",
    "query-kvm",
    "query-name",
    "query-status",
    "query-version",
    "quit",
    "screendump",
    "send-key",
    "set_link",
    "stop",
    "system_powerdown",
];

/// Why a command has no answer.
enum Failure {
    /// As the protocol tells it.
    Told { class: &'static str, description: String },
    /// The machinery's.
    Machine(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Machine(MachineError::Usage(description)) => generic(description),
            error => Self::Machine(error),
        }
    }
}

fn generic(description: impl Into<String>) -> Failure {
    Failure::Told { class: "GenericError", description: description.into() }
}

impl Machine {
    /// Does what a command of QEMU's machine protocol would, and answers what that would: an object with `return`, or
    /// with `error`. `query-commands` names the commands there are.
    ///
    /// # Errors
    /// As [`Machine::execute`].
    pub async fn send_qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        if let Some(monitor) = self.inner.backend.monitor() {
            return self.ask_qmp(monitor, command, arguments).await;
        }
        match self.answer_qmp(command, arguments).await {
            Ok(value) => Ok(json!({"return": value})),
            Err(Failure::Told { class, description }) => {
                Ok(json!({"error": {"class": class, "desc": description}}))
            }
            Err(Failure::Machine(error)) => Err(error),
        }
    }

    async fn answer_qmp(&self, command: &str, arguments: &Value) -> Result<Value, Failure> {
        Ok(match command {
            "qmp_capabilities" => json!({}),
            "query-status" => {
                let status = self.qemu_status();
                json!({"running": status == "running", "status": status})
            }
            "query-name" => json!({"name": self.name()}),
            "query-version" => {
                let mut numbers = env!("CARGO_PKG_VERSION").split('.').map(str::parse::<u32>);
                let mut number = || numbers.next().and_then(std::result::Result::ok).unwrap_or(0);
                let version = json!({"major": number(), "minor": number(), "micro": number()});
                json!({"qemu": version, "package": "firn"})
            }
            "query-kvm" => json!({"enabled": true, "present": true}),
            "query-commands" => COMMANDS.iter().map(|name| json!({"name": name})).collect(),
            "query-cpus-fast" => {
                let cpu = |at: u8| json!({"cpu-index": at, "target": std::env::consts::ARCH});
                (0..self.devices()?.0.cores.get()).map(cpu).collect()
            }
            "query-block" => self.query_block()?,
            "query-balloon" => json!({"actual": self.memory().await?}),
            "balloon" => match arguments["value"].as_u64() {
                Some(bytes) => self.set_memory(bytes).await.map(|()| json!({}))?,
                None => return Err(generic("balloon needs `value`, a number of bytes")),
            },
            "human-monitor-command" => match arguments["command-line"].as_str() {
                // It ends lines as a terminal does.
                Some(line) => {
                    let said = Box::pin(self.send_monitor_command(line)).await?;
                    said.replace('\n', "\r\n").into()
                }
                None => return Err(generic("it needs `command-line`, a text")),
            },
            "send-key" => self.qmp_send_key(arguments).await.map(|()| json!({}))?,
            "input-send-event" => self.qmp_send_event(arguments).await.map(|()| json!({}))?,
            "screendump" => self.qmp_screendump(arguments).await.map(|()| json!({}))?,
            "quit" | "stop" | "cont" | "system_powerdown" => {
                self.send_monitor_command(command).await?;
                json!({})
            }
            "set_link" => match (arguments["name"].as_str(), arguments["up"].as_bool()) {
                (Some(name), Some(up)) => self.set_card(name, up).map(|()| json!({}))?,
                _ => {
                    return Err(generic("set_link needs `name`, a text, and `up`, true or false"));
                }
            },
            _ => return Err(not_found(command)),
        })
    }

    fn query_block(&self) -> Result<Value> {
        let (_, disks) = self.devices()?;
        let told = disks.iter().enumerate().map(|(at, disk)| {
            let (file, driver) = (disk.image.display().to_string(), disk.format().to_string());
            let inserted = json!({"file": file, "drv": driver, "ro": disk.read_only});
            json!({"device": format!("virtio{at}"), "removable": false, "inserted": inserted})
        });
        Ok(told.collect())
    }
}

fn not_found(command: &str) -> Failure {
    // The same commands have an underscore there and a hyphen here.
    let why = refusal(command).or_else(|| refusal(&command.replace('-', "_")));
    let description = match why {
        Some(why) => format!("{command}: {why}"),
        None => format!("The command {command} has not been found"),
    };
    Failure::Told { class: "CommandNotFound", description }
}
