//! The monitor for people.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use firn_vmm::spec::Mac;

use super::input::HOLD;
use super::{Machine, REFUSED, usage};
use crate::config;
use crate::error::Result;
use crate::machine::Format;

/// What there is.
const COMMANDS: &str = "\
balloon target -- ask the guest to do with this much memory, in MiB
cont|c -- resume emulation
help|? -- show this help
hostfwd_add [tcp|udp]:[HOST]:PORT-[GUEST]:PORT -- forward a port of the host to the guest
info subcommand -- show something; `info` alone lists what
quit|q -- end the machine at once
screendump FILE [-f png|ppm] -- write a picture of the screen
sendkey KEYS [MS] -- press keys together: ctrl-alt-delete, 0x2b
set_link name on|off -- plug or pull a network card's cable; virtio-net-pci.1 is the first vlan's
stop|s -- stop emulation
system_powerdown -- have the guest power off
";

/// What can be shown.
const INFO: &str = "\
info balloon -- how much memory the guest has
info block -- the disks
info cpus -- the processors
info kvm -- whether KVM runs the guest: always
info name -- the machine's name
info network -- the network cards
info status -- whether it runs
info version -- firn's version
";

impl Machine {
    /// Does what a command of QEMU's human monitor would, and answers what that would print. `help` names the
    /// commands there are.
    ///
    /// # Errors
    /// [`crate::MachineError::Usage`] for another command; else as [`Machine::execute`].
    pub async fn send_monitor_command(&self, command: &str) -> Result<String> {
        if let Some(monitor) = self.inner.backend.monitor() {
            return self.ask_monitor(monitor, command).await;
        }
        let words: Vec<&str> = command.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            ["help" | "?"] => return Ok(help()),
            ["help" | "?", "info"] | ["info"] => return Ok(INFO.to_owned()),
            ["help" | "?", name] => {
                let about = |line: &&str| line.starts_with(name);
                return Ok(help().lines().filter(about).map(|line| format!("{line}\n")).collect());
            }
            ["info", what] => return self.info(what, command).await,
            ["quit" | "q"] => self.crash().await,
            ["stop" | "s"] => self.pause().await?,
            ["cont" | "c"] => self.resume().await?,
            ["system_powerdown"] => self.power_down().await?,
            ["sendkey", keys] => self.monitor_sendkey(keys, HOLD).await?,
            ["sendkey", keys, hold] => {
                let hold = hold.parse().map_err(|_| usage("sendkey needs a number of ms"))?;
                self.monitor_sendkey(keys, Duration::from_millis(hold)).await?;
            }
            ["screendump", file] | ["screendump", file, "-f", "ppm"] => {
                self.dump_screen(Path::new(file), Format::Ppm).await?;
            }
            ["screendump", file, "-f", "png"] => {
                self.dump_screen(Path::new(file), Format::Png).await?;
            }
            ["set_link", card, "on"] => self.set_card(card, true)?,
            ["set_link", card, "off"] => self.set_card(card, false)?,
            ["balloon", mib] => {
                let mib: u64 = mib.parse().map_err(|_| usage("balloon needs a number of MiB"))?;
                self.set_memory(mib.saturating_mul(1 << 20)).await?;
            }
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

    async fn info(&self, what: &str, command: &str) -> Result<String> {
        Ok(match what {
            "name" => format!("{}\n", self.name()),
            "status" => format!("VM status: {}\n", self.qemu_status()),
            "version" => format!("{} (firn)\n", env!("CARGO_PKG_VERSION")),
            "kvm" => "kvm support: enabled\n".to_owned(),
            "balloon" => format!("balloon: actual={}\n", self.memory().await? >> 20),
            "block" => self.info_block()?,
            "cpus" => {
                let mark = |cpu: u8| if cpu == 0 { '*' } else { ' ' };
                (0..self.devices()?.0.cores.get())
                    .map(|cpu| format!("{} CPU #{cpu}\n", mark(cpu)))
                    .collect()
            }
            "network" => self.info_network()?,
            _ => return Err(self.no_command(command)),
        })
    }

    fn info_block(&self) -> Result<String> {
        let (_, disks) = self.devices()?;
        let mut text = String::new();
        for (at, disk) in disks.iter().enumerate() {
            let read_only = if disk.read_only { ", read-only" } else { "" };
            // A String takes everything.
            let _ = writeln!(
                text,
                "virtio{at}: {} ({}{read_only})",
                disk.image.display(),
                disk.format()
            );
        }
        Ok(text)
    }

    fn info_network(&self) -> Result<String> {
        let (node, _) = self.devices()?;
        let mut text = String::new();
        for (name, mac, other) in cards(&node) {
            let _ = writeln!(text, "{name}: index=0,type=nic,model=virtio-net-pci,macaddr={mac}");
            let _ = writeln!(text, " \\ {other}");
        }
        Ok(text)
    }
}

/// Each network card: its name, its address, and what its cable leads to.
pub(super) fn cards(
    node: &config::NodeConfig,
) -> impl Iterator<Item = (String, String, String)> + '_ {
    let user = node.user_network.iter().map(|user| {
        let restrict = if user.restrict { "on" } else { "off" };
        let other = format!("user.0: index=0,type=user,net=10.0.2.0,restrict={restrict}");
        (0, Mac(firn_gateway::CARD_MAC), other)
    });
    let vlans = (1..).zip(&node.vlans).map(|(number, vlan)| {
        (number, node.mac(*vlan), format!("vlan{vlan}: index=0,type=socket"))
    });
    user.chain(vlans)
        .map(|(number, mac, other)| (format!("virtio-net-pci.{number}"), mac.to_string(), other))
}

fn help() -> String {
    let mut lines: Vec<String> = COMMANDS.lines().chain(INFO.lines()).map(str::to_owned).collect();
    for (names, why) in REFUSED {
        lines.extend(names.iter().map(|name| format!("{name} -- not there: {why}")));
    }
    lines.sort_unstable();
    lines.into_iter().map(|line| line + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_has_a_line_for_each_command_and_says_what_is_not_there() {
        let help = help();
        assert!(help.lines().count() > 70, "{help}");
        for line in ["balloon target -- ask", "device_add -- not there: a machine has the devices"]
        {
            assert!(help.lines().any(|there| there.starts_with(line)), "{line} in {help}");
        }
        let names: Vec<&str> = REFUSED.iter().flat_map(|(names, _)| *names).copied().collect();
        for name in names {
            assert!(!COMMANDS.lines().any(|line| line.starts_with(&format!("{name} "))), "{name}");
        }
    }
}
