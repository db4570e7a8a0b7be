//! Power button, reboots, pauses.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use firn::{End, Error, ExecOptions, Machine, MachineError, Status};
use firn_tests::{output, with_machines};

#[test]
fn the_power_button_reaches_the_guest() {
    with_machines("[nodes.m]", async |driver| {
        let machine = &driver.machines()[0];
        // Powers off when the button's input device says that key 116, KEY_POWER, is down.
        let listen = "insmod /lib/modules/evdev.ko; \
            grep -A4 'Power Button' /proc/bus/input/devices | grep -o 'event[0-9]*'";
        let event = output(machine, listen).await;
        let command = format!(
            "mkfifo /tmp/up; (exec </dev/input/{event}; echo ready >/tmp/up; \
             key=$(head -c 24 | tail -c 8 | hexdump -v -e '8/1 \"%02x\"'); \
             [ $key = 0100740001000000 ] && poweroff -f) >/dev/null 2>&1 & cat /tmp/up"
        );
        assert_eq!(output(machine, &command).await, "ready");
        machine.press_power_button().await.unwrap();
        machine.wait_for_shutdown().await.unwrap();
    });
}

#[test]
fn a_press_that_the_kernel_cannot_hear_yet_does_no_harm() {
    with_machines("[nodes.m]", async |driver| {
        let machine = &driver.machines()[0];
        machine.start(false).await.unwrap();
        machine.press_power_button().await.unwrap();
        assert_eq!(output(machine, "echo up").await, "up");
    });
}

#[test]
fn a_guest_reboots_in_the_same_machine() {
    with_machines("[nodes.m]\ncores = 2\ndisks = [{ size = 8 }]\nballoon = true", async |driver| {
        let machine = &driver.machines()[0];
        machine.start(true).await.unwrap();
        let boot_id = "cat /proc/sys/kernel/random/boot_id";
        let mut seen = vec![output(machine, boot_id).await];
        for round in 0..3 {
            let command = format!(
                "echo round {round} >/tmp/shared/said; echo round {round} >/tmp/lost; \
                 echo round {round} | dd of=/dev/vda conv=fsync 2>/dev/null"
            );
            output(machine, &command).await;
            // In the middle of reads and writes, by a call that learns of the end at once.
            let command = "(while :; do cat /dev/vda /tmp/shared/said; done) >/dev/null 2>&1 & \
                (while :; do dd if=/dev/vda of=/tmp/shared/copy bs=64k; done) >/dev/null 2>&1 & \
                sleep 0.3; reboot -f; sleep 1000";
            let answer = machine.execute(command, ExecOptions::default()).await;
            assert!(matches!(answer, Err(Error::Machine(_))), "{answer:?}");

            let id = output(machine, boot_id).await;
            assert!(!seen.contains(&id), "it did not reboot");
            seen.push(id);
            let command = "head -n 1 /dev/vda; cat /tmp/shared/said; ls /tmp/lost 2>/dev/null || true; \
                           nproc; ls /sys/bus/virtio/devices/*/driver -d | wc -l";
            let expected = format!("round {round}\nround {round}\n2\n8");
            assert_eq!(output(machine, &format!("({command})")).await, expected);
        }
        machine.shutdown().await.unwrap();
    });
}

/// How far the guest's clock is from the host's.
async fn clock_error(machine: &Machine) -> Duration {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let before = now();
    let guest = output(machine, "date +%s").await.parse().map(Duration::from_secs).unwrap();
    // The guest's is cut to whole seconds. Until it has found its clock it counts ticks, of which
    // it misses some in a carrier.
    let (earliest, latest) = (before - Duration::from_secs(4), now());
    guest.saturating_sub(latest).max(earliest.saturating_sub(guest))
}

#[test]
fn the_clock_is_right_after_boot_and_after_a_pause() {
    const PAUSE: Duration = Duration::from_secs(8);
    with_machines("[nodes.m]\ncores = 2", async |driver| {
        let machine = &driver.machines()[0];
        assert_eq!(clock_error(machine).await, Duration::ZERO);
        // From two seconds on the kernel would complain of a processor that stands still.
        let strict = "echo 1 >/proc/sys/kernel/watchdog_thresh; \
            echo 3 >/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout; \
            (while :; do :; done) >/dev/null 2>&1 & cat /proc/uptime";
        let before: f64 = output(machine, strict).await.split(' ').next().unwrap().parse().unwrap();
        machine.send_monitor_command("stop").await.unwrap();
        tokio::time::sleep(PAUSE).await;
        machine.send_monitor_command("cont").await.unwrap();
        assert_eq!(clock_error(machine).await, Duration::ZERO);
        let after = output(machine, "sleep 4; cat /proc/uptime").await;
        let after: f64 = after.split(' ').next().unwrap().parse().unwrap();
        assert!(after - before >= PAUSE.as_secs_f64() + 4.0, "{before}, then {after}");
        let said = output(machine, "dmesg | grep -iE 'lockup|stall|clocksource.*unstable' || true");
        assert_eq!(said.await, "");
    });
}

#[test]
fn no_time_of_a_call_runs_out_while_its_machine_is_paused() {
    // Longer than any call below may take, and than the agent may be silent.
    const PAUSE: Duration = Duration::from_secs(75);
    const LIMIT: Duration = Duration::from_secs(40);
    with_machines("[nodes.m]\n[nodes.other]", async |driver| {
        let [machine, other] = driver.machines() else { panic!("there are two") };
        tokio::try_join!(machine.connect(), other.connect()).unwrap();
        let options = ExecOptions { timeout: Some(LIMIT), ..ExecOptions::default() };
        let command = machine.execute("sleep 10; echo done", options);
        let file = machine.wait_for_file("/tmp/there", LIMIT);
        let tries = machine.wait_until_succeeds("test -e /tmp/there", LIMIT, None);
        let printed = |text: &str| Ok(text.find("there is a file"));
        let console = machine.wait_for_console("the text", printed, Some(LIMIT));
        let pause = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            machine.pause().await.unwrap();
            machine.pause().await.unwrap();
            assert_eq!(machine.status(), Status::Paused);
            assert!(machine.booted());
            let time = machine.clock().now();
            let resumed = Instant::now() + PAUSE;
            while Instant::now() < resumed {
                assert_eq!(output(other, "echo still here").await, "still here");
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            assert_eq!(machine.clock().now(), time);
            machine.resume().await.unwrap();
            machine.resume().await.unwrap();
            assert_eq!(machine.status(), Status::Running);
            output(machine, "touch /tmp/there; echo there is a file >/dev/console").await
        };
        let (answer, file, tries, console, _) = tokio::join!(command, file, tries, console, pause);
        assert_eq!(answer.unwrap(), (0, "done\n".to_owned()));
        file.unwrap();
        tries.unwrap();
        console.unwrap();
        // The time runs again.
        let options = ExecOptions { timeout: Some(Duration::from_secs(2)), ..options };
        let answer = machine.execute("echo begun; sleep 1000", options).await.unwrap();
        assert_eq!(answer, (124, "begun\n".to_owned()));
    });
}

#[test]
fn the_states_of_a_machine() {
    with_machines("[nodes.m]", async |driver| {
        let machine = &driver.machines()[0];
        let not_running =
            |answer| matches!(answer, Err(Error::Machine(MachineError::NotRunning { .. })));
        assert_eq!(machine.status(), Status::Off);
        assert!(not_running(machine.pause().await) && not_running(machine.resume().await));
        machine.start(false).await.unwrap();
        assert_eq!(machine.status(), Status::Running);
        // One that is paused before its guest is up comes up afterwards, and calls that begin meanwhile wait for it.
        machine.pause().await.unwrap();
        let late = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            machine.resume().await
        };
        let (answer, late) = tokio::join!(output(machine, "echo up"), late);
        late.unwrap();
        assert_eq!(answer, "up");
        // One that is paused can be ended, and that ends what waits for it.
        machine.pause().await.unwrap();
        let crash = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            machine.crash().await;
        };
        let waits = machine.execute("true", ExecOptions::default());
        let (answer, ()) = tokio::join!(waits, crash);
        assert!(matches!(answer, Err(Error::Machine(_))), "{answer:?}");
        assert_eq!(machine.status(), Status::Off);
        // The next start begins with time that runs.
        let options = ExecOptions { timeout: Some(Duration::from_secs(2)), ..Default::default() };
        assert_eq!(machine.execute("sleep 1000", options).await.unwrap().0, 124);
        let answer = machine.execute("poweroff -f; sleep 1000", ExecOptions::default()).await;
        assert!(answer.is_err(), "{answer:?}");
        assert_eq!(machine.status(), Status::Ended);
        assert!(machine.pause().await.is_err());
        machine.wait_for_shutdown().await.unwrap();
        assert_eq!(machine.status(), Status::Off);
    });
}

#[test]
fn a_guest_that_halts_for_good_ends_the_waiting_calls() {
    with_machines("[nodes.m]\ncores = 2", async |driver| {
        let machine = &driver.machines()[0];
        let answer = machine.execute("halt -f; sleep 1000", ExecOptions::default()).await;
        let Err(Error::Machine(MachineError::Ended { end, .. })) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(*end, End::Halted);
    });
}
