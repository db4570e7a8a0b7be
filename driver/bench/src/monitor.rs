//! The commands that boot a guest, firn's and those of other monitors.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::guest::OFF;
use super::{BenchError, Guest};

/// That KVM gives and takes a vCPU's extended control registers (linux/kvm.h): not where the processor has none, as the
/// carrier's.
const KVM_CAP_XCRS: u32 = 56;

/// How to boot a subject and to watch it.
#[derive(Clone, Debug)]
pub struct Boot {
    /// The command that boots once.
    pub command: Vec<OsString>,
    /// The same with a guest that stays for a moment, so that the monitor's memory can be measured, if there is one.
    pub lingering: Option<Vec<OsString>>,
    /// The file to which the command writes the times of stages, if it does.
    pub marks: Option<PathBuf>,
    /// The size of the guest's memory in MiB.
    pub memory_mib: u64,
}

/// What a guest has besides its memory and its serial console.
#[derive(Clone, Debug, Default)]
pub struct Devices {
    /// A disk: a raw image.
    pub disk: Option<PathBuf>,
    /// A share that another process serves by vhost-user.
    pub share: Option<Share>,
    /// A network card.
    pub net: Option<Net>,
}

/// A share that another process serves by vhost-user.
#[derive(Clone, Debug)]
pub struct Share {
    /// By this the guest finds it.
    pub tag: String,
    /// The socket of monitor and server.
    pub socket: PathBuf,
    /// Whether it is the server that listens, and not the monitor.
    pub server_listens: bool,
}

/// What a network card is plugged into.
#[derive(Clone, Debug)]
pub enum Net {
    /// The monitor's user network, with a port of the host that leads to the guest's port 80.
    User(u16),
    /// A switch of vde.
    Vde {
        /// The switch's directory.
        switch: PathBuf,
        /// The card's address.
        mac: String,
    },
}

/// A monitor that firn can be compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OtherMonitor {
    /// QEMU with the machine that nixpkgs uses
    QemuQ35,
    /// QEMU with its smallest machine
    QemuMicrovm,
    /// Firecracker
    Firecracker,
    /// Cloud Hypervisor
    CloudHypervisor,
}

impl OtherMonitor {
    /// All that there are.
    pub const ALL: [Self; 4] =
        [Self::QemuQ35, Self::QemuMicrovm, Self::Firecracker, Self::CloudHypervisor];

    /// Its name in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::QemuQ35 => "qemu-q35",
            Self::QemuMicrovm => "qemu-microvm",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::QemuQ35 | Self::QemuMicrovm => "qemu-system-x86_64",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// Returns its program, if it is installed.
    #[must_use]
    pub fn find(self) -> Option<PathBuf> {
        find(self.program())
    }

    /// How it boots `guest`, this many at once. Writes the files this needs to `dir`.
    ///
    /// # Errors
    /// If `dir` cannot be written to.
    pub fn boot(
        self,
        program: &Path,
        guest: &Guest,
        machines: u8,
        dir: &Path,
    ) -> Result<Boot, BenchError> {
        let (name, none) = (self.as_str(), Devices::default());
        let command = self.command(program, guest, &none, &dir.join(name))?;
        let lingering = dir.join(format!("{name}-lingering"));
        let lingering = self.command(program, &guest.lingering(), &none, &lingering)?;
        let (one, memory_mib) = (machines == 1, guest.memory_mib);
        let command = if one { command } else { at_once(machines, command) };
        Ok(Boot { command, lingering: one.then_some(lingering), marks: None, memory_mib })
    }

    /// The command that boots `guest` with `devices`. A file that it needs is written to `config`, with an extension.
    ///
    /// # Errors
    /// If the file cannot be written, or the monitor has no such devices.
    pub fn command(
        self,
        program: &Path,
        guest: &Guest,
        devices: &Devices,
        config: &Path,
    ) -> Result<Vec<OsString>, BenchError> {
        // The smaller machines have no PCI and support fewer ways to restart.
        let small = |reboot: &str| format!("{} pci=off reboot={reboot}", guest.cmdline);
        let mut words: Vec<OsString> = vec![program.into()];
        match self {
            Self::QemuQ35 => {
                words.extend(["-M", "q35"].map(Into::into));
                words.extend(qemu(&guest.bzimage, guest, &guest.cmdline));
                words.extend(qemu_devices(devices, guest, "pci"));
            }
            Self::QemuMicrovm => {
                words.extend(["-M", "microvm,pit=off,pic=off,rtc=on"].map(Into::into));
                words.extend(qemu(&guest.vmlinux, guest, &small("t")));
                words.extend(qemu_devices(devices, guest, "device"));
            }
            Self::Firecracker => {
                self.lacks(devices.share.is_some(), "a share")?;
                self.lacks(devices.net.is_some(), "a network without privileges")?;
                let drive = |image| {
                    serde_json::json!({
                        "drive_id": "disk", "path_on_host": image,
                        "is_root_device": false, "is_read_only": false,
                    })
                };
                let mut text = serde_json::json!({
                    "boot-source": {
                        "kernel_image_path": guest.vmlinux,
                        "initrd_path": guest.initrd,
                        "boot_args": small("k"),
                    },
                    "drives": devices.disk.iter().map(drive).collect::<Vec<_>>(),
                    "machine-config": { "vcpu_count": guest.cores, "mem_size_mib": guest.memory_mib },
                });
                // It would not start where KVM cannot save what it does not save either.
                let cpu = config.with_extension("cpu.json");
                let template =
                    serde_json::json!({ "kvm_capabilities": [format!("!{KVM_CAP_XCRS}")] });
                text["cpu-config"] = serde_json::json!(cpu);
                let file = config.with_extension("json");
                for (file, text) in [(&cpu, template), (&file, text)] {
                    fs::write(file, text.to_string()).map_err(BenchError::file("write", file))?;
                }
                words.extend(["--no-api", "--config-file"].map(Into::into));
                words.push(file.into());
            }
            Self::CloudHypervisor => {
                self.lacks(devices.net.is_some(), "a network without privileges")?;
                words.extend(["--kernel".into(), guest.vmlinux.clone().into()]);
                words.extend(["--initramfs".into(), guest.initrd.clone().into()]);
                // A guest that restarts would start anew.
                words.extend(["--cmdline".into(), format!("{} {OFF}", guest.cmdline).into()]);
                words.extend(["--cpus".into(), format!("boot={}", guest.cores).into()]);
                let shared = if devices.share.is_some() { ",shared=on" } else { "" };
                let memory = format!("size={}M{shared}", guest.memory_mib);
                words.extend(["--memory".into(), memory.into()]);
                words.extend(["--serial", "tty", "--console", "off"].map(Into::into));
                if let Some(image) = &devices.disk {
                    let disk = format!("path={},image_type=raw", image.display());
                    words.extend(["--disk".into(), disk.into()]);
                }
                if let Some(Share { tag, socket, server_listens }) = &devices.share {
                    self.lacks(!server_listens, "a share whose server does not listen")?;
                    let share = format!("tag={tag},socket={}", socket.display());
                    words.extend(["--fs".into(), share.into()]);
                }
            }
        }
        Ok(words)
    }

    fn lacks(self, asked: bool, what: &'static str) -> Result<(), BenchError> {
        match asked {
            true => Err(BenchError::Unsupported { monitor: self.as_str(), what }),
            false => Ok(()),
        }
    }
}

/// A program that is installed, by its name.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The arguments common to all of QEMU's machines.
fn qemu(kernel: &Path, guest: &Guest, cmdline: &str) -> Vec<OsString> {
    let (cores, memory) = (guest.cores.to_string(), format!("{}M", guest.memory_mib));
    let mut words: Vec<OsString> =
        ["-accel", "kvm", "-cpu", "host", "-smp", &cores, "-m", &memory].map(Into::into).into();
    words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(Into::into));
    words.extend(["-display", "none", "-serial", "stdio"].map(Into::into));
    words.extend(["-kernel".into(), kernel.into()]);
    words.extend(["-initrd".into(), guest.initrd.clone().into()]);
    words.extend(["-append", cmdline].map(Into::into));
    words
}

/// QEMU's devices at a kind of bus: names of devices end with it.
fn qemu_devices(devices: &Devices, guest: &Guest, bus: &str) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: String| words.extend([option.into(), value.into()]);
    if let Some(image) = &devices.disk {
        let image = image.display();
        // As nixpkgs has it.
        add("-drive", format!("if=none,id=disk,format=raw,cache=writeback,file={image}"));
        add("-device", format!("virtio-blk-{bus},drive=disk"));
    }
    if let Some(Share { tag, socket, server_listens }) = &devices.share {
        let server = if *server_listens { "" } else { ",server=on" };
        let memory = guest.memory_mib;
        add("-object", format!("memory-backend-memfd,id=memory,size={memory}M,share=on"));
        add("-machine", "memory-backend=memory".to_owned());
        add("-chardev", format!("socket,id=share,path={}{server}", socket.display()));
        add("-device", format!("vhost-user-fs-{bus},chardev=share,tag={tag}"));
    }
    match &devices.net {
        Some(Net::User(port)) => {
            add("-netdev", format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:80"));
            add("-device", format!("virtio-net-{bus},netdev=net"));
        }
        Some(Net::Vde { switch, mac }) => {
            add("-netdev", format!("vde,id=net,sock={}", switch.display()));
            add("-device", format!("virtio-net-{bus},netdev=net,mac={mac}"));
        }
        None => (),
    }
    words
}

/// Runs a command several times at once. It fails if one does.
fn at_once(times: u8, command: Vec<OsString>) -> Vec<OsString> {
    let script = r#"times=$1; shift; all=
while [ "$times" -gt 0 ]; do "$@" & all="$all $!"; times=$((times - 1)); done
for one in $all; do wait "$one" || exit; done"#;
    let shell = ["sh", "-c", script, "sh", &times.to_string()].map(Into::into);
    shell.into_iter().chain(command).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest() -> Guest {
        Guest {
            vmlinux: "vmlinux".into(),
            bzimage: "bzimage".into(),
            initrd: "initrd".into(),
            cmdline: "quiet".to_owned(),
            memory_mib: 256,
            cores: 1,
        }
    }

    fn line(monitor: OtherMonitor, devices: &Devices) -> Result<String, BenchError> {
        let dir = std::env::temp_dir().join(format!("firn-bench-{}", std::process::id()));
        let words = monitor.command(Path::new("program"), &guest(), devices, &dir)?;
        Ok(words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn devices_are_given_to_those_who_have_them() {
        let share = Share { tag: "s".to_owned(), socket: "socket".into(), server_listens: false };
        let devices = Devices { share: Some(share.clone()), ..Devices::default() };
        let words = line(OtherMonitor::QemuQ35, &devices).expect("it has them");
        assert!(words.contains("socket,id=share,path=socket,server=on"), "{words}");
        assert!(words.contains("-device vhost-user-fs-pci,chardev=share,tag=s"), "{words}");
        let error = line(OtherMonitor::Firecracker, &devices).expect_err("it has none");
        assert_eq!(error.to_string(), "firecracker cannot be given a share");
        line(OtherMonitor::CloudHypervisor, &devices).expect_err("it does not listen");
        let share = Some(Share { server_listens: true, ..share });
        let words = line(OtherMonitor::CloudHypervisor, &Devices { share, ..devices });
        assert!(words.expect("it has them").ends_with("--fs tag=s,socket=socket"));
    }

    #[test]
    fn several_at_once_fail_if_one_does() {
        let run = |script: &str| {
            let words = at_once(3, ["sh", "-c", script].map(Into::into).into());
            std::process::Command::new(&words[0]).args(&words[1..]).output().expect("a shell")
        };
        let done = run("echo done");
        assert_eq!((done.status.code(), &*done.stdout), (Some(0), &b"done\ndone\ndone\n"[..]));
        assert_eq!(run("exit 7").status.code(), Some(7));
    }
}
