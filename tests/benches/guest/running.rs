//! Guests that run, by firn in this process or by another monitor, and what they say on their consoles.

use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use firn_bench::monitor::Devices;
use firn_bench::{Guest, OtherMonitor, Sample};
use firn_net_switch::NetPort;
use firn_tests::{host_libraries, micro, small_guest};
use firn_vmm::Cancel;
use firn_vmm::spec::{MachineSpec, NetSpec};
use firn_vmm::virtio::build::Connect;
use firn_vmm::vm::{Event, HostSide, Vm};

use super::{FIRN, Way, write};

/// A guest that says nothing for so long hangs. Each of 16 that boot at once on one processor takes minutes.
const PATIENCE: Duration = Duration::from_secs(600);
/// What a machine of firn's says in the place of a guest that has ended.
const ENDED: &str = "the machine has ended: ";
/// The driver of a disk, and those of the bus that some monitors have.
const DRIVERS: [&str; 4] =
    ["virtio_blk", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"];
/// In the directory of a subject.
const INITRD: &str = "initrd";

/// Makes the initrd of a guest that runs a script, with what all scripts begin with, and may have a program of the host.
pub(crate) fn prepare(script: &str, program: Option<&Path>, dir: &Path) -> Result<()> {
    let mut files = Vec::new();
    if let Some(program) = program {
        let libraries = host_libraries().into_iter();
        let libraries = libraries.map(|(name, path)| (Path::new("lib64").join(name), path));
        let place = Path::new("bin").join(program.file_name().context("it has a name")?);
        for (place, path) in libraries.chain([(place, program.to_owned())]) {
            let content =
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            files.push((place, content));
        }
    }
    let script = concat!(include_str!("begin.sh"), "\n").to_owned() + script;
    write(dir, INITRD, small_guest(&micro(), &script, &DRIVERS, files))?;
    Ok(())
}

/// The guest of [`prepare`], with variables for its script.
pub(crate) fn guest(dir: &Path, memory_mib: u64, variables: &str) -> Guest {
    let kit = micro();
    Guest {
        vmlinux: kit.vmlinux(),
        bzimage: kit.kernel(),
        initrd: dir.join(INITRD),
        cmdline: format!("{} {variables}", kit.manifest.cmdline),
        memory_mib,
        cores: 1,
    }
}

/// By firn, and by each of these monitors that is installed.
pub(crate) fn ways(monitors: impl IntoIterator<Item = OtherMonitor>) -> Vec<Way> {
    let others = monitors.into_iter().filter(|monitor| monitor.find().is_some());
    let others = others.map(|monitor| Way::other(monitor.as_str()));
    [Way::firn(FIRN)].into_iter().chain(others).collect()
}

/// The monitor of a way, by its name.
pub(crate) fn other(way: &str) -> Result<OtherMonitor> {
    let find = OtherMonitor::ALL.into_iter().find(|monitor| monitor.as_str() == way);
    find.with_context(|| format!("there is no monitor {way}"))
}

/// A guest that runs. It ends with this.
pub(crate) struct Running {
    lines: Receiver<(Instant, String)>,
    machine: Machine,
}

enum Machine {
    Firn(Box<Vm>),
    Other(Child, ChildStdin),
}

/// What a machine of firn's has besides what all guests have.
#[derive(Default)]
pub(crate) struct Parts {
    /// As keys of a machine's spec.
    pub spec: serde_json::Value,
    /// Beside the guest's own initrd.
    pub initrd: Option<PathBuf>,
    pub net: Option<Arc<dyn NetPort>>,
}

impl Running {
    /// Starts a guest by the way of this name among [`ways`]: firn's has `parts`, others have `devices`.
    pub fn start(
        way: &str,
        guest: &Guest,
        parts: Parts,
        devices: &Devices,
        dir: &Path,
    ) -> Result<Self> {
        match way {
            FIRN => Self::firn(guest, parts),
            monitor => Self::other(other(monitor)?, guest, devices, (dir, monitor)),
        }
    }

    /// Starts a guest by firn, in this process.
    pub fn firn(guest: &Guest, parts: Parts) -> Result<Self> {
        let initrd: Vec<_> = [guest.initrd.clone()].into_iter().chain(parts.initrd).collect();
        let mut spec = serde_json::json!({
            "name": "m", "cores": guest.cores, "memory": guest.memory_mib,
            "kernel": guest.vmlinux, "initrd": initrd, "cmdline": guest.cmdline, "rng": false,
        });
        if let serde_json::Value::Object(more) = parts.spec {
            spec.as_object_mut().context("it is one")?.extend(more);
        }
        let spec: MachineSpec = serde_json::from_value(spec)?;
        let (sender, lines) = channel();
        let ended = sender.clone();
        let host = HostSide {
            events: Box::new(move |event| {
                if !matches!(event, Event::Booting) {
                    let _ = ended.send((Instant::now(), format!("{ENDED}{event:?}")));
                }
            }),
            serial: Box::new(Lines { sender, begun: Vec::new() }),
            connect: Box::new(Plug(parts.net)),
            descriptors: 10_000,
            cancel: Cancel::default(),
        };
        let mut vm = Vm::new(&spec, host)?;
        vm.start()?;
        Ok(Self { lines, machine: Machine::Firn(Box::new(vm)) })
    }

    /// Starts a guest by another monitor. `name` is for its files.
    pub fn other(
        monitor: OtherMonitor,
        guest: &Guest,
        devices: &Devices,
        (dir, name): (&Path, &str),
    ) -> Result<Self> {
        let program = monitor.find().context("it is not installed")?;
        let command = monitor.command(&program, guest, devices, &dir.join(name))?;
        let mut child = Command::new(&command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let input = child.stdin.take().context("it is piped")?;
        let output = child.stdout.take().context("it is piped")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(output).split(b'\n').map_while(Result::ok);
            lines.all(|line| pass_on(&line, &sender).is_ok())
        });
        Ok(Self { lines, machine: Machine::Other(child, input) })
    }

    /// Types a line on the guest's console.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let line = format!("{line}\n");
        match &mut self.machine {
            Machine::Firn(vm) => vm.serial_input(line.as_bytes())?,
            Machine::Other(_, input) => {
                input.write_all(line.as_bytes())?;
                input.flush()?;
            }
        }
        Ok(())
    }

    /// The guest's next line.
    fn next(&self) -> Result<(Instant, String)> {
        let (at, line) = match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => bail!("the monitor has ended"),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest hangs: it has said nothing for {} seconds", PATIENCE.as_secs())
            }
        };
        match &*line {
            "failed" => bail!("the guest has failed"),
            _ if line.starts_with(ENDED) => bail!("{line}"),
            _ => Ok((at, line)),
        }
    }

    /// When the guest says this.
    pub fn until(&self, said: &str) -> Result<Instant> {
        loop {
            let (at, line) = self.next()?;
            if line == said {
                return Ok(at);
            }
        }
    }

    /// How long each step took, until the guest says that it is over.
    pub fn steps(&self) -> Result<Sample> {
        let (mut steps, mut began) = (Sample::new(), Instant::now());
        loop {
            let (at, line) = self.next()?;
            if line.starts_with("begin ") {
                began = at;
            } else if let Some(step) = line.strip_prefix("end ") {
                steps.push((step.to_owned(), nanoseconds(at - began)));
            } else if line == "over" {
                return Ok(steps);
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Machine::Other(child, _) = &mut self.machine {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Plugs a machine's card in.
struct Plug(Option<Arc<dyn NetPort>>);

impl Connect for Plug {
    fn net(&mut self, _card: &NetSpec) -> io::Result<Arc<dyn NetPort>> {
        self.0.clone().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

/// Passes a line on. If all goes wrong, the report shows the last ones.
fn pass_on(
    line: &[u8],
    sender: &Sender<(Instant, String)>,
) -> Result<(), SendError<(Instant, String)>> {
    let at = Instant::now();
    let line = String::from_utf8_lossy(line).trim().to_owned();
    eprintln!("{line}");
    sender.send((at, line))
}

/// Passes a console on by lines.
struct Lines {
    sender: Sender<(Instant, String)>,
    begun: Vec<u8>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte == b'\n' {
                let _ = pass_on(&std::mem::take(&mut self.begun), &self.sender);
            } else {
                self.begun.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
