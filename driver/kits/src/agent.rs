//! Finds the guest agent's static binary.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use object::elf;
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use thiserror::Error;

const BINARY: &str = "firn-agent";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const VARIABLE: &str = "FIRN_AGENT";
const BUILD: &str = "RUSTFLAGS='-C target-feature=+crt-static' cargo build --profile agent -p firn-guest-agent \
                     --target x86_64-unknown-linux-gnu";

/// Why the guest agent was not found.
#[derive(Debug, Error)]
pub enum AgentError {
    /// It is in none of the places.
    #[error(
        "no `{BINARY}` found; looked at {}.\nSet {VARIABLE} to its path, or build it: {BUILD}",
        .looked_at.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NotFound {
        /// The places.
        looked_at: Vec<PathBuf>,
    },
    /// `FIRN_AGENT` names a file that cannot be read.
    #[error("{VARIABLE} is {path}, which cannot be read")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not a program that a guest without libraries can run.
    #[error("{path} {problem}.\nBuild it with: {BUILD}")]
    Unsuitable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Finds the agent: by `FIRN_AGENT`, then beside this program, then in the cargo target directory that this program was
/// built into.
///
/// # Errors
/// If there is none, or it is not a static x86-64 program.
pub fn find_agent() -> Result<PathBuf, AgentError> {
    if let Some(path) = env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from) {
        return check(path);
    }
    let program = env::current_exe().unwrap_or_default();
    let candidates = candidates(&program);
    match candidates.iter().find(|path| path.is_file()) {
        Some(path) => check(path.clone()),
        None => Err(AgentError::NotFound { looked_at: candidates }),
    }
}

/// Returns the places to look at for a program at `program`, best first.
fn candidates(program: &Path) -> Vec<PathBuf> {
    let mut candidates = Vec::new();
    let Some(dir) = program.parent() else { return candidates };
    candidates.push(dir.join(BINARY));
    // target/debug/firn, target/debug/deps/test-0123 or target/TRIPLE/debug/deps/test-0123.
    for target in dir.ancestors().skip(1).take(3) {
        for profile in ["agent", "release", "debug"] {
            candidates.push(target.join(TARGET).join(profile).join(BINARY));
        }
    }
    candidates
}

fn check(path: PathBuf) -> Result<PathBuf, AgentError> {
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(source) => return Err(AgentError::Unreadable { path, source }),
    };
    match problem(&bytes) {
        None => Ok(path),
        Some(problem) => Err(AgentError::Unsuitable { path, problem }),
    }
}

/// Why the program in `bytes` cannot run as a guest's init, without libraries.
pub(crate) fn problem(bytes: &[u8]) -> Option<&'static str> {
    let Ok(file) = ElfFile64::<object::Endianness>::parse(bytes) else {
        return Some("is not a 64-bit ELF program");
    };
    let endian = file.endian();
    if file.elf_header().e_machine(endian) != elf::EM_X86_64 {
        return Some("is not for x86-64");
    }
    let interpreted =
        file.elf_program_headers().iter().any(|header| header.p_type(endian) == elf::PT_INTERP);
    interpreted.then_some("is dynamically linked, but guests have no libraries")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_beside_the_program_and_in_its_target_directory() {
        let found = candidates(Path::new("/w/target/debug/deps/kit-0123"));
        assert_eq!(found[0], Path::new("/w/target/debug/deps/firn-agent"));
        assert!(found.contains(&"/w/target/x86_64-unknown-linux-gnu/agent/firn-agent".into()));
        let installed = candidates(Path::new("/usr/bin/firn"));
        assert_eq!(installed[0], Path::new("/usr/bin/firn-agent"));
        assert!(candidates(Path::new("/")).is_empty());
    }

    #[test]
    fn refuses_programs_that_need_libraries() {
        let this = fs::read(env::current_exe().unwrap()).unwrap();
        assert_eq!(problem(&this), Some("is dynamically linked, but guests have no libraries"));
        assert_eq!(problem(b"#!/bin/sh"), Some("is not a 64-bit ELF program"));
        assert_eq!(problem(&this[..40]), Some("is not a 64-bit ELF program"));
    }

    #[test]
    fn the_error_says_what_to_do() {
        let error = AgentError::NotFound { looked_at: vec!["/a/firn-agent".into()] }.to_string();
        assert!(
            error.contains("/a/firn-agent")
                && error.contains("FIRN_AGENT")
                && error.contains("cargo build")
        );
    }
}
