use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use firn_vmm::spec::{CachePolicy, Cores, DiskFormat, ScreenKind, ScreenSpec, VsockSpec};

use super::*;
use crate::config::{BackendKind, ScreenChoice, UserNetwork};
use crate::kit::KitName;

/// The text of a machine file with these lines of JSON beside what every one has.
fn text(lines: &str) -> String {
    format!(
        "#!/usr/bin/env -S firn run\n{{ \"firn\": 1, \"name\": \"server\", \"kernel\": \"/k\",\n{lines} }}\n"
    )
}

fn parse(lines: &str) -> Result<MachineFile, ConfigError> {
    MachineFile::parse(&text(lines), Path::new("/nix/run-server-vm"))
}

#[track_caller]
fn refused(lines: &str) -> String {
    parse(lines).expect_err(lines).to_string()
}

fn variables() -> Variables {
    Variables::of_environment()
        .with("TMPDIR", "/state")
        .with("SHARED_DIR", "/shared")
        .with("NIX_DISK_IMAGE", "")
        .with("QEMU_KERNEL_PARAMS", "debug")
}

#[test]
fn a_short_file() {
    let file = parse("\"memory\": 256").expect("valid");
    let node = file.node(7, &variables(), Path::new("/state")).expect("nothing to expand");
    let expected = NodeConfig {
        name: "server".into(),
        number: 7,
        backend: None,
        start_command: None,
        because: vec![],
        kit: KitName::Micro,
        kernel: Some("/k".into()),
        initrd: Some(vec![]),
        cmdline: Some(String::new()),
        memory: Some(256_u64.try_into().expect("in range")),
        cores: Cores::MIN,
        user_network: None,
        vlans: vec![],
        macs: BTreeMap::new(),
        disks: vec![],
        shares: vec![],
        exchange: false,
        rng: true,
        balloon: false,
        screen: ScreenChoice::Unsaid,
        keyboard: None,
        tablet: None,
        vsock: None,
        oem_strings: vec![],
        credentials: BTreeMap::new(),
        qemu_opts: String::new(),
    };
    assert_eq!(node, expected);
    assert_eq!(file.outline(7).expect("nothing to expand"), expected);
}

#[test]
fn everything() {
    let dir = tempfile::tempdir().expect("a directory");
    let params = dir.path().join("kernel-params");
    fs::write(&params, "loglevel=7 panic=1\n").expect("written");
    let params = params.display();
    let file = parse(&format!(
        r#""number": 3, "cores": 2, "memory": 2048, "initrd": ["/a", "b"],
        "cmdline": "init=/init ${{QEMU_KERNEL_PARAMS:-}}", "cmdline_file": "{params}",
        "shares": [
          {{"tag": "nix-store", "source": "/nix/store", "read_only": true, "cache": "always"}},
          {{"tag": "shared", "source": "${{SHARED_DIR:-${{TMPDIR}}/xchg}}",
            "allow_setuid": true, "copies": {{"a": "file", "b": "${{NIX_DISK_IMAGE:-}}"}}}}
        ],
        "disks": [
          {{"image": "${{NIX_DISK_IMAGE:-server.qcow2}}", "size": 1024, "label": "nixos", "serial": "root"}},
          {{"size": 512, "serial": "data"}},
          {{"image": "/iso", "format": "raw", "read_only": true, "backing": ["base", "${{SHARED_DIR}}"]}}
        ],
        "vlans": [2, 1], "macs": {{"2": "52:54:00:12:02:FF"}},
        "vsock": {{"cid": 3, "socket": "vsock"}}, "rng": false, "balloon": true, "oem_strings": ["a=b"],
        "credentials": {{"ssh.key": "${{TMPDIR}}/key", "token": "./token"}}"#
    ))
    .expect("valid");
    let node = file.node(1, &variables(), Path::new("/state")).expect("all is set");
    assert_eq!(node.initrd, Some(vec!["/a".into(), "/state/b".into()]));
    assert_eq!(node.cmdline.as_deref(), Some("loglevel=7 panic=1 init=/init debug"));
    assert_eq!(node.shares[0].cache, CachePolicy::Always);
    assert!(node.shares[0].read_only && !node.shares[1].read_only);
    assert!(!node.shares[0].allow_setuid && node.shares[1].allow_setuid);
    assert_eq!(node.shares[1].source, Path::new("/shared"));
    let copies: Vec<_> =
        node.shares[1].copies.iter().map(|(name, file)| (&**name, &**file)).collect();
    assert_eq!(copies, [("a", Path::new("/state/file")), ("b", Path::new(""))]);
    let credentials: Vec<_> =
        node.credentials.iter().map(|(name, file)| (&**name, &**file)).collect();
    assert_eq!(
        credentials,
        [("ssh.key", Path::new("/state/key")), ("token", Path::new("/state/./token"))]
    );
    assert_eq!(node.oem_strings, ["a=b"]);
    let disks: Vec<_> = node
        .disks
        .iter()
        .map(|disk| {
            let (size, label) = (disk.size.map(u64::from), disk.label.as_deref());
            let image = disk.image.to_str().expect("UTF-8");
            (image, disk.format(), disk.serial.as_deref(), size, label, disk.read_only)
        })
        .collect();
    assert_eq!(
        disks,
        [
            (
                "/state/server.qcow2",
                DiskFormat::Qcow2,
                Some("root"),
                Some(1024),
                Some("nixos"),
                false
            ),
            ("", DiskFormat::Raw, Some("data"), Some(512), None, false),
            ("/iso", DiskFormat::Raw, None, None, None, true),
        ]
    );
    let vlans = [2_u64, 1].map(|vlan| Number::try_from(vlan).expect("in range"));
    assert_eq!(node.disks[2].backing, [Path::new("/state/base"), Path::new("/shared")]);
    assert_eq!((node.number, &node.vlans[..]), (3, &vlans[..]));
    assert_eq!(node.mac(vlans[0]).0, [0x52, 0x54, 0, 0x12, 2, 0xff]);
    assert_eq!(node.mac(vlans[1]).0, [0x52, 0x54, 0, 0x12, 1, 3]);
    let cid = 3_u64.try_into().expect("in range");
    assert_eq!(node.vsock, Some(VsockSpec { cid, socket: "/state/vsock".into() }));
    // Before the start it is as it will be.
    let preview = file.preview(1, &variables(), Path::new("/state")).expect("all is set");
    assert_eq!(preview.vsock, node.vsock);
    assert!(!node.rng && node.balloon);
}

#[test]
fn what_makes_no_sense_is_named_with_what_would() {
    for (lines, parts) in [
        (r#""memroy": 5"#, &["run-server-vm:3", "unknown field `memroy`", "`memory`"][..]),
        (r#""disks": [{"imag": "x"}]"#, &["unknown field `imag`", "`image`"]),
        (r#""shares": [{"tag": "a"}]"#, &["missing field `source`"]),
        (r#""shares": [{"tag": "a", "source": "/", "cache": "x"}]"#, &["`never`", "`always`"]),
        (
            r#""memory": 1"#,
            &["run-server-vm:3", "`memory`: 1 cannot be used", "allowed: 64 to", "MiB"],
        ),
        (r#""cores": 33"#, &["`cores`: 33 cannot be used", "allowed: 1 to 32 processors"]),
        (r#""number": 0"#, &["`number`: 0 cannot be used", "allowed: 1 to 254"]),
        (
            r#""shares": [{"tag": "a b", "source": "/"}]"#,
            &["`shares[0].tag`: \"a b\"", "1 to 36 of"],
        ),
        (
            r#""shares": [{"tag": "a", "source": "/"}, {"tag": "a", "source": "/"}]"#,
            &["`shares[1].tag`: a cannot", "a unique tag"],
        ),
        (r#""vlans": [0]"#, &["`vlans[0]`: 0 cannot be used", "allowed: 1 to 254"]),
        (r#""vlans": [1, 1]"#, &["`vlans[1]`: 1 cannot be used", "each vlan once"]),
        (r#""vlans": [1], "macs": {"1": "1:2"}"#, &["`macs.1`: \"1:2\"", "52:54:00"]),
        (r#""vlans": [1], "macs": {"1": "01:00:00:00:00:00"}"#, &["`macs.1`"]),
        (r#""nets": [{"vlan": 1}]"#, &["unknown field `nets`", "it is `vlans = [1, 2]` now"]),
        (r#""disks": [{}]"#, &["`disks[0].image`: a disk without `image` and `size`"]),
        (r#""disks": [{"image": "x", "label": "y"}]"#, &["`disks[0].label`", "give its `size`"]),
        (r#""disks": [{"size": 0}]"#, &["`disks[0].size`: 0 cannot be used", "allowed: 1 to"]),
        (r#""disks": [{"size": 1, "serial": "a b"}]"#, &["`disks[0].serial`: \"a b\""]),
        (
            r#""vsock": {"cid": 2, "socket": "s"}"#,
            &["`vsock.cid`: 2 cannot be used", "allowed: 3 to"],
        ),
        (
            r#""shares": [{"tag": "a", "source": "/", "copies": {"../b": "/c"}}]"#,
            &["`shares[0].copies", "\"../b\"", "the name of a file"],
        ),
        (r#""credentials": {"": "/a"}"#, &["`credentials", "\"\" cannot be used"]),
        (r#""credentials": {"..": "/a"}"#, &["`credentials", "\"..\" cannot be used"]),
        (r#""credentials": {"a=b": "/a"}"#, &["`credentials", "\"a=b\"", "without `/`"]),
        (r#""credentials": {"a\u0000b": "/a"}"#, &["`credentials", "\"a\\0b\""]),
        (r#""kit": "micro""#, &["nothing comes from a kit"]),
        (r#""memory": "x""#, &["invalid type: string \"x\""]),
        ("\"memory\": 256 } {", &["trailing characters"]),
    ] {
        let message = refused(lines);
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message}");
        }
    }
    let version = text("\"memory\": 256").replace("\"firn\": 1", "\"firn\": 2");
    let error = MachineFile::parse(&version, Path::new("f")).expect_err("of the future");
    assert!(error.to_string().contains("`firn`: 2 cannot be used"), "{error}");
}

#[test]
fn what_cannot_be_expanded() {
    let file = parse(r#""shares": [{"tag": "x", "source": "${FIRN_NOT_SET}/x"}]"#).expect("valid");
    let error = file.node(1, &variables(), Path::new("/")).expect_err("not set").to_string();
    assert!(error.contains("/nix/run-server-vm:3:"), "{error}");
    // It may be set before the start.
    let preview = file.preview(1, &variables(), Path::new("/")).expect("it is looked up later");
    assert_eq!(preview.shares[0].source, Path::new("/${FIRN_NOT_SET}/x"));
    assert_eq!(
        error.lines().next().unwrap_or_default(),
        "error: `shares[0].source`: the variable FIRN_NOT_SET is not set"
    );
    let file = parse(r#""cmdline": "a", "cmdline_file": "/no/such""#).expect("valid");
    let error = file.node(1, &variables(), Path::new("/")).expect_err("not there").to_string();
    assert_eq!(error, "cannot read /no/such");
}

#[test]
fn other_files_are_said_to_be_what_they_are() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("file");
    for (content, what) in [
        (&b"\x7fELF\x02\xff"[..], "a program that nobody may execute"),
        (b"\xff\xfe", "no text"),
        (b"", "empty"),
        (b"#!/bin/sh\nexec qemu-system-x86_64\n", "a program that nobody may execute"),
        (b"#!/bin/sh\necho firn\n", "a program that nobody may execute"),
        (b"{\"firn\": 1}", "JSON without the first line"),
        (b"hello", "some text"),
    ] {
        fs::write(&path, content).expect("written");
        let error = MachineFile::read(&path).expect_err(what).to_string();
        assert!(
            error.contains("is no machine file of firn, it is ") && error.contains(what),
            "{error}"
        );
    }
    fs::write(&path, "#!/bin/sh\nexec qemu-system-x86_64\n").expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
    let file = MachineFile::read(&path).expect("a start script");
    let command = format!("'{}'", path.display());
    assert_eq!((file.name(), file.command()), ("machine", Some(command)));
    assert!(MachineFile::read(dir.path()).is_err(), "a directory");
    fs::write(&path, text("\"memory\": 256")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("ours");
    assert_eq!(MachineFile::read(&path).expect("valid").name(), "server");
}

#[test]
fn qemus_variables() {
    let file = parse(
        r#""memory": 512, "qemu_opts": "${QEMU_OPTS:-}",
        "user_network": {"restrict": true, "host_loopback": false, "qemu_net_opts": "${QEMU_NET_OPTS:-}",
          "forward_ports": [{"host": {"port": 1}, "guest": {"port": 2}}]}"#,
    )
    .expect("valid");
    let with = |options: &str, net_options: &str| {
        let variables = variables().with("QEMU_OPTS", options).with("QEMU_NET_OPTS", net_options);
        file.node(1, &variables, Path::new("/"))
    };
    let plain = with("", "").expect("nothing is asked for");
    assert_eq!((plain.memory().get(), plain.cores.get()), (512, 1));
    let network = plain.user_network.expect("there is one");
    assert!(network.restrict && !network.host_loopback && network.forward_ports.len() == 1);
    let changed = with("-m 1G -smp 3", "restrict=off,hostfwd=tcp::8080-:80").expect("allowed");
    assert_eq!((changed.memory().get(), changed.cores.get()), (1024, 3));
    let network = changed.user_network.expect("there is one");
    assert!(!network.restrict && network.forward_ports.len() == 2);
    for (options, net_options, message) in [
        ("-vga qxl", "", ["`qemu_opts`: `-vga qxl` is not for firn", "allowed: `-m SIZE`"]),
        ("-m 1", "", ["`qemu_opts`: -m 1 cannot be used", "allowed: 64 to "]),
        ("-smp 33", "", ["`qemu_opts`: -smp 33 cannot be used", "allowed: 1 to 32 processors"]),
        ("", "x=y", ["`user_network.qemu_net_opts`: `x=y` is not for firn", "allowed: `hostfwd="]),
    ] {
        let error = with(options, net_options).expect_err(message[0]).to_string();
        assert!(message.iter().all(|part| error.contains(part)), "{error}");
    }
}

/// What nix/machine-spec.nix makes of the nodes in tests/nix/fixtures.nix.
fn golden(name: &str) -> Option<NodeConfig> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/nix/golden/{name}"));
    let json = fs::read_to_string(path).expect("it was listed");
    let made: Value = serde_json::from_str(&json).expect("Nix writes JSON");
    if let Some(under_qemu) = made.get("qemu") {
        // What would be said without QEMU is there, too.
        assert!(made["error"].as_array().is_some_and(|error| !error.is_empty()), "{name}");
        let text = under_qemu.to_string();
        let file = MachineFile::parse(&text, Path::new(name)).expect("Nix and we agree");
        let node = file.node(254, &variables(), Path::new("/state")).expect("nothing is missing");
        let command = format!("/bin/run-{}-vm", name.trim_end_matches(".json"));
        assert!(node.start_command.expect("there is one").ends_with(&command), "{name}");
        assert_eq!(node.backend, Some(BackendKind::Qemu));
        assert!(node.because.iter().all(|why| why.contains(' ')), "{name}");
        return None;
    }
    let text = format!("#!/nix/store/hash-firn-0.1.0/bin/firn run\n{json}");
    assert!(is_ours(&text));
    let mut file = MachineFile::parse(&text, Path::new(name)).expect("Nix and we agree");
    // It is not there.
    let params = file.keys.remove("cmdline_file").expect("each has one");
    assert!(params.as_str().is_some_and(|params| params.ends_with("/kernel-params")), "{params}");
    let own = variables().with("HOME", "/root").with("QEMU_KERNEL_PARAMS", "last");
    Some(file.node(254, &own, Path::new("/state")).expect("nothing is missing"))
}

#[test]
fn what_nix_makes() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/nix/golden");
    let names = fs::read_dir(dir).expect("it is there").map(|entry| entry.expect("readable"));
    let nodes: BTreeMap<String, NodeConfig> = names
        .filter_map(|entry| {
            let name = entry.file_name().into_string().expect("UTF-8");
            let node = golden(&name)?;
            Some((name.trim_end_matches(".json").to_owned(), node))
        })
        .collect();
    assert!(nodes.len() >= 12, "{} nodes", nodes.len());
    let store = |name: &str| format!("/nix/store/00000000000000000000000000000000-{name}");

    let plain = &nodes["plain"];
    assert_eq!((plain.name.as_str(), plain.number), ("plain", 1));
    assert_eq!(plain.kernel, Some(format!("{}/kernel", store("nixos-system-plain")).into()));
    assert_eq!(plain.initrd, Some(vec![format!("{}/initrd", store("initrd")).into()]));
    let cmdline = plain.cmdline.as_deref().expect("there is one");
    assert!(cmdline.starts_with("initcall_blacklist=") && cmdline.ends_with(" last"), "{cmdline}");
    assert!(cmdline.contains(" init=/nix/store/"), "{cmdline}");
    assert!(cmdline.contains(" console=ttyS0,115200n8 console=tty0 "), "{cmdline}");
    let shares: Vec<_> = plain
        .shares
        .iter()
        .map(|share| (&*share.tag, share.source.to_str().expect("UTF-8"), share.read_only))
        .collect();
    assert_eq!(
        shares,
        [
            ("nix-store", "/nix/store", true),
            ("shared", "/shared", false),
            ("xchg", "/state/xchg", false)
        ]
    );
    assert_eq!(plain.shares[0].cache, CachePolicy::Always);
    assert_eq!(plain.user_network, Some(UserNetwork::default()));

    let vlans = |name: &str| nodes[name].vlans.iter().map(|vlan| vlan.get()).collect::<Vec<_>>();
    assert_eq!(vlans("two-vlans"), [2, 1]);
    let named = &nodes["named-interfaces"];
    assert_eq!((vlans("named-interfaces"), named.number), (vec![3, 254], 17));
    // NixOS knows its cards by these.
    assert_eq!(named.mac(named.vlans[1]).0, [0x52, 0x54, 0, 0x12, 254, 17]);

    let disks = |name: &str| {
        let disks = nodes[name].disks.iter().map(|disk| {
            let size = disk.size.map(u64::from);
            (disk.image.display().to_string(), disk.format(), size, disk.serial.as_deref())
        });
        disks.collect::<Vec<_>>()
    };
    let qcow2 = |path: &str, size, serial| (path.to_owned(), DiskFormat::Qcow2, size, serial);
    assert_eq!(
        disks("disks"),
        [
            qcow2("/state/./disks.qcow2", Some(4096), Some("root")),
            qcow2("/state/empty0.qcow2", Some(512), None),
            qcow2("/state/empty1.qcow2", Some(20), Some("journal")),
            qcow2("/state/empty2.qcow2", Some(30), None),
        ]
    );
    assert_eq!(disks("tmpfs-root"), [qcow2("/state/empty0.qcow2", Some(64), None)]);
    let image = (store("nix-store-image"), DiskFormat::Raw, None, None);
    assert_eq!(disks("store-image")[1], image);
    assert_eq!(
        nodes["forwarded-ports"].user_network.as_ref().map(|net| net.forward_ports.len()),
        Some(3)
    );
    assert!(nodes["restricted"].user_network.as_ref().is_some_and(|net| net.restrict));
    assert_eq!(nodes["no-user-network"].user_network, None);
    assert!(nodes["known-qemu-options"].balloon);
    assert!(nodes["vm-variant"].vlans.is_empty());
    let token = nodes["credentials"].credentials.iter().find(|(name, _)| &***name == "token");
    let token = token.map(|(name, file)| (&**name, &**file));
    assert_eq!(token, Some(("token", Path::new("/state/./token"))));
    let copies = |name: &str| nodes[name].shares.iter().map(|share| share.copies.len()).sum();
    assert_eq!((copies("certificates"), copies("own-certificates")), (1_usize, 0_usize));
    assert_eq!(nodes["own-settings"].vsock.as_ref().map(|vsock| vsock.cid.get()), Some(7));
}

#[test]
fn what_its_script_needs() {
    let needs = Needs { screen: true, keyboard: true, ..Needs::default() };
    let of = |lines: &str| {
        let mut file = parse(lines).expect("valid");
        file.supply(needs);
        let node = file.node(1, &variables(), Path::new("/")).expect("valid");
        (node.screen, node.keyboard, node.tablet)
    };
    let plain = ScreenChoice::Yes(ScreenSpec::default());
    assert_eq!(of("\"memory\": 256"), (plain, Some(true), None));
    assert_eq!(of(r#""screen": false, "keyboard": false"#), (ScreenChoice::No, Some(false), None));
    let gpu = ScreenChoice::Yes(ScreenSpec { kind: ScreenKind::Gpu, ..ScreenSpec::default() });
    assert_eq!(
        of(r#""qemu_opts": "-vga virtio -device usb-tablet""#),
        (gpu, Some(true), Some(true))
    );
    assert_eq!(of(r#""screen": "gpu""#), (gpu, Some(true), None));
}

#[test]
fn start_commands() {
    for (command, name) in [
        ("qemu-system-x86_64 -m 512 $OPTIONS", "machine"),
        ("/nix/store/hash-nixos-vm/bin/run-web-1-vm", "web-1"),
        ("'/nix/store/hash-nixos-vm/bin/run-web-1-vm'", "web-1"),
        ("/bin/run-web-1-vm -snapshot", "machine"),
    ] {
        let file = MachineFile::start_command(command, Path::new("script")).expect(command);
        let node = file.node(3, &variables(), Path::new("/state")).expect(command);
        assert_eq!((file.name(), node.start_command.as_deref()), (name, Some(command)));
        assert_eq!(node.backend(), BackendKind::Qemu);
    }
    for (lines, said) in [
        (r#""backend": "xen""#, "`backend`: unknown variant `xen`"),
        (r#""backend": "firn", "start_command": "qemu""#, "`backend`: \"firn\" cannot be used"),
        (
            r#""backend": "qemu", "user_network": {"host_loopback": false}"#,
            "`user_network.host_loopback`: false cannot be used",
        ),
    ] {
        let error = refused(lines);
        assert!(error.contains(said), "{error}");
    }
}
