//! Images for which there is no room, and guests that cannot use them.

use std::env;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use firn::error::chain;
use firn::log::Logger;
use firn::worlds::Worlds;
use firn::{Driver, Machine};
use firn_tests::{config, micro, only, output, with_log, with_machines};

use crate::boot_once::{Said, run};
use crate::shares::tree;

/// Set for the process in which a test really runs.
const INNER: &str = "FIRN_TEST_FEW_ADDRESSES";
/// The addresses that such a process may have, in bytes, and a file that does not fit there.
const ADDRESSES: u64 = 64 << 30;
const TOO_LARGE: u64 = 1 << 40;

/// Whether this process has few addresses. If not, the test `name` of this program is run in one that has, where none
/// but it has images.
fn has_few_addresses(name: &str) -> bool {
    if env::var_os(INNER).is_some() {
        return true;
    }
    let run = Command::new("prlimit")
        .arg(format!("--as={ADDRESSES}"))
        .arg(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INNER, "1")
        .output()
        .expect("prlimit can be run");
    let said = String::from_utf8_lossy(&run.stdout);
    eprintln!("{said}{}", String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success() && said.contains("1 passed"), "{}", run.status);
    false
}

fn image(tag: &str, source: &Path) -> String {
    format!(
        "[[nodes.m.shares]]\ntag = '{tag}'\nsource = {source:?}\nread_only = true\ncache = 'always'\nimage = true\n"
    )
}

fn mounted(tag: &str, source: &Path) -> String {
    image(tag, source) + &format!("target = '/mnt/{tag}'\n")
}

/// What a run logs.
fn log_of(nodes: &str, script: impl AsyncFnOnce(&Driver)) -> String {
    let said = Said::default();
    with_log(&config(nodes), Logger::new(Box::new(said.clone()), false), script);
    said.text()
}

/// How a share is mounted.
async fn kind(machine: &Machine, tag: &str) -> String {
    output(
        machine,
        &format!("grep ' /mnt/{tag} ' /proc/mounts | cut -d ' ' -f 3,4 | cut -d , -f 1"),
    )
    .await
}

#[test]
fn an_image_that_has_no_room_comes_by_virtiofs() {
    if !has_few_addresses("image_trouble::an_image_that_has_no_room_comes_by_virtiofs") {
        return;
    }
    let (small, large) = (tree(), tree());
    let cache = tempfile::tempdir().unwrap();
    let sparse = large.path().join("sparse");
    File::create(&sparse).unwrap().set_len(TOO_LARGE).unwrap();
    let read = format!(
        "cat /mnt/large/file; stat -c ' %s' /mnt/large/sparse; cmp /mnt/small/a/b/linked /mnt/large/large; \
         dd if=/mnt/large/sparse bs=4096 skip={} count=1 2>/dev/null | wc -c",
        TOO_LARGE / 4096 - 1
    );
    let expected = format!("of the host {TOO_LARGE}\n4096");
    let nodes = mounted("large", large.path()) + &mounted("small", small.path());
    let log = log_of(&nodes, async |driver| {
        let m = only(driver);
        for _ in 0..2 {
            assert_eq!(kind(m, "small").await, "erofs ro");
            assert_eq!(kind(m, "large").await, "virtiofs ro");
            assert_eq!(output(m, &read).await, expected);
            m.shutdown().await.unwrap();
            m.start(false).await.unwrap();
        }
        // By now there is room.
        m.connect().await.unwrap();
        let then = driver.checkpoint("then").await.unwrap();
        File::options().write(true).open(&sparse).unwrap().set_len(0).unwrap();
        driver.roll_back(&then).await.unwrap();
        let fork = driver.fork(&then, "fork").await.unwrap();
        for machine in [m, fork.machine("m").unwrap()] {
            assert_eq!(kind(machine, "large").await, "virtiofs ro");
            assert_eq!(output(machine, "cat /mnt/large/file /mnt/small/file").await.len(), 22);
        }
        fork.close().await;
        then.forget();
        m.shutdown().await.unwrap();
        assert_eq!(kind(m, "large").await, "erofs ro");
    });
    let worlds = Worlds::at(cache.path().join("worlds"), 4096);
    File::options().write(true).open(&sparse).unwrap().set_len(TOO_LARGE).unwrap();
    let boot = run(&worlds, &nodes, async |driver| {
        assert_eq!(kind(only(driver), "large").await, "virtiofs ro");
    });
    assert!(
        boot.contains("not kept: m has share large by virtio-fs, and not as an image"),
        "{boot}"
    );
    let why = format!(
        "m: warning: share large comes by virtio-fs, not as an image: cannot make an image of {}: no 1048581 MiB of memory: \
         Cannot allocate memory (os error 12)",
        large.path().display()
    );
    assert_eq!(log.matches(&why).count(), 3, "{log}");
    assert!(!log.contains("share small"), "{log}");
}

#[test]
fn images_have_so_many_mappings_and_what_is_beyond_comes_by_virtiofs() {
    let name = "image_trouble::images_have_so_many_mappings_and_what_is_beyond_comes_by_virtiofs";
    if !has_few_addresses(name) {
        return;
    }
    let source = tempfile::tempdir().unwrap();
    for number in 0..8192 {
        let file = File::create(source.path().join(number.to_string())).unwrap();
        file.set_len(16 << 10).unwrap();
    }
    let tags = ["a", "b", "c", "d", "e"];
    let nodes = tags.map(|tag| mounted(tag, source.path())).concat();
    let log = log_of(&nodes, async |driver| {
        let m = only(driver);
        for (tag, expected) in tags.iter().zip(["erofs", "erofs", "erofs", "erofs", "virtiofs"]) {
            assert_eq!(kind(m, tag).await, format!("{expected} ro"));
            let count = output(m, &format!("ls /mnt/{tag} | wc -l; wc -c </mnt/{tag}/8191")).await;
            assert_eq!(count, "8192\n16384");
        }
    });
    let why = "m: warning: share e comes by virtio-fs, not as an image: cannot make an image with ";
    assert_eq!(log.matches(why).count(), 1, "{log}");
    assert!(log.contains(": images have 32768 mappings of files at most"), "{log}");
}

#[test]
fn who_mounts_an_image_by_oneself_is_told_that_there_is_no_room() {
    let source = tempfile::tempdir().unwrap();
    for name in ["1", "2"] {
        File::create(source.path().join(name)).unwrap().set_len(5 << 40).unwrap();
    }
    let kit = micro();
    let own = format!("[nodes.m]\ninitrd = [{:?}]\n", kit.initrd());
    for nodes in [image("image", source.path()), own + &mounted("image", source.path())] {
        with_machines(&nodes, async |driver| {
            let m = only(driver);
            let error = chain(&m.start(false).await.unwrap_err());
            assert!(
                error.starts_with("m cannot start: share image cannot be an image: "),
                "{error}"
            );
            for why in
                ["it would have more than 8 TiB", "`image = false`", "firn.storeImage = false"]
            {
                assert!(error.contains(why), "{error}");
            }
        });
    }
}

#[test]
fn a_guest_without_the_drivers_boots_without_the_image() {
    let source = tree();
    for (driver, said) in [
        ("virtio_pmem", "there is no image with the label image"),
        ("nd_pmem", "there is no image with the label image"),
        ("erofs", "mounting"),
    ] {
        let cmdline = format!("{} module_blacklist={driver}", micro().manifest.cmdline);
        let nodes =
            format!("[nodes.m]\ncmdline = {cmdline:?}\n") + &mounted("image", source.path());
        let log = log_of(&nodes, async |driver| {
            let m = only(driver);
            assert_eq!(output(m, "ls /mnt/image").await, "");
            output(m, "! grep ' /mnt/image ' /proc/mounts").await;
            output(m, "echo works >/tmp/shared/file").await;
            assert_eq!(fs::read_to_string(m.shared_dir().join("file")).unwrap(), "works\n");
        });
        assert!(log.contains(said), "{driver}: {log}");
    }
}
