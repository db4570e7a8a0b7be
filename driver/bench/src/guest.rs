//! The guest for comparing monitors: a kernel and an initrd that prints a line and restarts the machine.

use std::fs;
use std::path::{Path, PathBuf};

use firn::config::NodeConfig;
use firn::kit::Kit;
use firn::kit::archive::Archive;

use super::BenchError;

/// The line that the guest prints first.
pub const HERE: &str = "firn-bench: init";

/// The guest's init. The kernel passes `linger=` and `off=` from its command line on as variables.
const INIT: &str = "#!/bin/busybox sh
echo 'firn-bench: init'
[ -z \"$linger\" ] || /bin/busybox sleep \"$linger\"
[ -z \"$off\" ] || /bin/busybox poweroff -f
/bin/busybox reboot -f
";

/// The argument that keeps [`INIT`] running long enough to inspect its monitor.
const LINGER: &str = "linger=1";

/// The argument that has a guest power off where it would restart.
pub(super) const OFF: &str = "off=1";

/// A guest that shuts itself down.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The kernel as an ELF file, for monitors that accept one.
    pub vmlinux: PathBuf,
    /// The kernel as a bzImage, for the others.
    pub bzimage: PathBuf,
    /// The initrd.
    pub initrd: PathBuf,
    /// The kernel's arguments.
    pub cmdline: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The number of vCPUs.
    pub cores: u8,
}

impl Guest {
    /// Creates the reference guest, with the kernel and the shell of the micro kit. Its initrd is written to `dir`.
    ///
    /// # Errors
    /// If the kit or `dir` cannot be used.
    pub fn reference(kit: &Kit, dir: &Path) -> Result<Self, BenchError> {
        let initrd = dir.join("reference.cpio");
        let busybox = kit
            .initrd_file("bin/busybox")
            .map_err(BenchError::file("read busybox of", &kit.initrd()))?;
        let mut archive = Archive::new();
        archive.dir("bin", 0o755);
        archive.file("bin/busybox", 0o755, &busybox);
        archive.file("init", 0o755, INIT.as_bytes());
        fs::write(&initrd, archive.finish()).map_err(BenchError::file("write", &initrd))?;
        Ok(Self {
            vmlinux: kit.vmlinux(),
            bzimage: kit.kernel(),
            initrd,
            cmdline: kit.manifest.cmdline.clone(),
            memory_mib: 512,
            cores: 1,
        })
    }

    /// The guest of a machine file without the machine's devices, which monitors configure in different ways.
    #[must_use]
    pub fn of(node: &NodeConfig) -> Option<Self> {
        let kernel = node.kernel.clone()?;
        let [initrd] = node.initrd.as_deref()? else { return None };
        Some(Self {
            vmlinux: kernel.clone(),
            bzimage: kernel,
            initrd: initrd.clone(),
            cmdline: node.cmdline.clone().unwrap_or_default(),
            memory_mib: node.memory().get(),
            cores: node.cores.get(),
        })
    }

    /// The same; if it is the reference guest, its init stays for a moment.
    #[must_use]
    pub fn lingering(&self) -> Self {
        Self { cmdline: format!("{} {LINGER}", self.cmdline), ..self.clone() }
    }

    /// A machine file for it: with an entropy source, a network card and a share of `share` if that is given, otherwise
    /// with only the devices that all monitors have.
    #[must_use]
    pub fn machine_file(&self, share: Option<&Path>) -> String {
        let mut machine = serde_json::json!({
            "firn": 1, "name": "machine", "memory": self.memory_mib, "cores": self.cores,
            "kernel": self.vmlinux, "initrd": [self.initrd], "cmdline": self.cmdline, "rng": false,
        });
        if let Some(share) = share {
            machine["rng"] = true.into();
            machine["vlans"] = serde_json::json!([1]);
            machine["shares"] = serde_json::json!([{ "tag": "share", "source": share }]);
        }
        format!("#!/usr/bin/firn run\n{machine}\n")
    }
}
