//! `firn run`.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use firn::config::{MachineFile, Needs, Script, TestConfig};
use firn::driver::{Driver, DriverOptions};
use firn::log::{Level, Logger};
use firn::machine::Machine;
use firn::scratch::StatePlace;
use firn_carrier::Options;
use firn_carrier::accel::run_again;
use firn_carrier::signals::Signals;
use firn_carrier::terminal::RawTerminal;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::Place;

/// Boot a machine file on this terminal
///
/// The terminal is the machine's serial console. A machine file starts with `#!… firn run`, so executing one does the
/// same.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Ctrl-A x ends the machine, Ctrl-A a sends Ctrl-A.

Relative paths in the file start at the current directory; disk images created there are kept.
`${TMPDIR}` in it is a directory that is removed at the end; with USE_TMPDIR in the environment, it
is TMPDIR itself. No other machine is on its vlans.

Exit status: 0 the machine powered off, or Ctrl-A x ended it; 1 it ended otherwise; 2 the file is
invalid.")]
pub struct Args {
    /// The machine file
    file: PathBuf,
    /// Give the machine a screen, a keyboard and a tablet, unless its file says otherwise
    #[arg(long)]
    screen: bool,
    #[command(flatten)]
    place: Place,
}

/// Ctrl-A, the prefix of commands to firn.
const ESCAPE: u8 = 0x01;

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let mut file = MachineFile::read(&args.file)?;
    if let Some(command) = file.command() {
        return by_itself(&command);
    }
    if args.screen {
        file.supply(Needs::ALL);
    }
    let state = std::env::var_os("USE_TMPDIR").filter(|value| !value.is_empty());
    let state = state.map(|_| std::env::temp_dir());
    if args.place.accel.runs_here()? {
        return here(file, state);
    }
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command: Vec<OsString> = Vec::new();
    let mut writable = test_of(file).writable();
    if let Some(dir) = state {
        let mut variable = OsString::from("TMPDIR=");
        variable.push(&dir);
        command.extend(["env".into(), variable]);
        writable.push(dir);
    }
    command.push(program.into());
    command.extend(["run", "--accel", "kvm"].map(Into::into));
    command.extend(args.screen.then(|| "--screen".into()));
    command.push("--".into());
    command.push(std::path::absolute(&args.file)?.into());
    let options = Options {
        writable,
        terminal: true,
        viewers: std::env::current_exe().ok(),
        ..Options::default()
    };
    Ok(run_again(&options, command)?.into())
}

/// A start command for QEMU does all that this does itself.
fn by_itself(command: &str) -> Result<ExitCode> {
    let error = Command::new("/bin/sh").args(["-c", &format!("exec {command}")]).exec();
    Err(error).context("cannot run /bin/sh")
}

/// A test with just this machine.
pub(super) fn test_of(file: MachineFile) -> TestConfig {
    TestConfig {
        name: file.name().to_owned(),
        script: Script { text: String::new(), file: file.path().to_owned(), line: 1 },
        global_timeout: None,
        nodes: Vec::new(),
        files: vec![file],
        more_vlans: Vec::new(),
        vsock_offset: None,
        from_boot: false,
    }
}

/// Driver options for files written by hand: paths are relative to the current directory, and consoles are not logged.
pub(super) fn options_here() -> Result<DriverOptions> {
    let here = std::env::current_dir().context("there is no current directory")?;
    Ok(DriverOptions {
        out_dir: here.clone(),
        log: Logger::stderr_from(Level::Warning),
        base: Some(here),
        ..DriverOptions::default()
    })
}

/// A runtime for a driver alone. One thread is enough, as machines have their own.
pub(super) fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start threads")
}

fn here(file: MachineFile, state: Option<PathBuf>) -> Result<ExitCode> {
    let state = state.map_or(StatePlace::New, StatePlace::Of);
    let options = DriverOptions { state, ..options_here()? };
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        // Before anything is there that must be removed in the end.
        let mut signals = Signals::new().context("cannot catch signals")?;
        let driver = Driver::new(&test_of(file), options)?;
        let outcome = match driver.machines() {
            [machine] => attend(machine, &mut signals).await,
            _ => Ok(()),
        };
        driver.close().await;
        outcome
    });
    // A read of standard input may still block a thread.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}

/// Runs the machine on the terminal until it ends or is told to.
async fn attend(machine: &Machine, signals: &mut Signals) -> Result<()> {
    let tap = machine.tap_console();
    tokio::select! {
        started = machine.start(true) => started?,
        _ = signals.next() => return Ok(()),
    }
    let raw = RawTerminal::of_stdin().context("cannot use the terminal")?;
    let (typed, mut keys) = mpsc::channel(16);
    std::thread::spawn(move || read_keys(&typed));
    let mut open = true;
    let outcome = loop {
        tokio::select! {
            bytes = tap.next() => show(&bytes)?,
            key = keys.recv(), if open => match key {
                Some(Typed::Text(text)) => {
                    // A guest that does not read loses what is typed, as with any serial line.
                    let _ = machine.send_console_bytes(text).await;
                }
                Some(Typed::Quit) => break Ok(()),
                None => open = false,
            },
            ended = machine.wait_for_shutdown() => break ended.map_err(Into::into),
            _ = signals.next() => break Ok(()),
        }
    };
    drop(raw);
    outcome
}

fn show(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// Input from the terminal.
#[derive(Debug, PartialEq, Eq)]
enum Typed {
    Text(Vec<u8>),
    Quit,
}

/// Reads standard input until it ends or the receiver is gone.
fn read_keys(typed: &mpsc::Sender<Typed>) {
    let mut input = io::stdin().lock();
    let mut escaped = false;
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = input.read(&mut buffer) {
        for item in parse(&buffer[..length], &mut escaped) {
            if typed.blocking_send(item).is_err() {
                return;
            }
        }
    }
}

/// Separates commands to firn from what was typed.
fn parse(bytes: &[u8], escaped: &mut bool) -> Vec<Typed> {
    let mut text = Vec::new();
    for byte in bytes {
        match (std::mem::take(escaped), *byte) {
            (true, b'x' | b'X') => return vec![Typed::Text(text), Typed::Quit],
            (true, b'a' | ESCAPE) => text.push(ESCAPE),
            (true, other) => text.push(other),
            (false, ESCAPE) => *escaped = true,
            (false, other) => text.push(other),
        }
    }
    if text.is_empty() { Vec::new() } else { vec![Typed::Text(text)] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let mut escaped = false;
        let text = |text: &[u8]| Typed::Text(text.to_vec());
        assert_eq!(parse(b"ls\r", &mut escaped), [text(b"ls\r")]);
        assert_eq!(parse(b"\x01", &mut escaped), []);
        assert_eq!(parse(b"ab", &mut escaped), [text(b"\x01b")]);
        assert_eq!(parse(b"x\x01\x01\x01z", &mut escaped), [text(b"x\x01z")]);
        assert_eq!(parse(b"y\x01xz", &mut escaped), [text(b"y"), Typed::Quit]);
    }
}
