//! Machines under QEMU beside firn's own.

use std::fs;
use std::path::Path;
use std::process::Command;

use firn::Machine;
use firn::config::TestConfig;
use firn_tests::{
    PATIENCE, config, connect_to_vsock, firn, micro, noise, only, output, start_script,
    with_config, with_machines,
};
use serde_json::json;

/// The size of what is transferred.
const TRANSFER: usize = 100 << 20;
/// The machines of a test, as they are numbered.
const NAMES: [&str; 3] = ["a", "b", "q"];

/// Pings by name, both ways and with both protocols.
async fn reach_each_other(one: &Machine, other: &Machine) {
    for (from, to) in [(one, other), (other, one)] {
        output(from, &format!("ping -4 -c 1 {0} && ping -6 -c 1 {0}", to.name())).await;
    }
}

/// A vlan inside of the vlan: frames of full length, and those that a card leaves to others to cut.
async fn tagged_frames_pass(a: &Machine, q: &Machine) {
    let drivers = "for name in llc stp garp mrp 8021q; do insmod /lib/modules/$name.ko; done";
    let ends = [(a, "10.7.0.1", drivers), (q, "10.7.0.2", "modprobe 8021q")];
    for (machine, address, load) in ends {
        let up = format!(
            "{load}
             ip link add link eth1 name tagged type vlan id 7
             ip addr add {address}/24 dev tagged && ip link set tagged up
             busybox httpd -p {address}:5002 -h /bin >/dev/null 2>&1"
        );
        output(machine, &up).await;
    }
    for ((from, ..), (other, to, _)) in [(ends[0], ends[1]), (ends[1], ends[0])] {
        output(from, &format!("ping -c 1 -s 1472 {to}")).await;
        let fetch = format!("busybox wget -q -O - http://{to}:5002/busybox | sha256sum");
        assert_eq!(output(from, &fetch).await, output(other, "sha256sum </bin/busybox").await);
    }
}

/// How many processes there are in a state directory, or were started for it.
fn processes_in(state: &Path) -> usize {
    let variable = format!("TMPDIR={}\0", state.display());
    let all = fs::read_dir("/proc").unwrap().flatten();
    let environments = all.filter_map(|entry| fs::read(entry.path().join("environ")).ok());
    environments.filter(|environment| contains(environment, variable.as_bytes())).count()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[test]
fn one_beside_two_of_firn() {
    let dir = tempfile::tempdir().unwrap();
    let nodes = format!(
        "[nodes.a]\nmemory = 768\n[nodes.b]\n[nodes.q]\nstart_command = {:?}",
        start_script::like_nixos(dir.path(), "q", &NAMES)
    );
    let config = TestConfig { vsock_offset: Some(2), ..config(&nodes) };
    with_config(&config, async |driver| {
        let [a, b, q] = driver.machines() else { panic!("three machines") };
        let state = q.state_dir();
        q.start(true).await.unwrap();
        a.start(false).await.unwrap();
        b.start(false).await.unwrap();
        reach_each_other(q, a).await;
        reach_each_other(q, b).await;
        tagged_frames_pass(a, q).await;
        files_come_whole(a, q).await;
        cable_can_be_pulled(b, q).await;
        console_screen_and_keys(q).await;
        assert_eq!(output(q, "lsblk -dno SERIAL,LABEL /dev/vda").await, "root nixos");
        assert_eq!(connect_to_vsock(&state.join("vsock"), 5000).1, "", "nobody listens there");

        // Their shutdown would wait for servers that heed no SIGTERM.
        output(q, "pkill -9 busybox").await;
        q.reboot().await.unwrap();
        reach_each_other(q, b).await;
        assert_eq!(connect_to_vsock(&state.join("vsock"), 5000).1, "", "nor in the next guest");
        assert_ne!(processes_in(&state), 0);
        q.crash().await;
        assert!(!q.booted());
        assert_eq!(processes_in(&state), 0);
        b.fail(&["ping -c 1 -W 1 q"], None).await.unwrap();
    });
}

/// A disk, a screen, a keyboard, shares and a vsock, where no start script says so.
#[test]
fn one_by_firns_own_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let nodes = format!(
        "[nodes.q]\nbackend = 'qemu'\ndisks = [{{ size = 20, serial = 'data' }}]\n\
         screen = 'plain'\nkeyboard = true\nvsock = {{ cid = 42, socket = {socket:?} }}"
    );
    with_machines(&nodes, async |driver| {
        let q = only(driver);
        q.start(false).await.unwrap();
        assert_eq!(output(q, "cat /sys/block/vda/serial /sys/block/vda/size").await, "data40960");
        output(q, "echo told > /tmp/shared/file && test -d /tmp/xchg").await;
        assert_eq!(fs::read(q.shared_dir().join("file")).unwrap(), b"told\n");
        console_screen_and_keys(q).await;
        monitors_answer(q).await;
        it_stands_still_and_goes_on(q).await;
        q.block();
        assert_eq!(output(q, "cat /sys/class/net/eth?/carrier").await, "1\n0");
        assert_eq!(connect_to_vsock(&socket, 5000).1, "", "nobody listens there");
        q.execute("echo c > /proc/sysrq-trigger", spawned()).await.unwrap();
        q.wait_for_shutdown().await.unwrap();
    });
}

/// A start script as nixpkgs makes them is a subject of benchmarks, too.
#[test]
fn benchmarks_take_start_scripts() {
    let dir = tempfile::tempdir().unwrap();
    let kit = micro();
    let options = format!(
        r#"-machine accel=kvm -m 256 -kernel {kernel} -initrd {initrd} \
  -append 'console=ttyS0 quiet rdinit=/bin/poweroff -- -f' {cards}"#,
        kernel = kit.kernel().display(),
        initrd = kit.initrd().display(),
        cards = start_script::cards(1),
    );
    let path = start_script::write(dir.path(), "q", "", &options);
    let bench = |options: [&str; 2]| {
        let mut bench = Command::new(firn());
        bench.args(["bench", "boot", "--runs", "1"]).args(options).arg(&path).output().unwrap()
    };
    let results = dir.path().join("results");
    let done = bench(["--output", results.to_str().unwrap()]);
    let table = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{table}{}", String::from_utf8_lossy(&done.stderr));
    assert!(table.contains(&format!("\nqemu: {}", path.display())), "{table}");

    // Against a run that was faster than any can be.
    let saved = results.join("boot.json");
    let mut report: serde_json::Value = serde_json::from_slice(&fs::read(&saved).unwrap()).unwrap();
    report["rows"][0]["figures"]["total"] = json!({ "value": 1000, "spread": 0, "runs": 1 });
    fs::write(&saved, report.to_string()).unwrap();
    let worse = bench(["--against", saved.to_str().unwrap()]);
    let table = String::from_utf8_lossy(&worse.stdout);
    assert_eq!(worse.status.code(), Some(1), "{table}");
    let said = format!("\nworse: qemu: {}: total 0.0 -> ", path.display());
    assert!(table.contains(&said), "{table}");
}

/// Options of a command whose end nobody waits for.
fn spawned() -> firn::ExecOptions {
    firn::ExecOptions { check_output: false, ..firn::ExecOptions::default() }
}

async fn files_come_whole(a: &Machine, q: &Machine) {
    let data = noise(TRANSFER);
    fs::write(q.shared_dir().join("data"), &data).unwrap();
    output(q, "busybox httpd -p 5000 -h /tmp/shared >/dev/null 2>&1").await;
    output(a, "wget -q -O /tmp/shared/received http://q:5000/data").await;
    assert!(fs::read(a.shared_dir().join("received")).unwrap() == data);
    output(a, "rm /tmp/shared/received /tmp/shared/data").await;
    // By what the driver itself copies.
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("file");
    fs::write(&file, noise(100_001)).unwrap();
    q.copy_from_host(&file, Path::new("/tmp/there/file")).await.unwrap();
    q.set_out_dir(out.path().join("out"));
    q.copy_from_machine(Path::new("/tmp/there"), Path::new("")).await.unwrap();
    assert!(fs::read(out.path().join("out/there/file")).unwrap() == noise(100_001));
}

async fn cable_can_be_pulled(b: &Machine, q: &Machine) {
    q.block();
    b.fail(&["ping -c 1 -W 1 q"], None).await.unwrap();
    assert_eq!(output(q, "cat /sys/class/net/eth1/carrier").await, "0");
    assert_eq!(output(q, "cat /sys/class/net/eth0/carrier").await, "1");
    q.unblock();
    b.wait_until_succeeds("ping -c 1 -W 2 q", PATIENCE, None).await.unwrap();
}

async fn console_screen_and_keys(q: &Machine) {
    output(q, "(read line; echo got $line) < /dev/ttyS0 > /dev/ttyS0 2>&1 &").await;
    q.send_console("typed\n").await.unwrap();
    let find = |console: &str| Ok(console.find("got typed").map(|at| at + 9));
    q.wait_for_console("an answer", find, Some(PATIENCE)).await.unwrap();

    let out = tempfile::tempdir().unwrap();
    q.set_out_dir(out.path().to_owned());
    q.screenshot("screen").await.unwrap();
    let picture = firn::picture::read(&out.path().join("screen.png")).unwrap();
    assert!(picture.width >= 640 && picture.rgb.iter().any(|shade| *shade != 0), "{picture:?}");

    // A press and a release of 30, the key a (struct input_event: 16 bytes of time, type, code, value).
    let event =
        r"sed -n '/QEMU Virtio Keyboard/,/^$/s/.*\(event[0-9]*\).*/\1/p' /proc/bus/input/devices";
    let event = output(q, event).await;
    let listen = "head -c 96 /dev/input/$event > /tmp/keys & \
                  until ls -l /proc/$!/fd | grep -q $event; do sleep 0.02; done";
    output(q, &format!("event={event}; {listen}")).await;
    q.send_key("a", None, false).await.unwrap();
    let keys = "for i in $(seq 100); do [ $(wc -c < /tmp/keys) -lt 96 ] || break; sleep 0.1; done; od -An -tu2 -j16 -N8 -w8 /tmp/keys";
    assert_eq!(output(q, keys).await.split_whitespace().collect::<Vec<_>>(), ["1", "30", "1", "0"]);
    let error = q.send_key("no-such-key", None, false).await.expect_err("no key").to_string();
    assert!(error.contains("there is no key `no`"), "{error}");
}

async fn monitors_answer(q: &Machine) {
    let status = q.send_monitor_command("info status").await.unwrap();
    assert_eq!(status.trim(), "VM status: running");
    let reply = q.send_qmp("query-name", &json!({})).await.unwrap();
    assert!(reply["return"].is_object(), "{reply}");
    let reply = q.send_qmp("no-such-command", &json!({})).await.unwrap();
    assert_eq!(reply["error"]["class"], "CommandNotFound");

    let port = q.forward_port(0, 5001).await.unwrap();
    output(q, "httpd -p 5001 -h /etc >/dev/null 2>&1").await;
    let fetched = tokio::task::spawn_blocking(move || {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.write_all(b"GET /hostname HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let answer = fetched.await.unwrap();
    assert!(answer.ends_with("\r\n\r\nq\n"), "{answer}");
    let error = q.forward_port(port, 80).await.expect_err("it is in use").to_string();
    assert!(error.contains("cannot forward a port"), "{error}");
}

async fn it_stands_still_and_goes_on(q: &Machine) {
    q.pause().await.unwrap();
    let status = q.send_monitor_command("info status").await.unwrap();
    assert_eq!(status.trim(), "VM status: paused");
    q.resume().await.unwrap();
    let mut seen = Vec::new();
    while let Some(event) = q.next_qmp_event(PATIENCE).await {
        seen.push(event["event"].as_str().unwrap().to_owned());
        if seen.ends_with(&["STOP".to_owned(), "RESUME".to_owned()]) {
            return;
        }
    }
    panic!("{seen:?}");
}
