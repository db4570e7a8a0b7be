//! Shares that guests have as images in their memory.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use firn::error::{End, Error, MachineError, chain};
use firn::worlds::Worlds;
use firn::{ExecOptions, Machine};
use firn_tests::{PATIENCE, micro, noise, only, output, with_machines};

use crate::boot_once::run;
use crate::shares::{CHANGES, tree};

/// A share of `machine`, mounted at `/mnt/TAG`.
fn share(machine: &str, tag: &str, source: &Path, rest: &str) -> String {
    format!(
        "[[nodes.{machine}.shares]]\ntag = '{tag}'\nsource = {source:?}\ntarget = '/mnt/{tag}'\n\
         read_only = true\ncache = 'always'\n{rest}\n"
    )
}

fn image(machine: &str, source: &Path) -> String {
    share(machine, "image", source, "image = true")
}

/// What a share and an image have in common of the files below the working directory: neither has the other's inode
/// numbers, nor its blocks.
const ALL: &str = "{ find . -type d -exec stat -c '%n %f %u %g %h' {} + | sort; \
    find . ! -type d -exec stat -c '%n %f %s %u %g %h %t %T' {} + | sort; \
    find . -type f -exec sha256sum {} + | sort; find . -type l -exec readlink {} ';' | sort; } ";

async fn cached(machine: &Machine) -> u64 {
    let line = output(machine, "grep ^Cached: /proc/meminfo").await;
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn an_image_has_what_a_share_has_and_is_cached_nowhere() {
    let source = tree();
    fs::write(source.path().join("much"), noise(40 << 20)).unwrap();
    let program = source.path().join("busybox");
    fs::write(&program, micro().initrd_file("bin/busybox").unwrap()).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let nodes = image("m", source.path()) + &share("m", "share", source.path(), "");
    with_machines(&nodes, async |driver| {
        let m = &driver.machines()[0];
        let all = output(m, &format!("cd /mnt/share; {ALL} | tee /tmp/all | wc -l")).await;
        assert!(all.parse::<usize>().unwrap() > 600, "{all}");
        output(m, "cp /mnt/share/much /tmp/much; echo 3 >/proc/sys/vm/drop_caches").await;
        let before = cached(m).await;
        for cold in ["", "echo 3 >/proc/sys/vm/drop_caches; "] {
            output(m, &format!("cd /mnt/image; {cold}{ALL} | diff /tmp/all -")).await;
        }
        output(m, "cmp /tmp/much /mnt/image/much").await;
        let more = cached(m).await.saturating_sub(before);
        assert!(more < 4 << 10, "{more} KiB more in the guest's cache");
        output(m, "cd /mnt/image; test large -ef a/b/linked && cmp file a/b/../../file").await;
        assert_eq!(output(m, "/mnt/image/busybox echo it runs").await, "it runs");

        // To a kernel without DAX it is a disk.
        output(m, "umount /mnt/image; mount -t erofs -o ro /dev/pmem0 /mnt/image").await;
        output(m, &format!("cd /mnt/image; {ALL} | diff /tmp/all -")).await;
        assert!(cached(m).await > before + (30 << 10), "it is cached");
        output(m, "umount /mnt/image; mount -t erofs -o ro,dax=always /dev/pmem0 /mnt/image").await;

        output(m, "mount -o remount,rw /mnt/image; grep -q '/mnt/image erofs ro' /proc/mounts")
            .await;
        for change in CHANGES {
            let (status, said) = m
                .execute(&format!("cd /mnt/image; ({change}) 2>&1"), ExecOptions::default())
                .await
                .unwrap();
            assert!(status != 0 && said.contains("Read-only file system"), "{change}: {said}");
        }
    });
}

/// How much memory this process has mapped, and how much of it is nobody else's and no file's, in KiB.
fn memory() -> (u64, u64) {
    let all = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let of = |name: &str| -> u64 {
        let line = all.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (of("Rss:"), of("Anonymous:"))
}

fn sha256(path: &Path) -> String {
    let sum = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(sum.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

#[test]
fn all_machines_have_one_copy() {
    const KIB: u64 = 64 << 10;
    let source = tempfile::tempdir().unwrap();
    let file = source.path().join("file");
    fs::write(&file, noise(64 << 20)).unwrap();
    let sum = sha256(&file);
    let nodes = image("a", source.path()) + &image("b", source.path());
    with_machines(&nodes, async |driver| {
        driver.start_all().await.unwrap();
        for machine in driver.machines() {
            output(machine, "sha256sum /bin/busybox").await;
        }
        let (all, own) = memory();
        for machine in driver.machines() {
            assert!(output(machine, "sha256sum /mnt/image/file").await.starts_with(&sum));
        }
        let (all, own) = (memory().0.saturating_sub(all), memory().1.saturating_sub(own));
        assert!(own < KIB / 4, "{own} KiB more for what both guests have read");
        assert!(all > KIB / 2 && all < KIB * 3 / 2, "{all} KiB more are mapped");
    });
}

#[test]
fn what_a_guest_writes_to_an_image_is_lost() {
    let source = tree();
    let nodes = image("a", source.path()) + &image("b", source.path());
    with_machines(&nodes, async |driver| {
        driver.start_all().await.unwrap();
        let [a, b] = driver.machines() else { panic!("two machines") };
        let sum = "echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/pmem0";
        let before = output(a, sum).await;
        assert_eq!(output(b, sum).await, before);
        let write = "umount /mnt/image; head -c 20000 /dev/urandom | dd of=/dev/pmem0 conv=fsync";
        output(a, write).await;
        assert_eq!(output(a, sum).await, before);
        assert_eq!(output(b, sum).await, before);
        assert_eq!(output(b, "cat /mnt/image/file").await, "of the host");
        output(a, "mount -t erofs -o ro,dax=always /dev/pmem0 /mnt/image").await;
        assert_eq!(output(a, "cat /mnt/image/file").await, "of the host");
    });
}

#[test]
fn a_file_that_is_cut_short_ends_the_machine_that_reads_it_and_no_other() {
    let source = tempfile::tempdir().unwrap();
    let path = |name: &str| source.path().join(name);
    let (file, removed) = (path("file"), path("removed"));
    for file in [&file, &removed] {
        fs::write(file, noise(1 << 20)).unwrap();
    }
    let sum = sha256(&removed);
    let nodes = image("a", source.path()) + &image("b", source.path());
    with_machines(&nodes, async |driver| {
        driver.start_all().await.unwrap();
        let [a, b] = driver.machines() else { panic!("two machines") };
        fs::File::options().write(true).open(&file).unwrap().set_len(4096).unwrap();
        let read = a.execute("cat /mnt/image/file >/dev/null", ExecOptions::default()).await;
        let Err(Error::Machine(MachineError::Ended { end, .. })) = &read else {
            panic!("{read:?}")
        };
        let End::VcpuDied { vcpu: 0, reason } = &**end else { panic!("{end}") };
        assert!(reason.contains(&format!("{} has changed", file.display())), "{reason}");
        assert!(chain(&read.unwrap_err()).contains("image = true"));
        fs::remove_file(&removed).unwrap();
        assert!(output(b, "sha256sum /mnt/image/removed").await.starts_with(&sum));
        let rest = output(b, "dd if=/mnt/image/file bs=4096 count=1 2>/dev/null | wc -c").await;
        assert_eq!(rest, "4096");
    });
}

/// How often this process has a file mapped.
fn mappings(file: &Path) -> usize {
    let maps = fs::read("/proc/self/maps").unwrap();
    let maps = String::from_utf8_lossy(&maps);
    maps.lines().filter(|line| line.ends_with(&format!(" {}", file.display()))).count()
}

#[test]
fn machines_go_back_and_fork_with_their_images() {
    let source = tree();
    let program = source.path().join("busybox");
    fs::write(&program, micro().initrd_file("bin/busybox").unwrap()).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let large = source.path().join("large");
    let sum = sha256(&large);
    let read = "echo 3 >/proc/sys/vm/drop_caches; sha256sum /mnt/image/large";
    with_machines(&image("m", source.path()), async |driver| {
        let m = only(driver);
        // It has pages of the image mapped, and is in the middle of one.
        let begin = "(/mnt/image/busybox sh -c 'while [ ! -e /tmp/end ]; do sleep 0.1; done; echo ended >/tmp/ended') \
                     >/dev/null 2>&1 &";
        output(m, begin).await;
        let first = driver.checkpoint("first").await.unwrap();
        for _ in 0..2 {
            assert!(output(m, read).await.starts_with(&sum));
            output(m, "touch /tmp/end; until [ -s /tmp/ended ]; do sleep 0.1; done").await;
            driver.roll_back(&first).await.unwrap();
        }
        let fork = driver.fork(&first, "fork").await.unwrap();
        for machine in [m, fork.machine("m").unwrap()] {
            output(
                machine,
                "! [ -e /tmp/ended ]; touch /tmp/end; until [ -s /tmp/ended ]; do sleep 0.1; done",
            )
            .await;
            assert!(output(machine, read).await.starts_with(&sum));
        }
        assert_eq!(mappings(&large), 1);
        fork.close().await;
        first.forget();
    });
    assert_eq!(mappings(&large), 0);
}

#[test]
fn a_kept_world_goes_on_only_with_the_image_that_it_had() {
    let source = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let worlds = Worlds::at(dir.path().join("worlds"), 4096);
    let deep = source.path().join("deep");
    fs::create_dir(&deep).unwrap();
    fs::write(deep.join("small"), "old").unwrap();
    fs::write(deep.join("large"), noise(2 << 20)).unwrap();
    let sum = sha256(&deep.join("large"));
    let nodes = image("m", source.path());
    let read = "cat /mnt/image/deep/small; sha256sum /mnt/image/deep/large";
    let look = |small: &str| {
        run(&worlds, &nodes, async |driver| {
            let said = output(only(driver), read).await;
            assert!(said.starts_with(&format!("{small}{sum}")), "{said}");
        })
    };
    assert!(look("old").contains("kept the booted world in"));
    let said = look("old");
    assert!(said.contains("started from the world kept in"), "{said}");
    // The directory that is shared has not changed.
    fs::write(deep.join("small"), "new").unwrap();
    let said = look("new");
    assert!(said.contains("boots afresh: cannot start from the world kept in"), "{said}");
    assert!(said.contains("holds something else than when this was saved"), "{said}");
    assert!(look("new").contains("started from the world kept in"));
}

/// With udev the image is found by its label; and devices do not reach what a program has mapped of it: it gets an error
/// if it has them read there, and may go on.
#[test]
fn what_is_mapped_of_an_image_is_not_for_devices() {
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("data"), noise(1 << 20)).unwrap();
    let nodes = "[nodes.m]\nkit = 'systemd'\ndisks = [{ size = 16 }]\n".to_owned();
    let nodes = nodes + &image("m", source.path());
    let script = "import mmap, os, sys\n\
        data = mmap.mmap(os.open('/mnt/image/data', os.O_RDONLY), 0, prot=mmap.PROT_READ)\n\
        fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | int(sys.argv[2]))\n\
        try:\n\
        \x20   print(os.write(fd, data))\n\
        except OSError as error:\n\
        \x20   print(os.strerror(error.errno))\n";
    with_machines(&nodes, async |driver| {
        let m = only(driver);
        // The image is mounted before udev has looked at it, and a command may come in between, too.
        m.wait_for_file("/dev/disk/by-label/image", PATIENCE).await.unwrap();
        output(m, "test /dev/disk/by-label/image -ef /dev/pmem0").await;
        output(m, &format!("cat >/tmp/script <<'END'\n{script}END")).await;
        let direct = nix::libc::O_DIRECT;
        for (path, flags, expected) in [
            ("/tmp/file", 0, "1048576"),
            ("/dev/vda", 0, "1048576"),
            ("/dev/vda", direct, "Input/output error"),
            // Guests write to such shares without a cache.
            ("/tmp/shared/file", 0, "Bad address"),
        ] {
            let said = output(m, &format!("python3 /tmp/script {path} {flags}")).await;
            assert_eq!(said, expected, "{path} {flags}");
        }
        for file in ["/tmp/file", "/dev/vda"] {
            output(m, &format!("sync; head -c 1M {file} | cmp - /mnt/image/data")).await;
        }
        output(m, "cp /mnt/image/data /tmp/shared/file; cmp /tmp/shared/file /mnt/image/data")
            .await;
    });
}
