use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use super::*;

/// Another user of this host.
const OTHER: u32 = 65534;

/// Runs a program as another user; none if this is not root, who alone can.
fn as_other(program: &str, arguments: &[&Path]) -> Option<Output> {
    if me() != 0 {
        eprintln!("SKIPPED: only root can be another user");
        return None;
    }
    let mut command = Command::new(program);
    command.args(arguments).uid(OTHER).gid(OTHER).current_dir("/");
    Some(command.output().expect("it can be run"))
}

/// A directory that everybody may write to, as /tmp is.
fn like_tmp() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).expect("ours");
    dir
}

fn refused<T: std::fmt::Debug>(result: io::Result<T>, why: &str) {
    let error = result.expect_err(why).to_string();
    assert!(error.contains(why), "{error}");
}

#[test]
fn others_see_nothing_of_what_is_made() {
    let tmp = like_tmp();
    let dir = tmp.path().join("a/b");
    make(&dir).expect("made");
    make_for_guests(&dir.join("xchg")).expect("made");
    let mode = |path: &Path| fs::metadata(path).expect("it is there").mode() & 0o7777;
    assert_eq!((mode(&dir), mode(&tmp.path().join("a"))), (0o700, 0o700));
    assert_eq!(mode(&dir.join("xchg")), 0o755, "for the guests' users");
    make_for_guests(&tmp.path().join("xchg")).expect("made");
    assert_eq!(mode(&tmp.path().join("xchg")), 0o700, "this host's users come there");
    let file = dir.join("file");
    write(&file, b"secret").expect("written");
    assert_eq!(mode(&file), 0o600);
    let socket = dir.join("socket");
    let _listener = UnixListener::bind(&socket).expect("bound");
    for (program, path) in [("ls", dir.as_path()), ("cat", &file), ("stat", &socket)] {
        let Some(output) = as_other(program, &[path]) else { return };
        assert!(!output.status.success(), "{program} shows {output:?}");
    }
}

#[test]
fn what_another_user_made_is_not_taken() {
    let tmp = like_tmp();
    let (state, link) = (tmp.path().join("state"), tmp.path().join("link"));
    let Some(made) = as_other("mkdir", &[&state]) else { return };
    assert!(made.status.success(), "{made:?}");
    as_other("ln", &[Path::new("-s"), Path::new("/etc"), &link]);
    let place = Place::open(tmp.path()).expect("as /tmp is");
    for name in ["state", "link"] {
        refused(place.make(name.as_ref(), DIR_MODE), "belongs to another user (65534)");
        refused(place.remove(name.as_ref()), "belongs to another user (65534)");
        refused(place.open_file(name.as_ref()), "belongs to another user (65534)");
    }
    // Nor what lies below it, even if it is ours.
    let ours = state.join("ours");
    fs::create_dir(&ours).expect("root may");
    refused(Place::open(&ours), "belongs to another user (65534)");
    refused(make(&ours), "belongs to another user (65534)");
    assert!(fs::read_dir("/etc").expect("readable").count() > 0);
}

#[test]
fn nor_what_others_may_have_put_something_into() {
    let tmp = like_tmp();
    let place = Place::open(tmp.path()).expect("as /tmp is");
    let open = |mode| {
        let path = tmp.path().join("open");
        fs::create_dir_all(&path).expect("made");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("ours");
        path
    };
    open(0o777);
    refused(place.make("open".as_ref(), DIR_MODE), "can be written to by other users");
    // Without the sticky bit others rename what is ours.
    refused(Place::open(&open(0o777)), "can be written to by other users");
    Place::open(&open(0o1777)).expect("as /tmp is");
    refused(Place::closed(&open(0o1777)), "can be written to by other users");
    // A user's own group.
    Place::closed(&open(0o775)).expect("nobody else's");
    std::os::unix::fs::chown(open(0o775), None, Some(OTHER)).map_or_else(
        |_| eprintln!("SKIPPED: only root gives away a group"),
        |()| refused(Place::open(&open(0o775)), "can be written to by other users"),
    );
}

#[test]
fn links_are_not_followed() {
    let tmp = like_tmp();
    let target = tmp.path().join("target");
    fs::create_dir(&target).expect("made");
    fs::write(target.join("file"), "kept").expect("written");
    let place = Place::open(tmp.path()).expect("as /tmp is");
    symlink(&target, tmp.path().join("link")).expect("made");
    refused(place.make("link".as_ref(), DIR_MODE), "is not a directory");
    place.remove("link".as_ref()).expect("the link is removed");
    assert!(target.join("file").exists());
    symlink(target.join("file"), tmp.path().join("link")).expect("made");
    place.open_file("link".as_ref()).expect_err("a link");
    write(&tmp.path().join("link"), b"").expect_err("a link");
    assert_eq!(fs::read_to_string(target.join("file")).expect("it is there"), "kept");
}

#[test]
fn what_guests_have_shut_is_removed() {
    let tmp = tempfile::tempdir().expect("a directory");
    let shut = tmp.path().join("state/a/b");
    fs::create_dir_all(&shut).expect("made");
    fs::write(shut.join("file"), "").expect("written");
    symlink("/etc", shut.join("link")).expect("made");
    let before = fs::metadata("/etc").expect("it is there").mode();
    for dir in [&shut, &tmp.path().join("state/a")] {
        fs::set_permissions(dir, Permissions::from_mode(0o000)).expect("ours");
    }
    // Root can without, too.
    open_up(&tmp.path().join("state"));
    assert_eq!(fs::metadata(&shut).expect("it is there").mode() & 0o777, 0o700);
    remove(&tmp.path().join("state")).expect("removed");
    assert_eq!(fs::read_dir(tmp.path()).expect("readable").count(), 0);
    assert_eq!(fs::metadata("/etc").expect("it is there").mode(), before);
}
