//! Waits for files, ports and sockets, and what ends them.

use std::time::{Duration, Instant};

use firn::Error;
use firn_tests::{PATIENCE, with_machines};

const SHORT: Duration = Duration::from_millis(300);

#[test]
fn files_and_ports() {
    with_machines("[nodes.machine]", async |driver| {
        let machine = &driver.machines()[0];
        let timed_out = |error: Error| {
            assert_eq!(error.to_string(), "action timed out after 0.3 seconds (timeout=0.3)");
        };
        timed_out(machine.wait_for_file("/tmp/it", SHORT).await.unwrap_err());
        machine.succeed(&["(sleep 0.2; touch /tmp/it) >/dev/null 2>&1 &"], None).await.unwrap();
        machine.wait_for_file("/tmp/it", PATIENCE).await.unwrap();
        // The guest's shell expands it.
        machine.wait_for_file("/tmp/i?", PATIENCE).await.unwrap();
        machine.wait_for_file("$HOME/../tmp/it", Duration::ZERO).await.unwrap();

        timed_out(machine.wait_for_open_port(80, "localhost", SHORT).await.unwrap_err());
        machine.wait_for_closed_port(80, "localhost", Duration::ZERO).await.unwrap();
        machine
            .succeed(&["(sleep 0.2; exec httpd -f -p 80) >/dev/null 2>&1 &"], None)
            .await
            .unwrap();
        machine.wait_for_open_port(80, "localhost", PATIENCE).await.unwrap();
        timed_out(machine.wait_for_closed_port(80, "localhost", SHORT).await.unwrap_err());
        machine.succeed(&["(sleep 0.2; killall httpd) >/dev/null 2>&1 &"], None).await.unwrap();
        machine.wait_for_closed_port(80, "localhost", PATIENCE).await.unwrap();
    });
}

#[test]
fn a_wait_ends_with_the_guest() {
    with_machines("[nodes.machine]", async |driver| {
        let machine = &driver.machines()[0];
        machine.connect().await.unwrap();
        let began = Instant::now();
        let wait = machine.wait_for_file("/nowhere", Duration::from_secs(900));
        let crash = async {
            tokio::time::sleep(SHORT).await;
            machine.crash().await;
        };
        let (waited, ()) = tokio::join!(wait, crash);
        let error = waited.unwrap_err().to_string();
        assert!(error.contains("not running") || error.contains("was stopped"), "{error}");
        assert!(began.elapsed() < PATIENCE);
    });
}

#[test]
fn a_reboot_is_waited_for() {
    with_machines("[nodes.machine]", async |driver| {
        let machine = &driver.machines()[0];
        machine.start(true).await.unwrap();
        machine.succeed(&["touch /tmp/gone"], None).await.unwrap();
        machine.reboot().await.unwrap();
        machine.fail(&["test -e /tmp/gone"], None).await.unwrap();
        machine.shutdown().await.unwrap();
        machine.start(false).await.unwrap();
        let error = machine.reboot().await.unwrap_err().to_string();
        assert_eq!(error, "machine cannot reboot: it needs start(allow_reboot=True)");
    });
}

#[test]
fn a_copy_goes_into_a_directory_that_is_there() {
    with_machines("[nodes.machine]", async |driver| {
        let machine = &driver.machines()[0];
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("one"), "1").unwrap();
        machine.copy_from_host(&dir.path().join("one"), "/tmp".as_ref()).await.unwrap();
        machine.copy_from_host(dir.path(), "/tmp/new/place".as_ref()).await.unwrap();
        machine.copy_from_host(dir.path(), "/tmp/new/place".as_ref()).await.unwrap();
        let name = dir.path().file_name().unwrap().to_str().unwrap();
        let found = machine.succeed(&["cd /tmp; find one new -type f | sort"], None).await.unwrap();
        let mut expected =
            ["new/place/one".to_owned(), format!("new/place/{name}/one"), "one".to_owned()];
        expected.sort();
        assert_eq!(found.lines().collect::<Vec<_>>(), expected);
    });
}
