use super::super::archive::entries;
use super::*;

fn config() -> GuestConfig {
    GuestConfig {
        hostname: "machine1".into(),
        hosts: vec![
            HostsEntry {
                address: "192.168.1.1".parse().unwrap(),
                names: vec!["machine1".into(), "machine1.test".into()],
            },
            HostsEntry {
                address: "2001:db8:1::2".parse().unwrap(),
                names: vec!["machine2".into()],
            },
        ],
        interfaces: vec![
            Interface {
                name: "eth1".into(),
                mac: [0x52, 0x54, 0, 0x12, 1, 1],
                addresses: vec![
                    ("192.168.1.1".parse().unwrap(), 24),
                    ("2001:db8:1::1".parse().unwrap(), 64),
                ],
                gateway: Some("192.168.1.254".parse().unwrap()),
            },
            Interface {
                name: "eth2".into(),
                mac: [0x52, 0x54, 0, 0x12, 2, 0xff],
                addresses: vec![],
                gateway: None,
            },
        ],
        dns: vec!["10.0.2.3".parse().unwrap(), "fd00::3".parse().unwrap()],
        mounts: vec![
            Mount {
                tag: "host".into(),
                mount_point: "/host".into(),
                kind: MountKind::Image,
                options: "ro".into(),
            },
            Mount {
                tag: "my share".into(),
                mount_point: "/tmp/a b\\c".into(),
                kind: MountKind::Virtiofs,
                options: String::new(),
            },
        ],
    }
}

#[test]
fn writes_what_the_boot_script_reads() {
    let archive = machine_overlay(&config()).unwrap();
    assert_eq!(archive.len() % 4, 0);
    let files = entries(&archive).unwrap();
    let text = |path: &str| {
        let file = files.iter().find(|file| file.name == path).unwrap();
        String::from_utf8(file.contents.clone()).unwrap()
    };
    assert_eq!(text("etc/hostname"), "machine1\n");
    assert_eq!(
        text("etc/hosts"),
        "127.0.0.1 localhost\n::1 localhost ip6-localhost\n192.168.1.1 machine1 machine1.test\n2001:db8:1::2 machine2\n"
    );
    assert_eq!(
        text("etc/firn/network"),
        "eth2 52:54:00:12:02:ff\neth1 52:54:00:12:01:01 192.168.1.1/24 2001:db8:1::1/64 via=192.168.1.254\n"
    );
    assert_eq!(text("etc/resolv.conf"), "nameserver 10.0.2.3\nnameserver fd00::3\n");
    assert_eq!(
        text("etc/firn/mounts"),
        "host /host erofs ro\nmy\\ share /tmp/a\\ b\\\\c virtiofs rw\n"
    );
}

#[test]
fn the_shell_reads_mounts_as_they_were_meant() {
    let mounts = mounts(&config().mounts).unwrap();
    let script = "while read tag dir type options; do \
                  printf '%s|' \"$tag\" \"$dir\" \"$type\" \"$options\"; done <<'E'\n";
    let output = std::process::Command::new("sh")
        .arg("-c")
        .arg(format!("{script}{mounts}E\n"))
        .output()
        .unwrap();
    let read = "host|/host|erofs|ro|my share|/tmp/a b\\c|virtiofs|rw|";
    assert_eq!(String::from_utf8(output.stdout).unwrap(), read);
}

#[test]
fn refuses_what_the_files_cannot_hold() {
    let refuse = |change: fn(&mut GuestConfig), message: &str| {
        let mut config = config();
        change(&mut config);
        assert_eq!(machine_overlay(&config).unwrap_err().to_string(), message);
    };
    refuse(|c| c.hostname.clear(), "host name \"\" is empty");
    refuse(|c| c.hostname = "a\nb".into(), "host name \"a\\nb\" has invalid characters");
    refuse(|c| c.hosts[1].names[0] = "a b".into(), "host name \"a b\" has invalid characters");
    refuse(
        |c| c.interfaces[0].name = "a".repeat(16),
        "interface name \"aaaaaaaaaaaaaaaa\" is too long",
    );
    refuse(|c| c.interfaces[0].name = "../x".into(), "interface name \"../x\" has a slash");
    refuse(
        |c| c.interfaces[0].addresses[0].1 = 33,
        "address \"192.168.1.1/33\" has too long a prefix",
    );
    refuse(
        |c| c.mounts[0].mount_point = "host".into(),
        "mount point \"host\" does not start with a slash",
    );
    refuse(|c| c.mounts[0].tag = "a\nb".into(), "share tag \"a\\nb\" is empty or has a line break");
    refuse(
        |c| c.mounts[0].options = "ro bad".into(),
        "mount options \"ro bad\" has invalid characters",
    );
}
