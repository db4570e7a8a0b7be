//! The commands that boot a guest, firn's and those of other monitors.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::{BenchError, Guest};

/// How to run and watch a subject.
#[derive(Clone, Debug)]
pub struct Run {
    /// The command that boots once.
    pub command: Vec<OsString>,
    /// The same with a guest that stays for a moment, so that the monitor's memory can be measured, if there is one.
    pub lingering: Option<Vec<OsString>>,
    /// The file to which the command writes the times of stages, if it does.
    pub marks: Option<PathBuf>,
    /// The size of the guest's memory in MiB.
    pub memory_mib: u64,
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
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|dir| dir.join(self.program())).find(|file| file.is_file())
    }

    /// How it boots `guest`. Writes the files this needs to `dir`.
    ///
    /// # Errors
    /// If `dir` cannot be written to.
    pub fn run(self, program: &Path, guest: &Guest, dir: &Path) -> Result<Run, BenchError> {
        Ok(Run {
            command: self.command(program, guest, &dir.join(self.as_str()))?,
            lingering: Some(self.command(
                program,
                &guest.lingering(),
                &dir.join(format!("{}-lingering", self.as_str())),
            )?),
            marks: None,
            memory_mib: guest.memory_mib,
        })
    }

    fn command(
        self,
        program: &Path,
        guest: &Guest,
        config: &Path,
    ) -> Result<Vec<OsString>, BenchError> {
        let (cores, memory) = (guest.cores.to_string(), format!("{}M", guest.memory_mib));
        // The smaller machines have no PCI and support fewer ways to restart.
        let small = |reboot: &str| format!("{} pci=off reboot={reboot}", guest.cmdline);
        let mut words: Vec<OsString> = vec![program.into()];
        match self {
            Self::QemuQ35 => {
                words.extend(["-M", "q35"].map(Into::into));
                words.extend(qemu(&guest.bzimage, guest, &guest.cmdline, &cores, &memory));
            }
            Self::QemuMicrovm => {
                words.extend(["-M", "microvm,pit=off,pic=off,rtc=on"].map(Into::into));
                words.extend(qemu(&guest.vmlinux, guest, &small("t"), &cores, &memory));
            }
            Self::Firecracker => {
                let text = serde_json::json!({
                    "boot-source": {
                        "kernel_image_path": guest.vmlinux,
                        "initrd_path": guest.initrd,
                        "boot_args": small("k"),
                    },
                    "drives": [],
                    "machine-config": { "vcpu_count": guest.cores, "mem_size_mib": guest.memory_mib },
                });
                let file = config.with_extension("json");
                fs::write(&file, text.to_string()).map_err(BenchError::file("write", &file))?;
                words.extend(["--no-api", "--config-file"].map(Into::into));
                words.push(file.into());
            }
            Self::CloudHypervisor => {
                words.extend(["--kernel".into(), guest.vmlinux.clone().into()]);
                words.extend(["--initramfs".into(), guest.initrd.clone().into()]);
                words.extend(["--cmdline", &guest.cmdline].map(Into::into));
                words.extend(["--cpus", &format!("boot={cores}")].map(Into::into));
                words.extend(["--memory", &format!("size={memory}")].map(Into::into));
                words.extend(["--serial", "tty", "--console", "off"].map(Into::into));
            }
        }
        Ok(words)
    }
}

/// Returns the arguments common to all of QEMU's machines.
fn qemu(kernel: &Path, guest: &Guest, cmdline: &str, cores: &str, memory: &str) -> Vec<OsString> {
    let mut words: Vec<OsString> =
        ["-accel", "kvm", "-cpu", "host", "-smp", cores, "-m", memory].map(Into::into).into();
    words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(Into::into));
    words.extend(["-display", "none", "-serial", "stdio"].map(Into::into));
    words.extend(["-kernel".into(), kernel.into()]);
    words.extend(["-initrd".into(), guest.initrd.clone().into()]);
    words.extend(["-append", cmdline].map(Into::into));
    words
}
