//! Disks: order, formats, what survives, what goes back to the host.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use firn_tests::{SmallFileSystem, noise, only, output, with_machines};

const MIB: u64 = 1 << 20;

/// What the host's file has at `offset`.
fn host_bytes(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// How much of the host's disk a file takes.
fn taken(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn disks_come_in_order_with_their_sizes_and_serial_numbers() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("store"), vec![7; 3 << 20]).unwrap();
    let nodes = format!(
        "[nodes.m]\ncores = 2\ndisks = [\n\
         {{ image = '{0}/root.qcow2', serial = 'root', size = 64 }},\n\
         {{ image = '{0}/store', read_only = true, serial = 'twenty-bytes-serial!' }},\n\
         {{ size = 5 }}, {{ size = 6 }},\n]",
        dir.path().display()
    );
    with_machines(&nodes, async |driver| {
        let command = "cd /sys/block; for disk in vd*; do \
            echo $disk $(cat $disk/size $disk/ro) $(ls $disk/mq | wc -l) $(cat $disk/serial); done";
        let found = output(only(driver), command).await;
        let expected = [
            "vda 131072 0 2 root".to_owned(),
            "vdb 6144 1 2 twenty-bytes-serial!".to_owned(),
            "vdc 10240 0 2".to_owned(),
            "vdd 12288 0 2".to_owned(),
        ];
        assert_eq!(found.lines().collect::<Vec<_>>(), expected);
        assert!(fs::metadata(dir.path().join("root.qcow2")).unwrap().len() < MIB);
    });
}

#[test]
fn a_file_system_outlives_a_power_cut_after_sync() {
    with_machines("[nodes.m]\ndisks = [{ size = 64 }]", async |driver| {
        let machine = only(driver);
        let command = "mke2fs /dev/vda >/dev/null && mkdir /mnt/d && \
            mount -t ext4 /dev/vda /mnt/d && head -c 9000000 /dev/urandom >/mnt/d/file && sync && \
            md5sum </mnt/d/file";
        let before = output(machine, command).await;
        machine.crash().await;
        let command = "mkdir /mnt/d && mount -t ext4 /dev/vda /mnt/d && md5sum </mnt/d/file";
        assert_eq!(output(machine, command).await, before);
    });
}

#[test]
fn what_was_flushed_is_in_the_hosts_file_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, qcow2) = (dir.path().join("raw"), dir.path().join("disk.qcow2"));
    let nodes = format!(
        "[nodes.m]\ndisks = [{{ image = {raw:?}, size = 32 }}, \
         {{ image = {qcow2:?}, size = 32 }}]"
    );
    let data = noise(5 << 20);
    with_machines(&nodes, async |driver| {
        let machine = only(driver);
        fs::write(machine.shared_dir().join("data"), &data).unwrap();
        for disk in ["vda", "vdb"] {
            let command = format!("dd if=/tmp/shared/data of=/dev/{disk} bs=1M seek=3 conv=fsync");
            output(machine, &command).await;
            // In the middle of the next writes comes the end.
            let command = format!("dd if=/dev/zero of=/dev/{disk} bs=1M seek=10 >/dev/null 2>&1 &");
            output(machine, &command).await;
        }
        machine.crash().await;
        assert_eq!(host_bytes(&raw, 3 * MIB, data.len()), data);
        let command = "for disk in vda vdb; do dd if=/dev/$disk bs=1M skip=3 count=5 2>/dev/null | \
            cmp - /tmp/shared/data && echo same; done";
        assert_eq!(output(machine, command).await, "same\nsame");
    });
}

#[test]
fn a_read_only_disk_can_be_mounted_but_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let node = |more: &str| format!("[nodes.m]\ndisks = [{{ image = {image:?}, {more} }}]");
    with_machines(&node("size = 16"), async |driver| {
        let command = "mke2fs /dev/vda >/dev/null && mkdir /mnt/d && \
            mount -t ext4 /dev/vda /mnt/d && echo hello >/mnt/d/file && umount /mnt/d";
        output(only(driver), command).await;
    });
    let before = fs::read(&image).unwrap();
    with_machines(&node("read_only = true"), async |driver| {
        let machine = only(driver);
        machine.fail(&["dd if=/dev/zero of=/dev/vda count=1"], None).await.unwrap();
        let command = "mkdir /mnt/d && mount -t ext4 -o ro /dev/vda /mnt/d && cat /mnt/d/file";
        assert_eq!(output(machine, command).await, "hello");
    });
    assert!(before == fs::read(&image).unwrap(), "the image has changed");
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    with_machines("[nodes.m]\ndisks = [{ size = 64 }]", async |driver| {
        let machine = only(driver);
        let image = machine.state_dir().join("disk0.img");
        let command = "mke2fs /dev/vda >/dev/null && mkdir /mnt/d && \
            mount -t ext4 /dev/vda /mnt/d && head -c 40000000 /dev/urandom >/mnt/d/file && sync";
        output(machine, command).await;
        let full = taken(&image);
        assert!(full >= 40_000_000, "{full}");
        output(machine, "rm /mnt/d/file && sync && fstrim /mnt/d").await;
        let trimmed = taken(&image);
        assert!(trimmed < full - 35_000_000, "{full}, then {trimmed}");
    });
}

#[test]
fn ext4_is_made_with_its_label() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("root.qcow2");
    let nodes = format!("[nodes.m]\ndisks = [{{ image = {image:?}, size = 64, label = 'nixos' }}]");
    with_machines(&nodes, async |driver| {
        let machine = only(driver);
        // The label is at 120 in the superblock (struct ext4_super_block), which is at 1024.
        let command = "dd if=/dev/vda bs=1 skip=1144 count=5 2>/dev/null; mkdir /mnt/d && \
            mount -t ext4 /dev/vda /mnt/d && echo hello >/mnt/d/file && umount /mnt/d";
        assert_eq!(output(machine, command).await, "nixos");
        machine.crash().await;
        let command = "mkdir /mnt/d && mount -t ext4 -o ro /dev/vda /mnt/d && cat /mnt/d/file";
        assert_eq!(output(machine, command).await, "hello");
    });
}

#[test]
fn several_disks_and_processes_at_once() {
    let nodes = "[nodes.m]\ncores = 4\nvlans = []\n".to_owned()
        + &"[[nodes.m.disks]]\nsize = 24\n".repeat(8);
    with_machines(&nodes, async |driver| {
        let command = "head -c 16000000 /dev/urandom >/tmp/data; \
            for disk in a b c d e f g h; do for at in 0 1; do (\
            dd if=/tmp/data of=/dev/vd$disk bs=64k seek=$at count=120 conv=fsync; \
            dd if=/tmp/data of=/dev/vd$disk bs=64k) 2>/dev/null & done; done; wait; \
            sync; echo 3 >/proc/sys/vm/drop_caches; \
            for disk in a b c d e f g h; do \
            head -c 16000000 /dev/vd$disk | cmp - /tmp/data && echo same; done";
        let found = output(only(driver), command).await;
        assert_eq!(found.lines().filter(|line| *line == "same").count(), 8, "{found}");
    });
}

#[test]
fn one_image_cannot_be_written_by_two_machines() {
    let dir = tempfile::tempdir().unwrap();
    let disk = format!("disks = [{{ image = '{}/disk', size = 8 }}]", dir.path().display());
    with_machines(&format!("[nodes.a]\n{disk}\n[nodes.b]\n{disk}"), async |driver| {
        let [a, b] = driver.machines() else { panic!("two machines") };
        a.start(false).await.unwrap();
        let error = b.start(false).await.unwrap_err();
        let mut said = String::new();
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = cause {
            said = format!("{said}: {error}");
            cause = error.source();
        }
        assert!(said.contains("locked by another process or another disk"), "{said}");
        assert!(said.contains(dir.path().to_str().unwrap()), "{said}");
        a.crash().await;
        b.start(false).await.unwrap();
    });
}

/// A qcow2 image of version 2 without data that names a backing file.
fn qcow2_over(backing: &str, mib: u64) -> Vec<u8> {
    const CLUSTER: u64 = 64 << 10;
    let mut image = vec![0; 4 << 16];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x02");
    put(8, &100_u64.to_be_bytes());
    put(16, &u32::try_from(backing.len()).unwrap().to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(mib * MIB).to_be_bytes());
    // One entry of the first level, which covers 512 MiB.
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(100, backing.as_bytes());
    put(1 << 16, &(2 * CLUSTER).to_be_bytes());
    put(2 << 16, &[0, 1, 0, 1, 0, 1, 0, 1]);
    image
}

#[test]
fn a_backing_file_is_used_where_the_description_allows_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut base = noise(2 << 20);
    base[..5].copy_from_slice(b"base\n");
    fs::write(at("base.img"), base).unwrap();
    fs::write(at("top.qcow2"), qcow2_over("base.img", 2)).unwrap();
    let node = |name: &str, more: &str| {
        format!("[nodes.{name}]\ndisks = [{{ image = {:?}{more} }}]\n", at("top.qcow2"))
    };
    let nodes = node("allowed", &format!(", backing = [{:?}]", dir.path())) + &node("shut", "");
    with_machines(&nodes, async |driver| {
        let [allowed, shut] = driver.machines() else { panic!("two machines") };
        let error = firn::error::chain(&shut.start(false).await.unwrap_err());
        assert!(error.contains("base.img") && error.contains("the disk's `backing`"), "{error}");
        assert_eq!(output(allowed, "head -n 1 /dev/vda").await, "base");
    });
}

#[test]
fn a_full_host_is_an_input_output_error_for_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let Some(_small) = SmallFileSystem::mount(dir.path(), 8) else { return };
    let nodes =
        format!("[nodes.m]\ndisks = [{{ image = '{}/disk', size = 32 }}]", dir.path().display());
    let data = noise(3 << 20);
    with_machines(&nodes, async |driver| {
        let machine = only(driver);
        fs::write(machine.shared_dir().join("data"), &data).unwrap();
        output(machine, "dd if=/tmp/shared/data of=/dev/vda bs=1M conv=fsync").await;
        let command = "dd if=/dev/urandom of=/dev/vda bs=1M seek=4 count=26 conv=fsync 2>&1";
        let said = machine.fail(&[command], None).await.unwrap();
        assert!(said.contains("I/O error") || said.contains("Input/output error"), "{said}");
        // What has its place can still be written, and what was acknowledged is there.
        output(machine, "dd if=/tmp/shared/data of=/dev/vda bs=1M count=2 conv=fsync").await;
        machine.crash().await;
        assert_eq!(host_bytes(&dir.path().join("disk"), 0, data.len()), data);
    });
}
