use std::fs::File;
use std::sync::Mutex;
use std::time::SystemTime;

use firn::kit::archive::{Entry, entries};

use super::modules::tests::module;
use super::*;

/// Creates a cache with a micro base, so that nothing is fetched.
fn cache_with_base(root: &Path) -> Cache {
    let cache = Cache::at(root.join("firn"));
    let dir = Base::dir_of(&MICRO, &cache);
    fs::create_dir_all(dir.join("modules")).unwrap();
    fs::write(dir.join("kernel"), "kernel").unwrap();
    fs::write(dir.join("vmlinux"), "vmlinux").unwrap();
    fs::write(dir.join("busybox"), "busybox").unwrap();
    fs::write(dir.join("modules/virtio_mmio.ko"), module("")).unwrap();
    fs::write(dir.join("modules/virtio_balloon.ko"), module("")).unwrap();
    fs::write(dir.join("modules/virtio_pmem.ko"), module("")).unwrap();
    let info = base::Info {
        kernel_release: "6.1.0-1-cloud-amd64".into(),
        packages: [("busybox-static".to_owned(), "1:1".to_owned())].into(),
        modules: vec!["virtio_mmio".into()],
        on_demand: vec!["virtio_balloon".into()],
        images: vec!["virtio_pmem".into()],
        applets: vec!["busybox".into(), "sh".into()],
    };
    json::write(&dir.join("base.json"), &info).unwrap();
    cache
}

fn make_quietly(cache: &Cache, agent: &Path) -> (Kit, usize) {
    let lines = Mutex::new(0);
    let kit =
        make(KitName::Micro, cache, agent, Required::Exists, &|_| *lines.lock().unwrap() += 1)
            .unwrap();
    (kit, lines.into_inner().unwrap())
}

#[test]
fn a_kit_is_made_once_for_each_agent() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_with_base(dir.path());
    let agent = dir.path().join("agent");
    fs::write(&agent, "agent one").unwrap();
    let (first, lines) = make_quietly(&cache, &agent);
    assert!(lines > 0);
    let (again, lines) = make_quietly(&cache, &agent);
    assert_eq!((again.dir, lines), (first.dir.clone(), 0));
    fs::write(&agent, "agent two").unwrap();
    let (second, _) = make_quietly(&cache, &agent);
    assert_ne!(second.dir, first.dir);
    assert_eq!(fs::read_to_string(second.vmlinux()).unwrap(), "vmlinux");
    assert_eq!(second.manifest.modules, ["virtio_mmio"]);
}

#[test]
fn the_initrd_has_what_the_agent_expects() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_with_base(dir.path());
    let agent = dir.path().join("agent");
    fs::write(&agent, "the agent").unwrap();
    let (kit, _) = make_quietly(&cache, &agent);
    let initrd = fs::read(kit.initrd()).unwrap();
    let entries = entries(&initrd).unwrap();
    let entry = |path: &str| {
        let found = entries.iter().find(|entry| entry.name == path);
        found
            .map(|entry| (entry.mode, entry.contents.as_slice()))
            .unwrap_or_else(|| panic!("no {path}"))
    };
    assert_eq!(entry("init"), (0o100_755, &b"the agent"[..]));
    assert_eq!(entry("bin/sh"), (0o120_777, &b"busybox"[..]));
    assert_eq!(entry("etc/firn/modules").1, b"/lib/modules/virtio_mmio.ko\n");
    // What few machines need is apart.
    assert!(!entries.iter().any(|entry| entry.name.contains("virtio_pmem")));
    let list = firn::kit::archive::read(&kit.image_drivers(), "etc/firn/image-drivers").unwrap();
    assert_eq!(list, b"/lib/modules/virtio_pmem.ko\n");
    assert_eq!(entry("lib/modules/virtio_mmio.ko").1, module(""));
    assert_eq!(entry("lib/modules/virtio_balloon.ko").1, module(""));
    assert_eq!(entry("etc/firn/boot").0, 0o100_755);
    assert!(entry("etc/firn/lib.sh").1.starts_with(b"#"));
    assert_eq!(entry("tmp").0, 0o041_777);
    // A directory precedes its contents, or the kernel cannot unpack it.
    for (at, Entry { name, .. }) in entries.iter().enumerate() {
        if let Some((parent, _)) = name.rsplit_once('/') {
            assert!(
                entries[..at].iter().any(|entry| entry.name == parent),
                "{name} before {parent}"
            );
        }
    }
}

/// Creates a base like that of the kit `systemd`, with next to nothing in it.
fn systemd_base(cache: &Cache) -> PathBuf {
    let dir = Base::dir_of(&SYSTEMD, cache);
    fs::create_dir_all(dir.join("modules")).unwrap();
    fs::create_dir_all(dir.join("debian/etc/pam.d")).unwrap();
    fs::create_dir_all(dir.join("debian/usr/bin")).unwrap();
    let programs = ["kernel", "vmlinux", "busybox", "debian/usr/bin/true"];
    for file in programs.into_iter().chain(["debian/etc/profile"]) {
        fs::write(dir.join(file), file).unwrap();
    }
    std::os::unix::fs::symlink("usr/bin", dir.join("debian/bin")).unwrap();
    // Stands in for the program that would create the image, which the tree's linker runs.
    let linker = dir.join("debian/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    fs::create_dir_all(linker.parent().unwrap()).unwrap();
    fs::create_dir_all(dir.join("debian/usr/sbin")).unwrap();
    fs::write(dir.join("debian/usr/sbin/mke2fs"), "no static program").unwrap();
    let script = "#!/bin/sh\nwhile [ $# -gt 3 ]; do shift; done\nls \"$1\" > \"$2\"\n";
    fs::write(&linker, script).unwrap();
    fs::set_permissions(&linker, fs::Permissions::from_mode(0o755)).unwrap();
    let info = base::Info {
        kernel_release: "6.12.0-amd64".into(),
        packages: [("systemd".to_owned(), "257".to_owned())].into(),
        modules: Vec::new(),
        on_demand: Vec::new(),
        images: Vec::new(),
        applets: vec!["busybox".into(), "sh".into()],
    };
    json::write(&dir.join("base.json"), &info).unwrap();
    dir
}

#[test]
fn the_systemd_kit_has_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::at(dir.path().join("firn"));
    let base = systemd_base(&cache);
    let agent = dir.path().join("agent");
    fs::write(&agent, "the agent").unwrap();
    let kit = make(KitName::Systemd, &cache, &agent, Required::Exists, &|_| ()).unwrap();
    let store = kit.store().unwrap();
    let text = |path: &str| fs::read_to_string(store.join(path)).unwrap();
    assert_eq!(text("firn/bin/firn-agent"), "the agent");
    assert_eq!(text("debian/bin/true"), "debian/usr/bin/true");
    assert_eq!(text("toplevel/kernel"), "kernel");
    assert_eq!(text("firn/busybox/sh"), "busybox");
    // The command line is what a NixOS machine's start script builds from the file.
    let params = text("toplevel/kernel-params");
    assert_eq!(
        kit.manifest.cmdline,
        format!("{params} init=/nix/store/toplevel/init console=ttyS0")
    );
    let image = fs::read_to_string(kit.store_image().unwrap()).unwrap();
    assert_eq!(image, "debian\nfirn\ntoplevel\n");
    // The base's files, not copies of them.
    let inode = |path: PathBuf| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    assert_eq!(inode(store.join("debian/usr/bin/true")), inode(base.join("debian/usr/bin/true")));

    let initrd = fs::read(kit.initrd()).unwrap();
    let init = entries(&initrd).unwrap().into_iter().find(|entry| entry.name == "init").unwrap();
    assert!(init.contents.starts_with(b"#!/bin/sh"));
    assert_eq!(fs::read(store.join("toplevel/initrd")).unwrap(), initrd);

    // firn's files come after those of packages, and so replace them.
    let root = entries(&fs::read(store.join("firn/root.cpio")).unwrap()).unwrap();
    let last = root.iter().rfind(|entry| entry.name == "etc/profile").unwrap();
    assert!(String::from_utf8_lossy(&last.contents).contains("PATH="));
    let shadowed = root.iter().find(|entry| entry.name == "etc/profile").unwrap();
    assert_eq!(shadowed.contents, b"debian/etc/profile");
}

#[test]
fn leftovers_of_killed_builds_go_and_old_kits_too() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_with_base(dir.path());
    let leftover = dir.path().join("firn/staging/killed/file");
    fs::create_dir_all(leftover.parent().unwrap()).unwrap();
    fs::write(&leftover, "half").unwrap();
    let agent = dir.path().join("agent");
    fs::write(&agent, "one").unwrap();
    let (old, _) = make_quietly(&cache, &agent);
    assert!(!leftover.exists());
    let long_ago = SystemTime::now() - std::time::Duration::from_secs(30 * 24 * 3600);
    let manifest = File::options().write(true).open(old.dir.join("manifest.json")).unwrap();
    manifest.set_modified(long_ago).unwrap();
    fs::write(&agent, "two").unwrap();
    let (new, _) = make_quietly(&cache, &agent);
    assert!(!old.dir.exists() && new.dir.exists());
}

#[test]
fn many_builders_at_once_make_one_kit() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_with_base(dir.path());
    let agent = dir.path().join("agent");
    fs::write(&agent, "agent").unwrap();
    let kits: Vec<_> = std::thread::scope(|scope| {
        let builders: Vec<_> =
            (0..8).map(|_| scope.spawn(|| make_quietly(&cache, &agent).0.dir)).collect();
        builders.into_iter().map(|builder| builder.join().unwrap()).collect()
    });
    assert!(kits.iter().all(|kit| *kit == kits[0] && kit.join("initrd").is_file()));
    assert_eq!(fs::read_dir(kits[0].parent().unwrap()).unwrap().count(), 1);
    assert_eq!(fs::read_dir(dir.path().join("firn/staging")).unwrap().count(), 0);
}

/// Overwrites a file with different bytes of the same length, keeping its time.
fn spoil(path: &Path) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    let length = fs::read(path).unwrap().len();
    fs::write(path, vec![b'?'; length]).unwrap();
    File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
}

#[test]
fn a_damaged_kit_is_not_booted_and_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_with_base(dir.path());
    let agent = dir.path().join("agent");
    fs::write(&agent, "agent").unwrap();
    let kit = make_quietly(&cache, &agent).0;
    let whole = fs::read(kit.initrd()).unwrap();
    type Damage = fn(&Path);
    let damage: [(&str, Damage); 3] = [
        ("is damaged: it has 0 bytes", |initrd| {
            fs::remove_file(initrd).unwrap();
            fs::write(initrd, "").unwrap();
        }),
        ("is damaged: it is not what was written", |initrd| {
            let length = fs::read(initrd).unwrap().len();
            fs::remove_file(initrd).unwrap();
            fs::write(initrd, vec![0; length]).unwrap();
        }),
        ("is damaged: No such file", |initrd| fs::remove_file(initrd).unwrap()),
    ];
    for (what, damage) in damage {
        damage(&kit.initrd());
        let error = Kit::open(kit.dir.clone()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
        let (again, lines) = make_quietly(&cache, &agent);
        assert!(again.dir == kit.dir && lines > 1);
        assert_eq!(fs::read(kit.initrd()).unwrap(), whole);
    }
    // A thorough check finds damage that leaves size and time unchanged.
    spoil(&kit.initrd());
    Kit::open(kit.dir.clone()).unwrap();
    make(KitName::Micro, &cache, &agent, Required::Intact, &|_| ()).unwrap();
    assert_eq!(fs::read(kit.initrd()).unwrap(), whole);
}

#[test]
fn a_kit_that_was_copied_is_whole_and_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_with_base(dir.path());
    let agent = dir.path().join("agent");
    fs::write(&agent, "agent").unwrap();
    let kit = make_quietly(&cache, &agent).0;
    let long_ago = SystemTime::UNIX_EPOCH;
    File::open(kit.initrd()).unwrap().set_modified(long_ago).unwrap();
    let first = Kit::open(kit.dir.clone()).unwrap();
    assert_ne!(first.manifest.files, kit.manifest.files);
    // From now on its new time is recorded.
    spoil(&kit.initrd());
    assert_eq!(Kit::open(kit.dir).unwrap().manifest.files, first.manifest.files);
}

#[test]
fn a_damaged_base_makes_no_kit() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_with_base(dir.path());
    let base = Base::dir_of(&MICRO, &cache);
    let stamps = integrity::stamps(&base, None).unwrap();
    json::write(&base.join("files.json"), &stamps).unwrap();
    let open = || Base::open(&MICRO, &cache).unwrap().unwrap();
    open().check(Check::Full).unwrap();
    spoil(&base.join("modules/virtio_mmio.ko"));
    open().check(Check::Quick).unwrap();
    let error = open().check(Check::Full).unwrap_err().to_string();
    assert!(error.contains("virtio_mmio.ko is damaged"), "{error}");
    fs::write(base.join("busybox"), "").unwrap();
    let error = open().check(Check::Quick).unwrap_err().to_string();
    assert!(error.contains("busybox is damaged: it has 0 bytes, and 7 were"), "{error}");
}

#[test]
fn nobody_else_sees_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache_with_base(dir.path());
    let agent = dir.path().join("agent");
    fs::write(&agent, "agent").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let root = dir.path().join("fresh/firn");
    assert_eq!(mode(&make_quietly(&cache, &agent).0.dir), 0o700);
    drop(Cache::at(root.clone()).lock(|| ()).unwrap());
    assert_eq!((mode(&root), mode(root.parent().unwrap())), (0o700, 0o700));
    fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
    let error = Cache::at(root).lock(|| ()).err().unwrap().to_string();
    assert!(error.contains("written to by other users; set XDG_CACHE_HOME"), "{error}");
}
