//! Directories that change while they are listed.

use std::collections::BTreeSet;
use std::fs;

use virtiofsd::fuse::Opcode;

use super::client::{Mount, ROOT, c_string, dirent};
use super::share;

/// The names and positions in a reply to READDIR.
fn entries(reply: &[u8]) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    let mut rest = reply;
    while !rest.is_empty() {
        let (name, offset, others) = dirent(rest);
        found.push((String::from_utf8(name).unwrap(), offset));
        rest = others;
    }
    found
}

/// Lists as a guest does, a page at a time, and deletes all that it is told before it goes on.
fn delete_while_listing(count: usize) {
    let (directory, spec) = share();
    for number in 0..count {
        fs::write(directory.path().join(format!("file-{number}")), "").unwrap();
    }
    let mut mount = Mount::new(&spec);
    let fh = mount.open_as(Opcode::Opendir, ROOT, 0).unwrap().fh;
    let mut position = 0;
    let mut told = BTreeSet::new();
    loop {
        let reply = mount.read_as(Opcode::Readdir, ROOT, fh, position, 4096).unwrap();
        let found = entries(&reply);
        let Some((_, last)) = found.last() else { break };
        position = *last;
        for (name, _) in found.into_iter().filter(|(name, _)| !name.starts_with('.')) {
            mount.call(Opcode::Unlink, ROOT, &[&c_string(&name)]).unwrap();
            assert!(told.insert(name), "an entry is told twice");
        }
    }
    assert_eq!(told.len(), count);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn nothing_is_missed_by_who_deletes_what_is_listed() {
    delete_while_listing(300);
    delete_while_listing(3000);
}

#[test]
fn a_position_that_was_told_can_be_returned_to_and_the_start_is_new() {
    let (directory, spec) = share();
    for number in 0..500 {
        fs::write(directory.path().join(format!("file-{number}")), "").unwrap();
    }
    let mut mount = Mount::new(&spec);
    let fh = mount.open_as(Opcode::Opendir, ROOT, 0).unwrap().fh;
    let mut list =
        |position| entries(&mount.read_as(Opcode::Readdir, ROOT, fh, position, 4096).unwrap());
    let first = list(0);
    let middle = first[first.len() / 2].1;
    let again = list(middle);
    assert_eq!(first[first.len() / 2 + 1..], again[..first.len() - first.len() / 2 - 1]);
    fs::write(directory.path().join("new"), "").unwrap();
    let mut position = 0;
    let mut all = Vec::new();
    loop {
        let found = list(position);
        let Some((_, last)) = found.last() else { break };
        position = *last;
        all.extend(found.into_iter().map(|(name, _)| name));
    }
    assert!(all.contains(&"new".to_owned()));
    assert_eq!(all.len(), 503);
}

#[test]
fn a_guest_that_opens_many_directories_gets_all_entries() {
    let (directory, spec) = share();
    for number in 0..200 {
        fs::write(directory.path().join(format!("file-{number}")), "").unwrap();
    }
    let mut mount = Mount::new(&spec);
    let handles: Vec<u64> =
        (0..600).map(|_| mount.open_as(Opcode::Opendir, ROOT, 0).unwrap().fh).collect();
    let mut seen = vec![0; handles.len()];
    let mut positions = vec![0; handles.len()];
    for _ in 0..8 {
        for (index, &fh) in handles.iter().enumerate() {
            let reply = mount.read_as(Opcode::Readdir, ROOT, fh, positions[index], 2048).unwrap();
            let found = entries(&reply);
            seen[index] += found.len();
            positions[index] = found.last().map_or(positions[index], |(_, last)| *last);
        }
    }
    assert!(seen.iter().all(|&count| count == 202), "{seen:?}");
}
