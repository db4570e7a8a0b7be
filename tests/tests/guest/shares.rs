//! Directories of the host that guests mount.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use firn::kit::IMAGE_DRIVERS;
use firn::{Driver, Machine};
use firn_tests::skip::skipped;
use firn_tests::{micro, noise, output, with_machines};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{geteuid, mkfifo};
use tempfile::TempDir;

/// Two guests with the share `exchange` in `/mnt`.
fn two_guests(exchange: &Path) -> String {
    let share = format!("tag = 'exchange'\nsource = {exchange:?}\ntarget = '/mnt'");
    format!("[[nodes.a.shares]]\n{share}\n[[nodes.b.shares]]\n{share}")
}

/// Who writes to a share and reads from it.
enum Side<'a> {
    Host(&'a Path),
    /// A user of a guest.
    Guest(&'a Machine, &'a str),
}

impl Side<'_> {
    async fn write(&self, file: &str, text: &str) {
        match self {
            Side::Host(dir) => fs::write(dir.join(file), text).unwrap(),
            Side::Guest(machine, user) => {
                let command = format!("su {user} -c 'printf %s \"{text}\" >/mnt/{file}'");
                output(machine, &command).await;
            }
        }
    }

    /// What it sees in a file; `-` if there is none.
    async fn read(&self, file: &str) -> String {
        match self {
            Side::Host(dir) => fs::read_to_string(dir.join(file)).unwrap_or("-".to_owned()),
            Side::Guest(machine, user) => {
                let command = format!("su {user} -c 'cat /mnt/{file} 2>/dev/null || echo -'");
                output(machine, &command).await
            }
        }
    }
}

/// Each side reads what another one has written, new files and changed ones, at its first look: that is
/// sooner than within any time.
async fn all_sides_read_and_write(driver: &Driver, exchange: &Path) {
    driver.start_all().await.unwrap();
    let [a, b] = driver.machines() else { panic!("two machines") };
    for machine in [a, b] {
        output(machine, "echo user:x:1000:1000::/tmp:/bin/sh >>/etc/passwd").await;
    }
    for user in ["root", "user"] {
        let sides = [Side::Host(exchange), Side::Guest(a, user), Side::Guest(b, user)];
        let note = format!("{user}-note");
        // Made by a guest, so that what the user there makes is what the others change.
        sides[1].write(&note, "the first of all").await;
        for (number, writer) in sides.iter().enumerate() {
            let new = format!("{user}-{number}");
            for reader in &sides {
                // A guest that remembered what it sees now would be wrong later.
                assert_eq!(reader.read(&new).await, "-");
                assert_ne!(reader.read(&note).await, "-");
            }
            let text = format!("{user} writes: {}", "x".repeat(number * 5000 + 1));
            writer.write(&new, &text).await;
            writer.write(&note, &text).await;
            for reader in &sides {
                assert_eq!(reader.read(&new).await, text);
                assert_eq!(reader.read(&note).await, text);
            }
        }
        // Each guest removes what the other one has made.
        for (remover, number) in [(a, 2), (b, 1)] {
            output(remover, &format!("su {user} -c 'rm /mnt/{user}-{number}'")).await;
            for reader in &sides {
                assert_eq!(reader.read(&format!("{user}-{number}")).await, "-");
            }
        }
    }
}

#[test]
fn two_guests_and_the_host_write_to_one_share() {
    let exchange = tempfile::tempdir().unwrap();
    // As root, firn keeps the guest's users apart.
    fs::set_permissions(exchange.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    with_machines(&two_guests(exchange.path()), async |driver| {
        all_sides_read_and_write(driver, exchange.path()).await;
    });
}

/// Who the unprivileged firn runs as.
const USER: u32 = 1000;
/// Set for the process in which the next test really runs.
const INNER: &str = "FIRN_TEST_UNPRIVILEGED";

#[test]
fn two_guests_and_the_host_write_to_one_share_without_root() {
    let me = fs::metadata("/proc/self").unwrap().uid();
    if me == 0 {
        assert!(std::env::var_os(INNER).is_none(), "still root");
        return as_user("shares::two_guests_and_the_host_write_to_one_share_without_root");
    }
    let exchange = tempfile::tempdir().unwrap();
    with_machines(&two_guests(exchange.path()), async |driver| {
        all_sides_read_and_write(driver, exchange.path()).await;
    });
    for entry in fs::read_dir(exchange.path()).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().uid(), me);
    }
}

/// Runs the test `name` of this program again, as [`USER`].
fn as_user(name: &str) {
    let Some(groups) = groups_for_kvm() else {
        skipped("on this host none but root may use /dev/kvm");
        return;
    };
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (program, agent) = (place.path().join("tests"), place.path().join("agent"));
    // Where they are may be a place for root only.
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::copy(firn_kits::find_agent().unwrap(), &agent).unwrap();
    let cache = copy_of_kit(&place);
    let tmp = place.path().join("tmp");
    fs::create_dir(&tmp).unwrap();
    chown(&tmp, Some(USER), Some(USER)).unwrap();
    let run = Command::new("setpriv")
        .args([&format!("--reuid={USER}"), &format!("--regid={USER}"), &groups])
        .args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"])
        .arg(&program)
        .args(["--exact", name, "--nocapture"])
        .current_dir("/")
        .env(INNER, "1")
        .env("FIRN_AGENT", agent)
        .env("XDG_CACHE_HOME", cache)
        .env("HOME", &tmp)
        .env("TMPDIR", &tmp)
        .output()
        .expect("setpriv can be run");
    let said = String::from_utf8_lossy(&run.stdout);
    eprintln!("{said}{}", String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success() && said.contains("1 passed"), "{}", run.status);
    assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0, "something is left");
}

/// What setpriv must be told for a user of KVM; none if there is no such user but root.
fn groups_for_kvm() -> Option<String> {
    let kvm = fs::metadata("/dev/kvm").expect("there is KVM");
    if kvm.mode() & 0o006 == 0o006 {
        return Some("--clear-groups".to_owned());
    }
    (kvm.mode() & 0o060 == 0o060 && kvm.gid() != 0).then(|| format!("--groups={}", kvm.gid()))
}

/// The part of the cache that finds and boots the kit, for another user.
fn copy_of_kit(place: &TempDir) -> PathBuf {
    let kit = micro().dir;
    let cache = kit.ancestors().nth(2).expect("CACHE/kits/NAME");
    let copy = place.path().join("cache");
    let copy_dir = |dir: &Path, files: &[&str]| {
        let target = copy.join("firn").join(dir.strip_prefix(cache).unwrap());
        fs::create_dir_all(&target).unwrap();
        for file in files {
            fs::copy(dir.join(file), target.join(file)).unwrap();
        }
    };
    copy_dir(&kit, &["kernel", "vmlinux", "initrd", IMAGE_DRIVERS, "manifest.json"]);
    for base in fs::read_dir(cache.join("base")).unwrap() {
        copy_dir(&base.unwrap().path(), &["base.json"]);
    }
    copy
}

/// A directory in which there is everything that one can hold.
pub(crate) fn tree() -> TempDir {
    let tree = tempfile::tempdir().unwrap();
    let path = |name: &str| tree.path().join(name);
    fs::write(path("file"), "of the host").unwrap();
    fs::write(path("large"), noise(3_000_000)).unwrap();
    fs::write(path("executable"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(path("executable"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::create_dir_all(path("a/b/c")).unwrap();
    for number in 0..300 {
        fs::write(path("a/b").join(format!("file {number}")), number.to_string()).unwrap();
    }
    fs::write(path("a").join(OsStr::from_bytes(b"new\nline \xff")), "odd").unwrap();
    fs::write(path("a").join("n".repeat(255)), "").unwrap();
    fs::hard_link(path("large"), path("a/b/linked")).unwrap();
    symlink("/etc/passwd", path("a/out")).unwrap();
    symlink("../a/b", path("a/inside")).unwrap();
    mkfifo(&path("a/fifo"), Mode::S_IRUSR).unwrap();
    UnixListener::bind(path("a/socket")).unwrap();
    if geteuid().is_root() {
        mknod(&path("a/null"), SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, 3)).unwrap();
    }
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o777)).unwrap();
    tree
}

/// All that can be seen of the files below the working directory, but inode numbers.
const ALL: &str = "{ find . -exec stat -c '%n %f %s %b %u %g %h %Y %Z %t %T' {} + | sort; \
    find . -type f -exec sha256sum {} + | sort; find . -type l -exec readlink {} ';' | sort; } ";

#[test]
fn read_only_shares_show_the_whole_tree_and_refuse_writes_even_if_mounted_writable() {
    let source = tree();
    // The second has a server of its own.
    let share = |name: &str, cache: &str| {
        format!(
            "[[nodes.m.shares]]\ntag = '{name}'\nsource = {:?}\ntarget = '/mnt/{name}'\n\
             read_only = true\ncache = '{cache}'\n",
            source.path()
        )
    };
    let nodes = share("store", "auto") + &share("fixed", "always");
    with_machines(&nodes, async |driver| {
        let m = &driver.machines()[0];
        let all = output(m, &format!("cd /mnt/store; {ALL} | tee /tmp/all | wc -l")).await;
        assert!(all.parse::<usize>().unwrap() > 600, "{all}");
        for cold in ["", "echo 3 >/proc/sys/vm/drop_caches; "] {
            output(m, &format!("cd /mnt/fixed; {cold}{ALL} | diff /tmp/all -")).await;
        }
        output(m, "cd /mnt/fixed; test large -ef a/b/linked && cmp file a/b/../../file").await;
        for share in ["/mnt/store", "/mnt/fixed"] {
            refuses_writes(m, share).await;
        }
        // Whatever happens to it on the host, the guest gets an error and goes on.
        fs::write(source.path().join("late"), "never read").unwrap();
        let look = "echo 3 >/proc/sys/vm/drop_caches; cd /mnt/fixed; ls -l large late >/dev/null";
        output(m, look).await;
        let large = fs::File::options().write(true).open(source.path().join("large")).unwrap();
        large.set_len(1_000_000).unwrap();
        fs::remove_file(source.path().join("late")).unwrap();
        m.fail(&["cat /mnt/fixed/large", "cat /mnt/fixed/late"], None).await.unwrap();
        assert_eq!(output(m, "cat /mnt/fixed/file '/mnt/fixed/a/b/file 8'").await, "of the host8");
    });
    let file = source.path().join("file");
    assert_eq!(fs::read(&file).unwrap(), b"of the host");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o644);
    assert_eq!(fs::read_dir(source.path()).unwrap().count(), 4);
}

#[test]
fn of_a_store_a_machine_sees_what_its_list_names() {
    let store = tempfile::tempdir().unwrap();
    let lists = tempfile::tempdir().unwrap();
    let mut nodes = String::new();
    for (name, paths) in [("a", ["one", "both"]), ("b", ["two", "both"])] {
        for path in paths {
            fs::create_dir_all(store.path().join(path)).unwrap();
            fs::write(store.path().join(path).join("name"), path).unwrap();
        }
        let list = lists.path().join(name);
        let paths = paths.map(|path| store.path().join(path).display().to_string());
        fs::write(&list, paths.join("\n") + "\n").unwrap();
        nodes += &format!(
            "[[nodes.{name}.shares]]\ntag = 'store'\nsource = {:?}\ntarget = '/mnt'\n\
             read_only = true\ncache = 'always'\nonly = {list:?}\n",
            store.path()
        );
    }
    with_machines(&nodes, async |driver| {
        driver.start_all().await.unwrap();
        let [a, b] = driver.machines() else { panic!("two machines") };
        assert_eq!(output(a, "cd /mnt; ls; cat one/name both/name").await, "both\none\noneboth");
        assert_eq!(output(b, "cd /mnt; ls; cat two/name both/name").await, "both\ntwo\ntwoboth");
        a.fail(&["cat /mnt/two/name"], None).await.unwrap();
        b.fail(&["ls /mnt/one"], None).await.unwrap();
    });
}

/// What nobody may do to [`tree`] who may only read it.
pub(crate) const CHANGES: [&str; 12] = [
    "echo x >new",
    "echo x >>file",
    "echo x >file",
    "mkdir dir",
    "mkfifo fifo",
    "ln -s x link",
    "ln file hard",
    "rm file",
    "mv file other",
    "chmod 600 file",
    "touch file",
    "truncate -s 3 file",
];

async fn refuses_writes(m: &Machine, share: &str) {
    let changes = CHANGES.map(|change| format!("cd {share}; {change}"));
    let changes: Vec<_> = changes.iter().map(String::as_str).collect();
    let file = format!("cat {share}/file");
    assert_eq!(output(m, &file).await, "of the host");
    m.fail(&changes, None).await.unwrap();
    output(m, &format!("mount -o remount,rw {share}; grep -q '{share} virtiofs rw' /proc/mounts"))
        .await;
    m.fail(&changes, None).await.unwrap();
    output(m, "echo 3 >/proc/sys/vm/drop_caches").await;
    assert_eq!(output(m, &file).await, "of the host");
}

#[test]
fn every_machine_has_the_common_share_and_one_of_its_own() {
    with_machines("[nodes.a]\n[nodes.b]", async |driver| {
        driver.start_all().await.unwrap();
        let [a, b] = driver.machines() else { panic!("two machines") };
        fs::write(a.shared_dir().join("from-host"), "host").unwrap();
        for machine in [a, b] {
            output(machine, "cp /etc/hostname /tmp/shared/from-$(hostname)").await;
            output(machine, "cp /etc/hostname /tmp/xchg/name").await;
        }
        for machine in [a, b] {
            let all = output(machine, "cd /tmp/shared; cat from-a from-b from-host").await;
            assert_eq!(all, "a\nb\nhost");
            let own = fs::read_to_string(machine.state_dir().join("xchg/name")).unwrap();
            assert_eq!(own.trim(), machine.name());
            assert_eq!(output(machine, "ls /tmp/xchg").await, "name");
        }
        assert_eq!(fs::read_to_string(b.shared_dir().join("from-a")).unwrap(), "a\n");
    });
}

/// Another user of the host.
const NOBODY: u32 = 65534;

#[test]
fn no_other_user_of_the_host_comes_to_what_guests_write() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("SKIPPED: only root can be another user");
        return;
    }
    with_machines("[nodes.m]\ndisks = [{ size = 16 }]", async |driver| {
        let m = &driver.machines()[0];
        m.start(false).await.unwrap();
        output(m, "cp /bin/busybox /tmp/shared/sh; chmod 4755 /tmp/shared/sh").await;
        output(m, "echo secret >/tmp/xchg/note; chmod 666 /tmp/xchg/note").await;
        let (state, shared) = (m.state_dir(), m.shared_dir());
        assert!(shared.join("sh").exists() && state.join("xchg/note").exists());
        for path in [&shared.join("sh"), &state.join("xchg/note"), &state.join("disk0.img")] {
            let seen = Command::new("cat").arg(path).uid(NOBODY).gid(NOBODY).output().unwrap();
            assert!(!seen.status.success(), "{} is open to all", path.display());
        }
        for dir in [&state, &shared, &state.join("xchg")] {
            let seen = Command::new("ls").arg(dir).uid(NOBODY).gid(NOBODY).output().unwrap();
            assert!(!seen.status.success(), "{} is open to all", dir.display());
        }
        // What firn makes itself is closed of its own.
        for entry in fs::read_dir(&state).unwrap().map(Result::unwrap) {
            let meta = entry.metadata().unwrap();
            assert!(meta.is_dir() || meta.mode() & 0o077 == 0, "{}", entry.path().display());
        }
        assert_eq!(fs::metadata(shared).unwrap().mode() & 0o777, 0o700);
    });
}
