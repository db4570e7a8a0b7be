//! A machine under QEMU: by a start script as nixpkgs makes them, or by firn's own command line.
//!
//! Its cards are plugged into firn's vlans by VDE, its serial console is QEMU's standard input and output, the backdoor
//! and the agent are on sockets, and all else goes through QEMU's machine protocol.

mod command;
mod panic;
mod parts;
mod process;
mod protocol;

use std::error::Error as StdError;
use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use firn_gateway::{Forward, Side};
use firn_vmm::device::boot_timer::Mark;
use firn_vmm::probe;
use firn_vmm::screen::Screen;
use firn_vmm::socket::{Listener, connect_to};
use firn_vmm::virtio::blk::create_image;
use firn_vmm::virtio::fs::ShareServer;
use firn_vmm::virtio::vsock::VsockServer;
use firn_vmm::vm::DescriptorParts;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

use super::{Backend, Event, Input, Parts, QemuMonitors, Started};
use crate::config::NodeConfig;
use crate::error::{End, MachineError, Result, chain};
use crate::machine::Dirs;
use crate::machine::console::{Console, ConsoleWriter};
use crate::machine::rfb::{self, Display};
use crate::vlan::Vlan;
use command::Sockets;
use panic::PanicFinder;
use parts::{QemuInput, QemuScreen};
use process::Process;
use protocol::{ANSWER_WITHIN, Qmp, QmpError};

/// How long a start script may take until QEMU is there: it may make disk images before.
const START_WITHIN: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_millis(20);
/// No guest boots, and resets itself again, as fast.
const ONE_RESET: Duration = Duration::from_secs(1);
/// How long QEMU's last words may take after its end.
const LAST_WORDS: Duration = Duration::from_secs(2);

type Cause = Box<dyn StdError + Send + Sync>;

/// A machine under QEMU.
pub(super) struct Qemu {
    parts: Parts,
    running: Mutex<Option<Arc<Running>>>,
    /// Changes when a start shall fail.
    cancel: watch::Sender<()>,
}

/// One between its start and its end.
struct Running {
    process: Process,
    qmp: Qmp,
    dirs: Dirs,
    /// The number of the first vlan's card among all.
    first_card: usize,
    viewers: Option<AbortHandle>,
    /// They end with QEMU, which is dropped before.
    _served: ServedDevices,
}

/// The devices that this process serves.
#[derive(Default)]
struct ServedDevices {
    _shares: Vec<ShareServer>,
    _vsock: Option<VsockServer>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(viewers) = &self.viewers {
            viewers.abort();
        }
    }
}

impl Qemu {
    pub(super) fn new(parts: Parts) -> Self {
        Self { parts, running: Mutex::default(), cancel: watch::Sender::new(()) }
    }

    fn name(&self) -> String {
        self.parts.node.name.clone()
    }

    fn start_error(&self, source: impl Into<Cause>) -> MachineError {
        MachineError::Start { machine: self.name(), source: source.into() }
    }

    fn usage(&self, what: impl std::fmt::Display) -> MachineError {
        MachineError::Usage(format!("{}: {what}", self.name()))
    }

    fn running(&self) -> Result<Arc<Running>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let running = running.as_ref().map(Arc::clone);
        running.ok_or_else(|| MachineError::NotRunning { machine: self.name() }.into())
    }

    /// Does something with QEMU's monitor that blocks.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Running) -> Result<T, QmpError> + Send + 'static,
    ) -> Result<T> {
        let running = self.running()?;
        let done = spawn_blocking(move || work(&running)).await;
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error).into()));
        done.map_err(|source| self.monitor_error(source).into())
    }

    async fn command(&self, command: &'static str, arguments: Value) -> Result<Value> {
        self.with(move |running| running.qmp.call(command, &arguments, ANSWER_WITHIN)).await
    }

    fn monitor_error(&self, source: QmpError) -> MachineError {
        match source {
            QmpError::Refused { .. } => self.usage(source),
            source => {
                let (machine, what) = (self.name(), "QEMU does not do what it was asked to");
                MachineError::Monitor { machine, what, source: source.into() }
            }
        }
    }

    async fn launch(&self, dirs: Dirs, console: Arc<Console>, may_reboot: bool) -> Result<Started> {
        let node = self.parts.source.resolved(&self.parts.node, &dirs)?;
        let because = match node.because.as_slice() {
            [] if node.start_command.is_some() => "its start command is not firn's".to_owned(),
            [] => "its description says so".to_owned(),
            because => because.join("; "),
        };
        self.parts.log.info(format_args!("runs under QEMU: {because}"));
        dirs.make()?;
        let sockets = Sockets::of(&dirs.state);
        if let Some(path) = sockets.too_long() {
            let (path, length, most) =
                (path.display(), path.as_os_str().len(), command::MAX_SOCKET);
            return Err(self.start_error(format!(
                "the path of its socket {path} has {length} bytes, and the system allows {most}: set TMPDIR to a \
                 directory with a shorter name"
            )).into());
        }
        let vlans = self.vlan_directories()?;
        let (mut command, served) =
            self.command_line(&node, &dirs, &sockets, &vlans, may_reboot).await?;
        let vlans = vlans.iter().map(|(number, directory)| (*number, directory.as_path()));
        command::environment(&mut command, &dirs, vlans);

        let [shell, agent] = [&sockets.shell, &sockets.agent].map(|path| self.listen(path));
        let (shell, agent) = (shell?, agent?);
        // What an earlier run has left would be taken for this one's.
        let _ = std::fs::remove_file(&sockets.qmp);
        let (sender, events) = mpsc::unbounded_channel();
        let mut finder = PanicFinder::default();
        let mut writer = ConsoleWriter(console);
        let panics = sender.clone();
        let printed = move |bytes: &[u8]| {
            // It takes everything.
            let _ = writer.write(bytes);
            for reason in finder.find(bytes) {
                let _ = panics.send(Event::Panicked(Some(reason)));
            }
        };
        let program = command.as_std().get_program().to_owned();
        let process =
            Process::spawn(command, &self.parts.log, printed).map_err(|error| {
                match error.kind() {
                    ErrorKind::NotFound => self.start_error(format!(
                        "{} is not in PATH; on Debian it is in the package qemu-system-x86",
                        program.display()
                    )),
                    _ => self.start_error(error),
                }
            })?;
        // Nobody listens any more once the machine is being stopped.
        let _ = sender.send(Event::Booting);
        let (gone, all_heard) = oneshot::channel();
        let mut heard = EventReader { events: sender.clone(), reset: None, _gone: gone };
        let meet = async {
            let shell = accept(shell).await?;
            let agent = accept(agent).await?;
            let stream = connected(&sockets.qmp).await?;
            let qmp = spawn_blocking(move || {
                Qmp::new(stream, ANSWER_WITHIN, move |event| heard.read_event(event))
            });
            let qmp = qmp.await.map_err(io::Error::other)??;
            Ok::<_, Cause>((shell, agent, qmp))
        };
        let mut cancelled = self.cancel.subscribe();
        let met = tokio::select! {
            biased;
            _ = cancelled.changed() => Err("it was stopped".into()),
            met = meet => match met {
                // It has its last words in its complaints.
                Err(error) if timeout(LAST_WORDS, process.ended()).await.is_err() => Err(error),
                Err(_) => Err(early_end(&process).await),
                met => met,
            },
            error = async { early_end(&process).await } => Err(error),
            () = sleep(START_WITHIN) => {
                let limit = START_WITHIN.as_secs();
                Err(format!("QEMU is not there after {limit} seconds").into())
            }
        };
        let (shell, agent, qmp) = match met {
            Ok(met) => met,
            Err(error) => {
                process.kill().await;
                return Err(self.start_error(error).into());
            }
        };
        let first_card = match node.start_command.is_some() || node.user_network.is_some() {
            // nixpkgs' start scripts have the user network's first.
            true => 1,
            false => 0,
        };
        let viewers = self.open_to_viewers(&qmp, &dirs);
        let running =
            Arc::new(Running { process, qmp, dirs, first_card, viewers, _served: served });
        tokio::spawn(tell_end(Arc::clone(&running), sender, all_heard));
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(running);
        Ok(Started { events, shell, agent: Some(agent) })
    }

    /// The command that starts it, without its environment, and the devices that are served to it.
    async fn command_line(
        &self,
        node: &NodeConfig,
        dirs: &Dirs,
        sockets: &Sockets,
        vlans: &[(u8, PathBuf)],
        may_reboot: bool,
    ) -> Result<(tokio::process::Command, ServedDevices)> {
        let added = command::added(sockets, node.vsock.is_some(), may_reboot);
        let divide = |shares| {
            let all = self.parts.descriptors.monitor();
            DescriptorParts::of_served(shares, node.vsock.is_some(), all)
        };
        if let Some(command) = &node.start_command {
            let _vsock = self.serve_vsock(node, sockets, divide(0).vsock)?;
            let served = ServedDevices { _vsock, ..ServedDevices::default() };
            return Ok((command::of_shell(command, added), served));
        }
        let spec = self.parts.source.spec(&self.parts.node, dirs, &self.parts.log).await?;
        let descriptors = divide(spec.shares.len());
        let _vsock = self.serve_vsock(node, sockets, descriptors.vsock)?;
        let initrd = dirs.state.join("initrd");
        let (initrds, target) = (spec.initrd.clone(), initrd.clone());
        let joined = spawn_blocking(move || command::join(&initrds, &target)).await;
        let joined = joined.map_err(io::Error::other).flatten();
        joined.map_err(MachineError::file("write", &initrd))?;
        let of_node = |number: &firn_vmm::spec::Number| {
            let found = vlans.iter().find(|(vlan, _)| *vlan == number.get());
            found.map(|(_, directory)| directory.clone())
        };
        let vlans: Vec<PathBuf> = node.vlans.iter().filter_map(of_node).collect();
        let shares: Vec<PathBuf> =
            (0..spec.shares.len()).map(|at| dirs.state.join(format!("fs{at}"))).collect();
        // QEMU takes any that it can open, and there are some that only interpret.
        let kvm = spawn_blocking(|| probe::kvm().usable()).await.unwrap_or(false);
        let arguments = command::of_spec(&spec, node, kvm, &initrd, &shares, &vlans);
        let command = command::own(arguments, added);
        let prepare = move || {
            for disk in &spec.disks {
                create_image(disk).map_err(Cause::from)?;
            }
            let each = spec.shares.iter().zip(shares).map(|(share, socket)| {
                // What an earlier run has left would be taken for this one's.
                let _ = std::fs::remove_file(&socket);
                ShareServer::start(share, descriptors.share, socket).map_err(Cause::from)
            });
            each.collect::<Result<Vec<_>, _>>()
        };
        let shares = spawn_blocking(prepare).await.map_err(|error| self.start_error(error))?;
        let _shares = shares.map_err(|error| self.start_error(error))?;
        Ok((command, ServedDevices { _shares, _vsock }))
    }

    /// Serves the vsock that it has.
    fn serve_vsock(
        &self,
        node: &NodeConfig,
        sockets: &Sockets,
        connections: usize,
    ) -> Result<Option<VsockServer>> {
        let Some(spec) = &node.vsock else { return Ok(None) };
        // What an earlier run has left would be taken for this one's.
        let _ = std::fs::remove_file(&sockets.vsock);
        let server = VsockServer::start(spec, connections, sockets.vsock.clone());
        Ok(Some(server.map_err(|error| self.start_error(error))?))
    }

    /// The vlans' numbers, and where QEMU plugs cards into them.
    fn vlan_directories(&self) -> Result<Vec<(u8, PathBuf)>> {
        let directory = |vlan: &Vlan| Ok((vlan.number().get(), vlan.socket_dir()?));
        let all: Result<_, MachineError> = self.parts.vlans.iter().map(directory).collect();
        all.map_err(|error| self.start_error(error).into())
    }

    fn listen(&self, path: &Path) -> Result<(Listener, UnixListener), MachineError> {
        let listener = Listener::bind(path).map_err(|error| self.start_error(error))?;
        let clients = listener.try_clone().and_then(UnixListener::from_std);
        Ok((listener, clients.map_err(|error| self.start_error(error))?))
    }

    /// Lets viewers see the screen.
    fn open_to_viewers(&self, qmp: &Qmp, dirs: &Dirs) -> Option<AbortHandle> {
        let input: Arc<dyn Input> = Arc::new(QemuInput(qmp.clone()));
        let display = Display {
            name: self.name(),
            screen: Arc::new(QemuScreen::new(qmp.clone(), dirs.state.clone())),
            keyboard: Some(Arc::clone(&input)),
            tablet: Some(input),
        };
        rfb::open(&dirs.state, display, &self.parts.log)
    }
}

/// The next who connects.
async fn accept((_own, clients): (Listener, UnixListener)) -> io::Result<UnixStream> {
    clients.accept().await?.0.into_std()
}

/// A connection to a socket that will be there.
async fn connected(path: &Path) -> io::Result<UnixStream> {
    loop {
        match connect_to(path) {
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock
                ) =>
            {
                sleep(PAUSE).await;
            }
            connected => return connected,
        }
    }
}

/// Waits for the end of what has not been there yet, and says why.
async fn early_end(process: &Process) -> Cause {
    let (status, complaints) = process.ended().await;
    let how = match status {
        // As a shell has it.
        Some(status) if status.code() == Some(127) => {
            "a program of its start command was not found".to_owned()
        }
        Some(status) => format!("it ended at once, with {status}"),
        None => "it ended at once".to_owned(),
    };
    match &*complaints {
        "" => how.into(),
        complaints => format!("{how}: {complaints}").into(),
    }
}

/// What makes events of a machine of those of QEMU.
struct EventReader {
    events: mpsc::UnboundedSender<Event>,
    /// When it was reset last.
    reset: Option<Instant>,
    /// Dropped when there are no more.
    _gone: oneshot::Sender<()>,
}

impl EventReader {
    fn read_event(&mut self, event: Value) {
        let reason = event["data"]["reason"].as_str().unwrap_or_default();
        let (ends, panicked) = match event["event"].as_str().unwrap_or_default() {
            // Linux resets a machine in several ways at once, of which QEMU tells one by one.
            "RESET" if self.reset.is_some_and(|last| last.elapsed() < ONE_RESET) => {
                (Vec::new(), None)
            }
            "RESET" => {
                self.reset = Some(Instant::now());
                (vec![Event::Ended(End::Reset), Event::Booting], None)
            }
            "SHUTDOWN" => match reason {
                "guest-shutdown" => (vec![Event::Ended(End::PoweredOff)], None),
                "guest-reset" | "host-qmp-system-reset" => (vec![Event::Ended(End::Reset)], None),
                // Its process will end.
                _ => (Vec::new(), None),
            },
            "GUEST_PANICKED" => (Vec::new(), Some(Event::Panicked(None))),
            _ => (Vec::new(), None),
        };
        for event in std::iter::once(Event::Told(event)).chain(ends).chain(panicked) {
            // Nobody listens any more once the machine is being stopped.
            let _ = self.events.send(event);
        }
    }
}

/// Tells of the end of the process, after all that QEMU had to tell.
async fn tell_end(
    running: Arc<Running>,
    events: mpsc::UnboundedSender<Event>,
    all_heard: oneshot::Receiver<()>,
) {
    let (status, complaints) = running.process.ended().await;
    let _ = timeout(LAST_WORDS, all_heard).await;
    let how = status.map_or(String::new(), |status| format!(" with {status}"));
    let complaints = if complaints.is_empty() { complaints } else { format!(": {complaints}") };
    let _ = events.send(Event::Ended(End::Failed(format!("QEMU ended{how}{complaints}"))));
}

impl Backend for Qemu {
    fn start(
        &self,
        dirs: Dirs,
        console: Arc<Console>,
        may_reboot: bool,
    ) -> BoxFuture<'_, Result<Started>> {
        Box::pin(self.launch(dirs, console, may_reboot))
    }

    fn cancel_start(&self) {
        self.cancel.send_replace(());
    }

    fn restart(&self) -> BoxFuture<'_, Result<()>> {
        // It has done so itself.
        Box::pin(async { Ok(()) })
    }

    fn stop(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(running) = running {
                running.qmp.post("quit", &json!({}));
                running.process.end().await;
            }
        })
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.command("stop", json!({})).await.map(drop) })
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.command("cont", json!({})).await.map(drop) })
    }

    fn press_power_button(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.command("system_powerdown", json!({})).await.map(drop) })
    }

    fn type_in(&self, bytes: Vec<u8>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let typed = self.running()?.process.type_in(&bytes).await;
            let failed = |error| self.usage(format_args!("its console takes no input: {error}"));
            typed.map_err(|error| failed(error).into())
        })
    }

    fn links(&self) -> usize {
        self.parts.node.vlans.len()
    }

    fn set_link(&self, card: usize, up: bool) {
        let Ok(running) = self.running() else { return };
        let name = format!("virtio-net-pci.{}", running.first_card + card);
        let arguments = json!({"name": name, "up": up});
        if let Err(error) = running.qmp.call("set_link", &arguments, ANSWER_WITHIN) {
            let cable = if up { "plugged" } else { "pulled" };
            self.parts.log.warning(format_args!("its cable is not {cable}: {}", chain(&error)));
        }
    }

    fn forward(&self, forward: Forward) -> BoxFuture<'_, Result<SocketAddr>> {
        Box::pin(async move {
            if forward.from == Side::Guest {
                let what = "QEMU forwards ports to the guest, and this one is the other way round";
                return Err(self.usage(what).into());
            }
            let failed = |why: String| MachineError::Network {
                machine: self.name(),
                what: "cannot forward a port".to_owned(),
                source: why.into(),
            };
            let before = self.human("info usernet").await?;
            let said = self.human(&format!("hostfwd_add {}", command::rule(&forward))).await?;
            if !said.trim().is_empty() {
                return Err(failed(said.trim().to_owned()).into());
            }
            if forward.host.port() != 0 {
                return Ok(forward.host);
            }
            let after = self.human("info usernet").await?;
            let new = forwarded(&after).find(|new| forwarded(&before).all(|old| old != *new));
            new.ok_or_else(|| failed("QEMU does not say which port it has taken".to_owned()).into())
        })
    }

    fn memory(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async {
            let told = self.command("query-balloon", json!({})).await?;
            Ok(told["actual"].as_u64())
        })
    }

    fn set_memory(&self, bytes: u64) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            self.command("balloon", json!({"value": bytes})).await?;
            Ok(true)
        })
    }

    fn keyboard(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Input>>>> {
        Box::pin(async {
            let input = QemuInput(self.running()?.qmp.clone());
            Ok(Some(Arc::new(input) as _))
        })
    }

    fn tablet(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Input>>>> {
        self.keyboard()
    }

    fn screen(&self) -> BoxFuture<'_, Result<Option<Arc<dyn Screen>>>> {
        Box::pin(async {
            let screen = self.with(|running| {
                let screen = QemuScreen::new(running.qmp.clone(), running.dirs.state.clone());
                // QEMU says why there is none.
                screen.take()?;
                Ok(screen)
            });
            Ok(Some(Arc::new(screen.await?) as _))
        })
    }

    fn boot_marks(&self) -> Vec<Mark> {
        Vec::new()
    }

    fn monitor(&self) -> Option<&dyn QemuMonitors> {
        Some(self)
    }
}

impl QemuMonitors for Qemu {
    fn human<'a>(&'a self, command: &'a str) -> BoxFuture<'a, Result<String>> {
        Box::pin(async move {
            let arguments = json!({"command-line": command});
            let said = self.command("human-monitor-command", arguments).await?;
            Ok(said.as_str().unwrap_or_default().replace("\r\n", "\n"))
        })
    }

    fn qmp<'a>(&'a self, command: &'a str, arguments: &'a Value) -> BoxFuture<'a, Result<Value>> {
        let (command, arguments) = (command.to_owned(), arguments.clone());
        Box::pin(self.with(move |running| running.qmp.ask(&command, &arguments, ANSWER_WITHIN)))
    }
}

/// The host's ends of forwarded ports, as `info usernet` lists them.
fn forwarded(text: &str) -> impl Iterator<Item = SocketAddr> + '_ {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.next().filter(|word| word.ends_with("[HOST_FORWARD]"))?;
        let address: IpAddr = words.nth(1)?.parse().ok()?;
        Some(SocketAddr::new(address, words.next()?.parse().ok()?))
    })
}
