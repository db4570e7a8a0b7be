//! Runs a command in its own carrier, with this process's streams and signals.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::time::Duration;

use firn::kit::KitName;
use firn_agent_client::{Exec, ExecEvent, ExecStdin, Exit, Stream};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep_until};

use super::{Carrier, CarrierError, HostCommand, Options, command};
use crate::signals::Signals;
use crate::terminal::RawTerminal;
use crate::viewers::ViewerSocket;

/// How long a command may continue after the signal that should end it.
const GRACE: Duration = Duration::from_secs(1);

/// How long to wait for output after the command's end. Processes it left behind may hold the streams open for ever.
const LINGER: Duration = Duration::from_millis(500);

const SIGPIPE: i32 = 13;

/// Runs the command `argv` in a carrier and returns its exit status, as a shell does: 128 plus the signal's number if a
/// signal killed it. The working directory is writable. Output and input are forwarded as they come, input only if it
/// is not a terminal. SIGINT, SIGTERM and SIGHUP go to the command, and a second later the carrier ends.
///
/// # Errors
/// If the carrier cannot be started or breaks down.
pub fn exec(options: &Options, argv: Vec<OsString>) -> Result<u8, CarrierError> {
    let command = HostCommand::new(argv)?;
    let mut options = options.clone();
    options.writable.extend(command::writable_here(&command.cwd));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(CarrierError::host("start the runtime"))?;
    let status = runtime.block_on(async {
        let mut signals = Signals::new().map_err(CarrierError::host("catch signals"))?;
        let kit = tokio::task::spawn_blocking(|| {
            firn_kits::build(KitName::Carrier, &|line| eprintln!("{line}"))
        });
        let kit = tokio::select! {
            kit = kit => kit.map_err(io::Error::other).map_err(CarrierError::host("make its kit"))??,
            // The next build removes what this one leaves behind.
            number = signals.next() => return Ok(128 + number),
        };
        let carrier = tokio::select! {
            carrier = Carrier::start(&kit, &options) => Arc::new(carrier?),
            number = signals.next() => return Ok(128 + number),
        };
        let door = options.viewers.as_deref().and_then(|firn| ViewerSocket::open(&carrier, firn));
        let raw = match options.terminal {
            true => RawTerminal::of_stdin().map_err(CarrierError::host("use the terminal"))?,
            false => None,
        };
        let with_input = raw.is_some() || !io::stdin().is_terminal();
        let status = run(&carrier, command, with_input, &mut signals).await?;
        drop(door);
        carrier.shutdown().await?;
        Ok(status)
    });
    // A read of standard input may still block a thread.
    runtime.shutdown_background();
    status.map(|status| u8::try_from(status).unwrap_or(u8::MAX))
}

/// Runs the command until it ends or a signal ends it.
async fn run(
    carrier: &Carrier,
    command: HostCommand,
    with_input: bool,
    signals: &mut Signals,
) -> Result<i32, CarrierError> {
    let command = if with_input { command.stdin() } else { command };
    let mut exec = tokio::select! {
        exec = carrier.exec(&command) => exec?,
        number = signals.next() => return Ok(128 + number),
    };
    if let Some(stdin) = exec.take_stdin() {
        tokio::spawn(feed(tokio::io::stdin(), stdin));
    }
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let mut exit: Option<Exit> = None;
    let mut end: Option<(Instant, i32)> = None;
    loop {
        let deadline = end.map_or_else(Instant::now, |(deadline, _)| deadline);
        tokio::select! {
            event = carrier.or_ended(exec.next()) => match event? {
                Some(ExecEvent::Output { stream, bytes }) => {
                    let written = async {
                        match stream {
                            Stream::Stdout => forward(&mut stdout, &bytes, &exec).await,
                            Stream::Stderr => forward(&mut stderr, &bytes, &exec).await,
                        }
                    };
                    tokio::select! {
                        written = written => written?,
                        // The output has no reader any more: there is nothing to wait for.
                        number = signals.next() => return Ok(128 + number),
                    }
                }
                Some(ExecEvent::Closed(_)) => {}
                Some(ExecEvent::Exited(how)) => {
                    exit = Some(how);
                    end = Some((Instant::now() + LINGER, how.shell_status()));
                }
                None => return Ok(exit.map_or(1, Exit::shell_status)),
            },
            number = signals.next() => {
                exec.signal(number)?;
                end.get_or_insert((Instant::now() + GRACE, 128 + number));
            }
            () = sleep_until(deadline), if end.is_some() => {
                return Ok(end.map_or(1, |(_, status)| status));
            }
        }
    }
}

/// Forwards output. If its reader is gone, the command gets a broken pipe as usual.
async fn forward(
    out: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    exec: &Exec,
) -> Result<(), CarrierError> {
    let written = async {
        out.write_all(bytes).await?;
        out.flush().await
    };
    match written.await {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(exec.signal(SIGPIPE)?),
        result => result.map_err(CarrierError::host("write the command's output")),
    }
}

/// Sends input to the command until either ends.
pub(super) async fn feed(mut input: impl AsyncRead + Unpin, mut stdin: ExecStdin) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = input.read(&mut buffer).await {
        if !matches!(stdin.write_all(&buffer[..length]).await, Ok(true)) {
            return;
        }
    }
}
