mod reader;
mod trouble;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, SFlag, makedev, mkdirat, mknod};
use nix::unistd::mkfifo;
use proptest::prelude::*;
use tempfile::{NamedTempFile, tempdir};

use super::*;
use reader::{BLOCK, Reader};

fn compose_with(source: &Path, label: &str, filter: &Filter) -> Result<Image, ComposeError> {
    Image::compose(&File::open(source).unwrap(), source, label, filter, &Cancel::default())
}

fn compose(source: &Path) -> Image {
    compose_with(source, "store", &Filter::default()).unwrap()
}

fn bytes(image: &Image) -> Vec<u8> {
    let file = NamedTempFile::new().unwrap();
    image.memory.write_to(file.as_file()).unwrap();
    fs::read(file.path()).unwrap()
}

/// Runs a program of erofs-utils on an image, and gives back what it says.
fn erofs_utils(program: &str, options: &[&OsStr], image: &Image) -> String {
    let file = NamedTempFile::new().unwrap();
    image.memory.write_to(file.as_file()).unwrap();
    let output = Command::new(program).args(options).arg(file.path()).output();
    let output = output.expect("Debian's erofs-utils is there");
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    assert!(output.status.success(), "{said:?}");
    said.concat()
}

/// That an image holds what `source` does: as `Reader` sees it, and as fsck.erofs does.
fn check(source: &Path, image: &Image) {
    let content = bytes(image);
    let reader = Reader(&content);
    let root = reader.root();
    assert_eq!(reader.lookup(root, b".."), Some(root));
    same(&reader, root, source, &mut HashMap::new());
    erofs_utils("fsck.erofs", &[], image);

    let out = tempdir().unwrap();
    let to = out.path().join("tree");
    let mut option = OsStr::new("--extract=").to_owned();
    option.push(&to);
    erofs_utils("fsck.erofs", &[&option, OsStr::new("--preserve-perms")], image);
    same_trees(source, &to);
}

/// That a directory is the same as one of the host. `nids` has the inodes found by their places on the host.
fn same(reader: &Reader<'_>, nid: u64, host: &Path, nids: &mut HashMap<u64, u64>) {
    let entries = reader.entries(nid);
    assert!(entries.is_sorted_by(|one, other| one.0 < other.0), "{}", host.display());
    assert_eq!(reader.lookup(nid, b"."), Some(nid));
    let (mut count, mut directories) = (2, 2);
    for entry in fs::read_dir(host).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let (path, metadata) = (entry.path(), entry.metadata().unwrap());
        let found = reader.lookup(nid, name.as_bytes()).expect("each name is found");
        let inode = reader.inode(found);
        assert_eq!(inode.mode, metadata.mode(), "{}", path.display());
        assert_eq!(*nids.entry(metadata.ino()).or_insert(found), found, "{}", path.display());
        let kind = metadata.file_type();
        if kind.is_dir() {
            assert_eq!(reader.lookup(found, b".."), Some(nid));
            same(reader, found, &path, nids);
            directories += 1;
        } else {
            assert_eq!(inode.links, metadata.nlink(), "{}", path.display());
        }
        if kind.is_file() {
            assert_eq!(inode.size, metadata.len());
            assert_eq!(inode.layout, 0, "only what is plain is not cached by guests");
            assert!(reader.content(&inode) == fs::read(&path).unwrap(), "{}", path.display());
        } else if kind.is_symlink() {
            assert_eq!(
                reader.content(&inode),
                fs::read_link(&path).unwrap().as_os_str().as_bytes()
            );
        } else if kind.is_char_device() || kind.is_block_device() {
            let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
            assert_eq!(inode.place, u64::from((minor & 0xff) | major << 8 | (minor >> 8) << 20));
        }
        count += 1;
    }
    assert_eq!(entries.len(), count, "{}", host.display());
    let own = reader.inode(nid);
    assert_eq!(own.mode, fs::metadata(host).unwrap().mode());
    assert_eq!(own.links, directories);
}

/// That two directories of the host hold the same.
fn same_trees(one: &Path, other: &Path) {
    let names = |path: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(one), names(other));
    for name in names(one) {
        let paths = [one.join(&name), other.join(&name)];
        let [first, second] = paths.each_ref().map(|path| fs::symlink_metadata(path).unwrap());
        // fsck.erofs gives a file its owner last, which takes these bits away.
        let lost = if first.is_file() { 0o6000 } else { 0 };
        assert_eq!(first.mode() & !lost, second.mode() & !lost, "{}", paths[0].display());
        if first.is_dir() {
            same_trees(&paths[0], &paths[1]);
        } else if first.is_file() {
            assert!(fs::read(&paths[0]).unwrap() == fs::read(&paths[1]).unwrap());
        } else if first.is_symlink() {
            assert_eq!(fs::read_link(&paths[0]).unwrap(), fs::read_link(&paths[1]).unwrap());
        } else {
            assert_eq!(first.rdev(), second.rdev());
        }
    }
}

/// Bytes that differ at each place of each file.
fn content(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at / 251 + at).to_le_bytes()[0].wrapping_add(seed)).collect()
}

#[test]
fn an_empty_directory() {
    let source = tempdir().unwrap();
    let image = compose(source.path());
    assert_eq!(image.len(), 2 << 20);
    assert!(image.host_address().as_ptr().addr().is_multiple_of(2 << 20));
    check(source.path(), &image);
    assert_eq!(Reader(&bytes(&image)).label(), b"store");
    let said = erofs_utils("dump.erofs", &[OsStr::new("-s")], &image);
    assert!(said.contains("root nid:                          36\n"), "{said}");
}

#[test]
fn files_of_all_sizes() {
    let source = tempdir().unwrap();
    for len in [
        0,
        1,
        4095,
        4096,
        4097,
        16_383,
        16_384,
        65_535,
        65_536,
        65_537,
        2 << 20,
        (2 << 20) + 1,
        5 << 20,
    ] {
        let path = source.path().join(len.to_string());
        fs::write(path, content(len, 0)).unwrap();
    }
    for (name, len) in [("small holes", 50_000), ("large holes", 300_000)] {
        let file = File::create(source.path().join(name)).unwrap();
        file.write_all_at(b"here", 20_000).unwrap();
        file.set_len(len).unwrap();
    }
    let image = compose(source.path());
    check(source.path(), &image);
    assert_eq!(image.changed_file(), None);
    let content = bytes(&image);
    let reader = Reader(&content);
    for (name, nid, _) in reader.entries(reader.root()) {
        let inode = reader.inode(nid);
        if inode.size >= 2 << 20 {
            let place = reader.place(&inode);
            assert!(place.is_multiple_of(2 << 20), "{name:?}: guests can map huge pages of it");
        }
        if inode.mode & libc::S_IFMT == libc::S_IFREG && inode.size > 0 {
            let end = reader.place(&inode) + usize::try_from(inode.size).unwrap();
            let rest = &content[end..end.next_multiple_of(BLOCK)];
            assert!(rest.iter().all(|byte| *byte == 0), "{name:?}");
        }
    }
    // 9 MiB are of those that begin at 2 MiB; the others fit between.
    assert!(image.len() <= 16 << 20, "{}", image.len());
}

#[test]
fn files_of_all_kinds() {
    let source = tempdir().unwrap();
    let path = source.path();
    fs::create_dir(path.join("empty")).unwrap();
    fs::create_dir_all(path.join("a/b")).unwrap();
    fs::write(path.join("a/once"), "once").unwrap();
    fs::hard_link(path.join("a/once"), path.join("a/b/twice")).unwrap();
    fs::hard_link(path.join("a/once"), path.join("thrice")).unwrap();
    fs::write(path.join("large"), content(100_000, 1)).unwrap();
    fs::hard_link(path.join("large"), path.join("a/large too")).unwrap();
    symlink("/nowhere", path.join("link")).unwrap();
    symlink("..", path.join("a/up")).unwrap();
    fs::hard_link(path.join("link"), path.join("link too")).unwrap();
    for len in [1, 59, 4000, 4063, 4064, 4065, 4095] {
        let target = OsStr::from_bytes(&content(len, 0)).to_owned();
        let target: Vec<_> = target.as_bytes().iter().map(|byte| byte.max(&1)).copied().collect();
        symlink(OsStr::from_bytes(&target), path.join(format!("link {len}"))).unwrap();
    }
    mkfifo(&path.join("fifo"), Mode::from_bits_truncate(0o640)).unwrap();
    let _socket = UnixListener::bind(path.join("socket")).unwrap();
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        let mode = Mode::from_bits_truncate(0o600);
        mknod(&path.join("null"), SFlag::S_IFCHR, mode, makedev(1, 3)).unwrap();
        mknod(&path.join("disk"), SFlag::S_IFBLK, mode, makedev(259, 0x12345)).unwrap();
    }
    for mode in [0o4755, 0o2755, 0o1777, 0o444, 0o400] {
        let file = path.join(format!("{mode:o}"));
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
    }
    fs::set_permissions(path.join("empty"), Permissions::from_mode(0o1555)).unwrap();
    let image = compose(path);
    check(path, &image);
    let said = erofs_utils("dump.erofs", &[OsStr::new("--path=/thrice")], &image);
    assert!(said.contains("Links: 3 "), "{said}");
}

#[test]
fn odd_names() {
    let source = tempdir().unwrap();
    let long = [b'x'; 255];
    let names: &[&[u8]] = &[
        b"!",
        b"-",
        b"...",
        b"..a",
        b".hidden",
        b"\n",
        b"a\nb",
        b"\xff\xfe",
        b" ",
        b"\\",
        b"a",
        b"aa",
        b"a.",
        b"\x01",
        b"~",
        &long,
        &long[..254],
    ];
    for name in names {
        fs::write(source.path().join(OsStr::from_bytes(name)), name).unwrap();
    }
    check(source.path(), &compose(source.path()));
}

#[test]
fn many_names() {
    let source = tempdir().unwrap();
    fs::write(source.path().join("file"), "one").unwrap();
    let many = source.path().join("many");
    fs::create_dir(&many).unwrap();
    for index in 0..5000 {
        let name = format!("{}{index}", "n".repeat(index % 250));
        fs::hard_link(source.path().join("file"), many.join(name)).unwrap();
    }
    for index in 0..500 {
        fs::create_dir(source.path().join(format!("directory {index}"))).unwrap();
    }
    check(source.path(), &compose(source.path()));
}

/// More than the 8,192 that are mapped are large.
#[test]
fn a_hundred_thousand_files() {
    let source = tempfile::tempdir_in("/dev/shm").unwrap();
    for directory in 0..100 {
        let directory = source.path().join(format!("directory {directory}"));
        fs::create_dir(&directory).unwrap();
        for number in 0..1000 {
            let file = File::create(directory.join(number.to_string())).unwrap();
            file.write_all_at(number.to_string().as_bytes(), 0).unwrap();
            if number < 100 {
                file.set_len(16_384).unwrap();
            }
        }
    }
    let image = compose(source.path());
    let content = bytes(&image);
    let reader = Reader(&content);
    same(&reader, reader.root(), source.path(), &mut HashMap::new());
    erofs_utils("fsck.erofs", &[], &image);
    assert_eq!(image.files.len(), 8192);
}

/// Directories in each other, and a file in the last one.
fn deep(root: &File, name: &str, levels: usize) {
    let mut at = root.try_clone().unwrap();
    for _ in 0..levels {
        mkdirat(&at, name, Mode::S_IRWXU).unwrap();
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        at = openat(&at, name, flags, Mode::empty()).unwrap().into();
    }
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_CLOEXEC;
    let file: File = openat(&at, "file", flags, Mode::S_IRUSR).unwrap().into();
    file.write_all_at(b"deep", 0).unwrap();
}

#[test]
fn deep_directories() {
    let source = tempdir().unwrap();
    let root = File::open(source.path()).unwrap();
    deep(&root, "d", 300);
    check(source.path(), &compose(source.path()));

    let name = "long".repeat(50);
    deep(&root, &name, 300);
    let image = compose(source.path());
    let content = bytes(&image);
    let reader = Reader(&content);
    let mut at = reader.root();
    for _ in 0..300 {
        at = reader.lookup(at, name.as_bytes()).unwrap();
    }
    let file = reader.inode(reader.lookup(at, b"file").unwrap());
    assert_eq!(reader.content(&file), b"deep");
    erofs_utils("fsck.erofs", &[], &image);
}

#[test]
fn files_beyond_4_gib() {
    let source = tempdir().unwrap();
    let file = File::create(source.path().join("large")).unwrap();
    file.set_len((4 << 30) + 5).unwrap();
    file.write_all_at(b"end", (4 << 30) + 2).unwrap();
    let image = compose(source.path());
    assert_eq!(image.len(), (4 << 30) + (4 << 20));
    let reader = Reader(image.memory.memory());
    let inode = reader.inode(reader.lookup(reader.root(), b"large").unwrap());
    assert_eq!((inode.size, inode.links), ((4 << 30) + 5, 1));
    assert_eq!(image.changed_file(), None);
}

#[test]
fn many_links_need_a_larger_inode() {
    let inode = format::Inode {
        layout: format::Layout::Plain,
        mode: 0o40755,
        links: 70_000,
        size: 5,
        place: 9,
        number: 3,
    };
    let mut to = [0; 64];
    assert_eq!(inode.write(&mut to), 64);
    let read = Reader(&[vec![0; 1024 + 128], to.to_vec()].concat()).inode(36);
    assert_eq!((read.links, read.size, read.place), (70_000, 5, 9));
    assert!(format::fits_inline(4032, 70_000) && !format::fits_inline(4033, 70_000));
    assert!(format::fits_inline(4064, 7) && !format::fits_inline(4065, 7));
}

#[test]
fn only_what_a_filter_shows() {
    let source = tempdir().unwrap();
    for name in ["a", "b", "c"] {
        fs::create_dir(source.path().join(name)).unwrap();
        fs::write(source.path().join(name).join("file"), name).unwrap();
    }
    let list = NamedTempFile::new().unwrap();
    fs::write(list.path(), format!("a\n{}/c\nmissing\n", source.path().display())).unwrap();
    let filter = Filter::read(list.path(), source.path()).unwrap();
    let image = compose_with(source.path(), "some", &filter).unwrap();
    let content = bytes(&image);
    let reader = Reader(&content);
    let names: Vec<_> =
        reader.entries(reader.root()).into_iter().map(|(name, ..)| name.to_vec()).collect();
    assert_eq!(names, [b".".to_vec(), b"..".to_vec(), b"a".to_vec(), b"c".to_vec()]);
    assert_eq!(reader.inode(reader.root()).links, 4);
    fs::remove_dir_all(source.path().join("b")).unwrap();
    check(source.path(), &image);
}

#[test]
fn no_file_looks_like_information_of_nvdimm() {
    let source = tempdir().unwrap();
    let mut signature = b"NVDIMM_PFN_INFO\0".to_vec();
    signature.resize(70_000, 1);
    fs::write(source.path().join("large"), &signature).unwrap();
    fs::write(source.path().join("small"), &signature[..100]).unwrap();
    let content = bytes(&compose(source.path()));
    assert!(content[BLOCK..4 * BLOCK].iter().all(|byte| *byte == 0));

    // Inodes are there now, and links behind them.
    for index in 0..500 {
        symlink(OsStr::from_bytes(&signature[..15]), source.path().join(index.to_string()))
            .unwrap();
    }
    let content = bytes(&compose(source.path()));
    for block in [1, 2] {
        assert!(content[block * BLOCK] < 8, "an inode");
    }
}

/// Trees of files: how long each is, and which of its directory's names it gets.
#[derive(Debug, Clone)]
enum Any {
    File(Vec<u8>, usize, u8),
    Link(Vec<u8>, usize),
    Directory(Vec<u8>, Vec<Any>),
}

fn any_tree() -> impl Strategy<Value = Vec<Any>> {
    let name = || {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..8),
            proptest::collection::vec(any::<u8>(), 200..256),
        ]
    };
    let lens = prop_oneof![0..20_usize, 4090..4100_usize, 16_380..16_390_usize];
    let leaf = prop_oneof![
        (name(), lens, any::<u8>()).prop_map(|(name, len, seed)| Any::File(name, len, seed)),
        (name(), 1..4096_usize).prop_map(|(name, len)| Any::Link(name, len)),
    ];
    let node = leaf.prop_recursive(4, 100, 20, move |inner| {
        (name(), proptest::collection::vec(inner, 0..20))
            .prop_map(|(name, entries)| Any::Directory(name, entries))
    });
    proptest::collection::vec(node, 0..30)
}

fn make(at: &Path, entries: &[Any]) {
    for entry in entries {
        let (Any::File(name, ..) | Any::Link(name, _) | Any::Directory(name, _)) = entry;
        let name: Vec<_> = name.iter().filter(|byte| !b"/\0".contains(byte)).copied().collect();
        let path = at.join(OsStr::from_bytes(&name));
        if name.is_empty() || name == b"." || name == b".." || fs::symlink_metadata(&path).is_ok() {
            continue;
        }
        match entry {
            Any::File(_, len, seed) => fs::write(path, content(*len, *seed)).unwrap(),
            Any::Link(_, len) => symlink("t".repeat(*len), path).unwrap(),
            Any::Directory(_, entries) => {
                fs::create_dir(&path).unwrap();
                make(&path, entries);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn any_tree_comes_back(tree in any_tree()) {
        let source = tempdir().unwrap();
        make(source.path(), &tree);
        let image = compose(source.path());
        check(source.path(), &image);
        prop_assert_eq!(image.digest(), compose(source.path()).digest());
        prop_assert!(image.len().is_multiple_of(2 << 20));
    }
}
