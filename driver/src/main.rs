//! The command `firn`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    firn::cli::main()
}
