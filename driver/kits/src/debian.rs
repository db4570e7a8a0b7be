//! A Debian system as a directory tree, set up from unpacked packages as their maintainer scripts would do.
//!
//! Programs of the tree that this needs run through the tree's own dynamic linker, so none has to be installed here.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use super::modules::{self, ModuleTree};
use super::{BuildError, agent};

/// What no guest needs: documentation, translations, data of package tools, files for other inits, and what looks for
/// hardware and configuration that a virtual machine does not have.
const PRUNED: &[&str] = &[
    "boot",
    "etc/apt",
    "etc/cron.d",
    "etc/cron.daily",
    "etc/init.d",
    "etc/modules-load.d/modules.conf",
    "etc/rc0.d",
    "etc/rc1.d",
    "etc/rc2.d",
    "etc/rc3.d",
    "etc/rc4.d",
    "etc/rc5.d",
    "etc/rc6.d",
    "etc/rcS.d",
    "etc/runit",
    "etc/sv",
    "etc/ufw",
    "etc/X11",
    "usr/lib/systemd/system-generators/systemd-getty-generator",
    "usr/lib/systemd/system-generators/systemd-gpt-auto-generator",
    "usr/lib/systemd/system-generators/systemd-hibernate-resume-generator",
    "usr/lib/systemd/system-generators/systemd-rc-local-generator",
    "usr/lib/systemd/system-generators/systemd-run-generator",
    "usr/lib/systemd/system-generators/systemd-system-update-generator",
    "usr/lib/systemd/system-generators/systemd-sysv-generator",
    "usr/lib/systemd/system-generators/systemd-tpm2-generator",
    "usr/lib/udev/hwdb.d",
    "usr/lib/udev/rules.d/60-autosuspend.rules",
    "usr/lib/udev/rules.d/60-cdrom_id.rules",
    "usr/lib/udev/rules.d/60-fido-id.rules",
    "usr/lib/udev/rules.d/60-infiniband.rules",
    "usr/lib/udev/rules.d/60-persistent-alsa.rules",
    "usr/lib/udev/rules.d/60-persistent-storage-mtd.rules",
    "usr/lib/udev/rules.d/60-persistent-storage-tape.rules",
    "usr/lib/udev/rules.d/60-persistent-v4l.rules",
    "usr/lib/udev/rules.d/60-sensor.rules",
    "usr/lib/udev/rules.d/70-camera.rules",
    "usr/lib/udev/rules.d/70-joystick.rules",
    "usr/lib/udev/rules.d/70-memory.rules",
    "usr/lib/udev/rules.d/75-probe_mtd.rules",
    "usr/lib/udev/rules.d/78-sound-card.rules",
    "usr/lib/udev/rules.d/90-iocost.rules",
    "usr/lib/udev/rules.d/96-e2scrub.rules",
    "usr/share/apport",
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/debconf",
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/fish",
    "usr/share/info",
    "usr/share/initramfs-tools",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/menu",
    "usr/share/runit",
    "usr/share/ucf",
    "usr/share/zsh",
    "var",
];

/// Units that packages enable and that are useless in a machine whose system is new at each boot. They can still be
/// started.
const UNWANTED: &[&str] = &[
    "local-fs.target.wants/run-lock.mount",
    "local-fs.target.wants/tmp.mount",
    "multi-user.target.wants/systemd-ask-password-wall.path",
    "getty.target.wants/getty-static.service",
    "sockets.target.wants/systemd-creds.socket",
    "sockets.target.wants/systemd-initctl.socket",
    "sockets.target.wants/systemd-pcrextend.socket",
    "sockets.target.wants/systemd-pcrlock.socket",
    "sockets.target.wants/systemd-sysext.socket",
    "sysinit.target.wants/dev-hugepages.mount",
    "sysinit.target.wants/dev-mqueue.mount",
    "sysinit.target.wants/kmod-static-nodes.service",
    "sysinit.target.wants/ldconfig.service",
    "sysinit.target.wants/proc-sys-fs-binfmt_misc.automount",
    "sysinit.target.wants/sys-fs-fuse-connections.mount",
    "sysinit.target.wants/sys-kernel-config.mount",
    "sysinit.target.wants/sys-kernel-debug.mount",
    "sysinit.target.wants/sys-kernel-tracing.mount",
    "sysinit.target.wants/systemd-ask-password-console.path",
    "sysinit.target.wants/systemd-binfmt.service",
    "sysinit.target.wants/systemd-firstboot.service",
    "sysinit.target.wants/systemd-hibernate-clear.service",
    "sysinit.target.wants/systemd-hwdb-update.service",
    "sysinit.target.wants/systemd-journal-catalog-update.service",
    "sysinit.target.wants/systemd-journal-flush.service",
    "sysinit.target.wants/systemd-machine-id-commit.service",
    "sysinit.target.wants/systemd-pcrmachine.service",
    "sysinit.target.wants/systemd-pcrphase-sysinit.service",
    "sysinit.target.wants/systemd-pcrphase.service",
    "sysinit.target.wants/systemd-random-seed.service",
    "sysinit.target.wants/systemd-sysusers.service",
    "sysinit.target.wants/systemd-tmpfiles-setup-dev-early.service",
    "sysinit.target.wants/systemd-tmpfiles-setup-dev.service",
    "sysinit.target.wants/systemd-tpm2-setup-early.service",
    "sysinit.target.wants/systemd-tpm2-setup.service",
    "sysinit.target.wants/systemd-update-done.service",
];

/// Links that maintainer scripts create with `update-alternatives`.
const ALTERNATIVES: &[(&str, &str)] = &[
    ("usr/bin/awk", "mawk"),
    ("usr/bin/nc", "nc.openbsd"),
    ("usr/bin/netcat", "nc.openbsd"),
    ("usr/bin/pager", "less"),
    ("usr/bin/which", "which.debianutils"),
];

/// Kernel modules for what a virtual machine may have or do, besides those that the kit loads itself.
const MODULES: &[&str] = &[
    "autofs4",
    "binfmt_misc",
    "bonding",
    "configfs",
    "crc32c_generic",
    "crc32c_intel",
    "dm_mod",
    "dummy",
    "efivarfs",
    "evdev",
    "ext4",
    "geneve",
    "ifb",
    "ipvlan",
    "loop",
    "macsec",
    "macvlan",
    "macvtap",
    "nbd",
    "netconsole",
    "null_blk",
    "nlmon",
    "pvpanic_mmio",
    "squashfs",
    "team",
    "tun",
    "veth",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "nls_iso8859_1",
    "virtio_blk",
    "virtio_gpu",
    "virtio_net",
    "virtio_rng",
    "virtio_scsi",
    "vrf",
    "vsockmon",
    "vxlan",
    "wireguard",
    "xfs",
    "zram",
    "erofs",
    "isofs",
    "btrfs",
    "9p",
    "9pnet_virtio",
    "button",
    "psmouse",
    "softdog",
];

/// Directories of modules, all included for the same reason.
const MODULE_DIRECTORIES: &[&str] = &[
    "kernel/drivers/virtio",
    "kernel/fs/fuse",
    "kernel/fs/overlayfs",
    "kernel/net/802",
    "kernel/net/8021q",
    "kernel/net/bridge",
    "kernel/net/ipv4",
    "kernel/net/ipv6",
    "kernel/net/key",
    "kernel/net/netfilter",
    "kernel/net/netlink",
    "kernel/net/packet",
    "kernel/net/sched",
    "kernel/net/tls",
    "kernel/net/unix",
    "kernel/net/vmw_vsock",
    "kernel/net/xfrm",
];

/// Modules in these directories that nothing but other hypervisors has a device for. Both would be loaded for any use of
/// vsock: systemd asks for its number at each boot.
const FOREIGN: &[&str] = &["hv_sock", "vmw_vsock_vmci_transport"];

/// What depmod reads besides the modules.
const MODULE_LISTS: &[&str] = &["modules.builtin", "modules.builtin.modinfo", "modules.order"];

/// The tree of a Debian system.
pub(crate) struct Debian<'a> {
    root: &'a Path,
}

impl<'a> Debian<'a> {
    /// Identifies how trees are made, so that one made differently is not mistaken for this one.
    pub(crate) fn recipe() -> String {
        format!(
            "{PRUNED:?} {UNWANTED:?} {ALTERNATIVES:?} {MODULES:?} {MODULE_DIRECTORIES:?} {FOREIGN:?}"
        )
    }

    /// Turns unpacked packages in `root` into a system for Linux `release`.
    pub(crate) fn set_up(root: &'a Path, release: &str) -> Result<(), BuildError> {
        let this = Self { root };
        this.select_modules(release)?;
        for path in PRUNED {
            this.remove(path)?;
        }
        for path in UNWANTED {
            this.remove(&format!("usr/lib/systemd/system/{path}"))?;
        }
        for (path, target) in ALTERNATIVES {
            let path = root.join(path);
            symlink(target, &path).map_err(BuildError::io("link", path))?;
        }
        this.run("usr/bin/kmod", "depmod", |depmod| depmod.arg("-b").arg(root).arg(release))?;
        this.make_users()?;
        // When not run as root, it works without chroot.
        this.run("usr/sbin/ldconfig", "ldconfig", |ldconfig| ldconfig.args(["-X", "-r"]).arg(root))
    }

    /// An existing tree.
    pub(crate) const fn at(root: &'a Path) -> Self {
        Self { root }
    }

    /// Writes an ext4 image of `store`, without features that would need more kernel modules.
    pub(crate) fn make_image(&self, store: &Path, image: &Path) -> Result<(), BuildError> {
        // Half as much again for ext4's own structures; the file is sparse.
        let kib = tree_size(store)? * 3 / 2 / 1024 + 8192;
        self.run("usr/sbin/mke2fs", "mke2fs", |mke2fs| {
            mke2fs.args([
                "-q",
                "-t",
                "ext4",
                "-O",
                "^has_journal,^metadata_csum",
                "-m",
                "0",
                "-b",
                "4096",
                "-d",
            ]);
            mke2fs.arg(store).arg(image).arg(format!("{kib}k"))
        })
    }

    /// Replaces the package's modules, compressed and for all kinds of machines, by those of use here.
    fn select_modules(&self, release: &str) -> Result<(), BuildError> {
        let dir = self.root.join("usr/lib/modules").join(release);
        let tree = ModuleTree::scan(&dir)?;
        let mut wanted: Vec<_> = MODULES.iter().map(|&name| name.to_owned()).collect();
        wanted.extend(tree.below(&dir, MODULE_DIRECTORIES));
        wanted.retain(|name| !FOREIGN.contains(&name.as_str()));
        let selected = self.root.join("usr/lib/modules/selected");
        for (name, path) in tree.load_order(&wanted)? {
            let below = path.parent().and_then(|parent| parent.strip_prefix(&dir).ok());
            let to = selected.join(below.unwrap_or(Path::new("kernel")));
            fs::create_dir_all(&to).map_err(BuildError::io("create", &to))?;
            let to = to.join(format!("{name}.ko"));
            fs::write(&to, modules::read(&path)?).map_err(BuildError::io("write", to))?;
        }
        for list in MODULE_LISTS {
            let (from, to) = (dir.join(list), selected.join(list));
            fs::rename(&from, to).map_err(BuildError::io("move", from))?;
        }
        fs::remove_dir_all(&dir).map_err(BuildError::io("remove", &dir))?;
        fs::rename(&selected, &dir).map_err(BuildError::io("rename", selected))
    }

    /// Creates the users that the packages ask systemd-sysusers for, and root, without a password.
    fn make_users(&self) -> Result<(), BuildError> {
        for (name, mode, text) in [
            ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/bash\n"),
            ("etc/shadow", 0o640, "root::1::::::\n"),
            ("etc/group", 0o644, "root:x:0:\n"),
        ] {
            let path = self.root.join(name);
            fs::write(&path, text)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
                .map_err(BuildError::io("write", path))?;
        }
        let mut root = OsString::from("--root=");
        root.push(self.root);
        self.run("usr/bin/systemd-sysusers", "systemd-sysusers", |sysusers| sysusers.arg(root))
    }

    /// Runs a program of the tree.
    fn run(
        &self,
        program: &str,
        name: &'static str,
        arguments: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Result<(), BuildError> {
        let program = self.root.join(program);
        let bytes = fs::read(&program).map_err(BuildError::io("read", &program))?;
        let mut command = if agent::problem(&bytes).is_none() {
            Command::new(&program)
        } else {
            let libraries = self.root.join("usr/lib/x86_64-linux-gnu");
            let mut path = libraries.clone().into_os_string();
            path.push(":");
            path.push(libraries.join("systemd"));
            let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
            command.arg("--library-path").arg(path).args(["--argv0", name]).arg(&program);
            command
        };
        let output = arguments(&mut command).env("LC_ALL", "C").stdin(Stdio::null()).output();
        let output = output.map_err(BuildError::io("run", &program))?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(BuildError::Program { program: name, status: output.status.to_string(), message })
    }

    fn remove(&self, path: &str) -> Result<(), BuildError> {
        let path = self.root.join(path);
        let removed = match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            // Debian may have moved it; a guest with some superfluous files works as well.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        removed.map_err(BuildError::io("remove", path))
    }
}

/// Returns the bytes that the files below `dir` take in blocks of 4 KiB.
fn tree_size(dir: &Path) -> Result<u64, BuildError> {
    let mut size = 0;
    for entry in fs::read_dir(dir).map_err(BuildError::io("list", dir))? {
        let entry = entry.map_err(BuildError::io("list", dir))?;
        let metadata = entry.metadata().map_err(BuildError::io("look at", entry.path()))?;
        size += metadata.len().next_multiple_of(4096);
        if metadata.is_dir() {
            size += tree_size(&entry.path())?;
        }
    }
    Ok(size)
}
