//! Fuzz targets: whatever a guest does, the host goes on.
//!
//! Each file or directory of `tests/` holds the targets of one part. They are ordinary tests: `cargo test`, and so `make
//! test`, gives each some thousand inputs that it makes up, others each time. `make fuzz` gives them a million, or any
//! number, and one target is run by
//!
//! ```sh
//! BOLERO_RANDOM_ITERATIONS=1000000 cargo test --release -p firn-fuzz segments_of_a_guest
//! ```
//!
//! With `cargo install cargo-bolero` and a nightly toolchain, `cargo bolero test -p firn-fuzz NAME` does the same
//! with libFuzzer, which looks for inputs that lead to new code. An input that fails is made as small as it
//! will go, and printed with the seed that makes it again.

#![forbid(unsafe_code)]
