//! A test that cannot run here does not look as if it had passed.

use std::fs::OpenOptions;
use std::io::Write;
use std::panic::Location;

/// Says that the test is skipped, and why: on standard error, and in the file that `FIRN_SKIPPED` names.
///
/// # Panics
/// If it cannot be said.
#[track_caller]
pub fn skipped(why: &str) {
    let line = format!("SKIPPED {}: {why}\n", Location::caller());
    // `eprint!` would be kept from whoever looks at tests that pass.
    std::io::stderr().write_all(line.as_bytes()).expect("standard error is there");
    if let Some(list) = std::env::var_os("FIRN_SKIPPED") {
        let list = OpenOptions::new().create(true).append(true).open(list);
        list.and_then(|mut list| list.write_all(line.as_bytes())).expect("the list takes a line");
    }
}
