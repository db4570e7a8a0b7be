//! Machine files that are run by hand.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use firn::kit::Kit;
use firn_tests::{firn, micro, repository, systemd};
use serde_json::Value;
use tempfile::TempDir;

/// A machine file, and where it is run.
struct Place {
    cwd: TempDir,
    tmp: TempDir,
    file: PathBuf,
}

impl Place {
    fn new(spec: &Value) -> Self {
        let (cwd, tmp) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = cwd.path().join("run-machine-vm");
        let text = format!("#!{} run\n{spec}\n", firn().display());
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        Self { cwd, tmp, file }
    }

    /// The guest has a shell on its serial console.
    fn with_shell(kernel: impl FnOnce(&Kit) -> PathBuf) -> Self {
        let kit = micro();
        let spec = serde_json::json!({
            "firn": 1,
            "name": "shell",
            "memory": 256,
            "kernel": kernel(&kit),
            "initrd": [kit.initrd()],
            "cmdline": format!("{} rdinit=/bin/sh ${{QEMU_KERNEL_PARAMS:-}}", kit.manifest.cmdline),
            "disks": [{ "image": "${NIX_DISK_IMAGE:-made.img}", "size": 8 }],
            "shares": [{ "tag": "xchg", "source": "${TMPDIR}/xchg" }],
            "vlans": [1],
        });
        Self::new(&spec)
    }

    /// Runs the file itself.
    fn start(&self) -> Child {
        self.command().spawn().unwrap()
    }

    fn command(&self) -> Command {
        // Whatever a guest waits for, the tests go on.
        let mut command = Command::new("timeout");
        command.args(["--foreground", "300"]).arg(&self.file);
        command.current_dir(self.cwd.path()).env("TMPDIR", self.tmp.path());
        command.env_remove("USE_TMPDIR").env("QEMU_KERNEL_PARAMS", "hello=there");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    /// Nothing of the run may be left but the disk.
    fn check(&self) {
        assert_eq!(fs::read_dir(self.tmp.path()).unwrap().count(), 0);
        assert_eq!(fs::metadata(self.cwd.path().join("made.img")).unwrap().len(), 8 << 20);
    }
}

/// Reads until the guest has printed something.
fn read_until(out: &mut impl Read, wanted: &str) -> String {
    let mut said = Vec::new();
    let mut byte = [0];
    while out.read(&mut byte).unwrap() == 1 {
        said.push(byte[0]);
        if said.ends_with(wanted.as_bytes()) {
            return String::from_utf8_lossy(&said).into_owned();
        }
    }
    panic!("it ended without {wanted:?}: {}", String::from_utf8_lossy(&said));
}

#[test]
fn the_terminal_is_the_serial_console() {
    let place = Place::with_shell(Kit::vmlinux);
    let mut run = place.start();
    let (mut keys, mut screen) = (run.stdin.take().unwrap(), run.stdout.take().unwrap());
    read_until(&mut screen, "# ");
    let commands = "mount -t proc none /proc; tr ' ' '\\n' </proc/cmdline | tail -n 1; echo a''b\n";
    keys.write_all(commands.as_bytes()).unwrap();
    let said = read_until(&mut screen, "ab\r\n");
    assert!(said.contains("\nhello=there\r\n"), "{said}");
    keys.write_all(b"poweroff -f\n").unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(0));
    place.check();
}

#[test]
fn ctrl_a_x_ends_it() {
    let place = Place::with_shell(Kit::vmlinux);
    let mut run = place.start();
    let (mut keys, mut screen) = (run.stdin.take().unwrap(), run.stdout.take().unwrap());
    read_until(&mut screen, "# ");
    keys.write_all(b"\x01x").unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(0));
    place.check();
}

/// The first run unpacks it, and it is what is in the cache that boots. What is cut off there is unpacked again.
#[test]
fn a_bzimage_is_unpacked_once() {
    let place = Place::with_shell(Kit::kernel);
    let cache = tempfile::tempdir().unwrap();
    let start = || {
        let mut command = place.command();
        command.env("XDG_CACHE_HOME", cache.path()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let boot = || {
        let mut run = start();
        let (mut keys, mut screen) = (run.stdin.take().unwrap(), run.stdout.take().unwrap());
        read_until(&mut screen, "# ");
        keys.write_all(b"poweroff -f\n").unwrap();
        assert_eq!(run.wait().unwrap().code(), Some(0));
    };
    boot();
    let kernels = fs::read_dir(cache.path().join("firn/vmlinux")).unwrap();
    let kernels = kernels.map(|entry| entry.unwrap().path());
    let (links, kernels): (Vec<_>, Vec<_>) = kernels.partition(|path| path.is_symlink());
    assert_eq!((links.len(), kernels.len()), (1, 1));
    assert!(fs::read(&kernels[0]).unwrap().starts_with(b"\x7fELF"));
    boot();

    let size = usize::try_from(fs::metadata(&kernels[0]).unwrap().len()).unwrap();
    let replace = |content: Vec<u8>| {
        fs::remove_file(&kernels[0]).unwrap();
        fs::write(&kernels[0], content).unwrap();
    };
    replace(vec![0; size]);
    let ended = start().wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && said.contains(kernels[0].to_str().unwrap()), "{said}");
    replace(b"\x7fELF".to_vec());
    boot();
    assert_eq!(fs::metadata(&kernels[0]).unwrap().len(), size as u64);
}

/// As nix/machine-spec.nix makes it for a node whose system is the kit.
#[test]
fn what_nix_makes_boots() {
    let store = systemd().store().unwrap();
    let mut nix = Command::new("nix-instantiate");
    nix.env("NIX_REMOTE", "dummy://").args(["--eval", "--strict", "--json"]);
    nix.args(["--argstr", "name", "node", "--argstr", "store"]).arg(store);
    let made = nix.arg(repository().join("tests/nix/kit.nix")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let place = Place::new(&serde_json::from_slice(&made.stdout).unwrap());
    fs::write(place.cwd.path().join("token"), "a credential").unwrap();

    let mut run = place.start();
    let (mut keys, mut screen) = (run.stdin.take().unwrap(), run.stdout.take().unwrap());
    // The root shell says it on ttyS0 when the system is up.
    let said = read_until(&mut screen, "connecting to host...");
    assert!(said.contains("]: Reached target sysinit.target"), "{said}");
    keys.write_all(b"\x01x").unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(0));
    let kept = fs::read_dir(place.cwd.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let kept: BTreeSet<_> = kept.collect();
    assert_eq!(kept, BTreeSet::from(["node.qcow2", "run-machine-vm", "token"].map(Into::into)));
    assert_eq!(fs::read_dir(place.tmp.path()).unwrap().count(), 0);
}
