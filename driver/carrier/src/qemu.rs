//! The QEMU process: its command line and its life cycle.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use firn_guest_agent::protocol::PORT_NAME;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::CarrierError;

const PROGRAM: &str = "qemu-system-x86_64";

/// Runs the words after the first if the first is the PID of the process's parent. The kernel kills a process whose
/// parent dies, but not one whose parent died before the request.
const IF_PARENT_LIVES: &str = "[ \"$PPID\" = \"$0\" ] && exec \"$@\"";

/// CPU features to disable. QEMU 7.2 shares XCR0 between its guest and nested guests: a write by one is seen by the
/// other, and Linux 7 finds inconsistent sizes and stops. So there is no XSAVE, and nothing that needs it.
const UNUSABLE: &str = "-xsave,-avx,-avx2,-f16c,-fma,-mpx,-pku,-vaes";

/// The same for counting instructions. Guests there are Linux 6.1, which such sizes do not stop if there is no MPX; and
/// without AVX they would take 2 % more instructions than on a real processor, and than what was counted before.
const UNUSABLE_EXACT: &str = "-mpx";

/// How much output of QEMU and its guest's kernel is kept, in bytes.
const TAIL: usize = 16 << 10;

/// The configuration of the machine.
pub(super) struct Machine {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) cmdline: String,
    pub(super) memory_mib: u64,
    pub(super) cores: u32,
    /// Whether to count instructions instead of time; with one core.
    pub(super) exact: bool,
    /// The frequency of its time stamp counter.
    pub(super) tsc_khz: u64,
    /// Directories of the host that the guest may write to, by their 9p tag.
    pub(super) writable: Vec<(String, PathBuf)>,
    /// Images of its disks, read-only, in the guest's order.
    pub(super) disks: Vec<PathBuf>,
}

impl Machine {
    fn arguments(&self) -> Vec<OsString> {
        let mut args = Arguments::default();
        // Devices that no such guest uses cost setup time, and firmware tables cost boot time.
        args.add("-M", "q35,smm=off,hpet=off,usb=off,vmport=off,sata=off,smbus=off");
        args.add("-nodefaults", "").add("-no-user-config", "").add("-no-reboot", "");
        args.add("-display", "none");
        if self.exact {
            args.add("-cpu", format!("max,{UNUSABLE_EXACT}"));
            // The clock is the number of instructions, 1 ns each; idle time is skipped.
            args.add("-accel", "tcg,thread=single")
                .add("-icount", "shift=0,sleep=off")
                .add("-smp", "1");
        } else {
            // Each byte of a `rep stosb` is emulated as an instruction. Without it Linux clears memory by words, which
            // makes a boot faster by a quarter.
            args.add("-cpu", format!("max,{UNUSABLE},-erms"));
            args.add("-accel", "tcg,thread=multi").add("-smp", self.cores.to_string());
        }
        args.add("-m", format!("{}M", self.memory_mib));
        args.add("-kernel", &self.kernel)
            .add("-initrd", &self.initrd)
            .add("-append", format!("{} tsc_early_khz={}", self.cmdline, self.tsc_khz));
        // The console goes to the pipe that is QEMU's standard output, the agent's port to the socket that is its
        // standard input: neither leaves anything in the file system, whatever happens.
        args.add("-serial", "file:/proc/self/fd/1");
        args.add("-device", "virtio-serial-pci").add("-chardev", "socket,id=agent,fd=0");
        args.add("-device", format!("virtserialport,chardev=agent,name={PORT_NAME}"));
        args.add("-device", "virtio-rng-pci");
        args.share("root", Path::new("/"), true);
        for (tag, path) in &self.writable {
            args.share(tag, path, false);
        }
        for (at, path) in self.disks.iter().enumerate() {
            args.disk(&format!("disk{at}"), path);
        }
        args.0
    }
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn add(&mut self, option: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.push(option.into());
        if !value.as_ref().is_empty() {
            self.0.push(value.as_ref().to_owned());
        }
        self
    }

    fn share(&mut self, tag: &str, path: &Path, read_only: bool) {
        let mut backend =
            format!("local,id={tag},security_model=none,multidevs=remap").into_bytes();
        if read_only {
            backend.extend_from_slice(b",readonly=on");
        }
        backend.extend_from_slice(b",path=");
        push_value(&mut backend, path);
        self.add("-fsdev", OsString::from_vec(backend));
        self.add("-device", format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
    }

    fn disk(&mut self, id: &str, image: &Path) {
        let mut drive = format!("if=none,id={id},format=raw,readonly=on,file=").into_bytes();
        push_value(&mut drive, image);
        self.add("-drive", OsString::from_vec(drive));
        self.add("-device", format!("virtio-blk-pci,drive={id}"));
    }
}

/// Adds a path to an option's value.
fn push_value(option: &mut Vec<u8>, path: &Path) {
    for &byte in path.as_os_str().as_bytes() {
        option.push(byte);
        if byte == b',' {
            // In a value, QEMU reads two commas as one.
            option.push(byte);
        }
    }
}

/// A running QEMU. Dropping it kills it and waits until it is gone.
pub(super) struct Qemu {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    /// How it ended, once it has.
    ended: watch::Receiver<Option<String>>,
    output: Arc<Output>,
}

impl Qemu {
    /// Starts QEMU. The stream is the agent's port. Needs a tokio runtime.
    pub(super) fn start(machine: &Machine) -> Result<(Self, UnixStream), CarrierError> {
        let spawn = |source| CarrierError::Spawn { program: PROGRAM, source };
        let (port, qemu_port) = StdUnixStream::pair().map_err(spawn)?;
        port.set_nonblocking(true).map_err(spawn)?;
        let port = UnixStream::from_std(port).map_err(spawn)?;
        let command = command(machine.arguments(), qemu_port.into());
        let (stop, stopped) = oneshot::channel();
        let (started_tx, started) = std::sync::mpsc::channel();
        let (ended_tx, ended) = watch::channel(None);
        let output = Arc::new(Output::default());
        let kept = output.clone();
        // In a separate thread, because the kernel kills QEMU when the *thread* that started it ends.
        let thread = std::thread::Builder::new()
            .name("carrier".to_owned())
            .spawn(move || attend(command, &started_tx, stopped, &ended_tx, &kept))
            .map_err(spawn)?;
        let this = Self { stop: Some(stop), thread: Some(thread), ended, output };
        match started.recv() {
            Ok(Ok(())) => Ok((this, port)),
            Ok(Err(source)) => Err(CarrierError::missing("setpriv", "util-linux", source)),
            Err(_) => Err(spawn(io::Error::other("the thread that starts it ended"))),
        }
    }

    /// Waits until it has ended by itself; returns the error that explains why.
    pub(super) async fn ended(&self) -> CarrierError {
        let mut ended = self.ended.clone();
        // A closed channel means that its thread is gone, and with it QEMU.
        let how = match ended.wait_for(Option::is_some).await {
            Ok(how) => how.clone().unwrap_or_default(),
            Err(_) => String::new(),
        };
        self.explain(how)
    }

    /// Waits for a step of its start to end, up to a limit.
    pub(super) async fn within<T>(
        &self,
        step: &'static str,
        limit: Duration,
        done: impl Future<Output = Result<T, CarrierError>>,
    ) -> Result<T, CarrierError> {
        let late = |_| CarrierError::Timeout { step, limit, console: self.console() };
        timeout(limit, done).await.map_err(late)?
    }

    /// Returns the end of its guest's kernel log.
    pub(super) fn console(&self) -> String {
        text(&self.output.console)
    }

    fn explain(&self, how: String) -> CarrierError {
        let (stderr, console) = (text(&self.output.stderr), self.console());
        if stderr.contains(&format!("{PROGRAM}: not found")) {
            let source = io::Error::from(io::ErrorKind::NotFound);
            return CarrierError::missing(PROGRAM, "qemu-system-x86", source);
        }
        CarrierError::Ended { how, stderr, console }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked; if it did, QEMU is dead too.
            let _ = thread.join();
        }
    }
}

fn command(arguments: Vec<OsString>, port: OwnedFd) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "/bin/sh", "-c", IF_PARENT_LIVES]);
    command.arg(std::process::id().to_string()).arg(PROGRAM).args(arguments);
    command.stdin(Stdio::from(port)).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A terminal sends Ctrl-C to its foreground group; here firn handles it.
    command.process_group(0).kill_on_drop(true);
    command
}

/// Starts QEMU, reads its output, and stays with it until it has ended or is `stopped`.
fn attend(
    mut command: Command,
    started: &std::sync::mpsc::Sender<io::Result<()>>,
    stopped: oneshot::Receiver<()>,
    ended: &watch::Sender<Option<String>>,
    output: &Output,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    runtime.block_on(async {
        let child = command.spawn();
        // The port's other end must close when QEMU ends, so this copy is dropped.
        drop(command);
        let mut child = match child {
            Ok(child) => child,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let _ = started.send(Ok(()));
        let (_, _, how) = tokio::join!(
            keep(stdout, &output.console),
            keep(stderr, &output.stderr),
            until_ended(&mut child, stopped)
        );
        // The receiver may be gone already.
        let _ = ended.send(Some(how));
    });
}

/// Waits for `child` to end, and kills it when `stopped` is sent or dropped.
async fn until_ended(child: &mut Child, stopped: oneshot::Receiver<()>) -> String {
    let describe = |status: io::Result<ExitStatus>| match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    tokio::select! {
        status = child.wait() => return describe(status),
        _ = stopped => {}
    }
    // This fails only if it has ended already.
    let _ = child.start_kill();
    describe(child.wait().await)
}

/// The ends of QEMU's outputs.
#[derive(Default)]
struct Output {
    stderr: Mutex<VecDeque<u8>>,
    console: Mutex<VecDeque<u8>>,
}

fn text(tail: &Mutex<VecDeque<u8>>) -> String {
    let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
    String::from_utf8_lossy(tail.make_contiguous()).trim().to_owned()
}

/// Reads `pipe` to its end and keeps the last [`TAIL`] bytes.
async fn keep(pipe: Option<impl AsyncRead + Unpin>, tail: &Mutex<VecDeque<u8>>) {
    let Some(mut pipe) = pipe else { return };
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&buffer[..length]);
        let surplus = tail.len().saturating_sub(TAIL);
        tail.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(exact: bool) -> Machine {
        Machine {
            kernel: "/k".into(),
            initrd: "/i".into(),
            cmdline: "quiet".into(),
            memory_mib: 2048,
            cores: 3,
            exact,
            tsc_khz: 2_592_000,
            writable: vec![("w0".into(), "/work/a,b".into())],
            disks: vec!["/cache/a,b.img".into()],
        }
    }

    fn value_of<'a>(arguments: &'a [OsString], option: &str) -> Vec<&'a str> {
        let pairs = arguments.windows(2);
        pairs.filter(|pair| pair[0] == option).map(|pair| pair[1].to_str().unwrap()).collect()
    }

    #[test]
    fn shares_the_root_read_only_and_escapes_commas() {
        let arguments = machine(false).arguments();
        let shares = value_of(&arguments, "-fsdev");
        assert_eq!(
            shares[0],
            "local,id=root,security_model=none,multidevs=remap,readonly=on,path=/"
        );
        assert_eq!(shares[1], "local,id=w0,security_model=none,multidevs=remap,path=/work/a,,b");
        let disks = value_of(&arguments, "-drive");
        assert_eq!(disks, ["if=none,id=disk0,format=raw,readonly=on,file=/cache/a,,b.img"]);
        assert_eq!(value_of(&arguments, "-smp"), ["3"]);
        assert_eq!(value_of(&arguments, "-m"), ["2048M"]);
        assert_eq!(value_of(&arguments, "-append"), ["quiet tsc_early_khz=2592000"]);
    }

    #[test]
    fn exact_counts_instructions_on_one_core() {
        let arguments = machine(true).arguments();
        assert_eq!(value_of(&arguments, "-icount"), ["shift=0,sleep=off"]);
        assert_eq!(value_of(&arguments, "-accel"), ["tcg,thread=single"]);
        assert_eq!(value_of(&arguments, "-smp"), ["1"]);
        assert_eq!(value_of(&arguments, "-cpu"), ["max,-mpx"]);
    }

    #[tokio::test]
    async fn an_early_end_is_explained() {
        let mut machine = machine(false);
        machine.kernel = "/no/such/kernel".into();
        machine.writable.clear();
        machine.disks.clear();
        let (qemu, _port) = Qemu::start(&machine).unwrap();
        let error = qemu.ended().await.to_string();
        assert!(error.contains("exit status: 1") && error.contains("/no/such/kernel"), "{error}");
    }
}
