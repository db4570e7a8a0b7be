//! `firn cache`.

use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Result;
use clap::Subcommand;
use firn::log::printable;
use firn::worlds::{Listed, Worlds};

/// Look at the booted worlds that are kept on disk, and remove them
///
/// `firn test --from-boot` keeps the machines of a test as they are after their boot, and the next run starts there.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without a command, this lists what is kept: the test's name, its machines, the space it takes, and
when it was made and used last.

A world is used only while everything that it depends on is the same: the machines' descriptions,
kernels, initrds, disks and shares, firn, and the host's processor. The script may change. The log
of a test says what has changed. Nothing breaks when worlds are removed: tests boot again, once.

They are in FIRN_WORLDS, by default $XDG_CACHE_HOME/firn/worlds (~/.cache/firn/worlds), and take
at most FIRN_WORLDS_MIB, by default 8192; those not used for the longest time go first.

Examples:
  firn test --from-boot my-test.toml   boots, keeps the world, and runs the script
  firn test --from-boot my-test.toml   starts from that world
  firn cache
  firn cache clear my-test")]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what is kept, the last used first
    List,
    /// Remove the worlds of these tests, or all
    Clear {
        /// Names of tests, as `firn cache` shows them
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let worlds = Worlds::of_user()?;
    match &args.command {
        None | Some(Command::List) => {
            print!("{}", table(&worlds.list()?, SystemTime::now()));
            println!("{}", summary(&worlds, &worlds.list()?));
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Clear { names }) => {
            let (gone, in_use) = worlds.clear(names)?;
            println!("removed {}", worlds_of(&gone));
            for world in &in_use {
                eprintln!("{} is in use, and stays", printable(&world.test));
            }
            Ok(if in_use.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

fn summary(worlds: &Worlds, all: &[Listed]) -> String {
    let limit = worlds.limit() >> 20;
    format!("{} in {}; at most {limit} MiB are kept", worlds_of(all), worlds.path().display())
}

fn worlds_of(all: &[Listed]) -> String {
    let size: u64 = all.iter().map(|world| world.size).sum();
    let noun = if all.len() == 1 { "world" } else { "worlds" };
    format!("{} {noun}, {}", all.len(), mib(size))
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// A line for each world, in columns.
fn table(all: &[Listed], now: SystemTime) -> String {
    if all.is_empty() {
        return String::new();
    }
    let head = ["TEST", "SIZE", "MADE", "USED", "MACHINES"].map(str::to_owned);
    let row = |world: &Listed| {
        let machines = printable(&world.machines.join(" "));
        let [made, used] = [world.made, world.used].map(|time| ago(time, now));
        [printable(&world.test), mib(world.size), made, used, machines]
    };
    let rows: Vec<[String; 5]> = [head].into_iter().chain(all.iter().map(row)).collect();
    let widths: [usize; 5] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
    });
    let line = |row: &[String; 5]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

fn ago(time: SystemTime, now: SystemTime) -> String {
    let seconds = now.duration_since(time).unwrap_or_default().as_secs();
    let units = [(24 * 3600, "day"), (3600, "hour"), (60, "minute")];
    match units.into_iter().find(|(unit, _)| seconds >= *unit) {
        None => "just now".to_owned(),
        Some((unit, name)) => {
            let count = seconds / unit;
            let plural = if count == 1 { "" } else { "s" };
            format!("{count} {name}{plural} ago")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_list_is_a_table() {
        let now = SystemTime::now();
        let world = |test: &str, size, age| Listed {
            id: "0123".to_owned(),
            test: test.to_owned(),
            machines: vec!["client".to_owned(), "server".to_owned()],
            size,
            made: now - Duration::from_secs(age),
            used: now - Duration::from_secs(age / 100),
        };
        let all = [world("ping", 150 << 20, 200_000), world("a long name", 1, 3600)];
        assert_eq!(
            table(&all, now),
            "TEST         SIZE     MADE        USED            MACHINES\n\
             ping         150 MiB  2 days ago  33 minutes ago  client server\n\
             a long name  1 MiB    1 hour ago  just now        client server\n"
        );
        assert_eq!(worlds_of(&all), "2 worlds, 151 MiB");
        assert_eq!(table(&[], now), "");
    }
}
