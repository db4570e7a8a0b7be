//! What a start command gives its machine, as far as its text says so.

use std::fs::File;
use std::io::Read;

/// Longer start scripts are read as far as this.
const MAX_SCRIPT: u64 = 1 << 20;
/// The device, on all buses, by which the host's kernel connects vsocks.
const VSOCK: &str = "vhost-vsock-";
/// Its option with the guest's address.
const CID: &str = "guest-cid=";

/// The address of the vsock that a start command itself gives its machine. nixpkgs of March 2026 and before has one in
/// its start scripts where there is a backdoor for ssh; Linux heeds no second one in the same machine.
pub(super) fn vsock_of(command: &str) -> Option<u32> {
    let program = command.trim_matches('\'');
    let mut script = Vec::new();
    // What is no file is a command.
    let read = File::open(program).and_then(|file| file.take(MAX_SCRIPT).read_to_end(&mut script));
    match read {
        Ok(_) => cid_in(&String::from_utf8_lossy(&script)),
        Err(_) => cid_in(command),
    }
}

fn cid_in(text: &str) -> Option<u32> {
    let given = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut words = given.flat_map(str::split_whitespace);
    let device = words.find(|word| word.contains(VSOCK))?;
    let cid = device.split_once(CID)?.1;
    let end = cid.find(|c: char| !c.is_ascii_digit()).unwrap_or(cid.len());
    cid[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vsock_of_its_own() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("it is a script");
        let quoted = format!("'{}'", path.display());
        for (script, cid) in [
            (
                "exec qemu \\\n    -device vhost-vsock-pci,guest-cid=5 \\\n    $QEMU_OPTS \"$@\"\n",
                Some(5),
            ),
            (
                "exec qemu -device 'vhost-vsock-pci,id=a,guest-cid=4294967294,b=1'\n",
                Some(u32::MAX - 1),
            ),
            ("# -device vhost-vsock-pci,guest-cid=5\nexec qemu -device virtio-rng-pci\n", None),
            ("exec qemu -device vhost-vsock-pci,guest-cid=$CID\n", None),
            ("exec qemu -device vhost-user-vsock-pci,chardev=vsock_ssh\n", None),
        ] {
            std::fs::write(&path, script).expect("written");
            assert_eq!(vsock_of(&quoted), cid, "{script}");
        }
        assert_eq!(vsock_of("qemu -device vhost-vsock-pci,guest-cid=7 -S"), Some(7));
        assert_eq!(vsock_of("qemu -S"), None);
    }
}
