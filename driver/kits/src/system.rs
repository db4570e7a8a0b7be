//! What firn adds to a Debian tree to make it the store of a machine that boots like NixOS.
//!
//! ```text
//! store/          the guest's /nix/.ro-store, and the lower layer of its /nix/store
//!   debian/       the tree: links to the base's files
//!   firn/         the agent, the backdoor, busybox, and root.cpio: the files copied at each boot
//!   toplevel/     kernel, initrd, init, kernel-params
//! ```

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use firn::kit::STORE_IMAGE;
use firn::kit::archive::Archive;

use super::base::Base;
use super::debian::Debian;
use super::{BuildError, link};

/// The kernel argument that names the guest's init after the initrd.
pub(crate) const INIT: &str = "init=/nix/store/toplevel/init";

/// The busybox commands that stage 2 calls.
const APPLETS: &[&str] = &["sh", "chmod", "cp", "cpio", "ln", "mkdir", "mknod", "mount"];

const STAGE_2: &str = include_str!("systemd/stage-2.sh");
const BACKDOOR: &str = include_str!("systemd/backdoor.sh");

/// Files of each boot's root directory: path, mode, contents. They replace those of packages.
const FILES: &[(&str, u32, &str)] = &[
    ("etc/fstab", 0o644, ""),
    ("etc/nsswitch.conf", 0o644, include_str!("systemd/nsswitch.conf")),
    ("etc/profile", 0o644, include_str!("systemd/profile")),
    ("etc/pam.d/common-account", 0o644, include_str!("systemd/pam.d/common-account")),
    ("etc/pam.d/common-auth", 0o644, include_str!("systemd/pam.d/common-auth")),
    ("etc/pam.d/common-password", 0o644, include_str!("systemd/pam.d/common-password")),
    ("etc/pam.d/common-session", 0o644, include_str!("systemd/pam.d/common-session")),
    (
        "etc/pam.d/common-session-noninteractive",
        0o644,
        include_str!("systemd/pam.d/common-session-noninteractive"),
    ),
    ("etc/ssh/sshd_config", 0o644, include_str!("systemd/sshd_config")),
    ("etc/systemd/journald.conf.d/firn.conf", 0o644, include_str!("systemd/journald.conf")),
    ("etc/systemd/network/eth0.network", 0o644, include_str!("systemd/eth0.network")),
    ("etc/systemd/system.conf.d/firn.conf", 0o644, include_str!("systemd/system.conf")),
    ("etc/systemd/system/backdoor.service", 0o644, include_str!("systemd/backdoor.service")),
    ("etc/systemd/system/firn-agent.service", 0o644, include_str!("systemd/firn-agent.service")),
    (
        "etc/systemd/system/firn-system-down.service",
        0o644,
        include_str!("systemd/firn-system-down.service"),
    ),
    (
        "etc/systemd/system/firn-system-up.service",
        0o644,
        include_str!("systemd/firn-system-up.service"),
    ),
    ("etc/systemd/user.conf.d/firn.conf", 0o644, include_str!("systemd/user.conf")),
    (
        "etc/systemd/system/sshd-keygen.service.d/firn.conf",
        0o644,
        include_str!("systemd/sshd-keygen.conf"),
    ),
    (
        "etc/systemd/system/sshd-vsock@.service.d/firn.conf",
        0o644,
        include_str!("systemd/sshd-vsock.conf"),
    ),
    (
        "etc/systemd/system/systemd-remount-fs.service.d/firn.conf",
        0o644,
        include_str!("systemd/remount-fs.conf"),
    ),
    (
        "etc/systemd/system/systemd-udev-load-credentials.service.d/firn.conf",
        0o644,
        include_str!("systemd/udev-load-credentials.conf"),
    ),
    (
        "etc/systemd/system/systemd-udev-trigger.service.d/firn.conf",
        0o644,
        include_str!("systemd/udev-trigger.conf"),
    ),
    ("etc/udev/udev.conf", 0o644, ""),
];

/// Links of each boot's root directory.
const LINKS: &[(&str, &str)] = &[
    ("etc/localtime", "/usr/share/zoneinfo/UTC"),
    ("etc/mtab", "../proc/self/mounts"),
    ("etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target"),
    (
        "etc/systemd/system/dbus-org.freedesktop.network1.service",
        "/usr/lib/systemd/system/systemd-networkd.service",
    ),
    (
        "etc/systemd/system/getty.target.wants/getty@tty1.service",
        "/usr/lib/systemd/system/getty@.service",
    ),
    ("etc/systemd/system/multi-user.target.wants/backdoor.service", "../backdoor.service"),
    ("etc/systemd/system/sysinit.target.wants/firn-agent.service", "../firn-agent.service"),
    ("etc/systemd/system/emergency.target.wants/firn-agent.service", "../firn-agent.service"),
    (
        "etc/systemd/system/emergency.target.wants/firn-system-down.service",
        "../firn-system-down.service",
    ),
    (
        "etc/systemd/system/rescue.target.wants/firn-system-down.service",
        "../firn-system-down.service",
    ),
    (
        "etc/systemd/system/multi-user.target.wants/firn-system-up.service",
        "../firn-system-up.service",
    ),
    ("etc/systemd/system/serial-getty@hvc0.service", "/dev/null"),
    ("etc/systemd/system/serial-getty@ttyS0.service", "/dev/null"),
    ("etc/systemd/system/tmp.mount", "/dev/null"),
    // logind requests it; on a machine with a screen udev loads it.
    ("etc/systemd/system/modprobe@drm.service", "/dev/null"),
    (
        "etc/systemd/system/ssh.service.requires/sshd-keygen.service",
        "/usr/lib/systemd/system/sshd-keygen.service",
    ),
    ("var/lock", "/run/lock"),
    ("var/run", "/run"),
];

/// Directories of each boot's root directory.
const DIRECTORIES: &[(&str, u32)] = &[
    ("etc", 0o755),
    ("home", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("root", 0o700),
    ("srv", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("var", 0o755),
    ("var/cache", 0o755),
    ("var/lib", 0o755),
    ("var/lib/systemd", 0o755),
    ("var/log", 0o755),
    ("var/spool", 0o755),
    ("var/tmp", 0o1777),
];

/// Everything in this file that a store is made of, for its name.
pub(crate) fn ingredients() -> impl Iterator<Item = String> {
    let files = FILES.iter().map(|(path, mode, text)| format!("{path} {mode:o} {text}"));
    let links = LINKS.iter().map(|(path, target)| format!("{path} -> {target}"));
    let directories = DIRECTORIES.iter().map(|(path, mode)| format!("{path} {mode:o}"));
    let programs = [STAGE_2, BACKDOOR, &APPLETS.join(" ")].map(str::to_owned);
    files.chain(links).chain(directories).chain(programs)
}

/// Creates the store in `kit`, which has the kernel and the initrd already.
pub(crate) fn make_store(
    base: &Base,
    agent: &[u8],
    kernel_params: &str,
    kit: &Path,
) -> Result<(), BuildError> {
    let store = kit.join("store");
    let (firn, toplevel) = (store.join("firn"), store.join("toplevel"));
    for dir in [&store, &firn, &firn.join("bin"), &firn.join("busybox"), &toplevel] {
        fs::create_dir(dir).map_err(BuildError::io("create", dir))?;
    }
    link_tree(&base.dir.join("debian"), &store.join("debian"))?;

    write(&firn.join("bin/firn-agent"), 0o555, agent)?;
    write(&firn.join("bin/backdoor"), 0o555, BACKDOOR.as_bytes())?;
    write(&firn.join("root.cpio"), 0o444, &root_archive(base)?)?;
    link(&base.dir.join("busybox"), &firn.join("busybox/busybox"))?;
    for applet in APPLETS {
        let path = firn.join("busybox").join(applet);
        symlink("busybox", &path).map_err(BuildError::io("link", path))?;
    }

    for file in ["kernel", "initrd"] {
        link(&kit.join(file), &toplevel.join(file))?;
    }
    write(&toplevel.join("init"), 0o555, STAGE_2.as_bytes())?;
    write(&toplevel.join("kernel-params"), 0o444, kernel_params.as_bytes())?;
    Debian::at(&base.dir.join("debian")).make_image(&store, &kit.join(STORE_IMAGE))
}

/// The archive of the files of which each boot gets its own copy.
fn root_archive(base: &Base) -> Result<Vec<u8>, BuildError> {
    let mut archive = Archive::new();
    for (path, mode) in DIRECTORIES {
        archive.dir(path, *mode);
    }
    let etc = base.dir.join("debian/etc");
    archive.tree("etc", &etc).map_err(BuildError::io("read", etc))?;
    for (path, mode, text) in FILES {
        archive.file(path, *mode, text.as_bytes());
    }
    for (path, target) in LINKS {
        archive.symlink(path, target);
    }
    Ok(archive.finish())
}

/// Makes `to` a tree of hard links to the files of `from`.
fn link_tree(from: &Path, to: &Path) -> Result<(), BuildError> {
    fs::create_dir(to).map_err(BuildError::io("create", to))?;
    for entry in fs::read_dir(from).map_err(BuildError::io("list", from))? {
        let entry = entry.map_err(BuildError::io("list", from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().map_err(BuildError::io("look at", &source))?;
        if kind.is_dir() {
            link_tree(&source, &target)?;
        } else if kind.is_symlink() {
            let aim = fs::read_link(&source).map_err(BuildError::io("read", &source))?;
            symlink(aim, &target).map_err(BuildError::io("link", &target))?;
        } else {
            link(&source, &target)?;
        }
    }
    Ok(())
}

fn write(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), BuildError> {
    fs::write(path, bytes)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .map_err(BuildError::io("write", path))
}
