//! A machine with many devices, each of which is used.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use firn::Machine;
use firn_tests::with_machines;

async fn output(machine: &Machine, command: &str) -> String {
    machine.succeed(&[command], None).await.unwrap().trim().to_owned()
}

/// 16 disks, 8 shares, 8 network cards, console, rng, balloon and vsock: 36 devices on 18 interrupt
/// lines.
#[test]
fn thirty_six_devices_on_one_machine() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let mut nodes = format!(
        "[nodes.other]\nvlans = [1, 2, 3, 4, 5, 6, 7, 8]\n[nodes.m]\n\
         vlans = [1, 2, 3, 4, 5, 6, 7, 8]\nuser_network = false\nballoon = true\nempty_disks = {:?}\n\
         vsock = {{ cid = 3, socket = {socket:?} }}\n",
        [8; 16],
    );
    // Two more shares are each machine's own.
    for n in 0..6 {
        let source = dir.path().join(format!("share{n}"));
        fs::create_dir(&source).unwrap();
        fs::write(source.join("number"), n.to_string()).unwrap();
        nodes += &format!(
            "[nodes.m.shared_directories.s{n}]\nsource = {source:?}\ntarget = '/mnt/s{n}'\n"
        );
    }
    with_machines(&nodes, async |driver| {
        let [m, other] = driver.machines() else { panic!("two machines") };
        other.start(false).await.unwrap();
        let count = output(m, "ls /sys/bus/virtio/devices | wc -l").await;
        assert_eq!(count, "36");
        assert_eq!(output(m, "ls -d /sys/bus/virtio/devices/*/driver | wc -l").await, "36");

        // All disks at once, and the shares and the entropy device meanwhile.
        let command = "head -c 400000 /dev/hwrng >/tmp/data; \
            for disk in a b c d e f g h i j k l m n o p; do \
            dd if=/tmp/data of=/dev/vd$disk bs=64k conv=fsync 2>/dev/null & done; \
            for n in 0 1 2 3 4 5; do \
            cp /tmp/data /mnt/s$n/data & done; cp /tmp/data /tmp/xchg/data; cp /tmp/data /tmp/shared/data; \
            wait; sync; echo 3 >/proc/sys/vm/drop_caches; \
            for disk in a b c d e f g h i j k l m n o p; do \
            head -c 400000 /dev/vd$disk | cmp - /tmp/data && echo same; done; \
            for dir in /mnt/s0 /mnt/s1 /mnt/s2 /mnt/s3 /mnt/s4 /mnt/s5 /tmp/xchg /tmp/shared; do \
            cmp $dir/data /tmp/data && echo same; done; cat /mnt/s?/number";
        let found = output(m, command).await;
        assert_eq!(found.lines().filter(|line| *line == "same").count(), 24, "{found}");
        assert!(found.ends_with("012345"), "{found}");

        other.connect().await.unwrap();
        for vlan in 1..=8 {
            output(m, &format!("ping -c 1 -W 5 192.168.{vlan}.2")).await;
        }
        // Nobody listens there, which the guest's driver has to say.
        let mut stream = UnixStream::connect(&socket).unwrap();
        writeln!(stream, "CONNECT 5000").unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        assert_eq!(answer, "");
        // No line was lost, and none shut off because nobody had wanted it.
        let said = output(m, "dmesg | grep -ciE 'nobody cared|timed out|hung' || true").await;
        assert_eq!(said, "0");
    });
}

#[test]
fn too_many_devices_are_refused_before_the_start() {
    let nodes = format!("[nodes.m]\nempty_disks = {:?}", vec![1; 130]);
    with_machines(&nodes, async |driver| {
        let error = driver.machines()[0].start(false).await.unwrap_err();
        let said = firn::error::chain(&error);
        assert!(said.contains("virtio devices; allowed are at most 128"), "{said}");
    });
}
