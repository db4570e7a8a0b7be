//! Builds guest kits from Debian packages.
//!
//! A [`Kit`] is a directory in the user's cache. It is made in two steps. The *base* holds what comes from Debian and
//! is fetched once; it changes when this program asks for other packages or modules, or on [`update`]. The kit proper
//! adds the guest agent and firn's scripts, so a new agent costs a few milliseconds and no network.
//!
//! ```text
//! $XDG_CACHE_HOME/firn/
//!   vmlinux/HASH         unpacked kernels of other machines: see firn's `kernels.rs`
//!   lock                 held while anything below is changed
//!   apt/                 apt's package lists
//!   staging/             what is being built; leftovers of killed builds are removed by the next one
//!   base/NAME-HASH/      kernel, vmlinux, modules/, busybox, base.json, files.json; of kits with a store: debian/
//!   kits/NAME-HASH/      kernel, vmlinux, initrd, image-drivers, manifest.json; of kits with a store: store/, store.img
//! ```
//!
//! No other user can read it. At each start the files a kit boots are compared with its manifest, by size and time; a
//! damaged kit is rebuilt.
//!
//! Everything here blocks; async callers use `spawn_blocking`.
#![forbid(unsafe_code)]

mod agent;
mod apt;
mod base;
mod cache;
mod debian;
mod modules;
mod system;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use firn::kit::archive::Archive;
use firn::kit::integrity::{self, Check, hex};
use firn::kit::{IMAGE_DRIVERS, Kit, KitError, KitName, Manifest, json};
use sha2::{Digest, Sha256};
use thiserror::Error;
use twox_hash::XxHash64;

pub use agent::{AgentError, find_agent};
pub use apt::AptError;
pub use modules::ModuleError;

use base::Base;
use cache::Cache;

/// Raised whenever a kit's layout changes, so that older ones are not mistaken for it.
const FORMAT: u32 = 4;

/// Incremented whenever the format of the manifest changes.
const MANIFEST_FORMAT: u32 = 1;

/// The kernel arguments for the micro kit under firn's monitor.
///
/// `cryptomgr.notests` skips self-tests of ciphers (0.88 giga-instructions with Debian's kernel), `tsc=reliable` and
/// `no_timer_check` skip the checking of clocks that KVM provides, the `i8042` ones skip the probing of a keyboard
/// controller's ports; with `init_on_alloc=0`, memory that the kernel hands to itself is not cleared: a guest has no
/// secrets. `initcall_blacklist` leaves out two searches of all symbols, 0.118 giga-instructions, that make names in
/// `/sys/kernel/tracing` prettier: of functions that others replaced, and of constants.
/// It leaves out the self-test of a source of entropy, too, 0.124 with Debian's newer kernel: a guest has virtio-rng;
/// and Debian's certificates for signed modules, 0.05: those of kits have no signatures. With `rodata=off`, the kernel
/// neither protects its code and constants from itself nor searches all page tables for what is unprotected, 0.11.
const MICRO_CMDLINE: &str = "console=ttyS0 panic=-1 quiet cryptomgr.notests nokaslr tsc=reliable no_timer_check \
                             i8042.noaux i8042.nomux i8042.dumbkbd init_on_alloc=0 rodata=off \
                             initcall_blacklist=ftrace_check_for_weak_functions,trace_eval_init,jent_mod_init,\
                             load_system_certificate_list";

/// Like [`MICRO_CMDLINE`], for kits with a store; the console is appended.
///
/// `lsm` leaves out access control by path names, as on NixOS, and by BPF: for `RestrictFileSystems=`, which no unit of
/// the kit sets, systemd would load a program at each boot, 0.2 giga-instructions. With `rcu_expedited`, mounts and
/// modules do not wait for the next tick.
const SYSTEMD_PARAMS: &str = "panic=1 quiet cryptomgr.notests nokaslr tsc=reliable no_timer_check i8042.noaux \
                              i8042.nomux i8042.dumbkbd net.ifnames=0 lsm=landlock,yama audit=0 mitigations=off \
                              rcupdate.rcu_expedited=1 8250.nr_uarts=1 init_on_alloc=0 rodata=off \
                              initcall_blacklist=ftrace_check_for_weak_functions,trace_eval_init,jent_mod_init,\
                              load_system_certificate_list";

/// Like [`MICRO_CMDLINE`], for QEMU's software emulation. The carrier needs no isolation, and mitigations are slow to
/// emulate.
const CARRIER_CMDLINE: &str = "console=ttyS0 panic=-1 quiet cryptomgr.notests nokaslr tsc=reliable no_timer_check \
                               i8042.noaux i8042.nomux i8042.nopnp mitigations=off rodata=off";

/// Functions shared by the boot scripts.
const LIBRARY: &str = include_str!("scripts/lib.sh");

/// A kit's ingredients.
struct Recipe {
    name: &'static str,
    /// The Debian release.
    suite: &'static str,
    /// Packages that make up the store, with their dependencies; if there are none, there is no store.
    packages: &'static [&'static [&'static str]],
    /// Packages to leave out although others depend on them.
    absent: &'static [&'static str],
    /// The metapackage that depends on the newest kernel image.
    kernel: &'static str,
    /// Modules to load, in this order, each after its dependencies.
    modules: &'static [&'static str],
    /// Modules that the script loads if the machine has a device for them, or that tests load.
    on_demand: &'static [&'static str],
    /// The modules for shares that are images, in this order; only machines that have such get them.
    images: &'static [&'static str],
    /// The script that the agent runs as `/etc/firn/boot`; with a store, the initrd's `/init`.
    boot: &'static str,
    cmdline: &'static str,
}

const MICRO: Recipe = Recipe {
    name: KitName::Micro.as_str(),
    suite: "bookworm",
    packages: &[],
    absent: &[],
    kernel: "linux-image-cloud-amd64",
    modules: &[
        "virtio_mmio",
        "virtio_console",
        "virtio_net",
        "virtiofs",
        "virtio_rng",
        "button",
        "pvpanic_mmio",
    ],
    on_demand: &[
        "8021q",
        "evdev",
        "virtio_input",
        "virtio_balloon",
        "virtio_blk",
        "virtio_pci",
        "vmw_vsock_virtio_transport",
    ],
    images: &["nd_pmem", "virtio_pmem", "erofs"],
    boot: include_str!("scripts/micro.sh"),
    cmdline: MICRO_CMDLINE,
};

/// A Debian system with what NixOS tests use.
const SYSTEM: &[&str] = &[
    "base-files",
    "bash",
    "bsdutils",
    "coreutils",
    "curl",
    "dash",
    "dbus",
    "dbus-user-session",
    "diffutils",
    "e2fsprogs",
    "ethtool",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "iputils-ping",
    "kexec-tools",
    "kmod",
    "less",
    "libc-bin",
    "libpam-systemd",
    "login",
    "mawk",
    "mount",
    "ncurses-base",
    "ncurses-bin",
    "netcat-openbsd",
    "openssh-client",
    "openssh-server",
    "passwd",
    "procps",
    "python3",
    "sed",
    "systemd",
    "systemd-sysv",
    "tar",
    "udev",
    "util-linux",
];

/// Graphical sessions, and tools that list their windows.
const WINDOWS: &[&str] = &[
    "foot",
    "sway",
    "x11-utils",
    "xserver-xorg-core",
    "xserver-xorg-input-libinput",
    "xserver-xorg-video-fbdev",
    "xterm",
];

const SYSTEMD: Recipe = Recipe {
    name: KitName::Systemd.as_str(),
    suite: "trixie",
    packages: &[SYSTEM],
    absent: &[],
    // The full flavour: the cloud one has no graphics.
    kernel: "linux-image-amd64",
    modules: &[
        "virtio_mmio",
        "virtio_console",
        "virtio_net",
        "virtiofs",
        "overlay",
        "virtio_rng",
        "button",
        "pvpanic_mmio",
    ],
    on_demand: &["drm", "virtio_balloon", "virtio_blk", "vmw_vsock_virtio_transport"],
    // erofs requests crc32c by name.
    images: &["nd_pmem", "virtio_pmem", "crc32c_generic", "erofs"],
    boot: include_str!("systemd/stage-1.sh"),
    cmdline: SYSTEMD_PARAMS,
};

const DESKTOP: Recipe = Recipe {
    name: KitName::Desktop.as_str(),
    packages: &[SYSTEM, WINDOWS],
    // Software rendering that no guest here uses: two thirds of the desktop's bytes.
    absent: &["mesa-libgallium"],
    ..SYSTEMD
};

const CARRIER: Recipe = Recipe {
    name: KitName::Carrier.as_str(),
    suite: "bookworm",
    packages: &[],
    absent: &[],
    // The cloud flavour has no 9p.
    kernel: "linux-image-amd64",
    modules: &[
        "virtio_pci",
        "9pnet_virtio",
        "9p",
        "virtio_console",
        "virtio_rng",
        "overlay",
        "tun",
    ],
    // ext4 requests crc32c by name, whether or not it uses it.
    on_demand: &["virtio_blk", "crc32c_generic", "ext4", "kvm_amd"],
    images: &[],
    boot: include_str!("scripts/carrier.sh"),
    cmdline: CARRIER_CMDLINE,
};

/// Why a kit cannot be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The kit or its cache cannot be used.
    #[error(transparent)]
    Kit(#[from] KitError),
    /// The static agent was not found or is unsuitable.
    #[error("the guest agent")]
    Agent(#[from] AgentError),
    /// Packages could not be fetched.
    #[error("cannot fetch Debian packages")]
    Apt(#[from] AptError),
    /// The kernel package lacks a module, or one is damaged.
    #[error("kernel modules")]
    Modules(#[from] ModuleError),
    /// The kernel image could not be unpacked.
    #[error("cannot unpack the kernel {path}")]
    Kernel {
        /// The bzImage.
        path: PathBuf,
        /// Why.
        #[source]
        source: firn_vmm::boot::unpack::UnpackError,
    },
    /// A package lacks a file that every version of it should have.
    #[error("Debian package {package} has no {file}")]
    Missing {
        /// The package.
        package: String,
        /// The file.
        file: String,
    },
    /// A program of a package, run to set the packages up, failed.
    #[error("{program} failed: {status}\n{message}")]
    Program {
        /// The program.
        program: &'static str,
        /// Its exit status, in words.
        status: String,
        /// What it printed.
        message: String,
    },
    /// The busybox program would not list its applets.
    #[error("busybox --list failed: {0}")]
    Busybox(String),
}

impl BuildError {
    fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| KitError::io(action, path)(source).into()
    }
}

/// Reports a build's progress, a line at a time.
pub type Progress<'a> = &'a (dyn Fn(&str) + 'a);

/// The kit `name`, built if missing. Needs the network only the first time. Calls `progress` only if there is something
/// to do.
///
/// # Errors
/// If the agent is missing, packages cannot be fetched or the cache cannot be written.
pub fn build(name: KitName, progress: Progress<'_>) -> Result<Kit, BuildError> {
    make(name, &Cache::of_user()?, &find_agent()?, Required::Exists, progress)
}

/// Like [`build`], but reads all files of the kit and rebuilds it if one is damaged.
///
/// # Errors
/// The same as for [`build`].
pub fn check(name: KitName, progress: Progress<'_>) -> Result<Kit, BuildError> {
    make(name, &Cache::of_user()?, &find_agent()?, Required::Intact, progress)
}

/// Like [`build`], but checks for newer Debian packages first.
///
/// # Errors
/// The same as for [`build`].
pub fn update(name: KitName, progress: Progress<'_>) -> Result<Kit, BuildError> {
    make(name, &Cache::of_user()?, &find_agent()?, Required::Newest, progress)
}

/// Returns the kit `name` if it is in the cache and up to date; `None` if [`build`] would have work to do.
///
/// # Errors
/// If the agent is missing or the cache cannot be read.
pub fn lookup(name: KitName) -> Result<Option<Kit>, BuildError> {
    let agent = find_agent()?;
    let agent = fs::read(&agent).map_err(BuildError::io("read", &agent))?;
    existing(recipe(name), &Cache::of_user()?, &agent, Check::Quick)
}

const fn recipe(name: KitName) -> &'static Recipe {
    match name {
        KitName::Micro => &MICRO,
        KitName::Systemd => &SYSTEMD,
        KitName::Desktop => &DESKTOP,
        KitName::Carrier => &CARRIER,
    }
}

/// What is required of a kit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Required {
    /// That it exists.
    Exists,
    /// That it exists and every byte is right.
    Intact,
    /// That it is made of Debian's newest packages.
    Newest,
}

fn existing(
    recipe: &Recipe,
    cache: &Cache,
    agent: &[u8],
    look: Check,
) -> Result<Option<Kit>, BuildError> {
    let Some(base) = Base::open(recipe, cache)? else {
        return Ok(None);
    };
    if look == Check::Full {
        base.check(look)?;
    }
    let dir = cache.kit_dir(recipe.name, &kit_key(recipe, &base, agent));
    Ok(Kit::find(dir, look)?)
}

/// For a kit or base that can be rebuilt: reports that it is damaged and treats it as missing.
fn or_anew<T>(
    found: Result<Option<T>, BuildError>,
    progress: Progress<'_>,
) -> Result<Option<T>, BuildError> {
    match found {
        Err(error @ BuildError::Kit(KitError::Damaged { .. })) => {
            progress(&error.to_string());
            Ok(None)
        }
        found => found,
    }
}

fn make(
    name: KitName,
    cache: &Cache,
    agent: &Path,
    required: Required,
    progress: Progress<'_>,
) -> Result<Kit, BuildError> {
    let recipe = recipe(name);
    let agent = fs::read(agent).map_err(BuildError::io("read", agent))?;
    let look = if required == Required::Intact { Check::Full } else { Check::Quick };
    let there = |progress: Progress<'_>| match required {
        Required::Newest => Ok(None),
        Required::Exists | Required::Intact => {
            or_anew(existing(recipe, cache, &agent, look), progress)
        }
    };
    if let Some(kit) = there(progress)? {
        return Ok(kit);
    }
    let lock = cache.lock(|| progress("another firn is building a kit, waiting for it"))?;
    // Another process may have built it meanwhile.
    if let Some(kit) = there(&|_| ())? {
        return Ok(kit);
    }
    let usable = |base: Base| base.check(look).map(|()| base);
    let base = Base::open(recipe, cache)?.map(usable).transpose();
    let base = or_anew(base, progress)?;
    // A kit contains the files of its base.
    let base_is_whole = base.is_some();
    let base = match base {
        Some(base) if required != Required::Newest => base,
        _ => Base::fetch(recipe, cache, &lock, progress)?,
    };
    let key = kit_key(recipe, &base, &agent);
    let dir = cache.kit_dir(recipe.name, &key);
    if base_is_whole
        && let Some(kit) = or_anew(Kit::find(dir.clone(), look).map_err(Into::into), &|_| ())?
    {
        return Ok(kit);
    }
    progress(&format!(
        "kit {}: writing the initrd for Linux {}",
        recipe.name, base.info.kernel_release
    ));
    let staging = lock.staging()?;
    let staged = staging.path();
    for file in ["kernel", "vmlinux"] {
        link(&base.dir.join(file), &staged.join(file))?;
    }
    let initrd = staged.join("initrd");
    fs::write(&initrd, initrd_bytes(recipe, &base, &agent)?)
        .map_err(BuildError::io("write", initrd))?;
    if !recipe.images.is_empty() {
        let archive = staged.join(IMAGE_DRIVERS);
        fs::write(&archive, image_drivers(&base)?).map_err(BuildError::io("write", archive))?;
    }
    make_immutable(staged)?;
    let store = !recipe.packages.is_empty();
    if store {
        system::make_store(&base, &agent, recipe.cmdline, staged)?;
    }
    let manifest = Manifest {
        kit: recipe.name.to_owned(),
        kernel_release: base.info.kernel_release,
        packages: base.info.packages,
        modules: base.info.modules,
        agent: hex(&Sha256::digest(&agent)),
        cmdline: if store {
            format!("{} {} console=ttyS0", recipe.cmdline, system::INIT)
        } else {
            recipe.cmdline.to_owned()
        },
        store,
        files: integrity::stamps(staged, Some(&staged.join("store/debian")))?,
    };
    json::write(&staged.join("manifest.json"), &manifest)?;
    lock.publish(staging, &dir)?;
    lock.prune_kits(recipe.name, &dir)?;
    progress(&format!("kit {}: ready in {}", recipe.name, dir.display()));
    Ok(Kit { dir, manifest })
}

/// Hard-links `to` to `from`, or copies it if that fails.
fn link(from: &Path, to: &Path) -> Result<(), BuildError> {
    fs::hard_link(from, to)
        .or_else(|_| fs::copy(from, to).map(drop))
        .map_err(BuildError::io("write", to))
}

/// Makes files that machines boot read-only: the monitor maps only such files.
fn make_immutable(dir: &Path) -> Result<(), BuildError> {
    for path in ["kernel", "vmlinux", "initrd", IMAGE_DRIVERS].map(|name| dir.join(name)) {
        if !path.exists() {
            continue;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444))
            .map_err(BuildError::io("write-protect", path))?;
    }
    Ok(())
}

/// Names a kit by all its ingredients.
fn kit_key(recipe: &Recipe, base: &Base, agent: &[u8]) -> String {
    let mut hash = Sha256::new();
    for part in [
        &FORMAT.to_le_bytes(),
        &MANIFEST_FORMAT.to_le_bytes(),
        base.key.as_bytes(),
        LIBRARY.as_bytes(),
        recipe.boot.as_bytes(),
        recipe.cmdline.as_bytes(),
    ] {
        hash.update(part);
        hash.update([0]);
    }
    for ingredient in system::ingredients().filter(|_| !recipe.packages.is_empty()) {
        hash.update(ingredient);
        hash.update([0]);
    }
    for (package, version) in &base.info.packages {
        hash.update(format!("{package}={version}\n"));
    }
    // Every run asks for its kit, and SHA-256 of the agent took a third of what a run without machines does.
    hash.update(XxHash64::oneshot(0, agent).to_le_bytes());
    hex(&hash.finalize()[..8])
}

fn initrd_bytes(recipe: &Recipe, base: &Base, agent: &[u8]) -> Result<Vec<u8>, BuildError> {
    let mut archive = Archive::new();
    for dir in [
        "bin",
        "dev",
        "etc",
        "etc/firn",
        "lib",
        "lib/modules",
        "mnt",
        "proc",
        "root",
        "run",
        "sys",
        "var",
    ] {
        archive.dir(dir, 0o755);
    }
    archive.dir("tmp", 0o1777);
    archive.symlink("sbin", "bin");
    archive.symlink("usr", ".");
    archive.symlink("var/run", "/run");
    archive.symlink("etc/mtab", "/proc/self/mounts");
    if recipe.packages.is_empty() {
        archive.file("init", 0o755, agent);
        archive.file("etc/firn/boot", 0o755, recipe.boot.as_bytes());
    } else {
        archive.file("init", 0o755, recipe.boot.as_bytes());
    }
    archive.file("etc/firn/lib.sh", 0o644, LIBRARY.as_bytes());
    archive.file("bin/busybox", 0o755, &base.read("busybox")?);
    for applet in base.info.applets.iter().filter(|applet| *applet != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("etc/nsswitch.conf", 0o644, b"hosts: files dns\n");
    // The defaults for a machine without an overlay.
    archive.file("etc/hostname", 0o644, b"firn\n");
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n::1 localhost\n");
    archive.file("etc/firn/network", 0o644, b"");
    archive.file("etc/firn/mounts", 0o644, b"");
    add_modules(&mut archive, base, &base.info.modules, "etc/firn/modules")?;
    add_modules(&mut archive, base, &base.info.on_demand, "etc/firn/on-demand")?;
    Ok(archive.finish())
}

/// What is added to the initrd of machines that have images.
fn image_drivers(base: &Base) -> Result<Vec<u8>, BuildError> {
    let mut archive = Archive::new();
    add_modules(&mut archive, base, &base.info.images, "etc/firn/image-drivers")?;
    Ok(archive.finish())
}

/// Adds modules, and the file `list` of their paths.
fn add_modules(
    archive: &mut Archive,
    base: &Base,
    modules: &[String],
    list: &str,
) -> Result<(), BuildError> {
    let mut paths = String::new();
    for module in modules {
        let path = format!("lib/modules/{module}.ko");
        archive.file(&path, 0o644, &base.read(&format!("modules/{module}.ko"))?);
        paths.push_str(&format!("/{path}\n"));
    }
    archive.file(list, 0o644, paths.as_bytes());
    Ok(())
}

#[cfg(test)]
mod tests;
