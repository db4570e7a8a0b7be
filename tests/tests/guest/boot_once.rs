//! Runs that start where an earlier one had booted.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use firn::log::Logger;
use firn::worlds::Worlds;
use firn::{Driver, Machine};
use firn_tests::{config, micro, output, with_log};

/// Two machines, of which the second prints what kernels print.
fn nodes() -> String {
    let cmdline = micro().manifest.cmdline;
    let loud = format!("[nodes.b]\ncmdline = '{cmdline} loglevel=6'\n");
    format!("[nodes.a]\ndisks = [{{ size = 16, label = 'data' }}]\n[nodes.a.user_network]\n{loud}")
}

/// What a run logs.
#[derive(Clone, Default)]
pub(crate) struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        eprint!("{}", String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A run of a test; what it logged.
pub(crate) fn run(worlds: &Worlds, nodes: &str, script: impl AsyncFnOnce(&Driver)) -> String {
    let said = Said::default();
    with_log(&config(nodes), Logger::new(Box::new(said.clone()), false), async |driver| {
        driver.boot_once(worlds, "guest", false).await.unwrap();
        script(driver).await;
    });
    let text = said.0.lock().unwrap().clone();
    String::from_utf8(text).unwrap()
}

/// What each boot prints at other times.
async fn boot_of(machine: &Machine) -> String {
    output(machine, "dmesg | sed -n 1,50p | md5sum").await
}

/// The one entry.
fn entry(worlds: &Worlds) -> PathBuf {
    let names: Vec<_> = fs::read_dir(worlds.path()).unwrap().flatten().collect();
    let [entry] = &names[..] else { panic!("{names:?}") };
    entry.path()
}

#[test]
fn the_second_run_starts_where_the_first_had_booted() {
    let dir = tempfile::tempdir().unwrap();
    let worlds = Worlds::at(dir.path().join("worlds"), 4096);
    let uuid = "dd if=/dev/vda bs=1 skip=1128 count=16 2>/dev/null | od -An -tx1";
    let nodes = &nodes();
    let (mut boots, mut disk) = (Vec::new(), String::new());
    let said = run(&worlds, nodes, async |driver| {
        let [a, b] = driver.machines() else { panic!("two machines") };
        for machine in [a, b] {
            boots.push(boot_of(machine).await);
        }
        disk = output(a, uuid).await;
        // What the script does is not kept.
        output(
            a,
            "mkdir -p /mnt/d; mount -t ext4 /dev/vda /mnt/d; echo spoiled >/mnt/d/file; echo spoiled >/tmp/shared/file; sync",
        )
        .await;
        a.shutdown().await.unwrap();
        let image = fs::read(a.state_dir().join("disk0.img")).unwrap();
        assert!(image.windows(7).any(|text| text == b"spoiled"), "its own image has it");
    });
    assert!(said.contains("boots afresh: no world of this test has been kept"), "{said}");
    assert!(said.contains("kept the booted world in "), "{said}");
    let place = entry(&worlds);

    let said = run(&worlds, nodes, async |driver| {
        let [a, b] = driver.machines() else { panic!("two machines") };
        for (machine, boot) in [a, b].into_iter().zip(&boots) {
            assert_eq!(boot_of(machine).await, *boot);
            // As for any machine that runs.
            machine.start(false).await.unwrap();
        }
        let printed = b.get_console_log();
        assert!(printed.contains("Linux version"), "{printed}");
        assert_eq!(output(a, uuid).await, disk);
        assert_eq!(
            output(a, "mkdir -p /mnt/d; mount -t ext4 /dev/vda /mnt/d; ls /mnt/d /tmp/shared")
                .await,
            "/mnt/d:\nlost+found\n\n/tmp/shared:"
        );
        a.succeed(&["ping -c 1 b", "ping -c 1 -6 b", "ping -c 1 10.0.2.2"], None).await.unwrap();
        output(b, "echo there >/tmp/shared/file").await;
        assert_eq!(output(a, "cat /tmp/shared/file").await, "there");
        let late = output(a, "date +%s").await.parse::<u64>().unwrap();
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        assert!(now.abs_diff(late) < 60, "{late} is not {now}");
        // It ends, starts again and goes back as any other does.
        let ready = driver.checkpoint("ready").await.unwrap();
        output(a, "echo lost >/mnt/d/file; sync").await;
        driver.roll_back(&ready).await.unwrap();
        ready.forget();
        output(a, "test ! -e /mnt/d/file; echo kept >/mnt/d/file; umount /mnt/d").await;
        a.shutdown().await.unwrap();
        a.start(false).await.unwrap();
        assert_eq!(
            output(a, "mkdir -p /mnt/d; mount -t ext4 /dev/vda /mnt/d; cat /mnt/d/file").await,
            "kept"
        );
        assert_ne!(boot_of(a).await, boots[0]);
    });
    assert!(
        said.contains(&format!("started from the world kept in {}", place.display())),
        "{said}"
    );

    // In the place of the disk's image lies something.
    let said = Said::default();
    with_log(&config(nodes), Logger::new(Box::new(said.clone()), false), async |driver| {
        let [a, _] = driver.machines() else { panic!("two machines") };
        fs::write(a.state_dir().join("disk0.img"), "mine").unwrap();
        driver.boot_once(&worlds, "guest", false).await.unwrap();
        assert_ne!(boot_of(a).await, boots[0]);
        assert_eq!(
            output(a, "mkdir -p /mnt/d; mount -t ext4 /dev/vda /mnt/d; ls /mnt/d").await,
            "lost+found"
        );
    });
    let said = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
    assert!(said.contains("boots afresh: cannot start from the world kept in "), "{said}");

    refused(&worlds);
    what_does_not_fit_is_not_used(&worlds, nodes, &boots[0]);
}

fn what_does_not_fit_is_not_used(worlds: &Worlds, nodes: &str, boot: &str) {
    let memory = entry(worlds).join("a.memory");
    fs::set_permissions(&memory, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::File::options().write(true).open(&memory).unwrap();
    file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
    let mut again = String::new();
    let said = run(worlds, nodes, async |driver| {
        again = boot_of(&driver.machines()[0]).await;
        assert_ne!(again, boot);
    });
    assert!(said.contains("cannot be used: a.memory has "), "{said}");
    // It was replaced. Whether guests may reset themselves is up to each run.
    let log = Logger::new(Box::new(io::sink()), false);
    with_log(&config(nodes), log, async |driver| {
        driver.boot_once(worlds, "guest", true).await.unwrap();
        let [a, _] = driver.machines() else { panic!("two machines") };
        assert_eq!(boot_of(a).await, again);
        a.reboot().await.unwrap();
        assert_ne!(boot_of(a).await, again);
    });
}

/// What is not the run's alone could not be taken back with it.
fn refused(worlds: &Worlds) {
    let dir = tempfile::tempdir().unwrap();
    let nodes = "[nodes.a]\ndisks = [{ image = 'DIR/mine.img', size = 16 }]\n\
        [[nodes.b.shares]]\ntag = 'data'\nsource = 'DIR'\n\
        [nodes.c]\n";
    let nodes = nodes.replace("DIR", &dir.path().display().to_string());
    let log = Logger::new(Box::new(io::sink()), false);
    with_log(&config(&nodes), log, async |driver| {
        driver.machines()[2].start(false).await.unwrap();
        let error = driver.boot_once(worlds, "guest", false).await.unwrap_err().to_string();
        let path = dir.path().display();
        let expected = format!(
            "its boot cannot be kept on disk: a writes to {path}/mine.img, which is not the run's alone; \
             b can write to share data ({path}), which is yours; c has been started already"
        );
        assert_eq!(error, expected);
    });
    assert!(!dir.path().join("mine.img").exists());
}
