use std::fs;
use std::path::Path;

use super::*;

fn read(text: &str) -> Result<TestConfig, ConfigError> {
    TestConfig::from_toml(text, Path::new("/nowhere/ping.toml"))
}

/// The message for a file that must be refused.
#[track_caller]
fn refused(text: &str) -> String {
    read(text).expect_err("the file makes no sense").to_string()
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
            kit: KitName::Micro,
            kernel: None,
            initrd: None,
            cmdline: None,
            memory_mib: 512,
            cores: 1,
            user_network: Some(UserNetwork::default()),
            vlans: vec![1],
            macs: BTreeMap::new(),
            disks: vec![],
            shares: vec![],
            exchange: true,
            rng: true,
            balloon: false,
            vsock: None,
            oem_strings: vec![],
            credentials: BTreeMap::new(),
        }]
    );
}

#[test]
fn kits_bring_their_memory() {
    let read = |lines| read(&node(lines)).expect("valid").nodes.remove(0);
    let machine = read("kit = 'systemd'");
    assert_eq!((machine.kit, machine.memory_mib), (KitName::Systemd, 1024));
    assert_eq!(read("kit = 'systemd'\nmemory_size = 700").memory_mib, 700);
    assert_eq!(read("kit = 'micro'").memory_mib, 512);
    // The carrier's is no guest's.
    for wrong in ["carrier", "Micro", ""] {
        let text = refused(&node(&format!("kit = '{wrong}'")));
        assert!(text.contains(&format!("`kit` is \"{wrong}\"")), "{text}");
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
    assert_eq!(nodes[0].vsock, Some(VsockSpec { cid: 3, socket }));
    for cid in [0_u64, 2, 4_294_967_295, 1 << 40] {
        let text = refused(&node(&format!("vsock = {{ cid = {cid}, socket = '/s' }}")));
        assert!(text.contains(&format!("`cid` is {cid}")), "{text}");
    }
}

#[test]
fn the_user_network_is_described_as_in_nixos() {
    let network = |lines: &str| read(&node(lines)).expect("valid").nodes.remove(0).user_network;
    assert_eq!(network("user_network = false"), None);
    assert_eq!(network("user_network = true"), Some(UserNetwork::default()));
    let lines = "restrict_network = true
host_loopback = false
[[nodes.machine1.forward_ports]]
host.port = 2222
guest.port = 22
[[nodes.machine1.forward_ports]]
from = 'guest'
proto = 'udp'
host = { address = '192.0.2.1', port = 53 }
guest = { address = '10.0.2.100', port = 5353 }
[[nodes.machine1.forward_ports]]
host = { address = '::1', port = 0 }
guest = { address = 'fd00::5054:ff:fe12:3456', port = 80 }";
    let UserNetwork { restrict, host_loopback, forwards } = network(lines).expect("there is one");
    assert!(restrict && !host_loopback);
    let said: Vec<_> = forwards
        .iter()
        .map(|f| format!("{:?} {} {} {}", f.from, f.protocol, f.host, f.guest))
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
    let forward =
        |lines: &str| refused(&node(&format!("[[nodes.machine1.forward_ports]]\n{lines}")));
    assert!(forward("host.port = 1\nguest.port = 0").contains("`guest.port` of a forwarded port"));
    let text = forward("from = 'guest'\nhost.port = 1\nguest.port = 1");
    assert!(text.contains("`guest.address`") && text.contains("such as 10.0.2.100"), "{text}");
    let text = forward("from = 'guest'\nhost.port = 0\nguest = { address = '10.0.2.9', port = 1 }");
    assert!(text.contains("`host.port`") && text.contains("1 to 65535"), "{text}");
    let text = forward("from = 'both'\nhost.port = 1\nguest.port = 1");
    assert!(text.contains("unknown variant `both`, expected `host` or `guest`"), "{text}");
    let text = forward("host.port = 65536\nguest.port = 1");
    assert!(text.contains("65536"), "{text}");
    for key in [
        "restrict_network = true",
        "host_loopback = true",
        "forward_ports = [{ host.port = 1, guest.port = 1 }]",
    ] {
        let text = refused(&node(&format!("user_network = false\n{key}")));
        assert!(text.contains("is for the user network"), "{text}");
    }
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
memory_size = 256
cores = 4
vlans = [1, 200]
[nodes.b.shared_directories.data]
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
    assert_eq!(test.vlans(), [1, 200]);
    let names: Vec<_> = test.nodes.iter().map(|n| (n.name.as_str(), n.number)).collect();
    assert_eq!(names, [("a", 1), ("b", 2)]);
    let b = &test.nodes[1];
    assert_eq!(b.kernel, Some(dir.path().join("vmlinux")));
    assert_eq!((b.memory_mib, b.cores), (256, 4));
    assert_eq!(b.shares[0].source, dir.path().join("data").canonicalize().expect("exists"));
    assert!(b.shares[0].read_only && b.shares[0].allow_setuid);
    assert_eq!(b.shares[0].cache, CachePolicy::Auto);
    assert_eq!(b.mac(200), [0x52, 0x54, 0, 0x12, 200, 2]);
    assert_eq!(b.ipv4(200).to_string(), "192.168.200.2");
    assert_eq!(b.ipv6(200).to_string(), "2001:db8:200::2");
}

#[test]
fn ipv6_repeats_the_decimal_digits() {
    let mut node = read(&node("")).expect("valid").nodes.remove(0);
    node.number = 254;
    assert_eq!(node.ipv6(19).to_string(), "2001:db8:19::254");
}

#[test]
fn unknown_key() {
    let message = refused(&node("memroy_size = 3"));
    assert!(message.contains("/nowhere/ping.toml:3:1"), "{message}");
    assert!(message.contains("unknown field `memroy_size`, expected one of `kit`"), "{message}");
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
    let message = refused(&node("memory_size = 0"));
    assert!(message.contains("`memory_size` is 0"), "{message}");
    assert!(message.contains("allowed: 64 to 1048576 MiB"), "{message}");
    assert!(message.contains("ping.toml:3:15"), "{message}");
    let message = refused(&node("cores = 33"));
    assert!(message.contains("allowed: 1 to 32 processors"), "{message}");
    assert!(refused(&node("memory_size = -5")).contains("-5"));
}

#[test]
fn vlans_have_a_range_and_no_doubles() {
    assert!(refused(&node("vlans = [0]")).contains("allowed: 1 to 254"));
    assert!(refused(&node("vlans = [1, 255]")).contains("`vlans` has 255"));
    assert!(refused(&node("vlans = [7, 7]")).contains("`vlans` has 7 twice"));
}

#[test]
fn files_must_exist() {
    let message = refused(&node("kernel = \"no/vmlinuz\""));
    assert!(
        message.contains("`kernel` cannot be used: /nowhere/no/vmlinuz: No such file"),
        "{message}"
    );
    assert!(message.contains("ping.toml:3:10"), "{message}");
    assert!(refused(&node("initrd = \"/\"")).contains("`initrd` is a directory"));
    let share = "[nodes.machine1.shared_directories.data]\nsource = \"/no/such\"\ntarget = \"/x\"";
    let message = refused(&node(share));
    assert!(
        message.contains("source of share `data` cannot be used: /no/such: No such file"),
        "{message}"
    );
    assert!(message.contains("ping.toml:4:10"), "{message}");
}

#[test]
fn shares_are_checked() {
    let share = |tag: &str, target: &str| {
        node(&format!(
            "[nodes.machine1.shared_directories.\"{tag}\"]\nsource = \"/\"\ntarget = \"{target}\""
        ))
    };
    assert!(read(&share("ok", "/mnt/a")).is_ok());
    assert!(refused(&share("shared", "/x")).contains("the tag `shared` is firn's own"));
    assert!(refused(&share("a b", "/x")).contains("cannot be a share's tag"));
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
        assert!(message.contains("cannot be a machine's name"), "{message}");
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
fn disks_come_before_empty_disks() {
    let dir = tempfile::tempdir().expect("a temp dir");
    fs::write(dir.path().join("store.img"), "s").expect("written");
    let text = node(
        "empty_disks = [512, 1]\n[[nodes.machine1.disks]]\npath = 'root.qcow2'\nserial = 'root'\n\
         create_size = 1024\next4_label = 'nixos'\n\
         backing = ['base.img', '/images']\n\
         [[nodes.machine1.disks]]\npath = 'store.img'\nread_only = true\n",
    );
    let test = TestConfig::from_toml(&text, &dir.path().join("t.toml")).expect("valid");
    let root = DiskImage {
        path: dir.path().join("root.qcow2"),
        format: DiskFormat::Qcow2,
        read_only: false,
        serial: Some("root".into()),
        create: Some(DiskCreateSpec { size_mib: 1024, ext4_label: Some("nixos".into()) }),
        backing: vec![dir.path().join("base.img"), "/images".into()],
    };
    let store = DiskImage {
        path: dir.path().join("store.img"),
        format: DiskFormat::Raw,
        read_only: true,
        serial: None,
        create: None,
        backing: Vec::new(),
    };
    let expected = [
        DiskConfig::Image(root),
        DiskConfig::Image(store),
        DiskConfig::Empty(512),
        DiskConfig::Empty(1),
    ];
    assert_eq!(test.nodes[0].disks, expected);
}

#[test]
fn disks_are_checked() {
    let message = refused(&node("disks = [{ path = '/no/such.img' }]"));
    assert!(message.contains("`path` cannot be used: /no/such.img: No such file"), "{message}");
    assert!(message.contains("ping.toml:3:19"), "{message}");
    assert!(refused(&node("disks = [{ path = '/' }]")).contains("is a directory"));
    let disk = |more: &str| refused(&node(&format!("disks = [{{ path = '/no', {more} }}]")));
    assert!(disk("format = 'vmdk'").contains("unknown variant `vmdk`"));
    assert!(disk("serial = 'longer-than-twenty-bytes'").contains("at most 20 ASCII characters"));
    assert!(disk("create_size = 0").contains("`create_size` is 0"));
    assert!(disk("create_size = 1, ext4_label = 'a b'").contains("at most 16 ASCII characters"));
    assert!(disk("ext4_label = 'nixos'").contains("give its size in MiB as `create_size`"));
    let message = refused(&node("empty_disks = [1, 0]"));
    assert!(message.contains("`empty_disks` is 0"), "{message}");
    assert!(message.contains("allowed: 1 to 67108864 MiB"), "{message}");
}
