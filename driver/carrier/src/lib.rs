//! The carrier: an emulated machine with a KVM of its own, for hosts whose KVM cannot be used.
//!
//! QEMU emulates a processor with AMD's virtualization and runs Debian's kernel (the kit `carrier`). The host's root
//! directory is the carrier's, read-only; the working directory, and others on request, are writable; `/tmp` is the
//! host's as well, but what is written there stays inside, and `/run` and `/dev/shm` are empty and writable. So the
//! host's programs run in it unmodified, see a `/dev/kvm`, and leave their results in the same places as on the host.
//! There is no network except loopback.
//!
//! Nothing outlives this process: QEMU is killed when the [`Carrier`] is dropped, and by the kernel when the process
//! dies. It leaves no file and no socket.
#![forbid(unsafe_code)]

pub mod accel;
mod clock;
mod command;
mod forward;
mod qemu;
pub mod signals;
pub mod terminal;
mod viewers;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use firn::error::chain;
use firn::kit::{Kit, KitName};
use firn_agent_client::{AgentClient, AgentError, Exec, ExecRequest};
use firn_kits::BuildError;
use firn_vmm::arch::tsc;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::task::AbortHandle;
use tokio::time::sleep;

pub use command::HostCommand;
pub use forward::exec;

use qemu::{Machine, Qemu};

/// How long the carrier may take to boot. It takes about four seconds on an idle host.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// How long any other step of its start may take. Each takes less than a second on an idle host.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);

/// How often it is started until its clock is right.
const TRIES: u32 = 3;

/// The frequency of a time stamp counter that counts instructions, 1 ns each.
const EXACT_KHZ: u64 = 1_000_000;

/// How long the carrier may take to write back its data before it is killed.
const SYNC_TIMEOUT: Duration = Duration::from_secs(1);

/// The default memory in MiB: enough for a guest of 6 GiB. The host allocates it as it is used.
const MEMORY_MIB: u64 = 9 << 10;

/// Mounts the 9p share named by the first argument at the second. Files that others change are never read from a cache:
/// `cache=mmap` keeps only pages of mapped files, which programs need to run.
const MOUNT_WRITABLE: &str = "mkdir -p \"/mnt$2\" && \
    exec mount -t 9p -o rw,trans=virtio,version=9p2000.L,cache=mmap,msize=512000 \"$1\" \"/mnt$2\"";

/// Loads the kit's drivers for disks and mounts the disk with the letter of the first argument at the second.
const MOUNT_DISK: &str = "while read -r module; do \
    [ -d \"/sys/module/$(basename \"$module\" .ko)\" ] || insmod \"$module\" || exit; done < /etc/firn/on-demand; \
    exec mount -t ext4 -o ro \"/dev/vd$1\" \"/mnt$2\"";

/// Processors unless something else is asked for. With two, under load, guests went wrong that no device had touched:
/// of transfers of 100 MiB one in four ended with a flipped bit in a CR3, a triple fault or a locked-up carrier. With
/// one, ten of ten passed and took no longer. QEMU 7.2 multi-threads AMD-V with nested paging, which is the likely
/// cause.
const CORES: u32 = 1;

/// Options of a carrier.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Its memory in MiB; by default what the host can spare, at most 9 GiB.
    pub memory_mib: Option<u64>,
    /// Its processors; one by default.
    pub cores: Option<u32>,
    /// Makes its clock count executed instructions, a nanosecond each, on one processor: slower, but repeatable.
    pub exact: bool,
    /// Directories it may write to, besides the working directory of [`exec`].
    pub writable: Vec<PathBuf>,
    /// Passes this process's terminal input to the command key by key.
    pub terminal: bool,
    /// The command `firn`, if viewers on the host should see the screens of machines that the command runs.
    pub viewers: Option<PathBuf>,
}

/// Why something could not run in a carrier.
#[derive(Debug, Error)]
pub enum CarrierError {
    /// The carrier's kernel and initrd could not be built.
    #[error("cannot build the carrier's kernel")]
    Kit(#[from] BuildError),
    /// A program is not installed.
    #[error("`{program}` is not installed: install Debian's package {package}")]
    Missing {
        /// The program.
        program: &'static str,
        /// The Debian package that contains it.
        package: &'static str,
    },
    /// A program could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// QEMU ended unexpectedly.
    #[error("the carrier ended: QEMU's {how}{}{}", section("QEMU said", .stderr), section("its kernel's last lines", .console))]
    Ended {
        /// QEMU's exit status, in words.
        how: String,
        /// The end of its output.
        stderr: String,
        /// The end of its guest kernel's output.
        console: String,
    },
    /// The carrier's agent failed.
    #[error("the carrier is not responding")]
    Agent(#[from] AgentError),
    /// A step of its start took too long.
    #[error("the carrier did not {step} within {} seconds{}", .limit.as_secs(), section("its kernel's last lines", .console))]
    Timeout {
        /// The step.
        step: &'static str,
        /// The time limit.
        limit: Duration,
        /// The end of its kernel's output.
        console: String,
    },
    /// Its clock does not run at the speed of the host's.
    #[error("the carrier is not usable: {0}")]
    Clock(String),
    /// It booted, but lacks what it needs.
    #[error("the carrier is not usable: {0}")]
    Unusable(String),
    /// A directory cannot be made writable in it.
    #[error("cannot make {path} writable in the carrier")]
    Writable {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The command cannot be sent to the carrier.
    #[error("{0}")]
    Command(String),
    /// An operation on the host failed.
    #[error("{action}")]
    Host {
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl CarrierError {
    /// The error for a program that could not be started.
    fn missing(program: &'static str, package: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { program, package },
            _ => Self::Spawn { program, source },
        }
    }

    fn host(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }
}

fn section(title: &str, text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("\n{title}:\n{text}") }
}

/// How often a carrier is woken up.
const WAKE_INTERVAL: Duration = Duration::from_secs(2);

/// Sends a carrier meaningless messages until it is dropped. On a loaded host a carrier's processor occasionally misses
/// its timer interrupt, whose handler would have rearmed the timer. Without another interrupt it would sleep forever.
struct KeptAwake(AbortHandle);

impl KeptAwake {
    fn new(client: AgentClient) -> Self {
        let task = tokio::spawn(async move {
            loop {
                sleep(WAKE_INTERVAL).await;
                let _ = client.heartbeat(Duration::ZERO);
            }
        });
        Self(task.abort_handle())
    }
}

impl Drop for KeptAwake {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A running carrier, killed when dropped.
pub struct Carrier {
    client: AgentClient,
    qemu: Qemu,
    _awake: Option<KeptAwake>,
}

impl Carrier {
    /// Starts one from the kit [`KitName::Carrier`] and waits until it is usable: about four seconds. If it hangs or
    /// has a wrong clock, as on a busy host, it is started again.
    ///
    /// # Errors
    /// If QEMU is missing or fails, or the carrier does not work. Nothing of it is left then.
    pub async fn start(kit: &Kit, options: &Options) -> Result<Self, CarrierError> {
        let mut tries = 1;
        loop {
            match Self::start_once(kit, options).await {
                Err(error @ (CarrierError::Clock(_) | CarrierError::Timeout { .. }))
                    if tries < TRIES =>
                {
                    tracing::warn!("{}; starting it again", chain(&error));
                    tries += 1;
                }
                done => return done,
            }
        }
    }

    async fn start_once(kit: &Kit, options: &Options) -> Result<Self, CarrierError> {
        let writable = command::writable_roots(&options.writable)?;
        // A guest that boots from a store reads thousands of files, which takes ten times as long over 9p. Without a
        // usable kit there is no store to read.
        let kits = KitName::GUESTS.into_iter().filter_map(|kit| firn_kits::lookup(kit).ok()?);
        let stores = kits.filter_map(|kit| Some((kit.store_image()?, kit.store()?)));
        let stores: Vec<_> = stores.collect();
        let machine = Machine {
            kernel: kit.vmlinux(),
            initrd: kit.initrd(),
            cmdline: kit.manifest.cmdline.clone(),
            memory_mib: options.memory_mib.unwrap_or_else(default_memory_mib),
            cores: options.cores.unwrap_or(CORES),
            exact: options.exact,
            // The kernel's own measurement is wrong when the host is busy.
            tsc_khz: if options.exact { EXACT_KHZ } else { tsc::khz() },
            writable: writable
                .into_iter()
                .enumerate()
                .map(|(n, path)| (format!("w{n}"), path))
                .collect(),
            disks: stores.iter().map(|(image, _)| image.clone()).collect(),
        };
        let (qemu, port) = Qemu::start(&machine)?;
        let client = connect(&qemu, port).await?;
        // If the clock counts instructions, each measurement would differ.
        let awake = (!options.exact).then(|| KeptAwake::new(client.clone()));
        let carrier = Self { client, qemu, _awake: awake };
        let mount = async {
            for (tag, path) in &machine.writable {
                carrier.mount(MOUNT_WRITABLE, tag, path).await?;
            }
            for ((_, mount_point), letter) in stores.iter().zip('a'..) {
                carrier.mount(MOUNT_DISK, &letter.to_string(), mount_point).await?;
            }
            Ok(())
        };
        let compare_clocks = async {
            // If the clock counts instructions, its pace is arbitrary.
            let wrong = match options.exact {
                true => None,
                false => carrier.or_ended(clock::fault(&carrier.client)).await?,
            };
            wrong.map_or(Ok(()), |wrong| Err(CarrierError::Clock(wrong)))
        };
        tokio::try_join!(mount, compare_clocks)?;
        Ok(carrier)
    }

    /// Starts a command in it. Dropping the returned value kills a command that is still running.
    ///
    /// # Errors
    /// If the command cannot be sent, or the carrier is gone.
    pub async fn exec(&self, command: &HostCommand) -> Result<Exec, CarrierError> {
        let started = self.or_ended(self.client.exec(command.request()?));
        self.qemu.within("start a command", STEP_TIMEOUT, started).await
    }

    /// Waits until everything written in it has reached the host; then it can be dropped.
    ///
    /// # Errors
    /// If the carrier is gone already.
    pub async fn shutdown(&self) -> Result<(), CarrierError> {
        let synced = tokio::time::timeout(SYNC_TIMEOUT, self.or_ended(self.client.sync())).await;
        // A carrier too busy to answer is killed nevertheless.
        synced.unwrap_or(Ok(()))
    }

    /// Waits for `answer` of the agent; if the agent is lost because QEMU ended, reports that.
    async fn or_ended<T>(
        &self,
        answer: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, CarrierError> {
        match answer.await {
            Ok(value) => Ok(value),
            // QEMU closes the port only by ending, so its end is near.
            Err(AgentError::Lost(_)) => Err(self.qemu.ended().await),
            Err(error) => Err(error.into()),
        }
    }

    async fn mount(&self, script: &str, tag: &str, path: &Path) -> Result<(), CarrierError> {
        let failed = |message: String| CarrierError::Writable {
            path: path.to_owned(),
            source: io::Error::other(message),
        };
        let path = path.to_str().ok_or_else(|| failed("its name is not UTF-8".to_owned()))?;
        let mount = ExecRequest::argv(["/bin/sh", "-c", script, "sh", tag, path]);
        let done = self.or_ended(self.client.exec_collect(mount));
        let done = self.qemu.within("mount a directory", STEP_TIMEOUT, done).await?;
        match done.exit.success() {
            true => Ok(()),
            false => Err(failed(String::from_utf8_lossy(&done.stderr).trim().to_owned())),
        }
    }
}

/// Waits for the agent behind `port` while watching QEMU.
async fn connect(qemu: &Qemu, port: UnixStream) -> Result<AgentClient, CarrierError> {
    let booted = async {
        tokio::select! {
            // QEMU's end closes the port too, but says less.
            biased;
            error = qemu.ended() => Err(error),
            client = AgentClient::connect(port) => match client {
                Err(AgentError::Lost(_)) => Err(qemu.ended().await),
                client => Ok(client?),
            },
        }
    };
    let client = qemu.within("boot", BOOT_TIMEOUT, booted).await?;
    let ready = client.ready();
    for warning in &ready.warnings {
        tracing::warn!("carrier: {warning}");
    }
    if ready.boot.is_none_or(|exit| !exit.success()) {
        let console = section("its console's last lines", &qemu.console());
        return Err(CarrierError::Unusable(format!("its boot script failed{console}")));
    }
    Ok(client)
}

/// [`MEMORY_MIB`], or on smaller hosts three quarters of their memory.
fn default_memory_mib() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    host_memory_mib(&meminfo).map_or(MEMORY_MIB, |host| MEMORY_MIB.min(host / 4 * 3))
}

fn host_memory_mib(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_follows_the_host() {
        assert_eq!(host_memory_mib("MemTotal:       24576000 kB\nMemFree: 1 kB\n"), Some(24_000));
        assert_eq!(host_memory_mib("MemFree: 1 kB\n"), None);
        assert!((1..=MEMORY_MIB).contains(&default_memory_mib()));
    }

    #[test]
    fn errors_name_the_package() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        let error = CarrierError::missing("qemu-system-x86_64", "qemu-system-x86", source);
        assert_eq!(
            error.to_string(),
            "`qemu-system-x86_64` is not installed: install Debian's package qemu-system-x86"
        );
    }

    #[test]
    fn empty_sections_are_left_out() {
        let ended = |stderr: &str| CarrierError::Ended {
            how: "exit status: 1".into(),
            stderr: stderr.into(),
            console: String::new(),
        };
        assert_eq!(ended("").to_string(), "the carrier ended: QEMU's exit status: 1");
        assert_eq!(
            ended("no memory").to_string(),
            "the carrier ended: QEMU's exit status: 1\nQEMU said:\nno memory"
        );
    }
}
