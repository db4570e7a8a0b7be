//! What files of shares can have: set-uid bits, extended attributes, shared mappings; and deleting
//! many of them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use firn_tests::{output, with_machines};
use tempfile::TempDir;

/// A directory that all users may write to.
fn open_directory() -> TempDir {
    opened(tempfile::tempdir().unwrap())
}

/// The same on a tmpfs: there are whiteouts, and before Linux 6.6 positions in a directory move when something is
/// deleted.
fn open_tmpfs() -> TempDir {
    opened(tempfile::tempdir_in("/dev/shm").unwrap())
}

fn opened(directory: TempDir) -> TempDir {
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    directory
}

/// A machine with a share in `/mnt`.
fn with_share(kit: &str, source: &Path, more: &str) -> String {
    format!(
        "[nodes.m]\nkit = '{kit}'\n\
         shares = [{{ tag = 'files', source = {source:?}, target = \"/mnt\"{more} }}]"
    )
}

#[test]
fn a_directory_of_many_files_is_removed_at_once() {
    let share = open_tmpfs();
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

#[test]
fn attributes_are_kept_and_an_overlay_can_write_to_a_share() {
    let share = open_tmpfs();
    with_machines(&with_share("systemd", share.path(), ""), async |driver| {
        let m = &driver.machines()[0];
        let python =
            async |code: &str| output(m, &format!("python3 -c \"import os; {code}\"")).await;
        output(m, "echo text >/mnt/file").await;
        let first = python("os.setxattr('/mnt/file', 'user.note', b'x')\" 2>&1 || echo \"").await;
        if first.contains("not supported") {
            eprintln!("SKIPPED: the file system of {:?} has no attributes", share.path());
            return;
        }
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

/// A static program for x86-64 that maps `/mnt/file` shared and writes an `M` at its start. It exits with the number of
/// the error of mmap, or 0.
fn program_that_maps() -> Vec<u8> {
    const CODE: [&[u8]; 19] = [
        &[0xb8, 2, 0, 0, 0],              // mov eax, SYS_open
        &[0x48, 0x8d, 0x3d, 63, 0, 0, 0], // lea rdi, [path]
        &[0xbe, 2, 0, 0, 0],              // mov esi, O_RDWR
        &[0x31, 0xd2, 0x0f, 0x05],        // xor edx, edx; syscall
        &[0x49, 0x89, 0xc0],              // mov r8, rax
        &[0xb8, 9, 0, 0, 0],              // mov eax, SYS_mmap
        &[0x31, 0xff],                    // xor edi, edi
        &[0xbe, 0, 16, 0, 0],             // mov esi, 4096
        &[0xba, 3, 0, 0, 0],              // mov edx, PROT_READ | PROT_WRITE
        &[0x41, 0xba, 1, 0, 0, 0],        // mov r10d, MAP_SHARED
        &[0x45, 0x31, 0xc9, 0x0f, 0x05],  // xor r9d, r9d; syscall
        &[0x31, 0xff, 0x48, 0x85, 0xc0],  // xor edi, edi; test rax, rax
        &[0x78, 5],                       // js error
        &[0xc6, 0x00, b'M'],              // mov byte [rax], 'M'
        &[0xeb, 4],                       // jmp exit
        &[0x89, 0xc7, 0xf7, 0xdf],        // error: mov edi, eax; neg edi
        &[0xb8, 60, 0, 0, 0],             // exit: mov eax, SYS_exit
        &[0x0f, 0x05],                    // syscall
        b"/mnt/file\0",                   // path
    ];
    const ADDRESS: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let code = CODE.concat();
    let size = HEADERS + u64::try_from(code.len()).unwrap();
    // ELF-64: identification; an executable for x86-64 with one program header, readable and executable.
    let mut program = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    program.extend([ADDRESS + HEADERS, 64, 0].map(u64::to_le_bytes).concat());
    program.extend([0, 0, 64, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    program.extend([1, 5].map(u32::to_le_bytes).concat());
    program.extend([0, ADDRESS, ADDRESS, size, size, 4096].map(u64::to_le_bytes).concat());
    program.extend(code);
    program
}

/// In guests before Linux 6.6, only files that may be cached can be.
#[test]
fn files_can_be_mapped_shared() {
    for (kit, more, status) in [
        ("systemd", "", 0),
        ("micro", ", cache = 'auto'", 0),
        ("micro", "", 19), // ENODEV
    ] {
        let share = open_directory();
        let file = share.path().join("file");
        fs::write(&file, "of the host").unwrap();
        let program = share.path().join("program");
        fs::write(&program, program_that_maps()).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        with_machines(&with_share(kit, share.path(), more), async |driver| {
            let m = &driver.machines()[0];
            let run = "status=0; /mnt/program || status=$?; echo $status";
            assert_eq!(output(m, run).await, status.to_string(), "{kit}{more}");
        });
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(text, if status == 0 { "Mf the host" } else { "of the host" });
    }
}
