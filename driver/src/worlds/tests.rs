use std::io::Write;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

struct Place {
    dir: TempDir,
    worlds: Worlds,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let worlds = Worlds::at(dir.path().join("worlds"), 64);
    Place { dir, worlds }
}

fn key(kernel: &str) -> Key {
    let mut key = Key::default();
    key.add("firn", "1");
    key.add("kernel of machine a", kernel);
    key
}

fn fill(worlds: &Worlds, key: &Key, content: &[u8]) -> PathBuf {
    let filling = worlds.fill(key.clone()).unwrap().expect("nobody else does");
    filling.create("a.memory").unwrap().write_all(content).unwrap();
    filling.finish("ping", vec!["a".to_owned()], Duration::from_secs(12)).unwrap()
}

fn why(worlds: &Worlds, key: &Key) -> String {
    match worlds.find("ping", key) {
        Found::Nothing(why) => why.to_string(),
        Found::World(_) => panic!("there is one"),
    }
}

fn found(worlds: &Worlds, key: &Key) -> World {
    match worlds.find("ping", key) {
        Found::World(world) => world,
        Found::Nothing(why) => panic!("{why}"),
    }
}

/// What is in the directory.
fn names(worlds: &Worlds) -> Vec<String> {
    let mut names = worlds.names().unwrap();
    names.sort();
    names
}

/// Replaces what is in a file, and leaves that as it was otherwise.
fn overwrite(path: &Path, content: &[u8]) {
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, mode).unwrap();
}

/// Makes an entry look as if it had not been used for so many seconds.
fn age(path: &Path, seconds: u64) {
    let past = SystemTime::now() - Duration::from_secs(seconds);
    File::open(path.join(MANIFEST)).unwrap().set_modified(past).unwrap();
}

#[test]
fn what_was_kept_is_found_and_a_miss_says_why() {
    let Place { dir: _dir, worlds } = place();
    let [one, two] = [key("one"), key("two")];
    assert_eq!(why(&worlds, &one), "no world of this test has been kept");
    let path = fill(&worlds, &one, b"memory");
    assert_eq!(names(&worlds), [one.id()], "no lock and nothing half done is left");
    age(&path, 100);
    let world = found(&worlds, &one);
    assert_eq!((world.path(), world.boot()), (&*path, Duration::from_secs(12)));
    let mode = fs::metadata(path.join("a.memory")).unwrap().mode();
    assert_eq!(mode & 0o222, 0, "machines may map it");
    assert_eq!(io::read_to_string(world.open("a.memory").unwrap()).unwrap(), "memory");
    for other in ["b.memory", MANIFEST, "../../x"] {
        assert!(world.open(other).is_err(), "{other}");
    }
    let used = worlds.list().unwrap()[0].used;
    assert!(used.elapsed().unwrap() < Duration::from_secs(50), "it was used now");

    let expected = "kernel of machine a has changed from one to two";
    assert_eq!(why(&worlds, &two), expected);
    // Of those that there are, the one that is most like it is named.
    let mut other = key("three");
    other.add("firn", "2");
    fill(&worlds, &other, b"");
    assert_eq!(why(&worlds, &two), expected);
    let of_another_test = worlds.find("pong", &two);
    assert!(matches!(of_another_test, Found::Nothing(Why::New)));
}

#[test]
fn damage_is_found_and_replaced() {
    let Place { dir: _dir, worlds } = place();
    let key = key("one");
    let path = fill(&worlds, &key, b"memory");
    let memory = path.join("a.memory");
    let manifest = fs::read_to_string(path.join(MANIFEST)).unwrap();
    let damages: [(&str, &dyn Fn()); 8] = [
        ("a.memory has 3 bytes, and 6 were written", &|| overwrite(&memory, b"mem")),
        ("a.memory is not what was written", &|| overwrite(&memory, b"MEMORY")),
        ("a.memory: No such file", &|| fs::remove_file(&memory).unwrap()),
        ("a.memory: it is no file", &|| {
            fs::remove_file(&memory).unwrap();
            fs::create_dir(&memory).unwrap();
        }),
        ("manifest.json: ", &|| fs::write(path.join(MANIFEST), &manifest[..40]).unwrap()),
        ("manifest.json: ", &|| fs::write(path.join(MANIFEST), "").unwrap()),
        ("it is that of another world", &|| {
            fs::write(path.join(MANIFEST), manifest.replace("one", "two")).unwrap();
        }),
        ("it has format 3, this firn reads 2", &|| {
            let other = manifest.replace("\"format\": 2", "\"format\": 3, \"more\": []");
            fs::write(path.join(MANIFEST), other).unwrap();
        }),
    ];
    for (expected, damage) in damages {
        damage();
        let why = why(&worlds, &key);
        assert!(why.starts_with("the world kept in /") && why.contains(expected), "{why}");
        assert_eq!(fill(&worlds, &key, b"memory"), path);
        found(&worlds, &key);
    }
}

#[test]
fn outside_of_the_cache_nothing_is_changed_and_nothing_damaged_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let (place, one) = (dir.path().join("more/world"), key("one"));
    let begin = || Filling::into_dir(place.clone(), one.clone());
    let filling = begin().unwrap();
    filling.create("a.memory").unwrap().write_all(b"memory").unwrap();
    let find = |key: &Key| match World::in_dir(place.clone(), key) {
        Found::Nothing(why) => why.to_string(),
        Found::World(world) => io::read_to_string(world.open("a.memory").unwrap()).unwrap(),
    };
    assert!(find(&one).contains("manifest.json: No such file"), "it is half done");
    let error = begin().unwrap_err().to_string();
    assert!(error.ends_with("is not empty; allowed: an empty directory, or one that is not there"));
    assert_eq!(filling.finish("ping", Vec::new(), Duration::ZERO).unwrap(), place);

    age(&place, 100);
    let used = || fs::metadata(place.join(MANIFEST)).unwrap().modified().unwrap();
    let before = used();
    assert_eq!(find(&one), "memory");
    assert_eq!(find(&key("two")), "kernel of machine a has changed from one to two");
    assert_eq!(used(), before);
    assert_eq!(fs::read_dir(&place).unwrap().count(), 2);
    overwrite(&place.join("a.memory"), b"mem");
    assert!(find(&one).ends_with("cannot be used: a.memory has 3 bytes, and 6 were written"));
}

#[test]
fn one_at_a_time_fills_an_entry() {
    let Place { dir: _dir, worlds } = place();
    let [one, two] = [key("one"), key("two")];
    let filling = worlds.fill(one.clone()).unwrap().expect("nobody else does");
    filling.create("a.memory").unwrap().write_all(b"half").unwrap();
    assert!(worlds.fill(one.clone()).unwrap().is_none(), "somebody does");
    assert_eq!(why(&worlds, &one), "no world of this test has been kept");
    fill(&worlds, &two, b"");
    let path = filling.finish("ping", Vec::new(), Duration::ZERO).unwrap();
    assert!(worlds.fill(one).unwrap().is_none(), "it is there");
    assert_eq!(fs::read(path.join("a.memory")).unwrap(), b"half");

    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for kernel in ["x", "y", "z"] {
                    if let Some(filling) = worlds.fill(key(kernel)).unwrap() {
                        filling.create("a.memory").unwrap().write_all(b"all").unwrap();
                        filling.finish("ping", Vec::new(), Duration::ZERO).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(names(&worlds).len(), 5);
    worlds.list().unwrap().iter().for_each(|entry| assert!(entry.test == "ping"));
}

#[test]
fn what_was_given_up_or_killed_leaves_nothing() {
    let Place { dir: _dir, worlds } = place();
    let filling = worlds.fill(key("one")).unwrap().unwrap();
    filling.create("a.memory").unwrap();
    for bad in ["", "..", "a/b", "/tmp/x", MANIFEST] {
        assert!(filling.create(bad).is_err(), "{bad}");
    }
    drop(filling);
    assert_eq!(names(&worlds), [""; 0]);

    let kept = key("kept");
    fill(&worlds, &kept, b"");
    let left = |name: &str| worlds.dir.join(name);
    fs::create_dir(left("dead.new")).unwrap();
    fs::write(left("dead.new/a.memory"), "half").unwrap();
    File::create(left("dead.lock")).unwrap();
    fs::create_dir(left("unlocked.new")).unwrap();
    // Half removed.
    fs::create_dir(left("half")).unwrap();
    fs::write(left("half/a.memory"), "").unwrap();
    // Alive.
    let filling = worlds.fill(key("one")).unwrap().unwrap();
    worlds.prepare().unwrap();
    assert_eq!(names(&worlds).len(), 3);
    drop(filling);
    assert_eq!(names(&worlds), [kept.id()]);
}

#[test]
fn the_least_recently_used_go_first() {
    let Place { dir, .. } = place();
    let worlds = Worlds::at(dir.path().join("worlds"), 4);
    let mib = vec![1; 1 << 20];
    let [a, b, c] = ["a", "b", "c"].map(|kernel| {
        let key = key(kernel);
        (fill(&worlds, &key, &mib), key)
    });
    age(&a.0, 300);
    age(&b.0, 200);
    age(&c.0, 100);
    let used = found(&worlds, &a.1);
    fill(&worlds, &key("d"), &mib);
    assert!(a.0.exists() && !b.0.exists() && c.0.exists());
    // What is being read is not removed, however old.
    age(&a.0, 300);
    fill(&worlds, &key("e"), &mib);
    assert!(a.0.exists() && !c.0.exists());
    let (gone, in_use) = worlds.clear(&[]).unwrap();
    assert_eq!((gone.len(), in_use.len()), (2, 1));
    drop(used);

    let filling = worlds.fill(key("large")).unwrap().unwrap();
    filling.create("a.memory").unwrap().write_all(&mib.repeat(5)).unwrap();
    let error = filling.finish("ping", Vec::new(), Duration::ZERO).unwrap_err().to_string();
    assert!(error.starts_with("the world takes 6 MiB, and all worlds may take 4"), "{error}");
    assert_eq!(names(&worlds), [a.1.id()]);
}

#[test]
fn they_are_cleared_by_name() {
    let Place { dir: _dir, worlds } = place();
    assert!(worlds.list().unwrap().is_empty() && !worlds.dir.exists(), "looking makes nothing");
    let [one, two] = [key("one"), key("two")];
    fill(&worlds, &one, b"");
    let path = fill(&worlds, &two, b"");
    let error = worlds.clear(&["pong".to_owned()]).unwrap_err().to_string();
    assert_eq!(error, "there is no world \"pong\"; `firn cache` lists them");
    worlds.clear(&[one.id()]).unwrap();
    assert_eq!(names(&worlds), [two.id()]);
    fs::write(path.join(MANIFEST), "{").unwrap();
    let [listed] = worlds.list().unwrap().try_into().unwrap();
    assert!(listed.test.starts_with("(unusable: manifest.json: EOF"), "{}", listed.test);
    worlds.clear(&[]).unwrap();
    assert_eq!(names(&worlds), [""; 0]);
}

#[test]
fn a_place_of_others_is_refused() {
    let Place { dir: _dir, worlds } = place();
    fs::create_dir(&worlds.dir).unwrap();
    fs::set_permissions(&worlds.dir, Permissions::from_mode(0o777)).unwrap();
    let error = worlds.fill(key("one")).unwrap_err();
    assert!(crate::error::chain(&error).contains("can be written to by other users"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever happens to the files of an entry, it is used only as it was written.
    #[test]
    fn nothing_damaged_is_used(file in 0..2_usize, at in any::<prop::sample::Index>(), byte: u8, cut: bool) {
        let Place { dir: _dir, worlds } = place();
        let key = key("one");
        let dir = fill(&worlds, &key, b"a guest's memory");
        let path = dir.join(["a.memory", MANIFEST][file]);
        let mut bad = fs::read(&path).unwrap();
        let at = at.index(bad.len());
        if cut { bad.truncate(at) } else { bad[at] = byte }
        overwrite(&path, &bad);
        if let Found::World(world) = worlds.find("ping", &key) {
            let memory = io::read_to_string(world.open("a.memory").unwrap()).unwrap();
            prop_assert_eq!(memory, "a guest's memory");
        }
    }
}
