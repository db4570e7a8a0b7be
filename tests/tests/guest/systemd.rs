//! The kit `systemd`: a machine laid out as those of NixOS tests are.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use firn::error::MachineError;
use firn::{Driver, Error, Machine};
use firn_tests::{PATIENCE, only, output, systemd, with_machines};

/// Waits until `text` is on the console, behind what was waited for before.
async fn console_shows(machine: &Machine, text: &str) {
    let find = |console: &str| Ok(console.find(text).map(|at| at + text.len()));
    machine.wait_for_console(text, find, Some(PATIENCE)).await.unwrap();
}

#[test]
fn two_machines_come_up_whole() {
    let nodes = "[nodes.a]\nkit = 'systemd'\n[nodes.b]\nkit = 'systemd'";
    with_machines(nodes, async |driver| {
        driver.start_all().await.unwrap();
        let [a, b] = driver.machines() else { panic!("two machines") };
        assert_eq!(output(a, "systemctl is-system-running --wait").await, "running");
        store_is_writable_but_its_share_is_not(a).await;
        names_and_addresses(a, b).await;
        commands_run_in_roots_environment(a).await;
        terminals_are_left_to_the_driver(a).await;
        journal_reaches_the_console(a).await;
        systemd_itself_tells_of_its_units(a).await;
        forks_draw_fresh_entropy(driver).await;
        a.shutdown().await.unwrap();
        assert!(!a.booted() && b.booted());
    });
}

/// Two of one past would go on with the same random numbers.
async fn forks_draw_fresh_entropy(driver: &Driver) {
    let then = driver.checkpoint("then").await.unwrap();
    let mut drawn = Vec::new();
    for name in ["one", "two"] {
        let fork = driver.fork(&then, name).await.unwrap();
        let told =
            "dmesg | grep -o 'reseeded due to virtual machine fork'; od -An -tx8 -N8 /dev/urandom";
        drawn.push(output(fork.machine("a").unwrap(), told).await);
        fork.close().await;
    }
    assert_ne!(drawn[0], drawn[1]);
    for machine in driver.machines() {
        machine.fail(&["dmesg | grep 'virtual machine fork'"], None).await.unwrap();
    }
}

async fn store_is_writable_but_its_share_is_not(machine: &Machine) {
    output(machine, "echo new > /nix/store/new; mkdir /nix/store/dir; test -s /nix/store/new")
        .await;
    machine.fail(&["touch /nix/.ro-store/new"], None).await.unwrap();
    assert!(!systemd().store().unwrap().join("new").exists());
    let kinds = output(machine, "stat -f -c %T / /nix/store /nix/.ro-store").await;
    assert_eq!(kinds, "tmpfs\noverlayfs\nfuse");
    let booted = output(machine, "readlink -f /run/current-system; ls /run/booted-system/").await;
    assert_eq!(booted, "/nix/store/toplevel\ninit\ninitrd\nkernel\nkernel-params");
}

async fn names_and_addresses(a: &Machine, b: &Machine) {
    assert_eq!(output(a, "hostname").await, "a");
    for (from, to) in [(a, "b"), (b, "a")] {
        output(from, &format!("ping -4 -c 1 {to} && ping -6 -c 1 {to}")).await;
    }
    let cards = output(b, "cd /sys/class/net; grep . */address").await;
    assert_eq!(
        cards,
        "eth0/address:52:54:00:12:34:56\neth1/address:52:54:00:12:01:02\nlo/address:00:00:00:00:00:00"
    );
}

async fn commands_run_in_roots_environment(machine: &Machine) {
    let variables = "echo $USER:$HOME:$DISPLAY:$PWD:${PAGER-unset}:$PATH";
    assert_eq!(
        output(machine, variables).await,
        "root:/root::0.0:/tmp::/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    );
}

async fn terminals_are_left_to_the_driver(machine: &Machine) {
    for terminal in ["hvc0", "ttyS0"] {
        let state = format!("systemctl show -P LoadState serial-getty@{terminal}.service");
        assert_eq!(output(machine, &state).await, "masked");
    }
    let state = "systemctl is-active backdoor.service getty@tty1.service";
    assert_eq!(output(machine, state).await, "active\nactive");
}

async fn journal_reaches_the_console(machine: &Machine) {
    output(machine, "logger --tag test a line for the console").await;
    // Between name and text there may be a change of colour.
    console_shows(machine, "a line for the console").await;
}

async fn systemd_itself_tells_of_its_units(machine: &Machine) {
    // Who would ask `systemctl` again and again fails.
    output(machine, "mount --bind /bin/false $(realpath $(command -v systemctl))").await;
    for (unit, name) in [("first", "first"), ("second.service", "second")] {
        let run = "systemd-run --no-block --service-type=notify -p NotifyAccess=all";
        let command =
            format!("{run} --unit={name} sh -c 'sleep 2; systemd-notify --ready; sleep 1000'");
        output(machine, &command).await;
        machine.wait_for_unit(unit, None, PATIENCE).await.unwrap();
    }
    output(machine, "umount $(realpath $(command -v systemctl))").await;
    assert_eq!(output(machine, "systemctl is-active first second").await, "active\nactive");
}

#[test]
fn without_the_agent_there_is_the_backdoor() {
    let cmdline = format!("{} systemd.mask=firn-agent.service", systemd().manifest.cmdline);
    let nodes = format!("[nodes.m]\nkit = 'systemd'\ncmdline = {cmdline:?}");
    with_machines(&nodes, async |driver| {
        let machine = only(driver);
        machine.start(false).await.unwrap();
        let units = "systemctl is-active firn-agent.service backdoor.service || true";
        assert_eq!(output(machine, units).await, "inactive\nactive");
    });
}

/// A machine of which `prepare`, shell lines, changes the system before systemd starts. It is not started.
fn with_prepared(prepare: &str, script: impl AsyncFnOnce(&Machine)) {
    let cmdline = format!("{} init=/tmp/shared/init", systemd().manifest.cmdline);
    with_machines(&format!("[nodes.m]\nkit = 'systemd'\ncmdline = {cmdline:?}"), async |driver| {
        let machine = only(driver);
        let init = machine.shared_dir().join("init");
        // The kit's own, with more before its last line.
        let text = format!(
            "#!/nix/store/firn/busybox/sh\nexport PATH=/nix/store/firn/busybox\n\
             {{ head -n -1 /nix/store/toplevel/init; cat <<'END'\n{prepare}\nEND\n\
             tail -n 1 /nix/store/toplevel/init; }} >/run/init\n\
             exec /nix/store/firn/busybox/sh /run/init\n"
        );
        fs::write(&init, text).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        script(machine).await;
    });
}

#[test]
fn the_first_command_waits_for_the_system() {
    let unit = "[Unit]\nDefaultDependencies=no\nBefore=basic.target\n\
        [Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sleep 5";
    let prepare = format!(
        "cd /etc/systemd/system\nprintf '{}' >slow.service\n\
         mkdir basic.target.wants\nln -s ../slow.service basic.target.wants/",
        unit.replace('\n', "\\n")
    );
    with_prepared(&prepare, async |machine| {
        let states = "systemctl is-active slow.service basic.target systemd-tmpfiles-clean.timer";
        assert_eq!(output(machine, states).await, "active\nactive\nactive");
        // The agent itself was there long before.
        let since = async |unit: &str| {
            let show = format!("systemctl show -P ActiveEnterTimestampMonotonic {unit}");
            output(machine, &show).await.parse::<u64>().unwrap()
        };
        assert!(since("firn-agent").await + 5_000_000 < since("firn-system-up").await);
        // An agent that is started again does not wait again.
        machine.fail(&["pkill -9 '^firn-agent$'; sleep 99"], None).await.unwrap_err();
        assert_eq!(output(machine, "echo on").await, "on");
    });
}

#[test]
fn a_system_that_does_not_come_up_fails_the_first_command() {
    let mount = "echo '/dev/nothing /mnt ext4 x-systemd.device-timeout=1s 0 0' >/etc/fstab";
    with_prepared(mount, async |machine| {
        let error = machine.succeed(&["true"], None).await.unwrap_err();
        assert!(matches!(error, Error::Machine(MachineError::NotUp { .. })), "{error:?}");
        assert!(error.to_string().contains("emergency or rescue mode"), "{error}");
        machine.wait_for_unit("multi-user.target", None, PATIENCE).await.unwrap_err();
        machine.shutdown().await.unwrap();
    });
}
