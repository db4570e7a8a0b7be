//! What the agent gives its commands on their way, beside what the host asks for.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// How much the kernel likes to end this process when memory is short: -1000 to 1000 (proc_pid_oom_score_adj(5)).
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Starts processes.
#[derive(Debug)]
pub struct Spawner {
    console: Option<PathBuf>,
    /// The agent's own score, if that protects it.
    protection: Option<String>,
}

impl Spawner {
    /// With a console for the standard error of commands.
    pub fn new(console: Option<PathBuf>) -> Self {
        let score = fs::read_to_string(OOM_SCORE).ok();
        Self { console, protection: score.filter(|score| score.starts_with('-')) }
    }

    /// A standard error for a command. Each opens the console again: a login there hangs up all earlier opens.
    pub fn console(&self) -> Stdio {
        let Some(path) = &self.console else { return Stdio::inherit() };
        match open_terminal(path) {
            Ok(console) => console.into(),
            Err(error) => {
                complain!("firn-agent: open {}: {error}", path.display());
                Stdio::inherit()
            }
        }
    }

    /// Starts a process that the kernel may end like any other when memory is short, however the agent is protected.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let Some(protection) = &self.protection else { return command.spawn() };
        // A child begins with its parent's score, and there is no way in between.
        set_score("0");
        let child = command.spawn();
        set_score(protection);
        child
    }
}

/// Opens a terminal that does not become the agent's own, without waiting for a carrier signal.
fn open_terminal(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let terminal = OpenOptions::new().write(true).custom_flags(flags.bits()).open(path)?;
    fcntl(&terminal, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(terminal)
}

fn set_score(score: &str) {
    if let Err(error) = fs::write(OOM_SCORE, score) {
        complain!("firn-agent: {OOM_SCORE}: {error}");
    }
}
