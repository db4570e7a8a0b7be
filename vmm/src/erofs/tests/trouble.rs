//! Directories that change all the same, and what cannot be an image.

use std::error::Error;
use std::time::{Duration, SystemTime};

use super::*;

fn said<T>(result: Result<T, ComposeError>) -> String {
    let error = result.err().expect("no image");
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// What is said if `change` happens after the first look at `source`.
fn meanwhile(source: &Path, change: impl FnOnce()) -> String {
    let root = File::open(source).unwrap();
    let tree = Tree::walk(&root, source, &Filter::default(), &Cancel::default()).unwrap();
    change();
    let plan = Plan::new(&tree).unwrap();
    let mut image = Mapping::new(index(plan.end), index(plan.written)).unwrap();
    said(fetch_files(&tree, &plan, &mut image)).replace(source.to_str().unwrap(), "SOURCE")
}

#[test]
fn files_that_change_meanwhile() {
    for len in [1000, 100_000] {
        let source = tempdir().unwrap();
        let (directory, path) = (source.path().join("a"), source.path().join("a/file"));
        fs::create_dir(&directory).unwrap();
        let write = |len| fs::write(&path, content(len, 0)).unwrap();
        let file = "cannot make an image with SOURCE/a/file: ";
        write(len);
        let shorter = meanwhile(source.path(), || write(len - 1));
        assert_eq!(shorter, format!("{file}it has changed meanwhile"));
        write(len);
        let gone = meanwhile(source.path(), || fs::remove_file(&path).unwrap());
        assert_eq!(gone, format!("{file}No such file or directory (os error 2)"));
        write(len);
        let link = meanwhile(source.path(), || {
            fs::rename(&path, source.path().join("other")).unwrap();
            symlink("../other", &path).unwrap();
        });
        assert_eq!(link, format!("{file}Too many levels of symbolic links (os error 40)"));
        fs::remove_file(&path).unwrap();
        write(len);
        let fifo = meanwhile(source.path(), || {
            fs::remove_file(&path).unwrap();
            mkfifo(&path, Mode::S_IRWXU).unwrap();
        });
        assert_eq!(fifo, format!("{file}it has changed meanwhile"));
        fs::remove_file(&path).unwrap();
        write(len);
        let linked = meanwhile(source.path(), || {
            fs::rename(&directory, source.path().join("b")).unwrap();
            symlink("b", &directory).unwrap();
        });
        let linked_at = "cannot make an image with SOURCE/a: ";
        assert_eq!(linked, format!("{linked_at}Too many levels of symbolic links (os error 40)"));
    }
}

#[test]
fn what_cannot_be_an_image() {
    let source = tempdir().unwrap();
    let file = source.path().join("file");
    fs::write(&file, "no directory").unwrap();
    let path = file.display();
    assert_eq!(
        said(compose_with(&file, "store", &Filter::default())),
        format!("cannot make an image with {path}: Not a directory (os error 20)")
    );
    assert!(compose_with(source.path(), "fifteen bytes !", &Filter::default()).is_ok());
    for label in ["sixteen bytes are", "\0"] {
        assert_eq!(
            said(compose_with(source.path(), label, &Filter::default())),
            format!(
                "{label:?} is no label for an image; allowed: at most 15 bytes, none of them 0"
            )
        );
    }
    // None of these is for want of room.
    for (source, label) in [(&*file, "store"), (source.path(), "sixteen bytes are")] {
        let error = compose_with(source, label, &Filter::default()).err().unwrap();
        assert!(!error.is_no_room(), "{error}");
    }
    for name in ["1", "2", "3"] {
        let file = File::create(source.path().join(name)).unwrap();
        file.set_len(7 << 40).unwrap();
    }
    let path = source.path().join("2");
    let much = compose_with(source.path(), "store", &Filter::default());
    assert!(much.as_ref().is_err_and(ComposeError::is_no_room));
    assert_eq!(
        said(much),
        format!("cannot make an image with {}: it would have more than 8 TiB", path.display())
    );
}

#[test]
fn the_host_has_no_memory() {
    let error = Mapping::new(1 << 60, 0).err().unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
    for (len, written) in [(usize::MAX, 0), (usize::MAX - (3 << 20), 0), (5, 3 << 20)] {
        assert!(Mapping::new(len, written).is_err());
    }
    // Of what is before an image nobody else's memory can be.
    for _ in 0..10 {
        let mapping = Mapping::new(1, 1).unwrap();
        let base = mapping.address().as_ptr().addr();
        let maps = String::from_utf8_lossy(&fs::read("/proc/self/maps").unwrap()).into_owned();
        let before = maps.lines().find(|line| line.contains(&format!("-{base:x} ")));
        assert!(before.is_some_and(|line| line.contains(" ---p ")), "{base:x}: {maps}");
    }
    let mut mapping = Mapping::new(4 << 20, 4096).unwrap();
    let file = tempfile::tempfile().unwrap();
    for (at, len) in [(0, 1), (4097, 1), (4 << 20, 1), (4096, 4 << 20), (4096, usize::MAX)] {
        assert!(mapping.map(at, len, &file).is_err(), "{at} {len}");
    }
    assert!(mapping.map(4096, (4 << 20) - 4096, &file).is_ok());
}

#[test]
fn a_digest_is_of_all_that_guests_see() {
    let source = tempdir().unwrap();
    fs::write(source.path().join("small"), "small").unwrap();
    fs::write(source.path().join("large"), content(100_000, 0)).unwrap();
    let digest = || compose(source.path()).digest();
    let mut seen = vec![digest()];
    assert_eq!(seen, [digest()]);
    let labelled = compose_with(source.path(), "other", &Filter::default()).unwrap().digest();
    seen.push(labelled);
    fs::write(source.path().join("small"), "SMALL").unwrap();
    seen.push(digest());
    let large = File::options().write(true).open(source.path().join("large")).unwrap();
    large.set_modified(SystemTime::UNIX_EPOCH + Duration::from_nanos(1)).unwrap();
    seen.push(digest());
    fs::set_permissions(source.path().join("large"), Permissions::from_mode(0o700)).unwrap();
    seen.push(digest());
    fs::rename(source.path().join("large"), source.path().join("Large")).unwrap();
    seen.push(digest());
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), count, "each differs");

    // Links from elsewhere are nothing that guests see.
    let before = digest();
    fs::hard_link(source.path().join("Large"), source.path().join("link")).unwrap();
    fs::remove_file(source.path().join("link")).unwrap();
    let elsewhere = tempfile::tempdir_in(source.path().parent().unwrap()).unwrap();
    fs::hard_link(source.path().join("Large"), elsewhere.path().join("link")).unwrap();
    assert_eq!(digest(), before);
}

#[test]
fn files_that_are_cut_short_are_found() {
    let source = tempdir().unwrap();
    let paths = ["a", "b", "c"].map(|name| source.path().join(name));
    for path in &paths {
        fs::write(path, content(100_000, 0)).unwrap();
    }
    let image = compose(source.path());
    assert_eq!(image.changed_file(), None);
    // What has only lost its name is still there.
    fs::remove_file(&paths[0]).unwrap();
    assert_eq!(image.changed_file(), None);
    let file = File::options().write(true).open(&paths[1]).unwrap();
    file.set_len(90_000).unwrap();
    assert_eq!(image.changed_file().as_ref(), Some(&paths[1]));
    file.set_len(100_000).unwrap();
    assert_eq!(image.changed_file(), None);
}

#[test]
fn machines_have_images_in_common() {
    let source = tempdir().unwrap();
    let (path, root) = (source.path(), File::open(source.path()).unwrap());
    fs::write(path.join("file"), "1").unwrap();
    let list = NamedTempFile::new().unwrap();
    fs::write(list.path(), "file\n").unwrap();
    let filter = Filter::read(list.path(), path).unwrap();
    let image =
        |label, filter| common_image(&root, path, label, filter, &Cancel::default()).unwrap();
    let everything = Filter::default();
    let all = image("store", &everything);
    assert!(Arc::ptr_eq(&all, &image("store", &everything)));
    assert!(!Arc::ptr_eq(&all, &image("other", &everything)));
    let some = image("store", &filter);
    assert!(!Arc::ptr_eq(&all, &some));
    root.set_modified(SystemTime::now() - Duration::from_secs(5)).unwrap();
    assert!(!Arc::ptr_eq(&all, &image("store", &everything)), "there may be more by now");
    assert!(Arc::ptr_eq(&some, &image("store", &filter)));
}

#[test]
fn nobody_writes_to_an_image_nor_inherits_it() {
    let source = tempdir().unwrap();
    fs::write(source.path().join("small"), "small").unwrap();
    for name in ["a", "b"] {
        fs::write(source.path().join(name), content(100_000, 0)).unwrap();
    }
    fn shared(_: &(impl Send + Sync)) {}
    let image = compose(source.path());
    shared(&image);
    let start = image.host_address().as_ptr().addr();
    let end = start + index(image.len());
    // Other tests map files of odd names.
    let maps = String::from_utf8_lossy(&fs::read("/proc/self/smaps").unwrap()).into_owned();
    let (mut len, mut covered) = (0, 0);
    for line in maps.lines() {
        let first = line.split_once(' ').map_or("", |(first, _)| first);
        if let Some((from, to)) = first.split_once('-') {
            // One may go on into what another test has mapped.
            let [from, to] = [from, to].map(|number| usize::from_str_radix(number, 16).unwrap());
            len = to.min(end).saturating_sub(from.max(start));
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| len > 0) {
            let flags: Vec<_> = flags.split_whitespace().collect();
            assert!(flags.contains(&"rd") && flags.contains(&"dc") && !flags.contains(&"wr"));
            covered += len;
        }
    }
    assert_eq!(covered, end - start);
}

#[test]
fn a_start_that_is_cancelled_composes_no_further() {
    let source = tempdir().unwrap();
    fs::write(source.path().join("file"), "text").unwrap();
    let (root, cancel) = (File::open(source.path()).unwrap(), Cancel::default());
    let compose = || Image::compose(&root, source.path(), "store", &Filter::default(), &cancel);
    assert!(compose().is_ok());
    cancel.cancel();
    assert!(said(compose()).ends_with("the start was cancelled"));
}

#[test]
fn what_cannot_be_mapped_leaves_a_hole_that_nothing_is_mapped_behind() {
    let (dir, file) = (File::open("/proc/self").unwrap(), tempfile::tempfile().unwrap());
    let mut mapping = Mapping::new(4 << 20, 0).unwrap();
    assert_eq!(mapping.map(0, 1, &dir).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    assert_eq!(mapping.map(8192, 1, &file).unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn only_roots_and_ones_own_programs_change_who_runs_them() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let source = tempdir().unwrap();
    for (name, owner) in [("own", 0), ("other", 1001)] {
        let file = source.path().join(name);
        fs::write(&file, "").unwrap();
        std::os::unix::fs::chown(&file, Some(owner), Some(owner)).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o6755)).unwrap();
    }
    let content = bytes(&compose(source.path()));
    let reader = Reader(&content);
    let mode = |name: &[u8]| {
        let node = reader.lookup(reader.root(), name).unwrap();
        reader.inode(node).mode & 0o7777
    };
    assert_eq!([mode(b"own"), mode(b"other")], [0o6755, 0o755]);
}
