//! What guests do, by firn and by whatever other monitors are installed, by turns, in the same guest on the same host:
//! what counts are the ratios of one run. Each round of each way is a process of its own, which ends with all that it has
//! started if it fails or hangs. An exact carrier needs ways of firn only: QEMU hardly gets on there.

mod commands;
mod disk;
mod memory;
mod network;
mod running;
mod store;
mod switch;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use firn_bench::compare::Comparison;
use firn_bench::report::{Report, Summary};
use firn_bench::{Run, Sample, print_sample};

/// Measure what guests do, by firn and by other monitors, by turns
///
/// Results are milliseconds, of which the best of the rounds counts. If a way fails or hangs, the table says why, the
/// others are still measured, and the exit status is 1.
#[derive(Debug, Parser)]
struct Args {
    /// What to measure; by default all
    subjects: Vec<Name>,
    /// How many rounds
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// A round that takes more seconds hangs; by default what suits the subject
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u32>,
    /// Only ways whose names contain this; may be repeated
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Also write SUBJECT.json and a chart, SUBJECT.svg, to this directory; created if it is missing
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Say what has changed since this SUBJECT.json was written, or all in this directory; if something is worse by more
    /// than the noise, the exit status is 1
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Run one round of this way, and print what it took
    #[arg(long, hide = true, requires = "dir")]
    once: Option<String>,
    /// Where the subject's files are
    #[arg(long, hide = true)]
    dir: Option<PathBuf>,
    /// cargo says it to all benchmarks
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// A tree that nobody changes, shared with the guest
    Store,
    /// The user network
    Network,
    /// The network between guests
    Switch,
    /// A disk whose image is in the host's memory
    Disk,
    /// The guest's memory
    Memory,
    /// The first command of a test, and others
    Commands,
}

impl Name {
    fn subject(self) -> Box<dyn Subject> {
        match self {
            Self::Store => Box::new(store::Store),
            Self::Network => Box::new(network::Network),
            Self::Switch => Box::new(switch::Pairs),
            Self::Disk => Box::new(disk::Disk),
            Self::Memory => Box::new(memory::Memory),
            Self::Commands => Box::new(commands::Commands),
        }
    }
}

/// firn's way, or the first of them.
const FIRN: &str = "firn";

/// One of the ways to do what a subject measures.
#[derive(Clone, Debug)]
struct Way {
    name: String,
    /// Whether it is none of firn's.
    reference: bool,
}

impl Way {
    fn firn(name: &str) -> Self {
        Self { name: name.to_owned(), reference: false }
    }

    fn other(name: impl Into<String>) -> Self {
        Self { name: name.into(), reference: true }
    }
}

/// What can be measured in several ways.
trait Subject {
    /// In words, with what the columns are of.
    fn title(&self) -> String;

    /// The ways that there are on this host.
    fn ways(&self) -> Vec<Way>;

    /// Makes what all rounds use, in a directory in memory.
    fn prepare(&self, dir: &Path) -> Result<()>;

    /// One round of a way.
    fn round(&self, way: &str, dir: &Path) -> Result<Sample>;

    /// A round that takes longer hangs.
    fn limit(&self) -> Duration {
        Duration::from_secs(300)
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    run(&args).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<ExitCode> {
    if let (Some(way), Some(dir), [name]) = (&args.once, &args.dir, &*args.subjects) {
        let sample = name.subject().round(way, dir)?;
        if sample.is_empty() {
            bail!("the guest has done nothing");
        }
        print_sample(&sample)?;
        return Ok(ExitCode::SUCCESS);
    }
    let names = match args.subjects.is_empty() {
        true => Name::value_variants(),
        false => &args.subjects,
    };
    let mut good = true;
    for name in names {
        // What one cannot be measured for says so itself, and is no reason to give up the others.
        match measure(*name, args) {
            Ok(all_well) => good &= all_well,
            Err(error) => {
                eprintln!("{}: {error:#}", file_name(*name));
                good = false;
            }
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether all ways could be measured, and none has become worse.
fn measure(name: Name, args: &Args) -> Result<bool> {
    let subject = name.subject();
    let label = file_name(name);
    let earlier = args.against.as_deref().map(|at| Report::earlier(at, &label));
    let earlier = earlier.transpose()?.flatten();
    let dir = tempfile::tempdir_in("/dev/shm").context("cannot make a temporary directory")?;
    let mut ways = subject.ways();
    ways.retain(|way| args.only.is_empty() || args.only.iter().any(|text| way.name.contains(text)));
    eprintln!("{label}: getting ready");
    subject.prepare(dir.path())?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let once = |way: &Way| -> Vec<OsString> {
        let words: [OsString; 6] = [
            program.clone().into(),
            label.clone().into(),
            "--once".into(),
            way.name.clone().into(),
            "--dir".into(),
            dir.path().into(),
        ];
        words.into()
    };
    let subjects: Vec<_> = ways
        .iter()
        .map(|way| firn_bench::Subject {
            name: way.name.clone(),
            machines: 1,
            reference: way.reference,
            run: Run::Sample(once(way)),
        })
        .collect();
    let rounds = args.rounds.into();
    let limit = args.limit.map_or(subject.limit(), |seconds| Duration::from_secs(seconds.into()));
    let progress = |what: &str| eprintln!("{label}: {what}");
    let measured = firn_bench::measure(&subjects, rounds, limit, progress);
    let title = subject.title();
    let report = Report::new((&label, &title), Summary::Best, Vec::new(), rounds, &measured);
    println!("{}", report.table());
    if let Some(dir) = &args.output {
        report.write(dir)?;
    }
    let mut good = report.missing.is_empty();
    if let Some(earlier) = earlier {
        let compared = Comparison::new(&earlier, &report)
            .with_context(|| format!("the report of --against is of {}", earlier.subject))?;
        println!("{}", compared.text());
        good &= !compared.is_worse();
    }
    Ok(good)
}

fn file_name(name: Name) -> String {
    name.to_possible_value().expect("none is left out").get_name().to_owned()
}

/// Writes a file of a subject.
fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
    let file = dir.join(name);
    fs::write(&file, content).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(file)
}
