//! What files of shares can have: set-uid bits, extended attributes, shared mappings; and deleting
//! many of them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use firn::Machine;
use firn_tests::with_machines;
use tempfile::TempDir;

async fn output(machine: &Machine, command: &str) -> String {
    machine.succeed(&[command], None).await.unwrap().trim().to_owned()
}

/// A directory that all users may write to.
fn open_directory() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    directory
}

/// A machine with a share in `/mnt`.
fn with_share(kit: &str, source: &Path, more: &str) -> String {
    format!(
        "[nodes.m]\nkit = '{kit}'\n[nodes.m.shared_directories]\n\
         files = {{ source = {source:?}, target = \"/mnt\"{more} }}"
    )
}

#[test]
fn a_directory_of_many_files_is_removed_at_once() {
    let share = open_directory();
    with_machines(&with_share("micro", share.path(), ""), async |driver| {
        let m = &driver.machines()[0];
        for count in [300, 3000] {
            let directory = share.path().join(format!("files-{count}"));
            fs::create_dir(&directory).unwrap();
            for number in 0..count {
                fs::write(directory.join(format!("file-{number}")), "").unwrap();
            }
            assert_eq!(
                output(m, &format!("ls /mnt/files-{count} | wc -l")).await,
                count.to_string()
            );
            output(m, &format!("rm -r /mnt/files-{count}")).await;
            assert!(!directory.exists());
        }
    });
}

#[test]
fn a_guest_leaves_no_set_uid_file_on_the_host() {
    let share = open_directory();
    with_machines(&with_share("micro", share.path(), ""), async |driver| {
        let m = &driver.machines()[0];
        let mode = async |file: &str| output(m, &format!("stat -c %a {file}")).await;
        for dir in ["/mnt", "/tmp/shared", "/tmp/xchg"] {
            let file = format!("{dir}/program");
            output(m, &format!("cp /bin/busybox {file} && chmod 6755 {file}")).await;
            assert_eq!(mode(&file).await, "755");
        }
        output(m, "mkdir /mnt/dir && chmod 2775 /mnt/dir").await;
        assert_eq!(mode("/mnt/dir").await, "2775");
        let on_host = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(on_host(&share.path().join("program")), 0o755);
        assert_eq!(on_host(&m.shared_dir().join("program")), 0o755);
    });
}

#[test]
fn what_another_user_changes_loses_its_set_uid_bits() {
    let share = open_directory();
    let nodes = with_share("micro", share.path(), ", allow_setuid = true");
    with_machines(&nodes, async |driver| {
        let m = &driver.machines()[0];
        output(m, "echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd").await;
        for change in [
            "su user -c 'echo more >>/mnt/file'",
            "su user -c 'echo new >/mnt/file'",
            "su user -c 'truncate -s 3 /mnt/file'",
            "chown 1000 /mnt/file",
        ] {
            output(m, "rm -f /mnt/file; echo text >/mnt/file; chmod 6777 /mnt/file").await;
            assert_eq!(output(m, "stat -c %a /mnt/file").await, "6777", "before {change}");
            output(m, change).await;
            assert_eq!(output(m, "stat -c %a /mnt/file").await, "777", "after {change}");
        }
    });
}

/// A directory of a file system with extended attributes for users; `None` if there is none here.
fn with_attributes() -> Option<TempDir> {
    let places = [std::env::temp_dir(), "/var/tmp".into(), env!("CARGO_TARGET_TMPDIR").into()];
    places.into_iter().find_map(|place| {
        let directory = tempfile::tempdir_in(place).ok()?;
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).ok()?;
        let set = "import os, sys; os.setxattr(sys.argv[1], 'user.test', b'1')";
        let python = Command::new("python3").args(["-c", set]).arg(directory.path()).status();
        python.is_ok_and(|status| status.success()).then_some(directory)
    })
}

#[test]
fn attributes_are_kept_and_an_overlay_can_write_to_a_share() {
    let Some(share) = with_attributes() else {
        eprintln!("SKIPPED: no file system here has extended attributes for users");
        return;
    };
    with_machines(&with_share("systemd", share.path(), ""), async |driver| {
        let m = &driver.machines()[0];
        let python =
            async |code: &str| output(m, &format!("python3 -c \"import os; {code}\"")).await;
        output(m, "echo text >/mnt/file").await;
        for name in ["user.note", "trusted.note", "security.note"] {
            python(&format!("os.setxattr('/mnt/file', '{name}', b'of {name}')")).await;
            let value =
                python(&format!("print(os.getxattr('/mnt/file', '{name}').decode())")).await;
            assert_eq!(value, format!("of {name}"));
        }
        let names = python("print(*sorted(os.listxattr('/mnt/file')))").await;
        assert_eq!(names, "security.note trusted.note user.note");
        python("os.removexattr('/mnt/file', 'trusted.note')").await;
        assert_eq!(python("print(len(os.listxattr('/mnt/file')))").await, "2");

        // Copies of files, directories and links, opaque directories, whiteouts.
        output(
            m,
            "mkdir -p /mnt/upper /mnt/work /run/lower/dir /run/all; echo low >/run/lower/dir/low; \
             echo gone >/run/lower/gone; ln -s gone /run/lower/link; \
             mount -t overlay overlay /run/all \
               -o lowerdir=/run/lower,upperdir=/mnt/upper,workdir=/mnt/work; \
             echo more >>/run/all/dir/low; mv /run/all/link /run/all/moved; \
             rm /run/all/gone; mkdir /run/all/gone; \
             mkdir /run/all/new; rm -r /run/all/dir; mkdir /run/all/dir; echo new >/run/all/dir/new",
        )
        .await;
        assert_eq!(output(m, "cd /run/all; ls -d * dir/*").await, "dir\ndir/new\ngone\nmoved\nnew");
        output(m, "umount /run/all").await;
        assert_eq!(
            python("print(os.getxattr('/mnt/upper/dir', 'trusted.overlay.opaque'))").await,
            "b'y'"
        );
    });
    assert_eq!(fs::read_to_string(share.path().join("upper/dir/new")).unwrap(), "new\n");
}

/// The access list of a directory in which users of the group 100 may write beside its owner, in the form of the
/// attribute (linux/posix_acl_xattr.h).
const ACL: &str = "struct.pack('<I' + 'HHI' * 5, 2, 1, 7, 2**32 - 1, 4, 5, 2**32 - 1, 8, 7, 100, \
    16, 7, 2**32 - 1, 32, 0, 2**32 - 1)";

#[test]
fn access_lists_are_obeyed() {
    let share = open_directory();
    with_machines(&with_share("systemd", share.path(), ""), async |driver| {
        let m = &driver.machines()[0];
        output(m, "mkdir -m 755 /mnt/dir").await;
        let as_user = "setpriv --reuid 1000 --regid 100 --clear-groups touch /mnt/dir/file";
        m.fail(&[as_user], None).await.unwrap();
        let name = "system.posix_acl_access";
        let set = format!("import os, struct; os.setxattr('/mnt/dir', '{name}', {ACL})");
        let said = output(m, &format!("python3 -c \"{set}\" 2>&1 || true")).await;
        if said.contains("not supported") {
            eprintln!("SKIPPED: the file system of {:?} has no access lists", share.path());
            return;
        }
        assert_eq!(said, "");
        output(m, as_user).await;
        assert_eq!(output(m, "stat -c %a /mnt/dir").await, "770");
    });
}

/// Guests before Linux 6.6 cannot do this unless the share may be cached.
#[test]
fn files_can_be_mapped_shared() {
    let share = open_directory();
    with_machines(&with_share("systemd", share.path(), ""), async |driver| {
        let m = &driver.machines()[0];
        fs::write(share.path().join("file"), "of the host").unwrap();
        let map = "import mmap, os; m = mmap.mmap(os.open('/mnt/file', os.O_RDWR), 0); \
            print(m[:].decode()); m[0:2] = b'to'; m.flush()";
        assert_eq!(output(m, &format!("python3 -c \"{map}\"")).await, "of the host");
        assert_eq!(fs::read_to_string(share.path().join("file")).unwrap(), "to the host");
    });
}
