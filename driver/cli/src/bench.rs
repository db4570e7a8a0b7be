//! `firn bench`.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Subcommand, ValueEnum};
use firn::config::{ConfigError, MachineFile, TestConfig};
use firn::driver::{Driver, DriverOptions};
use firn::kit::{Kit, KitName};
use firn::machine::Machine;
use firn::private::{self, Place};
use firn_bench::compare::Comparison;
use firn_bench::monitor::Boot as HowToBoot;
use firn_bench::report::{Report, Unit};
use firn_bench::{Guest, OtherMonitor, Run, Stage, Stages, Subject, boot};
use firn_carrier::Options;
use firn_carrier::accel::{Accel, run_again};
use firn_vmm::device::boot_timer::{Mark, now_ns, stage};
use firn_vmm::spec::Number;
use futures_util::future::try_join_all;

use super::run::{options_here, runtime, test_of};

/// Measure firn's speed
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Boot(Boot),
    #[command(hide = true)]
    Once(Once),
}

/// Measure boots, from exec to exit of the process
///
/// A machine file, or a start script for QEMU, is booted until it ends; a test file until all its machines take commands and have powered off.
/// Without files, two guests are booted: the micro kit's kernel with an initrd that prints a line and restarts the
/// machine, and the micro kit as tests have it, with a console, two network cards, two shares and an entropy source.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Where KVM does not work, or with --exact, boots run in a carrier whose clock counts executed instructions. Figures
are instructions then, and repeat to half a per cent. Otherwise, and with --machines, they are milliseconds.

Columns: the time from exec until the first vCPU entered the guest, the kernel used a device, the guest's first program
ran, the agent was ready, and the process exited; processor time of guest and monitor (user) and of the host's kernel
((sys); both; the monitor's resident memory without the guest's (for firn, with a console, an entropy source, a network
card and a share); and the spread of the totals.

If a monitor fails or hangs, the table says why, the others are still measured, and the exit status is 1. It is that,
too, if a figure is worse than in the report of --against by more than the noise: the larger spread of the two, and at
least half a per cent of instructions, a twentieth of a time, a tenth of what was measured once, as memory is. Times
are measured by those of other monitors that both reports have, as the host may be slower than it was.

Examples:
  firn bench boot
  firn bench boot --compare qemu-q35,qemu-microvm --output results
  firn bench boot --against results/boot.json
  firn bench boot --machines 2,4,8 --compare qemu-microvm
  firn bench boot --runs 9 my-machine two-machines.toml")]
struct Boot {
    /// Machine files, start scripts and test files
    files: Vec<PathBuf>,
    /// How many times to boot each
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// Also boot each machine file, or the reference guest, this many times at once; firn does so in one process; not
    /// exact
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', conflicts_with = "exact", value_parser = clap::value_parser!(u8).range(2..=64))]
    machines: Vec<u8>,
    /// Other monitors that boot the first machine file's kernel, initrd and command line, if they are installed
    #[arg(long, value_enum, value_delimiter = ',', value_name = "MONITORS")]
    compare: Vec<OtherMonitor>,
    /// Output format
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Also write boot.json and a chart, boot.svg, to this directory, with --machines machines.json and machines.svg;
    /// created if it is missing
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Say what has changed since this boot.json or machines.json was written, or the one in this directory
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Count instructions in a carrier even where KVM works
    #[arg(long)]
    exact: bool,
    /// Set when already in a carrier that counts instructions
    #[arg(long, hide = true)]
    counted: bool,
}

impl Boot {
    /// What it measures, which names files.
    fn subject(&self) -> &'static str {
        boot::subject(!self.machines.is_empty())
    }

    /// When a boot hangs: machines at once have one processor in a carrier.
    fn limit(&self) -> Duration {
        let most = self.machines.iter().copied().max().unwrap_or(1);
        match self.counted {
            true => firn_bench::LIMIT_COUNTED,
            false => firn_bench::LIMIT * u32::from(most.div_ceil(4)),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Format {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
}

/// One boot, in its own process.
#[derive(Debug, clap::Args)]
struct Once {
    file: PathBuf,
    /// How many machines to boot from a machine file
    #[arg(long, default_value = "1")]
    machines: u8,
    /// The micro kit's directory
    #[arg(long)]
    kit: PathBuf,
    /// File for the times at which stages were reached
    #[arg(long)]
    marks: PathBuf,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    match &args.command {
        Command::Boot(args) => boot(args),
        Command::Once(args) => once(args),
    }
}

fn boot(args: &Boot) -> Result<ExitCode> {
    let earlier = args.against.as_deref().map(|at| Report::earlier(at, args.subject()));
    let earlier = earlier.transpose()?.flatten();
    let accel = if args.exact { Accel::Carrier } else { Accel::Auto };
    if args.counted || accel.runs_here()? {
        return here(args, earlier.as_ref());
    }
    // What is wrong with a file is said before anything is built or booted.
    let read = args.files.iter().map(|file| Machines::read(file)?.into_test(1));
    let tests = read.collect::<Result<Vec<_>, _>>()?;
    // In a carrier no kit can be built.
    let kits = tests.iter().flat_map(Driver::kits_needed).chain([KitName::Micro]);
    for kit in kits.collect::<BTreeSet<_>>() {
        firn_kits::build(kit, &|line| eprintln!("{line}"))?;
    }
    // In a carrier that counts instructions, QEMU delivers some interrupts twice (tests/bench/README.md says why), which
    // machines that run at once do not survive.
    let exact = args.machines.is_empty();
    match exact {
        true => {
            eprintln!("counting instructions in a carrier, which takes about twenty times as long")
        }
        false => eprintln!("measuring times in a carrier"),
    }
    if let Some(dir) = &args.output {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command: Vec<OsString> = vec!["env".into(), "TMPDIR=/tmp".into(), program.into()];
    command.extend(["bench", "boot"].map(Into::into));
    command.extend(exact.then(|| "--counted".into()));
    // As this process was called: `firn bench boot` and what is behind it.
    command.extend(std::env::args_os().skip(3));
    let writable = args.output.iter().cloned().collect();
    let options = Options { exact, writable, ..Options::default() };
    Ok(run_again(&options, command)?.into())
}

/// The contents of a file to boot.
enum Machines {
    One(Box<MachineFile>),
    Test(Box<TestConfig>),
}

impl Machines {
    fn read(file: &Path) -> Result<Self, ConfigError> {
        match file.extension().is_some_and(|extension| extension == "toml") {
            true => TestConfig::from_toml_file(file).map(|test| Self::Test(Box::new(test))),
            false => MachineFile::read(file).map(|file| Self::One(Box::new(file))),
        }
    }

    /// As a test; several machines made from a machine file differ in name only.
    fn into_test(self, machines: u8) -> Result<TestConfig, ConfigError> {
        let file = match self {
            Self::One(file) if machines > 1 => file,
            Self::One(file) => {
                let more_vlans = vlans_of(&file);
                return Ok(TestConfig { more_vlans, ..test_of(*file) });
            }
            Self::Test(test) => return Ok(*test),
        };
        let numbered = |number| {
            let mut copy = (*file).clone();
            copy.rename(&format!("{}{number}", file.name())).map(|()| copy)
        };
        let files = (1..=machines).map(numbered).collect::<Result<_, _>>()?;
        Ok(TestConfig { files, more_vlans: vlans_of(&file), ..test_of(*file) })
    }

    /// What boots them.
    fn monitor(&self) -> &'static str {
        match self {
            Self::One(file) if file.command().is_some() => "qemu",
            _ => "firn",
        }
    }
}

/// The vlans that a start script plugs QEMU into: nothing but the script says which.
fn vlans_of(file: &MachineFile) -> Vec<Number> {
    let script = match file.command() {
        Some(_) => fs::read(file.path()).unwrap_or_default(),
        None => Vec::new(),
    };
    let script = String::from_utf8_lossy(&script);
    let numbers = script.split(firn::vlan::SOCKET_VARIABLE).skip(1).filter_map(|behind| {
        let end = behind.find(|char: char| !char.is_ascii_digit()).unwrap_or(behind.len());
        Number::try_from(behind[..end].parse::<u64>().ok()?).ok()
    });
    numbers.collect::<BTreeSet<_>>().into_iter().collect()
}

fn here(args: &Boot, earlier: Option<&Report>) -> Result<ExitCode> {
    let kit = firn_kits::build(KitName::Micro, &|line| eprintln!("{line}"))?;
    let dir = Place::open(&std::env::temp_dir())
        .and_then(|place| private::temporary(&place, "firn-bench-"))
        .context("cannot make a temporary directory")?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let manifest = kit.dir.join("manifest.json");
    let parts = [kit.vmlinux(), kit.kernel(), kit.initrd(), kit.image_drivers(), manifest];
    let files = parts.iter().chain([&program]);
    firn_bench::bring(files.map(PathBuf::as_path), dir.path())?;
    let kit = Kit { dir: dir.path().to_owned(), ..kit };
    let program = dir.path().join(program.file_name().context("this program has no name")?);
    let (machines, dir) = (args.machines.clone(), dir.path());
    let mut plan = Plan { subjects: Vec::new(), guest: None, program, machines, dir };
    match args.files.is_empty() {
        true => plan.add_defaults(&kit)?,
        false => args.files.iter().try_for_each(|file| plan.add_file(file))?,
    }
    plan.add_monitors(&args.compare)?;
    let measured = firn_bench::measure(&plan.subjects, args.runs.into(), args.limit(), |what| {
        if io::stderr().is_terminal() {
            eprint!("\r\x1b[K{what}");
        } else {
            eprintln!("{what}");
        }
    });
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
    let unit = if args.counted { Unit::Instructions } else { Unit::Nanoseconds };
    let report = boot::report(unit, args.runs.into(), &measured);
    let compared = earlier.map(|earlier| compare(earlier, &report)).transpose()?;
    show(args, &report, compared.as_ref())?;
    let good = report.missing.is_empty() && !compared.is_some_and(|compared| compared.is_worse());
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compare(earlier: &Report, report: &Report) -> Result<Comparison> {
    Comparison::new(earlier, report).with_context(|| {
        let [then, now] = [earlier, report]
            .map(|report| format!("{}, in {}", report.subject, report.unit().shown()));
        format!("the report of --against is of {then}, and this one of {now}")
    })
}

fn show(args: &Boot, report: &Report, compared: Option<&Comparison>) -> Result<()> {
    let text = match (args.format, compared) {
        (Format::Table, None) => report.table(),
        (Format::Table, Some(compared)) => format!("{}\n{}", report.table(), compared.text()),
        (Format::Json, None) => report.json().context("cannot write JSON")?,
        (Format::Json, Some(compared)) => {
            let mut all = serde_json::to_value(report).context("cannot write JSON")?;
            all["comparison"] = serde_json::to_value(compared).context("cannot write JSON")?;
            format!("{all:#}\n")
        }
    };
    io::stdout().write_all(text.as_bytes()).context("cannot write the report")?;
    args.output.as_deref().map_or(Ok(()), |dir| Ok(report.write(dir)?))
}

/// What to measure.
struct Plan<'a> {
    subjects: Vec<Subject>,
    /// What the other monitors boot.
    guest: Option<Guest>,
    /// A copy of this program.
    program: PathBuf,
    /// How many machines to boot at once, in addition to one.
    machines: Vec<u8>,
    /// Directory for the files this needs; the micro kit is in it too.
    dir: &'a Path,
}

impl Plan<'_> {
    fn add_defaults(&mut self, kit: &Kit) -> Result<()> {
        let guest = Guest::reference(kit, self.dir)?;
        let file = self.write("reference", &guest.machine_file(None))?;
        // What devices cost is part of the monitor's memory.
        let lingering = guest.lingering().machine_file(Some(self.dir));
        let lingering = self.write("lingering", &lingering)?;
        let command = self.once(&file, "reference", 1);
        let boot = HowToBoot {
            lingering: Some(self.once(&lingering, "lingering", 1).0),
            ..how(command, guest.memory_mib)
        };
        self.push("firn".to_owned(), 1, false, boot);
        self.guest = Some(guest);
        self.add_several("firn", &file);
        let kit = "name = 'boot'\ntest_script = ''\n[nodes.machine]\n";
        let file = self.write("kit.toml", kit)?;
        self.add("firn: the micro kit".to_owned(), &file);
        Ok(())
    }

    fn add_file(&mut self, file: &Path) -> Result<()> {
        let read = Machines::read(file)?;
        if let (Machines::One(machine), None) = (&read, &self.guest) {
            self.guest = Guest::of(&machine.outline(1)?);
        }
        let name = format!("{}: {}", read.monitor(), file.display());
        self.add(name.clone(), file);
        if matches!(read, Machines::One(_)) {
            self.add_several(&name, file);
        }
        Ok(())
    }

    fn add(&mut self, name: String, file: &Path) {
        let command = self.once(file, &self.subjects.len().to_string(), 1);
        self.push(name, 1, false, how(command, 0));
    }

    /// Adds several machines like the last one.
    fn add_several(&mut self, name: &str, file: &Path) {
        for machines in self.machines.clone() {
            let command = self.once(file, &self.subjects.len().to_string(), machines);
            self.push(format!("{name}: {machines} at once"), machines, false, how(command, 0));
        }
    }

    fn add_monitors(&mut self, monitors: &[OtherMonitor]) -> Result<()> {
        let Some(guest) = self.guest.clone() else {
            if monitors.is_empty() {
                return Ok(());
            }
            bail!("--compare needs a machine file with one initrd, or no files at all");
        };
        for monitor in monitors {
            let name = monitor.as_str();
            let Some(program) = monitor.find() else {
                eprintln!("{name} is not installed: left out");
                continue;
            };
            // Its libraries come slowly to a carrier, where a clock that counts instructions leaps on meanwhile.
            let _ = process::Command::new(&program).arg("--version").output();
            let boot = |machines| monitor.boot(&program, &guest, machines, self.dir);
            let boots = std::iter::once(1).chain(self.machines.iter().copied());
            let boots: Vec<_> =
                boots.map(|machines| Ok((machines, boot(machines)?))).collect::<Result<_>>()?;
            for (machines, boot) in boots {
                let name = match machines {
                    1 => name.to_owned(),
                    _ => format!("{name}: {machines} at once"),
                };
                self.push(name, machines, true, boot);
            }
        }
        Ok(())
    }

    fn push(&mut self, name: String, machines: u8, reference: bool, boot: HowToBoot) {
        self.subjects.push(Subject { name, machines, reference, run: Run::Boot(boot) });
    }

    /// The command that boots a file once, and the file its marks go to.
    fn once(&self, file: &Path, name: &str, machines: u8) -> (Vec<OsString>, PathBuf) {
        let marks = self.dir.join(format!("{name}.marks"));
        let mut command: Vec<OsString> = vec![self.program.clone().into()];
        command.extend(["bench", "once"].map(Into::into));
        command.extend(["--kit".into(), self.dir.into(), "--marks".into(), marks.clone().into()]);
        command.extend(["--machines".into(), machines.to_string().into()]);
        command.extend(["--".into(), file.into()]);
        (command, marks)
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let file = self.dir.join(name);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }
}

fn how((command, marks): (Vec<OsString>, PathBuf), memory_mib: u64) -> HowToBoot {
    HowToBoot { command, lingering: None, marks: Some(marks), memory_mib }
}

/// Boots the machines of a file.
fn once(args: &Once) -> Result<ExitCode> {
    let read = Machines::read(&args.file)?;
    let until_ready = matches!(read, Machines::Test(_));
    let test = read.into_test(args.machines)?;
    let kits = Driver::kits_needed(&test).into_iter().map(|name| match name {
        KitName::Micro => Ok(Kit::open(args.kit.clone())?),
        other => firn_kits::build(other, &|line| eprintln!("{line}")),
    });
    let options = DriverOptions { kits: kits.collect::<Result<_, _>>()?, ..options_here()? };
    let stages = runtime()?.block_on(async {
        let driver = Driver::new(&test, options)?;
        let outcome = match until_ready {
            true => until_connected(&driver).await,
            false => until_ended(&driver).await,
        };
        driver.close().await;
        outcome
    })?;
    let json = serde_json::to_vec(&stages).context("cannot write JSON")?;
    fs::write(&args.marks, json)
        .with_context(|| format!("cannot write {}", args.marks.display()))?;
    Ok(ExitCode::SUCCESS)
}

async fn until_connected(driver: &Driver) -> Result<Stages> {
    driver.start_all().await?;
    for machine in driver.machines() {
        machine.connect().await?;
    }
    let ready = now_ns();
    for machine in driver.machines() {
        machine.shutdown().await?;
    }
    let mut stages = driver.machines().first().map(marks).unwrap_or_default();
    // Not every guest can mark that itself.
    stages.entry(Stage::Ready).or_insert(ready);
    Ok(stages)
}

/// Boots all machines at once. The stages reported are the first machine's.
async fn until_ended(driver: &Driver) -> Result<Stages> {
    try_join_all(driver.machines().iter().map(until_one_ended)).await?;
    Ok(driver.machines().first().map(marks).unwrap_or_default())
}

async fn until_one_ended(machine: &Machine) -> Result<()> {
    let tap = machine.tap_console();
    // A guest that restarts has done its work.
    machine.start(false).await?;
    let ended = machine.wait_for_shutdown();
    let mut ended = std::pin::pin!(ended);
    loop {
        tokio::select! {
            biased;
            bytes = tap.next() => io::stdout().write_all(&bytes).and_then(|()| io::stdout().flush())?,
            ended = &mut ended => {
                return Ok(ended?);
            }
        }
    }
}

/// The stages of a machine's latest boot.
fn marks(machine: &Machine) -> Stages {
    let stage = |mark: &Mark| match mark.code {
        stage::RUN => Some((Stage::Run, mark.at_ns)),
        stage::KERNEL => Some((Stage::Kernel, mark.at_ns)),
        stage::INIT => Some((Stage::Init, mark.at_ns)),
        stage::READY => Some((Stage::Ready, mark.at_ns)),
        _ => None,
    };
    machine.boot_marks().iter().filter_map(stage).collect()
}
