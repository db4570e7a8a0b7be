//! The command `firn`.
#![forbid(unsafe_code)]

fn main() {}
