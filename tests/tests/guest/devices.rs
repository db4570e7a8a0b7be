//! A machine with many devices, each of which is used.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use firn::ssh::{self, SshError};
use firn::{ExecOptions, Machine};
use firn_tests::{PATIENCE, firn, noise, output, with_machines};

/// The machine's disks, by the letters of their names.
const DISKS: &str = "a b c d e f g h i j k l m n o p";
/// Where its shares are, besides the store.
const SHARES: &str = "/mnt/s0 /mnt/s1 /mnt/s2 /mnt/s3 /mnt/s4 /tmp/xchg /tmp/shared";

/// 16 disks, 8 shares, 8 network cards, console, rng, balloon and vsock: 36 devices on 17 interrupt
/// lines, in a guest like NixOS; and once more in the kernel that this one starts.
#[test]
fn thirty_six_devices_on_one_machine() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let images: Vec<_> = (0..16).map(|n| dir.path().join(format!("disk{n}"))).collect();
    let mut nodes = format!(
        "[nodes.other]\nvlans = [1, 2, 3, 4, 5, 6, 7, 8]\n[nodes.m]\nkit = 'systemd'\n\
         vlans = [1, 2, 3, 4, 5, 6, 7, 8]\nuser_network = false\nballoon = true\n\
         vsock = {{ cid = 3, socket = {socket:?} }}\n",
    );
    for (n, image) in images.iter().enumerate() {
        nodes += &format!("[[nodes.m.disks]]\nimage = {image:?}\nsize = 8\nserial = 'disk-{n}'\n");
    }
    // Three more shares are the store and each machine's own.
    let shares: Vec<_> = (0..5).map(|n| dir.path().join(format!("share{n}"))).collect();
    for (n, source) in shares.iter().enumerate() {
        fs::create_dir(source).unwrap();
        fs::write(source.join("number"), n.to_string()).unwrap();
        nodes += &format!(
            "[[nodes.m.shares]]\ntag = 's{n}'\nsource = {source:?}\ntarget = '/mnt/s{n}'\n"
        );
    }
    with_machines(&nodes, async |driver| {
        let [m, other] = driver.machines() else { panic!("two machines") };
        m.start(false).await.unwrap();
        other.start(false).await.unwrap();
        all_have_drivers(m).await;
        let data = disks_and_shares(m).await;
        for source in &shares {
            assert!(fs::read(source.join("data")).unwrap() == data, "{source:?}");
        }
        for image in &images {
            assert!(fs::read(image).unwrap().starts_with(&data), "{image:?}");
        }
        other.connect().await.unwrap();
        cards(m).await;
        enter_by_ssh(m, &socket).await;
        // Nobody listens there, which the guest's driver has to say.
        let refused = ssh::connect(&socket, 5000).unwrap_err();
        assert!(matches!(refused, SshError::Refused { port: 5000, .. }), "{refused}");
        no_interrupt_was_lost(m).await;

        start_another_kernel(m).await;
        all_have_drivers(m).await;
        let disks = format!("for disk in {DISKS}; do head -c 400000 /dev/vd$disk | md5sum; done");
        let sums = output(m, &format!("({disks}) | sort -u | wc -l")).await;
        assert_eq!(sums, "1", "all disks are as they were");
        enter_by_ssh(m, &socket).await;
        no_interrupt_was_lost(m).await;
    });
}

async fn all_have_drivers(m: &Machine) {
    assert_eq!(output(m, "ls /sys/bus/virtio/devices | wc -l").await, "36");
    assert_eq!(output(m, "ls -d /sys/bus/virtio/devices/*/driver | wc -l").await, "36");
    assert_eq!(
        output(m, "ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio* | wc -l").await,
        "1"
    );
    let read = format!("for d in {DISKS}; do cat /sys/block/vd$d/serial; echo; done");
    let serials = output(m, &read).await;
    let expected: Vec<_> = (0..16).map(|n| format!("disk-{n}")).collect();
    assert_eq!(serials.split_whitespace().collect::<Vec<_>>(), expected);
}

/// Writes to all of them at once, and reads it back; the data, which comes from the entropy device
/// meanwhile.
async fn disks_and_shares(m: &Machine) -> Vec<u8> {
    let command = format!(
        "head -c 400000 /dev/hwrng >/tmp/data; \
         for d in {DISKS}; do dd if=/tmp/data of=/dev/vd$d bs=64k conv=fsync 2>/dev/null & done; \
         for s in {SHARES}; do cp /tmp/data $s/data & done; \
         wait; sync; echo 3 >/proc/sys/vm/drop_caches; \
         for d in {DISKS}; do head -c 400000 /dev/vd$d | cmp - /tmp/data && echo same; done; \
         for s in {SHARES}; do cmp $s/data /tmp/data && echo same; done; cat /mnt/s?/number"
    );
    let found = output(m, &command).await;
    assert_eq!(found.lines().filter(|line| *line == "same").count(), 23, "{found}");
    assert!(found.ends_with("01234"), "{found}");
    fs::read(m.shared_dir().join("data")).unwrap()
}

async fn cards(m: &Machine) {
    for vlan in 1..=8 {
        output(m, &format!("ping -c 1 -W 5 -I eth{vlan} 192.168.{vlan}.2")).await;
    }
}

/// A command with much input and output, as root; and the command line that is told to people.
async fn enter_by_ssh(m: &Machine, socket: &Path) {
    m.wait_for_unit("sshd-vsock.socket", None, PATIENCE).await.unwrap();
    let mut ssh = Command::new(firn());
    ssh.arg("ssh").arg(socket).args(["--", "id -un; cat; exit 7"]);
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut ssh = ssh.spawn().unwrap();
    let (data, mut input) = (noise(1 << 20), ssh.stdin.take().unwrap());
    let sent = data.clone();
    let writer = thread::spawn(move || input.write_all(&sent));
    let done = ssh.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!((done.status.code(), said.as_str()), (Some(7), ""));
    assert!(done.stdout.strip_prefix(b"root\n").unwrap() == data);
    writer.join().unwrap().unwrap();
    let line = m.ssh_backdoor_command().unwrap();
    assert!(line.ends_with(socket.to_str().unwrap()), "{line}");
}

/// No line was lost, and none shut off because nobody had wanted it. All are edge-triggered, which costs fewer exits.
async fn no_interrupt_was_lost(m: &Machine) {
    assert_eq!(output(m, "grep -c -- '-edge .*virtio' /proc/interrupts").await, "17");
    let said = output(m, "dmesg | grep -ciE 'nobody cared|timed out|hung' || true").await;
    assert_eq!(said, "0");
}

/// The guest's kernel starts the same one again, without a reset of the machine. That one knows
/// nothing of the driver's files for the initrd: the shares and the cards are not set up.
async fn start_another_kernel(m: &Machine) {
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let before = output(m, boot_id).await;
    let load = "cd /nix/store/toplevel; kexec -l kernel --initrd=initrd --reuse-cmdline";
    output(m, load).await;
    let start = m.execute("kexec -e", ExecOptions::default()).await;
    assert!(start.is_err(), "{start:?}");
    assert_ne!(output(m, boot_id).await, before);
    assert!(m.booted());
}

#[test]
fn too_many_devices_are_refused_before_the_start() {
    let nodes = "[[nodes.m.disks]]\nsize = 1\n".repeat(130);
    with_machines(&nodes, async |driver| {
        let error = driver.machines()[0].start(false).await.unwrap_err();
        let said = firn::error::chain(&error);
        assert!(said.contains("virtio devices; allowed are at most 128"), "{said}");
    });
}
