//! Files copied between the host and a guest.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use firn::error::{MachineError, chain};
use firn::{Error, Machine};
use firn_tests::{SmallFileSystem, noise, only, output, systemd, with_machines};

async fn send(machine: &Machine, source: &Path, target: &str) {
    machine.copy_from_host(source, Path::new(target)).await.unwrap();
}

async fn fetch(machine: &Machine, source: &str, target_dir: &str) {
    machine.copy_from_machine(Path::new(source), Path::new(target_dir)).await.unwrap();
}

#[test]
fn two_hundred_mebibytes_and_none_both_ways() {
    with_machines("[nodes.m]\nmemory = 1024", async |driver| {
        let m = only(driver);
        let here = tempfile::tempdir().unwrap();
        for size in [0, 1, 200 << 20] {
            let (data, path) = (noise(size), here.path().join("data"));
            fs::write(&path, &data).unwrap();
            send(m, &path, "/tmp/made/by/copy").await;
            // What the guest itself sees, by another way than the agent's.
            output(m, "cp /tmp/made/by/copy /tmp/xchg/seen").await;
            let seen = m.state_dir().join("xchg/seen");
            assert!(fs::read(&seen).unwrap() == data, "{size} bytes sent");
            fs::remove_file(seen).unwrap();
            fetch(m, "/tmp/made/by/copy", "back").await;
            let back = fs::read(m.out_dir().join("back/copy")).unwrap();
            assert!(back == data, "{size} bytes fetched");
        }
    });
}

fn make_file(path: &Path, bytes: &[u8], mode: u32) {
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn make_dir(path: &Path, mode: u32) {
    fs::create_dir(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn trees_with_modes_and_links_both_ways() {
    with_machines("[nodes.m]", async |driver| {
        let m = only(driver);
        let here = tempfile::tempdir().unwrap();
        let tree = here.path().join("tree");
        make_dir(&tree, 0o755);
        make_dir(&tree.join("private"), 0o700);
        make_dir(&tree.join("private/empty"), 0o1777);
        make_file(&tree.join("private/secret"), b"s", 0o600);
        make_file(&tree.join("program"), b"#!/bin/sh\necho it runs\n", 0o4755);
        make_file(&tree.join("a \"name\"\nof two lines, \u{e9}"), b"n", 0o644);
        symlink("private/secret", tree.join("link")).unwrap();
        send(m, &tree, "/tmp/new/tree").await;
        // What the link points to was sent; links of the guest come back as they are.
        let relink = "cd /tmp/new/tree; test ! -L link; cmp link private/secret; \
            ln -sf private/secret link; ln -s '/nowhere/at all' dangling";
        output(m, relink).await;
        symlink("/nowhere/at all", tree.join("dangling")).unwrap();
        let seen = "cd /tmp/new/tree; \
            stat -c '%a %u' . private private/empty private/secret program a*; \
            readlink link; readlink dangling; cat link; echo; ./program; find . -mindepth 1 | wc -l";
        let expected = "755 0\n700 0\n1777 0\n600 0\n4755 0\n644 0\n\
            private/secret\n/nowhere/at all\ns\nit runs\n8";
        assert_eq!(output(m, seen).await, expected);

        fetch(m, "/tmp/new/tree", "").await;
        let back = m.out_dir().join("tree");
        for path in ["private/secret", "program", "a \"name\"\nof two lines, \u{e9}"] {
            assert_eq!(fs::read(back.join(path)).unwrap(), fs::read(tree.join(path)).unwrap());
        }
        for link in ["link", "dangling"] {
            assert_eq!(
                fs::read_link(back.join(link)).unwrap(),
                fs::read_link(tree.join(link)).unwrap()
            );
        }
        assert_eq!(fs::read_dir(back.join("private/empty")).unwrap().count(), 0);
        assert_eq!(mode(&back.join("private")), 0o700);
        assert_eq!(mode(&back.join("private/secret")), 0o600);
        // A guest cannot leave programs that run as somebody else.
        assert_eq!(mode(&back.join("program")), 0o755);
    });
}

#[test]
fn what_cannot_be_copied_is_refused() {
    with_machines("[nodes.m]", async |driver| {
        let m = only(driver);
        let here = tempfile::tempdir().unwrap();
        let missing = here.path().join("missing");
        let error = m.copy_from_host(&missing, Path::new("/tmp/x")).await.unwrap_err();
        assert!(
            matches!(&error, Error::Machine(MachineError::Missing { path }) if *path == missing)
        );
        symlink(".", here.path().join("round")).unwrap();
        m.copy_from_host(here.path(), Path::new("/tmp/round")).await.unwrap_err();
        m.succeed(&["[ ! -e /tmp/x ]", "mkfifo /tmp/fifo"], None).await.unwrap();
        for source in ["/tmp/nothing", "/tmp/fifo"] {
            let refused = m.copy_from_machine(Path::new(source), Path::new("")).await;
            let error = refused.unwrap_err();
            assert!(error.to_string().contains(source), "{error}");
            assert_eq!(matches!(error, Error::Assertion(_)), source == "/tmp/nothing", "{error:?}");
        }
        // The guest's links do not say where files of the host go.
        output(m, "mkdir /tmp/links; ln -s / /tmp/links/up").await;
        fetch(m, "/tmp/links", "").await;
        for through in ["links/up", "links/up/tmp/new"] {
            let refused = m.copy_from_machine(Path::new("/etc/hosts"), Path::new(through)).await;
            assert!(refused.is_err(), "copied to {through}");
        }
        assert!(!Path::new("/hosts").exists() && !Path::new("/tmp/new").exists());
        assert_eq!(output(m, "echo still here").await, "still here");
    });
}

#[test]
fn a_full_host_is_told_and_keeps_no_half_of_a_file() {
    let cmdline = format!("{} systemd.mask=firn-agent.service", systemd().manifest.cmdline);
    for way in [String::new(), format!("kit = 'systemd'\ncmdline = {cmdline:?}")] {
        with_machines(&format!("[nodes.m]\n{way}"), async |driver| {
            let m = only(driver);
            let full = m.out_dir().join("full");
            fs::create_dir(&full).unwrap();
            let Some(small) = SmallFileSystem::mount(&full, 4) else { return };
            // One too long by much, and one by its last bytes.
            for size in [8 << 20, (4 << 20) + 1] {
                output(m, &format!("head -c {size} /dev/urandom >/tmp/data")).await;
                let copied = m.copy_from_machine("/tmp/data".as_ref(), "full".as_ref()).await;
                let error = chain(&copied.unwrap_err());
                assert!(error.contains("No space left on device"), "{error}");
                assert_eq!(fs::read_dir(&full).unwrap().count(), 0);
            }
            output(m, "head -c 1000 /dev/urandom >/tmp/data").await;
            fetch(m, "/tmp/data", "full").await;
            assert_eq!(fs::metadata(full.join("data")).unwrap().len(), 1000);
            drop(small);
        });
    }
}
