use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use firn_vmm::spec::{CachePolicy, DiskFormat, DiskSpec, ScreenKind, ScreenSpec, VsockSpec};

use super::*;
use crate::kit::KitName;

fn read(text: &str) -> Result<TestConfig, ConfigError> {
    TestConfig::from_toml(text, Path::new("/nowhere/ping.toml"))
}

/// The message for a file that must be refused.
#[track_caller]
fn refused(text: &str) -> String {
    read(text).expect_err("the file makes no sense").to_string()
}

fn number(number: u64) -> Number {
    number.try_into().expect("in range")
}

/// A test with one machine, whose table has these lines.
fn node(lines: &str) -> String {
    format!("test_script = ''\n[nodes.machine1]\n{lines}\n")
}

#[test]
fn a_short_file_is_filled_up() {
    let test = read("test_script = '''\nmachine.succeed(\"true\")\n'''\n[nodes.machine]\n")
        .expect("valid");
    assert_eq!(test.name, "ping");
    assert_eq!(test.script.text, "machine.succeed(\"true\")\n");
    assert_eq!(test.script.line, 2);
    assert_eq!(test.global_timeout, None);
    assert_eq!(
        test.nodes,
        [NodeConfig {
            name: "machine".into(),
            number: 1,
            backend: None,
            start_command: None,
            because: vec![],
            kit: KitName::Micro,
            kernel: None,
            initrd: None,
            cmdline: None,
            memory: None,
            cores: 1_u64.try_into().expect("in range"),
            user_network: Some(UserNetwork::default()),
            vlans: vec![Number::MIN],
            macs: BTreeMap::new(),
            disks: vec![],
            shares: vec![],
            exchange: true,
            rng: true,
            balloon: false,
            screen: ScreenChoice::Unsaid,
            keyboard: None,
            tablet: None,
            vsock: None,
            oem_strings: vec![],
            credentials: BTreeMap::new(),
            qemu_opts: String::new(),
        }]
    );
}

#[test]
fn kits_bring_their_memory() {
    let read = |lines| read(&node(lines)).expect("valid").nodes.remove(0);
    let machine = read("kit = 'systemd'");
    assert_eq!((machine.kit, machine.memory().get()), (KitName::Systemd, 1024));
    assert_eq!(read("kit = 'systemd'\nmemory = 700").memory().get(), 700);
    assert_eq!(read("kit = 'micro'").memory().get(), 512);
    // The carrier's is no guest's.
    for wrong in ["carrier", "Micro", ""] {
        let text = refused(&node(&format!("kit = '{wrong}'")));
        assert!(
            text.contains(&format!("`nodes.machine1.kit`: \"{wrong}\" cannot be used")),
            "{text}"
        );
        assert!(text.contains("allowed: \"micro\", \"systemd\""), "{text}");
    }
}

#[test]
fn balloon_vsock_and_oem_strings() {
    let lines = "balloon = true
oem_strings = ['a=b']
vsock = { cid = 3, socket = 'run/sock' }";
    let nodes = read(&node(lines)).expect("valid").nodes;
    assert!(nodes[0].balloon);
    assert_eq!(nodes[0].oem_strings, ["a=b"]);
    let socket = "/nowhere/run/sock".into();
    let cid = 3_u64.try_into().expect("in range");
    assert_eq!(nodes[0].vsock, Some(VsockSpec { cid, socket }));
    for cid in [0_u64, 2, 4_294_967_295, 1 << 40] {
        let text = refused(&node(&format!("vsock = {{ cid = {cid}, socket = '/s' }}")));
        assert!(
            text.contains(&format!("`nodes.machine1.vsock.cid`: {cid} cannot be used")),
            "{text}"
        );
    }
}

#[test]
fn the_user_network_is_described_as_in_nixos() {
    let network = |lines: &str| read(&node(lines)).expect("valid").nodes.remove(0).user_network;
    assert_eq!(network("user_network = false"), None);
    assert_eq!(network("user_network = true"), Some(UserNetwork::default()));
    let lines = "user_network.restrict = true
user_network.host_loopback = false
[[nodes.machine1.user_network.forward_ports]]
host.port = 2222
guest.port = 22
[[nodes.machine1.user_network.forward_ports]]
from = 'guest'
proto = 'udp'
host = { address = '192.0.2.1', port = 53 }
guest = { address = '10.0.2.100', port = 5353 }
[[nodes.machine1.user_network.forward_ports]]
host = { address = '::1', port = 0 }
guest = { address = 'fd00::5054:ff:fe12:3456', port = 80 }";
    let UserNetwork { restrict, host_loopback, forward_ports, .. } =
        network(lines).expect("there is one");
    assert!(restrict && !host_loopback);
    let said: Vec<_> = forward_ports
        .iter()
        .map(|PortForward(f)| format!("{:?} {} {} {}", f.from, f.protocol, f.host, f.guest))
        .collect();
    assert_eq!(
        said,
        [
            "Host TCP 127.0.0.1:2222 10.0.2.15:22",
            "Guest UDP 192.0.2.1:53 10.0.2.100:5353",
            "Host TCP [::1]:0 [fd00::5054:ff:fe12:3456]:80",
        ]
    );
}

#[test]
fn forwards_that_make_no_sense() {
    let forward = |lines: &str| {
        refused(&node(&format!("[[nodes.machine1.user_network.forward_ports]]\n{lines}")))
    };
    assert!(forward("host.port = 1\nguest.port = 0").contains("`guest.port` 0 cannot be used"));
    let text = forward("from = 'guest'\nhost.port = 1\nguest.port = 1");
    assert!(text.contains("`guest.address`") && text.contains("such as 10.0.2.100"), "{text}");
    let text = forward("from = 'guest'\nhost.port = 0\nguest = { address = '10.0.2.9', port = 1 }");
    assert!(text.contains("`host.port`") && text.contains("1 to 65535"), "{text}");
    let text = forward("from = 'both'\nhost.port = 1\nguest.port = 1");
    assert!(text.contains("unknown variant `both`, expected `host` or `guest`"), "{text}");
    let text = forward("host.port = 65536\nguest.port = 1");
    assert!(text.contains("65536"), "{text}");
    let text = refused(&node("user_network = 3"));
    assert!(text.contains("expected true, false, or a table with `restrict`"), "{text}");
}

#[test]
fn everything_can_be_said() {
    let dir = tempfile::tempdir().expect("a temp dir");
    fs::write(dir.path().join("vmlinux"), "k").expect("written");
    fs::write(dir.path().join("script.py"), "x = 1\n").expect("written");
    fs::create_dir(dir.path().join("data")).expect("made");
    let text = "
name = 'all'
test_script_file = 'script.py'
global_timeout = 90
[nodes.b]
kernel = 'vmlinux'
cmdline = 'quiet'
memory = 256
cores = 4
vlans = [1, 200]
[[nodes.b.shares]]
tag = 'data'
source = 'data'
target = '/mnt/data'
read_only = true
cache = 'auto'
allow_setuid = true
[nodes.a]
vlans = []
";
    let test = TestConfig::from_toml(text, &dir.path().join("t.toml")).expect("valid");
    assert_eq!(test.name, "all");
    assert_eq!(test.script.text, "x = 1\n");
    assert_eq!(test.script.file, dir.path().join("script.py"));
    assert_eq!(test.global_timeout, Some(Duration::from_secs(90)));
    assert_eq!(test.vlans(), [1, 200].map(number));
    let names: Vec<_> = test.nodes.iter().map(|n| (n.name.as_str(), n.number)).collect();
    assert_eq!(names, [("a", 1), ("b", 2)]);
    let b = &test.nodes[1];
    assert_eq!(b.kernel, Some(dir.path().join("vmlinux")));
    assert_eq!((b.memory().get(), b.cores.get()), (256, 4));
    assert_eq!(b.shares[0].source, dir.path().join("data").canonicalize().expect("exists"));
    assert!(b.shares[0].read_only && b.shares[0].allow_setuid);
    assert_eq!(b.shares[0].cache, CachePolicy::Auto);
    assert_eq!(b.mac(number(200)).0, [0x52, 0x54, 0, 0x12, 200, 2]);
    assert_eq!(b.ipv4(number(200)).to_string(), "192.168.200.2");
    assert_eq!(b.ipv6(number(200)).to_string(), "2001:db8:200::2");
}

#[test]
fn a_list_of_what_is_seen_is_for_stores() {
    let share = |rest: &str| {
        node(&format!("[[nodes.machine1.shares]]\ntag = 'a'\nsource = '/'\nonly = 'list'\n{rest}"))
    };
    let store = "read_only = true\ncache = 'always'\n";
    let nodes = read(&share(store)).expect("valid").nodes;
    assert_eq!(nodes[0].shares[0].only.as_deref(), Some(Path::new("/nowhere/list")));
    let message = refused(&share("read_only = true\n"));
    assert!(message.contains("shares[0].only"), "{message}");
    assert!(message.contains("`read_only = true` and `cache = \"always\"`"), "{message}");
    let message = refused(&share(store).replacen("[[", "backend = 'qemu'\n[[", 1));
    assert!(message.contains("a list for a machine of firn, not under QEMU"), "{message}");
}

#[test]
fn images_are_of_stores() {
    let share = |tag: &str, rest: &str| {
        node(&format!(
            "[[nodes.machine1.shares]]\ntag = '{tag}'\nsource = '/'\nimage = true\n{rest}"
        ))
    };
    let store = "read_only = true\ncache = 'always'\n";
    let nodes = read(&share("a23456789012345", store)).expect("valid").nodes;
    assert!(nodes[0].shares[0].image);
    for rest in ["", "read_only = true\n", "cache = 'always'\n"] {
        let message = refused(&share("a", rest));
        assert!(message.contains("/nowhere/ping.toml"), "{message}");
        assert!(message.contains("shares[0].image"), "{message}");
        assert!(message.contains("`read_only = true` and `cache = \"always\"`"), "{message}");
    }
    let message = refused(&share("a", store).replacen("[[", "backend = 'qemu'\n[[", 1));
    assert!(message.contains("one under QEMU has no memory in common with firn"), "{message}");
    let message = refused(&share("a234567890123456", store));
    assert!(message.contains("shares[0].tag"), "{message}");
    assert!(message.contains("at most 15 bytes"), "{message}");
}

#[test]
fn ipv6_repeats_the_decimal_digits() {
    let mut node = read(&node("")).expect("valid").nodes.remove(0);
    node.number = 254;
    assert_eq!(node.ipv6(number(19)).to_string(), "2001:db8:19::254");
}

#[test]
fn unknown_key() {
    let message = refused(&node("memroy_size = 3"));
    assert!(message.contains("/nowhere/ping.toml:3:1"), "{message}");
    assert!(
        message.contains("unknown field `memroy_size`, expected one of `backend`"),
        "{message}"
    );
    assert!(message.contains("memroy_size = 3"), "{message}");
}

#[test]
fn wrong_type() {
    let message = refused(&node("cores = \"two\""));
    assert!(message.contains("/nowhere/ping.toml:3:9"), "{message}");
    assert!(message.contains("invalid type: string \"two\""), "{message}");
    assert!(message.contains("cores = \"two\""), "{message}");
}

#[test]
fn two_nodes_of_one_name() {
    let message = refused("test_script = ''\n[nodes.a]\n[nodes.a]\n");
    assert!(message.contains("/nowhere/ping.toml:3:"), "{message}");
    assert!(message.contains("duplicate key"), "{message}");
}

#[test]
fn two_nodes_of_one_variable() {
    let message = refused("test_script = ''\n[nodes.a-b]\n[nodes.a_b]\n");
    assert!(message.contains("`a-b` and `a_b` would both be `a_b`"), "{message}");
    assert!(message.contains("ping.toml:3:8"), "{message}");
}

#[test]
fn memory_and_cores_have_ranges() {
    let message = refused(&node("memory = 0"));
    assert!(message.contains("`nodes.machine1.memory`: 0 cannot be used"), "{message}");
    assert!(message.contains("allowed: 64 to 1048576 MiB"), "{message}");
    assert!(message.contains("ping.toml:3:10"), "{message}");
    let message = refused(&node("cores = 33"));
    assert!(message.contains("allowed: 1 to 32 processors"), "{message}");
    assert!(refused(&node("memory = -5")).contains("-5"));
}

#[test]
fn vlans_have_a_range_and_no_doubles() {
    assert!(refused(&node("vlans = [0]")).contains("allowed: 1 to 254"));
    assert!(refused(&node("vlans = [1, 255]")).contains("`nodes.machine1.vlans[1]`: 255"));
    let message = refused(&node("vlans = [7, 7]"));
    assert!(message.contains("`nodes.machine1.vlans[1]`: 7 cannot be used"), "{message}");
    assert!(message.contains("allowed: each vlan once"), "{message}");
    let message = refused(&node("macs = { 2 = '52:54:00:00:00:01' }"));
    assert!(message.contains("`nodes.machine1.macs.2`: vlan 2"), "{message}");
    let message = refused(&node("macs = { 1 = '53:54:00:00:00:01' }"));
    assert!(message.contains("such as 52:54:00:12:01:01"), "{message}");
}

#[test]
fn files_must_exist() {
    let message = refused(&node("kernel = \"no/vmlinuz\""));
    assert!(
        message.contains("`nodes.machine1.kernel`: /nowhere/no/vmlinuz: No such file"),
        "{message}"
    );
    assert!(message.contains("ping.toml:3:10"), "{message}");
    let message = refused(&node("initrd = [\"/\"]"));
    assert!(message.contains("`nodes.machine1.initrd[0]`: /: is a directory"), "{message}");
    let share = "[[nodes.machine1.shares]]\nsource = \"/no/such\"\ntag = \"data\"\ntarget = \"/x\"";
    let message = refused(&node(share));
    assert!(
        message.contains("`nodes.machine1.shares[0].source`: /no/such: No such file"),
        "{message}"
    );
    assert!(message.contains("ping.toml:4:10"), "{message}");
}

#[test]
fn shares_are_checked() {
    let share = |tag: &str, target: &str| {
        node(&format!(
            "[[nodes.machine1.shares]]\ntag = \"{tag}\"\nsource = \"/\"\ntarget = \"{target}\""
        ))
    };
    assert!(read(&share("ok", "/mnt/a")).is_ok());
    assert!(refused(&share("shared", "/x")).contains("one of firn's own: shared, xchg, "));
    assert!(refused(&share("a b", "/x")).contains("allowed: 1 to 36 of A-Z a-z 0-9"));
    let twice = share("a", "/x") + "[[nodes.machine1.shares]]\ntag = 'a'\nsource = '/'\n";
    assert!(refused(&twice).contains("allowed: a unique tag for each share"));
    assert!(refused(&share("a", "x")).contains("allowed: an absolute path"));
    assert!(refused(&share("a", "/x/../y")).contains("allowed: an absolute path"));
    assert!(refused(&share("a", "/x y")).contains("allowed: an absolute path"));
}

#[test]
fn a_test_needs_a_script_and_a_machine() {
    assert!(refused("[nodes.a]\n").contains("missing key `test_script`"));
    assert!(refused("test_script = ''\n").contains("a test needs a machine"));
    assert!(
        refused("test_script = ''\ntest_script_file = 'x'\n[nodes.a]\n").contains("both given")
    );
    assert!(refused("test_script = ''\nglobal_timeout = 0\n[nodes.a]\n").contains("above 0"));
    assert!(refused("test_script = ''\nglobal_timeout = 1e300\n[nodes.a]\n").contains("above 0"));
}

#[test]
fn names_become_host_names() {
    for bad in ["", "a b", "-a", "ä", "a.b", "a/../b"] {
        let message = refused(&format!("test_script = ''\n[nodes.\"{bad}\"]\n"));
        assert!(message.contains("allowed: 1 to 63 of A-Z a-z 0-9 `-` `_`"), "{message}");
    }
    assert_eq!(variable_name("1a-b.c"), "_a_b_c");
}

#[test]
fn no_file() {
    let error =
        TestConfig::from_toml_file(Path::new("/no/such.toml")).expect_err("it does not exist");
    assert_eq!(error.to_string(), "cannot read /no/such.toml");
}

#[test]
fn disks_are_images_or_empty() {
    let dir = tempfile::tempdir().expect("a temp dir");
    fs::write(dir.path().join("store.img"), "s").expect("written");
    let text = node(
        "[[nodes.machine1.disks]]\nimage = 'root.qcow2'\nbacking = ['base.img', '/images']\nserial = 'root'\nsize = 1024\nlabel = 'nixos'\n\
         [[nodes.machine1.disks]]\nimage = 'store.img'\nread_only = true\n\
         [[nodes.machine1.disks]]\nsize = 512\n",
    );
    let test = TestConfig::from_toml(&text, &dir.path().join("t.toml")).expect("valid");
    let disks = &test.nodes[0].disks;
    let root = DiskSpec {
        image: dir.path().join("root.qcow2"),
        backing: vec![dir.path().join("base.img"), "/images".into()],
        serial: Some("root".try_into().expect("a serial number")),
        size: Some(1024_u64.try_into().expect("in range")),
        label: Some("nixos".try_into().expect("a label")),
        ..DiskSpec::default()
    };
    let store =
        DiskSpec { image: dir.path().join("store.img"), read_only: true, ..DiskSpec::default() };
    let empty =
        DiskSpec { size: Some(512_u64.try_into().expect("in range")), ..DiskSpec::default() };
    assert_eq!(disks[..], [root, store, empty]);
    let formats: Vec<_> = disks.iter().map(DiskSpec::format).collect();
    assert_eq!(formats, [DiskFormat::Qcow2, DiskFormat::Raw, DiskFormat::Raw]);
}

#[test]
fn disks_are_checked() {
    let message = refused(&node("disks = [{ image = '/no/such.img' }]"));
    assert!(
        message.contains("`nodes.machine1.disks[0].image`: /no/such.img: No such file"),
        "{message}"
    );
    assert!(message.contains("ping.toml:3:20"), "{message}");
    assert!(refused(&node("disks = [{ image = '/' }]")).contains("is a directory"));
    let disk = |more: &str| refused(&node(&format!("disks = [{{ image = '/no', {more} }}]")));
    assert!(disk("format = 'vmdk'").contains("unknown variant `vmdk`"));
    assert!(disk("serial = 'longer-than-twenty-bytes'").contains("at most 20 ASCII characters"));
    assert!(disk("size = 0").contains("`nodes.machine1.disks[0].size`: 0 cannot be used"));
    assert!(disk("size = 0").contains("allowed: 1 to 67108864 MiB"));
    assert!(disk("size = 1, label = 'a b'").contains("at most 16 ASCII characters"));
    assert!(disk("label = 'nixos'").contains("give its `size` in MiB"));
    let message = refused(&node("disks = [{ size = 1 }, { serial = 'x' }]"));
    assert!(
        message.contains("`nodes.machine1.disks[1].image`: a disk without `image`"),
        "{message}"
    );
}

#[test]
fn keys_that_had_other_names_are_called_by_the_new_ones() {
    for (line, now) in [
        ("memory_size = 512", "it is `memory` now"),
        ("disks = [{ path = 'x' }]", "image is `image` now"),
        ("disks = [{ image = 'x', create_size = 3 }]", "it is `size` now"),
        ("empty_disks = [1]", "`disks = [{ size = 512 }]`"),
        ("restrict_network = true", "`user_network.restrict`"),
        ("[[nodes.machine1.forward_ports]]\nhost.port = 1", "`user_network.forward_ports`"),
        ("[nodes.machine1.shared_directories.x]\nsource = '/'", "it is `shares` now, a list"),
    ] {
        let message = refused(&node(line));
        assert!(message.contains("unknown field") && message.contains(now), "{message}");
    }
}

#[test]
fn screens_and_input_devices() {
    let read = |lines| read(&node(lines)).expect("valid").nodes.remove(0);
    let spec = |kind| ScreenSpec { kind, ..ScreenSpec::default() };
    for (lines, screen) in [
        ("screen = 'plain'", ScreenChoice::Yes(spec(ScreenKind::Plain))),
        ("screen = true", ScreenChoice::Yes(spec(ScreenKind::Plain))),
        ("screen = 'gpu'", ScreenChoice::Yes(spec(ScreenKind::Gpu))),
        ("screen = false", ScreenChoice::No),
        ("keyboard = true", ScreenChoice::Unsaid),
        ("qemu_opts = '-vga std'", ScreenChoice::Yes(spec(ScreenKind::Plain))),
        ("screen = 'plain'\nqemu_opts = '-vga virtio'", ScreenChoice::Yes(spec(ScreenKind::Gpu))),
    ] {
        assert_eq!(read(lines).screen, screen, "{lines}");
    }
    let sized = read("screen = { kind = 'gpu', width = 800 }\nkeyboard = true\ntablet = false");
    let spec = sized.screen.spec().expect("a screen");
    assert_eq!((spec.kind, spec.width.get(), spec.height.get()), (ScreenKind::Gpu, 800, 768));
    assert_eq!((sized.keyboard, sized.tablet), (Some(true), Some(false)));
    for (lines, said) in [
        ("screen = 'vnc'", "`nodes.machine1.screen`: \"vnc\" cannot be used"),
        (
            "screen = 3",
            "`nodes.machine1.screen`: invalid type: integer `3`, expected \"plain\", \"gpu\"",
        ),
        ("screen = { width = 63 }", "`nodes.machine1.screen.width`: 63 cannot be used"),
        ("screen = { kind = 'vnc' }", "`nodes.machine1.screen.kind`: unknown variant `vnc`"),
        ("screen = { depth = 8 }", "unknown field `depth`"),
        ("keyboard = 'us'", "`nodes.machine1.keyboard`: invalid type: string \"us\""),
        ("qemu_opts = '-vga qxl'", "`nodes.machine1.qemu_opts`: `-vga qxl` is not for firn"),
    ] {
        let text = refused(&node(lines));
        assert!(text.contains(said), "{said} is not in {text}");
    }
}

#[test]
fn a_script_needs_something_of_one_machine_or_of_all() {
    let text = "test_script = ''\n[nodes.a]\n[nodes.b-1]\n[nodes.c]\nscreen = false\n";
    let mut test = read(text).expect("valid");
    test.supply(Some("b_1"), Needs { screen: true, ..Needs::default() });
    test.supply(None, Needs { keyboard: true, ..Needs::default() });
    let has: Vec<_> = test
        .nodes
        .iter()
        .map(|node| (node.screen.spec().is_some(), node.keyboard, node.tablet))
        .collect();
    let typed_on = Some(true);
    assert_eq!(has, [(false, typed_on, None), (true, typed_on, None), (false, typed_on, None)]);
    test.supply(None, Needs::ALL);
    let has: Vec<_> = test.nodes.iter().map(|node| node.screen.spec().is_some()).collect();
    assert_eq!(has, [true, true, false]);
}
